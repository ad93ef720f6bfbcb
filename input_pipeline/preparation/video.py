"""Decoding one video file to JPEG frames on a constant grid. Runs inside the limits of `sandbox`, never outside.

decode_file -> film.inspect (packets only) -> film.pictures (decoder) -> shots.Distances (a thumbnail of each)
                                                                      -> _on_grid (times) -> pixels.to_bgr -> JPEG
"""

import itertools
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from input_pipeline.preparation import film, pixels, shots
from input_pipeline.preparation.film import Info, Refused

THUMBNAIL_SIDE = 64  # pixels of the short side of what is searched for cuts


def decode_file(
    video: str,
    frame_file: str,
    *,
    fps: float,
    short_side: int,
    jpeg_quality: int,
    shot_rule: str,
    untagged_matrix: str = "bt601",
    max_frames: int | None = None,
    max_bytes: int | None = None,
) -> dict:
    """Decodes a whole file to JPEG frames on a constant grid; memory does not depend on its length.

    Frame k is the picture on display k / rate seconds after the first one, rate = min(fps, native average rate): the
    rate is never raised. Where a video of variable rate pauses, the average is that of the moving rest, and the pause
    is as many equal frames. A file of one picture is one frame. `film` has the rules for rates, for files with several
    streams of pictures, and for recordings put end to end, which are shown one after the other.

    The short side becomes `short_side` pixels, the aspect ratio (pixels made square) is kept, and nothing is enlarged:
    a smaller video keeps its size. Rotation and mirror tags are applied. Not treated: interlacing, HDR tone mapping,
    and a picture size that changes midway (all are scaled to the size of the first).

    Args:
      video: path of a local file.
      frame_file: path of the file to write, the JPEG frames one after the other.
      shot_rule: see shots.find_shots. Cuts are looked for among all pictures, also those that no frame shows.
      untagged_matrix: a name in pixels.MATRICES, for video that does not say which matrix its colours have.
      max_frames, max_bytes: of the frame file; a file that would have more is refused. A pause is as many equal frames,
        so a small file can be made to ask for any number of them. None: no limit.

    Returns:
      {"frames": int, "fps": float, "height": int, "width": int, "shot_starts": list of int,
       "jpeg_bytes": list of int, the length of each frame in the frame file; "jpeg_crc32": list of int, its CRC-32,
       "notes": list of str, what is unusual about the file, as `kind: detail`}

    Raises:
      Refused: the file is not a usable video.
      OSError: the frame file cannot be written.
      MemoryError: the file needs more memory than there is.
    """
    info = film.inspect(video, fps)
    notes = list(info.notes)
    # Kept: setting one up costs as much as scaling a picture.
    scaler, thumbnails = VideoReformatter(), VideoReformatter()
    lengths, checksums, shown, size_so_far = [], [], [], 0
    distances = shots.Distances()
    transitions = shots.Transitions(float(info.usual_rate)) if shot_rule == "auto" else None

    def watched() -> Iterator[tuple[Fraction, Fraction, tuple[int, Any]]]:
        for number, (time, duration, frame) in enumerate(film.pictures(video, info)):
            thumbnail_size = pixels.size_on_display(frame, Fraction(1), THUMBNAIL_SIDE)
            thumbnail_HxWx3 = pixels.to_bgr(frame, thumbnails, thumbnail_size, (False, 0), untagged_matrix)
            histogram_64 = distances.add(thumbnail_HxWx3)
            if transitions is not None:
                transitions.add(thumbnail_HxWx3, histogram_64)
            yield time, duration, (number, frame)

    pathlib.Path(frame_file).unlink(
        missing_ok=True
    )  # a decoder that still writes to the old file must not reach the new one
    with open(frame_file, "wb") as out:
        for number, frame in _on_grid(watched(), info):
            if not shown:
                size = pixels.size_on_display(frame, info.pixel_aspect, short_side)
                orientation = pixels.orientation(frame)
                if pixels.is_untagged(frame) and pixels.is_high_definition(frame):
                    matrix = untagged_matrix.replace("bt", "BT.")
                    notes.append(f"untagged colours: {frame.width} x {frame.height}, read as {matrix}")
            if number not in shown[-1:]:  # else it is still on display: the same JPEG again
                picture_HxWx3 = pixels.to_bgr(frame, scaler, size, orientation, untagged_matrix)
                jpeg = cv2.imencode(".jpg", picture_HxWx3, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])[1].tobytes()
                checksum = zlib.crc32(jpeg)
            size_so_far += len(jpeg)
            if max_frames is not None and len(lengths) == max_frames:
                raise Refused(f"too many frames: more than {max_frames:,} (--max_frames)")
            if max_bytes is not None and size_so_far > max_bytes:
                raise Refused(f"too large when decoded: more than {max_bytes:,} bytes (--max_expansion, --max_mb)")
            out.write(jpeg)
            lengths.append(len(jpeg))
            checksums.append(checksum)
            shown.append(number)
        out.flush()
        os.fsync(out.fileno())
    starts_S = shots.find_shots(distances.so_far(), float(info.usual_rate), rule=shot_rule)
    if transitions is not None:
        starts_S = np.append(0, transitions.boundaries(starts_S[1:]))
    starts_s = shots.on_grid(starts_S, np.array(shown))
    height, width = picture_HxWx3.shape[:2]
    return {
        "frames": len(lengths),
        "fps": float(info.rate),
        "height": height,
        "width": width,
        "shot_starts": starts_s.tolist(),
        "jpeg_bytes": lengths,
        "jpeg_crc32": checksums,
        "notes": notes,
    }


def decode_head(video: str, frame_file: str, *, frames: int, short_side: int, image_size: int) -> dict:
    """Decodes the first pictures of a file, at its own rate, as an image classifier takes them.

    The short side becomes `short_side` pixels, also where that enlarges, and of the result the central square is kept.

    Args:
      video: path of a local file.
      frame_file: path of the file to write, uint8[frames, image_size, image_size, 3] RGB as it is.
      frames: at most so many; a shorter video has fewer.

    Returns:
      {"frames": int, "seconds": float, the length of the whole video}

    Raises:
      as decode_file; what is behind the first pictures is not decoded, and damage to it may go unnoticed.
    """
    info = film.inspect(video, fps=1.0)
    scaler, written = VideoReformatter(), 0
    with open(frame_file, "wb") as out:
        for _, _, frame in itertools.islice(film.pictures(video, info), frames):
            if not written:
                size = pixels.size_on_display(frame, info.pixel_aspect, short_side, enlarge=True)
                orientation = pixels.orientation(frame)
            picture_HxWx3 = pixels.to_bgr(frame, scaler, size, orientation, untagged_matrix="bt601")
            top, left = ((side - image_size) // 2 for side in picture_HxWx3.shape[:2])
            square = picture_HxWx3[top : top + image_size, left : left + image_size, ::-1]
            out.write(square.tobytes())
            written += 1
    return {"frames": written, "seconds": float(info.count / info.native_rate)}


def _on_grid(pictures: Iterable[tuple[Fraction, Fraction, Any]], info: Info) -> Iterator[Any]:
    """For k = 0, 1, ...: the picture on display k / rate seconds after the first one, until the last one ends."""
    step = 1 / info.rate
    # Time stamps are rounded to ticks: without slack, a grid of the native rate would repeat and drop pictures. Ticks
    # above 2 ms are whole frames, and exact.
    slack = min(info.tick, Fraction(2, 1000), step / 4)
    shown, start, due, end = None, Fraction(0), Fraction(0), Fraction(0)
    for time, duration, picture in pictures:
        if shown is None:
            start = due = time
        while shown is not None and due < time - slack:
            yield shown
            due += step
        shown, end = picture, time + duration
    # However short it is shown, a file has one frame.
    while shown is not None and (due < end - slack or due == start):
        yield shown
        due += step
