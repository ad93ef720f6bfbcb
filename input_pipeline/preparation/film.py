"""The film of a file: which of its streams that is, and when each of its pictures is shown.

    inspect: packets only -> the film's stream, rate, parts
    pictures: the decoder -> (time, time on display, frame) in the order of display

A file is used whole or refused with a reason: one that breaks off in the middle is not half kept. Headers may claim
absurd values; sizes, rates and durations are checked against what the file holds.
"""

import array
import contextlib
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.error
import av.format
import numpy as np
from av.stream import Disposition

from input_pipeline import folders
from input_pipeline.preparation import transport_stream

# FFmpeg opens far more than videos: pictures, subtitles, and playlists (hls, concat) that open further files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,ivf,h264,hevc,obu,m4v,nut,dv,"
    "yuv4mpegpipe,gif,apng"
)
MAX_PIXELS = 2**25  # per picture; 8K (7680 x 4320) is just below
MAX_SIDE = 2**15
MIN_RATE, MAX_RATE = Fraction(1, 10), Fraction(1000)  # pictures per second that a video can credibly have
# AVI knows only the order of decoding, and a program stream has time stamps for some of its pictures only: the display
# times that FFmpeg makes up are wrong for B-frames, and for the last picture before a join.
TIMED_BY_ORDER = {"avi", "mpeg"}
# A time stamp that far ahead of the one before it begins another recording: on a key picture, the value of ffmpeg's
# option -dts_delta_threshold; on any other, more than a picture may credibly stand.
KEY_LEAP, LEAP = Fraction(10), Fraction(3600)  # s


class Refused(Exception):
    """The file is not used; the message says why, as `kind: detail`."""


class Info(NamedTuple):
    streams: list[int]  # numbers of the film's streams: one, or of recordings put end to end one after the other
    rate: Fraction  # of the output grid, frames/s
    native_rate: Fraction  # average, pictures/s
    usual_rate: Fraction  # without pauses, pictures/s
    tick: Fraction  # resolution of the time stamps, s
    pixel_aspect: Fraction  # width / height of a pixel on display
    count: int  # pictures
    even_rates: list[Fraction | None]  # of each part, pictures/s, where they come evenly and their time stamps do not
    notes: list[str]  # what is unusual about the file, as `kind: detail`


@contextlib.contextmanager
def errors_refuse(kind: str) -> Iterator[None]:
    """What FFmpeg and PyAV raise on bad files becomes Refused; on damaged files PyAV also raises ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except (av.error.FFmpegError, ValueError) as e:
        raise Refused(f"{kind}: {getattr(e, 'strerror', None) or repr(e)}") from e


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise Refused(f"absurd size: {width} x {height} pixels")


def inspect(video: str, fps: float) -> Info:
    """Reads all packets without decoding them, which costs about 1 % of decoding.

    A folder of frames has the rate `fps`, because nothing says another: each picture is one frame.
    """
    if os.path.isdir(video):
        rate, count = Fraction(str(fps)), len(_frames_in(video))
        if count == 0:
            raise Refused("not a video: a folder, but not of numbered pictures")
        notes = [f"folder of frames: {count} pictures, taken as {float(rate):g} per second"]
        return Info([], rate, rate, rate, Fraction(1, 90_000), Fraction(1), count, [], notes)
    container = _open(video)
    tracks = {track.stream.index: track for track in map(_Track, _streams_of_pictures(container))}
    end = None
    with container, errors_refuse("truncated or damaged"):
        for packet in container.demux():
            if packet.size == 0:  # marks the end of a stream
                continue
            if packet.stream_index in tracks:
                tracks[packet.stream_index].add(packet)
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None:
                stop = (stamp + (packet.duration or 0)) * packet.time_base
                end = stop if end is None else max(end, stop)
        films = _films(list(tracks.values()))
        joins = sum(len(film.parts) for film in films) - 1
        for film in films:
            if film.incomplete is not None:
                found = transport_stream.joins(video, film.stream.id) if container.format.name == "mpegts" else None
                if found is None:
                    raise Refused(f"truncated or damaged: packet {film.incomplete} is incomplete")
                joins += found
        notes = ["joined recordings: they are shown one after the other"] if joins else []
        if not joins:
            _check_duration(container, end)
        return _info(films, Fraction(str(fps)), notes)


def pictures(video: str, info: Info) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """(time in s, time on display in s, frame) in the order of display; a part follows when the one before it ends."""
    if os.path.isdir(video):
        yield from _frames(video, info)
        return
    count, previous, step = 0, None, 1 / info.usual_rate
    number, in_part = -1, 0  # of the part, and of the picture in it
    begin = first = Fraction(0)  # time of the part's first picture, and its time stamp
    with errors_refuse("truncated or damaged"):
        for part, stream, frame in _decoded(video, info.streams):
            check_size(frame.width, frame.height)
            if frame.is_corrupt:
                raise Refused(f"truncated or damaged: picture {count} is incomplete")
            after = Fraction(0) if previous is None else previous + step
            stamp = frame.dts if stream.container.format.name in TIMED_BY_ORDER else frame.pts
            time = None if stamp is None else stamp * info.tick  # raw streams have no time stamps
            if part != number:
                number, begin, in_part = part, (time or after) if count == 0 else after, 0
                first = begin if time is None else time
            time = after if time is None else begin + time - first
            even_rate = info.even_rates[part]
            if even_rate is not None and abs(begin + in_part / even_rate - time) <= 2 / even_rate:
                time = begin + in_part / even_rate
            if previous is not None and time < previous:
                raise Refused(f"truncated or damaged: time stamps run backwards at picture {count}")
            # A single picture is one frame, however long it is said to stand.
            yield time, Fraction(0) if info.count == 1 else (frame.duration or 0) * info.tick or step, frame
            count, in_part, previous = count + 1, in_part + 1, time
    if count == 0:
        raise Refused("truncated or damaged: no picture could be decoded")


def _frames_in(folder: str) -> list[str]:
    return [
        os.path.join(folder, name) for name in folders.frames_among(list(filter(folders.is_data, os.listdir(folder))))
    ]


def _frames(folder: str, info: Info) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """What `pictures` says, of a folder of frames."""
    size = None
    for number, path in enumerate(_frames_in(folder)):
        with errors_refuse(f"truncated or damaged: {os.path.basename(path)}"):
            with open(path, "rb") as file:
                kind = "png_pipe" if file.read(4) == b"\x89PNG" else "jpeg_pipe"
            with av.open(
                "file:" + os.path.abspath(path), format=kind, container_options={"protocol_whitelist": "file"}
            ) as container:
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
                frame = next(iter(container.decode(stream)), None)
        if frame is None or frame.is_corrupt:
            raise Refused(f"truncated or damaged: {os.path.basename(path)} is incomplete")
        check_size(frame.width, frame.height)
        size = size or (frame.width, frame.height)
        if size != (frame.width, frame.height):
            raise Refused("not a video: a folder of pictures of different sizes")
        yield number / info.rate, 1 / info.rate, frame


def _open(video: str) -> Any:
    """Opens nothing but local files of known containers."""
    try:
        if os.path.getsize(video) == 0:
            raise Refused("empty file")
        # The prefix keeps names like "concat:a|b" what they are: names.
        name = "file:" + os.path.abspath(video)
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        try:
            container = av.open(name, container_options=options)
        except UnicodeDecodeError:  # a title that is no UTF-8, up to PyAV 18; 19 opens it, and has not this argument
            container = av.open(name, container_options=options, metadata_errors="replace")
    except av.error.ArgumentError as e:
        raise Refused("not a video: pictures, texts, playlists and unknown containers are not opened") from e
    except (av.error.InvalidDataError, av.error.EOFError) as e:
        raise Refused("not a video: no container format fits, or its header is damaged") from e
    except MemoryError:
        raise
    except (OSError, av.error.FFmpegError) as e:
        raise Refused(f"unreadable: {e.strerror}") from e
    for stream in container.streams.video:
        if stream.codec_context is not None:
            stream.codec_context.thread_count = 1  # files run in parallel, not threads of one
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return container


def _streams_of_pictures(container: Any) -> list[Any]:
    """All but covers and the thumbnails of chapters."""
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        raise Refused("no video stream")
    return streams


class _Joins:
    """Notices where another recording begins in a stream."""

    def __init__(self, stream: Any):
        self._possible = _may_start_again(stream)
        self._last: int | None = None

    def begins_at(self, packet: Any) -> bool:
        stamp = packet.pts if packet.dts is None else packet.dts
        if not self._possible or stamp is None:
            return False
        last, self._last = self._last, stamp
        if last is None:
            return False
        ahead = (stamp - last) * packet.time_base
        if ahead < 0:
            return packet.is_keyframe or ahead < -KEY_LEAP
        return ahead > (KEY_LEAP if packet.is_keyframe else LEAP)


class _Track:
    """What the packets of a stream of pictures say."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.count = 0
        self.parts = [array.array("q")]  # time stamps of the pictures of each part, ticks
        self.incomplete: int | None = None  # number of the first packet that is marked so
        self.first, self.last = math.inf, -math.inf  # where it begins and ends in the file, bytes
        self._in_program_stream = stream.container.format.name == "mpeg"
        self._joins = _Joins(stream)

    def add(self, packet: Any) -> None:
        if packet.pos is not None:
            self.first, self.last = min(self.first, packet.pos), max(self.last, packet.pos)
        if self._joins.begins_at(packet):
            self.parts.append(array.array("q"))
        by_order = packet.pts is None or (self._in_program_stream and packet.dts is not None)
        stamp = packet.dts if by_order else packet.pts
        if stamp is not None:
            self.parts[-1].append(stamp)
        if packet.is_corrupt and self.incomplete is None:
            self.incomplete = self.count
        self.count += 1

    @property
    def pixels(self) -> int:
        """Of a picture; 0: not known, or of a codec that is not known."""
        return 0 if self.stream.codec_context is None else self.stream.width * self.stream.height


def _films(tracks: list[_Track]) -> list[_Track]:
    """The stream that a player would show; of recordings put end to end there may be one of each, in their order.

    Never a cover, nor a still, which has one picture, where another stream has more. Of the others, in this order:
    none that can only be a preview (less than a quarter of the pixels of the largest stream) or thumbnails (less than
    a tenth of the pictures of the longest); the one marked default; the largest; the first. A preview is left out even
    where it is marked default, since writers mark the first stream so when nobody says which.
    """
    if not any(track.count for track in tracks):
        raise Refused("no video stream: it holds no picture")
    still = Disposition.still_image
    films = [track for track in tracks if track.count > 1 and not track.stream.disposition & still]
    films = films or [track for track in tracks if track.count]
    known = [track for track in films if track.pixels]
    if not known:
        if all(track.stream.codec_context is None for track in films):
            raise Refused("unknown codec")
        raise Refused("absurd size: the header gives none, or one that no decoder accepts")
    pixels, count = max(track.pixels for track in known), max(track.count for track in known)

    def rank(track: _Track) -> tuple:
        whole = 4 * track.pixels >= pixels and 10 * track.count >= count
        return whole, bool(track.stream.disposition & Disposition.default), track.pixels, -track.stream.index

    film, *others = sorted(known, key=rank, reverse=True)
    chosen = [film]
    for other in others if _may_start_again(film.stream) else []:
        if all(other.first > track.last or other.last < track.first for track in chosen):
            chosen.append(other)
    for track in chosen:
        check_size(track.stream.width, track.stream.height)
    return sorted(chosen, key=lambda track: track.first)


def _check_duration(container: Any, end: Fraction | None) -> None:
    """A file that was cut off ends earlier than it says. `end`: where the last packet of any stream ends, s."""
    if container.duration is None or end is None:
        return
    claimed = Fraction(container.duration, av.time_base)
    found = end - Fraction(container.start_time or 0, av.time_base)
    if found < claimed - Fraction(3, 20) - claimed / 200:  # headers are rounded, and some are a little off
        raise Refused(f"truncated: its header says {float(claimed):.1f} s, it ends after {float(found):.1f} s")


def _info(films: list[_Track], fps: Fraction, notes: list[str]) -> Info:
    stream, count = films[0].stream, sum(film.count for film in films)
    tick, header = Fraction(stream.time_base), _header_rate(stream)
    stamps = [part for film in films for part in film.parts]
    parts = [np.sort(np.frombuffer(part, np.int64)) * float(tick) for part in stamps]
    gaps = [np.diff(part) for part in parts] + [np.full(len(parts) - 1, 1 / float(header or fps))]
    gaps_T = np.concatenate(gaps)
    extent = sum((int(max(part) - min(part)) * tick for part in stamps if part), Fraction(0))
    extent += (len(parts) - 1) / (header or fps)
    native = usual = _native_rate(header, count, extent, fps)
    without_pauses, longest = _rate_without_pauses(gaps_T, fps)
    if without_pauses and min(without_pauses, fps) > Fraction(101, 100) * min(native, fps):
        usual = without_pauses
        notes.append(
            f"variable rate: pictures stand up to {longest:.1f} s, the average rate is {float(native):.3g} per second; "
            f"stored at {float(min(usual, fps)):.3g} as its moving seconds have"
        )
    return Info(
        streams=[film.stream.index for film in films],
        rate=min(usual, fps),
        native_rate=native,
        usual_rate=usual,
        tick=tick,
        pixel_aspect=Fraction(stream.sample_aspect_ratio or 1),
        count=count,
        even_rates=[_even_rate(stream, header, part) for part in parts],
        notes=notes,
    )


def _header_rate(stream: Any) -> Fraction | None:
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate else None


def _even_rate(stream: Any, header: Fraction | None, times_T: np.ndarray) -> Fraction | None:
    """The rate of pictures that come evenly, though time stamps may be off by 1.5 pictures.

    That happens in the formats that broadcasts use, and nowhere else: where recordings are joined, and where the
    container has no time stamp and FFmpeg makes one up.
    """
    if header is None or not len(times_T) or not _may_start_again(stream):
        return None
    off_T = times_T - times_T[0] - np.arange(len(times_T)) / float(header)
    return header if np.abs(off_T).max() <= 1.5 / float(header) else None


def _may_start_again(stream: Any) -> bool:
    """Whether the container is of those whose times may start again in the middle, such as MPEG-TS and MPEG-PS."""
    return bool(stream.container.format.flags & av.format.Flags.ts_discont.value)


def _bears_out(rate: Fraction, count: int, extent: Fraction) -> bool:
    """Whether `count` pictures whose time stamps span `extent` seconds may well have this average rate."""
    return not extent or abs(rate * extent - (count - 1)) <= max(1, (count - 1) / 100)


def _native_rate(header: Fraction | None, count: int, extent: Fraction, fps: Fraction) -> Fraction:
    """Average rate of `count` pictures whose time stamps span `extent` seconds; of one picture it has no meaning."""
    # Time stamps are rounded, so the rate in the header is the better number wherever they bear it out.
    rate = header
    if extent and (rate is None or not _bears_out(rate, count, extent)):
        rate = Fraction(count - 1) / extent
    if count == 1 and (rate is None or not MIN_RATE <= rate <= MAX_RATE):
        return min(fps, MAX_RATE)
    if rate is None:
        raise Refused("no frame rate: neither the header nor time stamps give one")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise Refused(f"absurd frame rate: {float(rate):g} pictures per second")
    return rate


def _rate_without_pauses(gaps_T: np.ndarray, fps: Fraction) -> tuple[Fraction | None, float]:
    """Average rate of what moves, and the longest pause in seconds; (None, 0) where nothing pauses.

    A pause is a time between pictures of more than twice the usual one: that of the fastest tenth of the pictures, and
    not below 1 / fps, because a faster rate would not be stored. So jitter and a lost picture are no pauses, and one
    pause, or many, do not slow down the rest.

    Args:
      gaps_T: float64[T] time from each picture to the next, s.
    """
    gaps_T = gaps_T[gaps_T > 0]
    if not len(gaps_T):
        return None, 0.0
    usual = max(np.quantile(gaps_T, 0.1, method="lower"), 1 / float(fps))
    moving = gaps_T[gaps_T <= 2 * usual * (1 + 1e-6)]
    if len(moving) == len(gaps_T):
        return None, 0.0
    return Fraction(len(moving) / moving.sum()).limit_denominator(100_000), float(gaps_T.max())


def _decoded(video: str, streams: list[int]) -> Iterator[tuple[int, Any, Any]]:
    """(number of the part, stream, picture) in the order of display.

    No picture is decoded with the help of another part.
    """
    part = 0
    for number in streams:
        container = _open(video)  # once more: FFmpeg hands out the end of a stream after the streams behind it
        with container:
            stream = container.streams[number]
            joins = _Joins(stream)
            for packet in container.demux(stream):
                if joins.begins_at(packet):
                    for frame in stream.codec_context.decode(None):
                        yield part, stream, frame
                    stream.codec_context.flush_buffers()
                    part += 1
                for frame in packet.decode():
                    yield part, stream, frame
        part += 1
