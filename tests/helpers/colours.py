"""From luma and chroma to red, green and blue in float64, without FFmpeg's conversion: an oracle for tests."""

import cv2
import numpy as np

RED_BLUE_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}  # ITU-R BT.601-7, BT.709-6


def _to_rgb(yuv, red_weight, blue_weight, full_range=False):
    luma, blue, red = np.moveaxis(np.asarray(yuv, float), -1, 0)
    if full_range:
        luma, blue, red = luma / 255, (blue - 128) / 255, (red - 128) / 255
    else:
        luma, blue, red = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    r = luma + 2 * (1 - red_weight) * red
    b = luma + 2 * (1 - blue_weight) * blue
    g = (luma - red_weight * r - blue_weight * b) / (1 - red_weight - blue_weight)
    return (255 * np.stack([r, g, b], axis=-1)).clip(0, 255)


MATRIX = {
    name: lambda yuv, full_range=False, weights=weights: _to_rgb(yuv, *weights, full_range)
    for name, weights in RED_BLUE_WEIGHTS.items()
}


def exact_rgb(frame, size, matrix):
    """float[H, W, 3] of a picture of planar 8 bit YCbCr, averaged over areas to `size` (width, height)."""
    planes = []
    for plane in frame.planes:
        stored = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        full = cv2.resize(stored.astype(np.float32), (frame.width, frame.height), interpolation=cv2.INTER_LINEAR)
        planes.append(cv2.resize(full, size, interpolation=cv2.INTER_AREA))
    return MATRIX[matrix](np.stack(planes, axis=-1), frame.format.name.startswith("yuvj") or frame.color_range == 2)
