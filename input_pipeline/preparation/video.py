"""Decoding one video file to JPEG frames on a constant grid. Runs inside the limits of `sandbox`, never outside.

    decode_file -> _inspect (packets only) -> _pictures (decoder) -> shots.Distances (a thumbnail of each)
                                                                  -> _on_grid (times) -> scale, turn, JPEG

A file is used whole or refused with a reason: one that breaks off in the middle is not half kept. Headers may
claim absurd values; sizes, rates and durations are checked against what the file holds.
"""

import contextlib
import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.error
import av.stream
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from input_pipeline.preparation import shots

# FFmpeg opens far more than videos: pictures, subtitles, and playlists (hls, concat) that open further files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,ivf,h264,hevc,obu,m4v,nut,dv"
)
MAX_PIXELS = 2**25  # per picture; 8K (7680 x 4320) is just below
MAX_SIDE = 2**15
THUMBNAIL_SIDE = 64  # pixels of the short side of what is searched for cuts
MIN_RATE, MAX_RATE = Fraction(1, 10), Fraction(1000)  # pictures per second that a video can credibly have


class Refused(Exception):
    """The file is not used; the message says why, as `kind: detail`."""


class Info(NamedTuple):
    rate: Fraction  # of the output grid, frames/s
    native_rate: Fraction  # average, pictures/s
    tick: Fraction  # resolution of the time stamps, s
    pixel_aspect: Fraction  # width / height of a pixel on display
    count: int  # pictures


def decode_file(video: str, frame_file: str, *, fps: float, short_side: int, jpeg_quality: int, shot_rule: str) -> dict:
    """Decodes a whole file to JPEG frames on a constant grid; memory does not depend on its length.

    Frame k is the picture on display k / rate seconds after the first one, rate = min(fps, native average rate): the
    rate is never raised. The short side becomes `short_side` pixels, the aspect ratio (pixels made square) is kept,
    and nothing is enlarged: a smaller video keeps its size. Rotation and mirror tags are applied. Not treated:
    interlacing, HDR tone mapping, and a picture size that changes midway (all are scaled to the size of the first).

    Args:
      video: path of a local file.
      frame_file: path of the file to write, the JPEG frames one after the other.
      shot_rule: see shots.find_shots. Cuts are looked for among all pictures, also those that no frame shows.

    Returns:
      {"frames": int, "fps": float, "height": int, "width": int, "shot_starts": list of int,
       "jpeg_bytes": list of int, the length of each frame in the frame file}

    Raises:
      Refused: the file is not a usable video.
      OSError: the frame file cannot be written.
      MemoryError: the file needs more memory than there is.
    """
    info = _inspect(video, fps)
    # Kept: setting one up costs as much as scaling a picture.
    scaler, thumbnails = VideoReformatter(), VideoReformatter()
    lengths, shown, distances = [], [], shots.Distances()

    def watched() -> Iterator[tuple[Fraction, Fraction, tuple[int, Any]]]:
        for number, (time, duration, frame) in enumerate(_pictures(video, info)):
            thumbnail_size = _output_size(frame, Fraction(1), THUMBNAIL_SIDE)
            distances.add(_to_bgr(frame, thumbnails, thumbnail_size, (False, 0)))
            yield time, duration, (number, frame)

    pathlib.Path(frame_file).unlink(
        missing_ok=True
    )  # a decoder that still writes to the old file must not reach the new one
    with open(frame_file, "wb") as out:
        for number, frame in _on_grid(watched(), info):
            if not shown:
                size, orientation = _output_size(frame, info.pixel_aspect, short_side), _orientation(frame)
            if number not in shown[-1:]:  # else it is still on display: the same JPEG again
                picture_HxWx3 = _to_bgr(frame, scaler, size, orientation)
                jpeg = cv2.imencode(".jpg", picture_HxWx3, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])[1].tobytes()
            out.write(jpeg)
            lengths.append(len(jpeg))
            shown.append(number)
        out.flush()
        os.fsync(out.fileno())
    starts = shots.on_grid(
        shots.find_shots(distances.so_far(), float(info.native_rate), rule=shot_rule), np.array(shown)
    )
    height, width = picture_HxWx3.shape[:2]
    return {
        "frames": len(lengths),
        "fps": float(info.rate),
        "height": height,
        "width": width,
        "shot_starts": starts.tolist(),
        "jpeg_bytes": lengths,
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
    info = _inspect(video, fps=1.0)
    scaler, written = VideoReformatter(), 0
    with open(frame_file, "wb") as out:
        for _, _, frame in itertools.islice(_pictures(video, info), frames):
            if not written:
                width, height = frame.width * info.pixel_aspect, frame.height
                scale = short_side / min(width, height)
                size, orientation = (round(width * scale), round(height * scale)), _orientation(frame)
                _check_size(*size)
            picture_HxWx3 = _to_bgr(frame, scaler, size, orientation)
            top, left = ((side - image_size) // 2 for side in picture_HxWx3.shape[:2])
            square = picture_HxWx3[top : top + image_size, left : left + image_size, ::-1]
            out.write(square.tobytes())
            written += 1
    return {"frames": written, "seconds": float(info.count / info.native_rate)}


@contextlib.contextmanager
def _errors_refuse(kind: str) -> Iterator[None]:
    """What FFmpeg and PyAV raise on bad files becomes Refused; on damaged files PyAV also raises ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except (av.error.FFmpegError, ValueError) as e:
        raise Refused(f"{kind}: {getattr(e, 'strerror', None) or repr(e)}") from e


def _open(video: str) -> tuple[Any, Any]:
    """(container, its first stream of moving pictures); opens nothing but local files of known containers."""
    try:
        if os.path.getsize(video) == 0:
            raise Refused("empty file")
        # The prefix keeps names like "concat:a|b" what they are: names.
        container = av.open(
            "file:" + os.path.abspath(video),
            metadata_errors="replace",
            container_options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS},
        )
    except av.error.ArgumentError as e:
        raise Refused("not a video: pictures, texts, playlists and unknown containers are not opened") from e
    except (av.error.InvalidDataError, av.error.EOFError) as e:
        raise Refused("not a video: no container format fits, or its header is damaged") from e
    except MemoryError:
        raise
    except (OSError, av.error.FFmpegError) as e:
        raise Refused(f"unreadable: {e.strerror}") from e
    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        raise Refused("no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise Refused("unknown codec")
    if stream.width == 0 or stream.height == 0:
        raise Refused("absurd size: the header gives none, or one that no decoder accepts")
    _check_size(stream.width, stream.height)
    stream.codec_context.thread_count = 1  # files run in parallel, not threads of one
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return container, stream


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise Refused(f"absurd size: {width} x {height} pixels")


def _inspect(video: str, fps: float) -> Info:
    """Reads all packets without decoding them, which costs about 1 % of decoding."""
    container, stream = _open(video)
    count, first, last, end = 0, None, None, None
    with container, _errors_refuse("truncated or damaged"):
        for packet in container.demux():
            if packet.size == 0:  # marks the end of a stream
                continue
            of_video = packet.stream_index == stream.index
            if of_video and packet.is_corrupt:
                raise Refused(f"truncated or damaged: packet {count} is incomplete")
            count += of_video
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None:
                continue
            time = stamp * packet.time_base
            stop = time + (packet.duration or 0) * packet.time_base
            end = stop if end is None else max(end, stop)
            if of_video:
                first = time if first is None else min(first, time)
                last = time if last is None else max(last, time)
        if count == 0:
            raise Refused("no video stream: it holds no picture")
        _check_duration(container, end)
        native = _native_rate(stream, count, None if first is None else last - first)
        return Info(
            rate=min(native, Fraction(str(fps))),
            native_rate=native,
            tick=Fraction(stream.time_base),
            pixel_aspect=Fraction(stream.sample_aspect_ratio or 1),
            count=count,
        )


def _check_duration(container: Any, end: Fraction | None) -> None:
    """A file that was cut off ends earlier than it says. `end`: where the last packet of any stream ends, s."""
    if container.duration is None or end is None:
        return
    claimed = Fraction(container.duration, av.time_base)
    found = end - Fraction(container.start_time or 0, av.time_base)
    if found < claimed - Fraction(3, 20) - claimed / 200:  # headers are rounded, and some are a little off
        raise Refused(f"truncated: its header says {float(claimed):.1f} s, it ends after {float(found):.1f} s")


def _native_rate(stream: Any, count: int, extent: Fraction | None) -> Fraction:
    """Average rate of `count` pictures whose time stamps span `extent` seconds."""
    rate = stream.average_rate or stream.guessed_rate
    # Time stamps are rounded, so the rate in the header is the better number wherever they bear it out.
    if extent and (rate is None or abs(rate * extent - (count - 1)) > max(1, (count - 1) / 100)):
        rate = (count - 1) / extent
    if rate is None:
        raise Refused("no frame rate: neither the header nor time stamps give one")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise Refused(f"absurd frame rate: {float(rate):g} pictures per second")
    return Fraction(rate)


def _pictures(video: str, info: Info) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """(time in s, time on display in s, frame) in the order of display."""
    container, stream = _open(video)
    count, previous = 0, None
    with container, _errors_refuse("truncated or damaged"):
        for frame in container.decode(stream):
            _check_size(frame.width, frame.height)
            if frame.is_corrupt:
                raise Refused(f"truncated or damaged: picture {count} is incomplete")
            # AVI knows only the order of decoding: what FFmpeg makes up as display times is wrong for B-frames.
            stamp = frame.dts if container.format.name == "avi" else frame.pts
            if stamp is not None:
                time = stamp * Fraction(frame.time_base)
            else:  # raw streams have no time stamps
                time = Fraction(0) if previous is None else previous + 1 / info.native_rate
            if previous is not None and time < previous:
                raise Refused(f"truncated or damaged: time stamps run backwards at picture {count}")
            yield time, (frame.duration or 0) * Fraction(frame.time_base) or 1 / info.native_rate, frame
            count, previous = count + 1, time
    if count == 0:
        raise Refused("truncated or damaged: no picture could be decoded")


def _on_grid(pictures: Iterable[tuple[Fraction, Fraction, Any]], info: Info) -> Iterator[Any]:
    """For k = 0, 1, ...: the picture on display k / rate seconds after the first one, until the last one ends."""
    step = 1 / info.rate
    # Time stamps are rounded to ticks: without slack, a grid of the native rate would repeat and drop pictures. Ticks
    # above 2 ms are whole frames, and exact.
    slack = min(info.tick, Fraction(2, 1000), step / 4)
    shown, due, end = None, Fraction(0), Fraction(0)
    for time, duration, picture in pictures:
        if shown is None:
            due = time
        while shown is not None and due < time - slack:
            yield shown
            due += step
        shown, end = picture, time + duration
    while shown is not None and due < end - slack:
        yield shown
        due += step


def _output_size(frame: Any, pixel_aspect: Fraction, short_side: int) -> tuple[int, int]:
    """(width, height) to scale to, before the orientation is applied."""
    width, height = frame.width * pixel_aspect, frame.height
    scale = min(Fraction(1), short_side / min(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    _check_size(*size)
    return size


def _orientation(frame: Any) -> tuple[bool, int]:
    """(mirror left to right, then quarter turns clockwise) that the file asks for.

    The display matrix sends a point (x, y), y down, to (a x + c y, b x + d y). PyAV's `frame.rotation` alone would turn
    a mirrored video upside down. Angles between quarter turns go to the nearest.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
            mirror = a * d - b * c < 0
            angle = math.atan2(-b, -a) if mirror else math.atan2(b, a)
            return mirror, round(angle / (math.pi / 2)) % 4
    return False, 0


def _to_bgr(frame: Any, scaler: VideoReformatter, size: tuple[int, int], orientation: tuple[bool, int]) -> np.ndarray:
    """uint8[H, W, 3] in OpenCV's channel order, scaled and turned."""
    width, height = size
    mirror, turns = orientation
    with _errors_refuse("unknown pixel format"):
        picture = scaler.reformat(frame, width, height, "bgr24", interpolation="AREA", threads=1).to_ndarray()
    if mirror:
        picture = picture[:, ::-1]
    return np.ascontiguousarray(np.rot90(picture, -turns))
