"""From a decoded picture to pixels: its colours, its size on display, and which way it is turned."""

import math
from typing import Any

import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from input_pipeline.preparation.film import check_size, errors_refuse

MATRICES = {"bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709}
UNSPECIFIED = 2  # of ITU-T H.273, table 4: matrix coefficients
# Without accurate rounding and chroma of full width, swscale's pictures are 1 to 3 grey levels dark.
SCALING = Interpolation.AREA | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


def size_on_display(frame: Any, pixel_aspect: Any, short_side: int, *, enlarge: bool = False) -> tuple[int, int]:
    """(width, height) to scale to, before the orientation is applied."""
    width, height = frame.width * pixel_aspect, frame.height
    scale = short_side / min(width, height)
    if not enlarge:
        scale = min(1, scale)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    check_size(*size)
    return size


def orientation(frame: Any) -> tuple[bool, int]:
    """(mirror left to right, then quarter turns clockwise) that the file asks for.

    The display matrix sends a point (x, y), y down, to (a x + c y, b x + d y). PyAV's `frame.rotation` alone would turn
    a mirrored video upside down. Angles between quarter turns go to the nearest.
    """
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, 0
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    mirror = a * d - b * c < 0
    angle = math.atan2(-b, -a) if mirror else math.atan2(b, a)
    return mirror, round(angle / (math.pi / 2)) % 4


def is_untagged(frame: Any) -> bool:
    """Whether it has luma and chroma, and nothing says which matrix makes them red, green and blue."""
    return frame.colorspace == UNSPECIFIED and any(component.is_chroma for component in frame.format.components)


def is_high_definition(frame: Any) -> bool:
    """Whether it has more lines or columns than BT.601, of 576 lines, is meant for; such video is BT.709 as a rule."""
    return frame.width >= 1280 or frame.height > 576


def to_bgr(
    frame: Any, scaler: VideoReformatter, size: tuple[int, int], turned: tuple[bool, int], untagged_matrix: str
) -> np.ndarray:
    """uint8[H, W, 3] in OpenCV's channel order, scaled and turned."""
    width, height = size
    mirror, turns = turned
    matrix = MATRICES[untagged_matrix] if is_untagged(frame) else None  # None: as it is tagged
    with errors_refuse("unknown pixel format"):
        picture = scaler.reformat(
            frame, width, height, "bgr24", src_colorspace=matrix, interpolation=SCALING, threads=1
        ).to_ndarray()
    if mirror:
        picture = picture[:, ::-1]
    return np.ascontiguousarray(np.rot90(picture, -turns))
