"""The size of a picture by its header, and the largest that is decoded: a file of some kB may ask for gigabytes.

Imports neither TensorFlow nor JAX.
"""

import contextlib
import io
import os
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from vivi_jax.errors import DataError

MAX_PIXELS = 64 * 10**6  # 8000 x 8000; decoded it is 192 MB in each thread
Name = str | os.PathLike[str]


class TooLarge(DataError):
    """A picture of more pixels than are decoded."""


def check(height: int, width: int, name: Name, max_pixels: int = MAX_PIXELS) -> None:
    """Raises TooLarge if a picture has more pixels than are decoded."""
    if height * width > max_pixels:
        raise TooLarge(
            f"{name} is {width} x {height} pixels, more than the {max_pixels / 1e6:g} million that are decoded: make "
            "it smaller, or take it out"
        )


def of(data: bytes, name: Name, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) in pixels as stored, of an encoded picture; nothing is decoded.

    Raises:
      TooLarge: it has more pixels than are decoded.
      ValueError: no picture, or a damaged header.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        check(height, width, name, max_pixels)
        return height, width
    try:
        with opened(io.BytesIO(data), name, max_pixels) as image:
            return image.height, image.width
    except (OSError, SyntaxError, struct.error) as error:  # Pillow's readers raise what the damage leads to
        raise ValueError(f"no image that can be read ({error})") from None


@contextlib.contextmanager
def opened(source: Name | io.BytesIO, name: Name = "", max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Pillow's Image.open of a file, for those that it would be safe to decode.

    Args:
      name: what to call it in a message; "": as the source.

    Raises:
      TooLarge: it has more pixels than are decoded.
    """
    name = name or (str(source) if not isinstance(source, io.BytesIO) else "the image")
    try:
        image = Image.open(source)
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours
        raise TooLarge(
            f"{name} is larger than the {max_pixels / 1e6:g} million pixels that are decoded ({error})"
        ) from None
    with image:
        check(image.height, image.width, name, max_pixels)
        yield image


def tiff_without_opacity(data: bytes) -> np.ndarray | None:
    """The colours of a TIFF file with opacity, as stored: uint8[height, width, 3], RGB; None: it is no such file.

    OpenCV multiplies them by the opacity, of this format alone.

    Raises:
      TooLarge: it has more pixels than are decoded.
      ValueError: the data do not decode.
    """
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    try:
        with opened(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB")) if image.mode == "RGBA" else None
    except (OSError, SyntaxError, struct.error) as error:
        raise ValueError(f"no image that can be read ({error})") from None
