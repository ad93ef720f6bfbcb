"""Masks as indexed PNGs show them: the colours of PASCAL VOC, which DAVIS uses too."""

import numpy as np


def palette() -> np.ndarray:
    """uint8[256, 3], number -> colour: the bits of the number dealt out to red, green and blue."""
    numbers = np.arange(256)
    bits = (numbers[:, None] >> np.arange(8)) & 1  # [256, 8], lowest first
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):  # bit 0 is red's highest, 1 green's, 2 blue's, 3 red's second highest, ...
        colours[:, bit % 3] |= (bits[:, bit] << (7 - bit // 3)).astype(np.uint8)
    return colours
