"""Picture files that are made up of bytes."""

import struct
import zlib

import cv2
import numpy as np


def claims(height: int, width: int, kind: str = "png") -> bytes:
    """A file of some bytes whose header says that the picture is that large; there are no pixels in it."""
    if kind == "png":
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"")
    data = cv2.imencode(f".{kind}", np.zeros((8, 16, 3), np.uint8))[1].tobytes()
    small, large = {
        "jpg": (struct.pack(">HH", 8, 16), struct.pack(">HH", height, width)),
        "bmp": (struct.pack("<ii", 16, 8), struct.pack("<ii", width, height)),
    }[kind]
    at = data.index(b"\xff\xc0") + 5 if kind == "jpg" else 18
    assert data[at : at + len(small)] == small
    return data[:at] + large + data[at + len(small) :]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
