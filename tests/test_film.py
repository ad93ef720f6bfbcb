"""Which stream of a file is its film, when its pictures are shown, and at what rate: files as recorders make them."""

import struct
import zlib
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from av.stream import Disposition

from helpers.video_files import decoded, number, numbered, write_video
from input_pipeline.preparation import film, transport_stream
from input_pipeline.preparation.film import Refused

RED = [200, 0, 0]


# --- which stream -----------------------------------------------------------------------------------------------------


def write_streams(path, *streams):
    """A file of several streams; each is (codec, (width, height), count, disposition), 50 pictures are the film's.

    The film's pictures are numbered (number 0 to 49 of 4 grey levels each), all others are red.
    """
    with av.open(str(path), "w") as out:
        made = []
        for codec, (width, height), count, disposition in streams:
            stream = out.add_stream(codec, rate=25)
            stream.width, stream.height = width, height
            stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
            stream.options = {"qp": "10", "preset": "ultrafast"} if codec == "libx264" else {}
            if disposition is not None:
                stream.disposition = disposition
            made.append((stream, count))
        for k in range(50):
            for stream, count in made:
                if k % (50 // count) or k // (50 // count) >= count:
                    continue
                shape = stream.height, stream.width, 3
                shown = np.full(shape, 20 + 4 * k, np.uint8) if count == 50 else np.full(shape, RED, np.uint8)
                if count == 50 and stream.width != 320:
                    shown[...] = RED
                frame = av.VideoFrame.from_ndarray(shown)
                frame.pts, frame.time_base = k, Fraction(1, 25)
                out.mux(stream.encode(frame))
        for stream, _ in made:
            out.mux(stream.encode())
    return path


NONE, DEFAULT, COVER = Disposition(0), Disposition.default, Disposition.attached_pic
FILM = "libx264", (320, 240), 50
STILL = {codec: (codec, (160, 120), 1) for codec in ("mjpeg", "png", "libx264")}
LARGE_STILL = "mjpeg", (640, 480), 1
PREVIEW = "libx264", (80, 60), 50
HALF = "libx264", (160, 120), 50
THUMBNAILS = "mjpeg", (320, 240), 4


@pytest.mark.parametrize(
    "container, streams",
    [
        ("mp4", [(*STILL["mjpeg"], NONE), (*FILM, DEFAULT)]),
        ("mp4", [(*STILL["png"], NONE), (*FILM, DEFAULT)]),
        ("mov", [(*STILL["mjpeg"], None), (*FILM, None)]),
        ("mkv", [(*STILL["libx264"], NONE), (*FILM, DEFAULT)]),
        ("mkv", [(*STILL["mjpeg"], DEFAULT), (*FILM, NONE)]),  # even where the still is the default
        ("mp4", [(*STILL["mjpeg"], DEFAULT), (*FILM, NONE)]),
        ("avi", [(*STILL["mjpeg"], None), (*FILM, None)]),
        ("mp4", [(*FILM, DEFAULT), (*STILL["mjpeg"], NONE)]),
        ("mp4", [(*LARGE_STILL, DEFAULT), (*FILM, NONE)]),  # a still is no preview's measure
        ("mp4", [(*LARGE_STILL, COVER), (*FILM, DEFAULT)]),
        ("mkv", [(*STILL["mjpeg"], NONE), (*FILM, DEFAULT), (*STILL["libx264"], NONE)]),
        ("mp4", [(*PREVIEW, NONE), (*FILM, DEFAULT)]),
        ("mp4", [(*PREVIEW, None), (*FILM, None)]),  # the writer then marks the first as default
        ("mkv", [(*PREVIEW, DEFAULT), (*FILM, NONE)]),
        ("ts", [(*PREVIEW, None), (*FILM, None)]),
        ("mp4", [(*FILM, DEFAULT), (*PREVIEW, NONE)]),
        ("mkv", [(*HALF, NONE), (*FILM, DEFAULT)]),
        ("ts", [(*HALF, None), (*FILM, None)]),  # nothing is marked: the largest
        ("mkv", [(*THUMBNAILS, DEFAULT), (*FILM, NONE)]),
        ("mkv", [(*STILL["mjpeg"], DEFAULT), (*THUMBNAILS, NONE), (*PREVIEW, NONE), (*FILM, NONE)]),
    ],
)
def test_the_film_is_what_players_show(tmp_path, container, streams):
    row, frames = decoded(write_streams(tmp_path / f"v.{container}", *streams))
    assert (row["frames"], row["width"], row["height"]) == (50, 320, 240)
    assert [round((frame.mean() - 20) / 4) for frame in frames] == list(range(50))


def test_of_several_films_the_default_one(tmp_path):
    row, _ = decoded(write_streams(tmp_path / "v.mkv", (*FILM, NONE), (*HALF, DEFAULT)))
    assert (row["frames"], row["width"], row["height"]) == (50, 160, 120)


def test_a_still_alone_is_a_video_of_one_frame(tmp_path):
    row, frames = decoded(write_streams(tmp_path / "v.mp4", (*STILL["mjpeg"], NONE), (*LARGE_STILL, COVER)))
    assert (row["frames"], row["width"], row["height"]) == (1, 160, 120)
    assert np.abs(frames[0].mean(axis=(0, 1)) - RED).max() < 4


# --- one picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "container, codec, pix_fmt, rate",
    [
        *(
            (container, "libx264", "yuv420p", rate)
            for container in ("mkv", "mp4", "mov", "ts", "flv")
            for rate in (1, 1000)
        ),
        ("mkv", "libx264", "yuv420p", Fraction(1, 60)),
        ("mp4", "libx264", "yuv420p", Fraction(1, 60)),
        ("mkv", "libx264", "yuv420p", 100_000),
        ("webm", "libvpx-vp9", "yuv420p", 1000),
        ("webm", "libvpx-vp9", "yuv420p", 25),
        ("avi", "mjpeg", "yuvj420p", 1000),
        ("gif", "gif", "bgr8", 25),
        ("y4m", "wrapped_avframe", "yuv420p", 25),
        ("h264", "libx264", "yuv420p", 25),
        ("mpg", "mpeg1video", "yuv420p", 25),
    ],
)
def test_one_picture_is_one_frame_however_short_or_long(tmp_path, container, codec, pix_fmt, rate):
    path = tmp_path / f"v.{container}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 70, np.uint8))))
        out.mux(stream.encode())
    row, frames = decoded(path)
    assert row["frames"] == 1 and abs(frames[0].mean() - 70) < 4 and 0 < row["fps"] <= 25


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi"])
def test_a_title_that_is_no_utf_8_does_not_refuse(tmp_path, container):
    path = tmp_path / f"v.{container}"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "Lille Erna"
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 70, np.uint8))))
        out.mux(stream.encode())
    data = path.read_bytes()
    assert data.count(b"Lille Erna") == 1
    path.write_bytes(data.replace(b"Lille Erna", "Lillé Ernå".encode("latin-1")))
    assert decoded(path)[0]["frames"] == 1


def test_one_picture_apng(tmp_path):
    """A PNG with the chunks that make it an animation of one picture."""
    png = cv2.imencode(".png", np.full((48, 64, 3), 70, np.uint8))[1].tobytes()
    chunks = (b"acTL", struct.pack(">II", 1, 0)), (b"fcTL", struct.pack(">IIIIIHHBB", 0, 64, 48, 0, 0, 0, 0, 0, 0))
    added = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    (tmp_path / "v.png").write_bytes(png[:33] + added + png[33:])  # behind the header chunk
    row, frames = decoded(tmp_path / "v.png")
    assert row["frames"] == 1 and abs(frames[0].mean() - 70) < 4


# --- pauses -----------------------------------------------------------------------------------------------------------


def write_at(path, times, rate=30):
    """Pictures shown at the given times, in units of 1 / rate seconds; of grey level 10 + 4 * their number."""
    pictures = np.stack([np.full((48, 64, 3), 10 + 4 * k, np.uint8) for k in range(len(times))])
    return write_video(path, pictures, fps=rate, times_ms=[round(1000 * time / rate) for time in times])


def bursts(length, count, pause):
    return [k * (length + pause) + i for k in range(count) for i in range(length)]


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize(
    "times, rate",
    [
        ([*range(30), *range(630, 659)], 25),  # one pause, of 19 s
        ([0, *range(600, 658)], 25),  # at the beginning
        ([*range(58), 600], 25),  # at the end
        (bursts(6, 9, 60), 25),  # many
        ([*range(0, 900, 30), *range(900, 930)], 25),  # slow, then fast
        ([*range(0, 30), *range(30, 630, 20)], 25),
        ([*range(0, 90, 3), *range(690, 780, 3)], 10),  # pictures every 0.1 s, then a pause, then again
    ],
)
def test_a_pause_does_not_slow_down_the_rest(tmp_path, container, times, rate):
    row, frames = decoded(write_at(tmp_path / f"v.{container}", times))
    assert row["fps"] == pytest.approx(rate, rel=0.02)
    assert row["notes"][0].startswith("variable rate: pictures stand up to")
    assert row["frames"] == pytest.approx(times[-1] / 30 * rate, abs=3)
    shown = np.array([(frame.mean() - 10) / 4 for frame in frames]).round().astype(int)
    due = [np.searchsorted(times, 30 * k / row["fps"] + 0.1, side="right") - 1 for k in range(row["frames"])]
    assert np.abs(shown - due).max() <= 1 and (np.diff(shown) >= 0).all()
    assert len(set(shown.tolist())) >= 0.8 * len(times)  # 25 of 30 pictures per second


@pytest.mark.parametrize(
    "times, rate",
    [
        (range(0, 80, 2), 15),
        ([k + k // 20 for k in range(40)], 25),  # a picture lost
        ([2 * k + k % 2 * 0.5 for k in range(40)], 15),  # jitter
    ],
)
def test_without_a_pause_the_rate_is_the_average(tmp_path, times, rate):
    row, _ = decoded(write_at(tmp_path / "v.mp4", list(times)))
    assert row["fps"] == pytest.approx(rate, rel=0.03) and row["notes"] == []


def test_a_slow_grid_has_no_pauses(tmp_path):
    row, _ = decoded(write_at(tmp_path / "v.mp4", [*range(30), *range(630, 659)]), fps=1)
    assert row["fps"] == 1 and row["frames"] == 22 and row["notes"] == []


# --- joined recordings ------------------------------------------------------------------------------------------------

RATE = Fraction(1, 25)


def recording(path, numbers, first=0, container="mpegts", codec="libx264", bframes=0, sound=False, options=None):
    """A file of pictures whose grey level tells their number; the first one is shown at first / 25 seconds."""
    with av.open(str(path), "w", format=container, options=options or {}) as out:
        stream = out.add_stream(codec, rate=25, width=160, height=120, pix_fmt="yuv420p", time_base=RATE)
        stream.options = {"bf": str(bframes), "g": "15"} | ({"qp": "10"} if codec == "libx264" else {"b": "4M"})
        audio = out.add_stream("mp2", rate=48000, layout="mono") if sound else None
        for k, value in enumerate(numbers):
            noise = np.random.default_rng(k).integers(-5, 6, (120, 160, 1))  # a picture fills several packets
            grey = (10 + 4 * value + noise + np.zeros(3)).clip(0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(grey)
            frame.pts, frame.time_base = first + k, RATE
            out.mux(stream.encode(frame))
            if audio is not None:
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format="s16", layout="mono")
                samples.sample_rate, samples.pts, samples.time_base = 48000, 1920 * (first + k), Fraction(1, 48000)
                out.mux(audio.encode(samples))
        out.mux(stream.encode())
        if audio is not None:
            out.mux(audio.encode())
    return path.read_bytes()


def joined(tmp_path, starts, name="v.ts", **kind):
    """The file of 60 pictures, in as many recordings as there are `starts`, put end to end."""
    each = 60 // len(starts)
    path = tmp_path / name
    path.write_bytes(
        b"".join(
            recording(tmp_path / "part", range(k * each, k * each + each), start, **kind)
            for k, start in enumerate(starts)
        )
    )
    return path


KINDS = {
    "ts": {"name": "v.ts"},
    "ts_b": {"name": "v.ts", "bframes": 2},
    "ts_sound": {"name": "v.ts", "sound": True},
    "ts_mpeg2": {"name": "v.ts", "codec": "mpeg2video", "bframes": 2, "sound": True},
    "m2ts": {"name": "v.m2ts", "options": {"mpegts_m2ts_mode": "1"}},
    "vob": {"name": "v.vob", "container": "vob", "codec": "mpeg2video"},
    "vob_b": {"name": "v.vob", "container": "vob", "codec": "mpeg2video", "bframes": 2, "sound": True},
    "mpg": {"name": "v.mpg", "container": "mpeg", "codec": "mpeg1video", "sound": True},
    "mpg_b": {"name": "v.mpg", "container": "mpeg", "codec": "mpeg1video", "bframes": 2},
    "dvd": {"name": "v.vob", "container": "dvd", "codec": "mpeg2video", "bframes": 2, "sound": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "starts",
    [
        [0, 0],
        [0, 30],  # segments of one recording
        *(
            pytest.param(starts, marks=pytest.mark.slow)
            for starts in ([0, 0, 0, 0, 0], [100_000, 0], [0, 100_000], [0, 20, 40], [50_000, 75_000, 25_000])
        ),
    ],
)
def test_joined_recordings_are_shown_one_after_the_other(tmp_path, kind, starts):
    row, frames = decoded(joined(tmp_path, starts, **KINDS[kind]))
    assert [round((frame.mean() - 10) / 4) for frame in frames] == list(range(60))
    assert row["fps"] == 25
    assert row["notes"] in ([], ["joined recordings: they are shown one after the other"])


@pytest.mark.parametrize("bframes", [0, 2])
def test_joined_recordings_of_other_stream_numbers(tmp_path, bframes):
    """As of two channels of a tuner."""
    parts = [
        recording(
            tmp_path / "part",
            range(20 * k, 20 * k + 20),
            7 * k,
            bframes=bframes,
            sound=True,
            options={"mpegts_start_pid": f"0x{k + 1}00"},
        )
        for k in range(3)
    ]
    (tmp_path / "v.ts").write_bytes(b"".join(parts))
    row, frames = decoded(tmp_path / "v.ts")
    assert [round((frame.mean() - 10) / 4) for frame in frames] == list(range(60))
    assert row["notes"] == ["joined recordings: they are shown one after the other"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_recording_is_one(tmp_path, kind):
    row, frames = decoded(joined(tmp_path, [0], **KINDS[kind]))
    assert [round((frame.mean() - 10) / 4) for frame in frames] == list(range(60))
    assert row["fps"] == 25 and row["notes"] == []


FILM_PID = 0x100  # FFmpeg's


def packets_of(path):
    data = path.read_bytes()
    return [data[at : at + 188] for at in range(0, len(data), 188)]


def pid(packet):
    return (packet[1] & 0x1F) << 8 | packet[2]


@pytest.mark.parametrize("starts", [[0], [0, 0], [0, 20, 40]])
@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("stride", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_a_lost_packet_is_no_join(tmp_path, starts, sound, stride):
    """Every single packet: first, inside or last of its picture, before or behind tables and joins."""
    packets = packets_of(joined(tmp_path, starts, sound=sound))
    mine = [k for k, packet in enumerate(packets) if pid(packet) == FILM_PID]
    begins = [k for k in mine if packets[k][1] & 0x40]
    per_part = 60 // len(starts)
    # The last packet of a file or a part is as good as never sent: whether one is missing nobody can tell.
    last = {mine[-1]} | {max(m for m in mine if m < k) for k in begins[per_part::per_part]}
    path = tmp_path / "lossy.ts"
    for k in mine[1::stride]:
        if k not in last:
            path.write_bytes(b"".join(packets[:k] + packets[k + 1 :]))
            assert transport_stream.joins(str(path), FILM_PID) is None, k


@pytest.mark.parametrize("starts", [[0], [0, 0], [0, 30]])
@pytest.mark.parametrize("damage", ["lost", "last of its picture", "marked"])
@pytest.mark.parametrize("picture", [20, 45])
def test_a_damaged_picture_refuses(tmp_path, starts, damage, picture):
    packets = packets_of(joined(tmp_path, starts))
    begins = [k for k, packet in enumerate(packets) if pid(packet) == FILM_PID and packet[1] & 0x40]
    if damage == "marked":  # by the receiver
        k = begins[picture] + 4
        packets[k] = bytes([packets[k][0], packets[k][1] | 0x80]) + packets[k][2:]
    elif damage == "lost":
        del packets[begins[picture] + 4]
    else:
        del packets[max(k for k in range(begins[picture + 1]) if pid(packets[k]) == FILM_PID)]
    (tmp_path / "v.ts").write_bytes(b"".join(packets))
    with pytest.raises(Refused, match="truncated or damaged: packet .* is incomplete"):
        film.inspect(str(tmp_path / "v.ts"), 25)


# --- further containers -----------------------------------------------------------------------------------------------


def test_y4m(tmp_path):
    row, frames = decoded(write_video(tmp_path / "v.y4m", numbered(20), codec="wrapped_avframe", pix_fmt="yuv420p"))
    assert [number(frame) for frame in frames] == list(range(20)) and row["fps"] == 25


@pytest.mark.parametrize("container, codec, pix_fmt", [("gif", "gif", "bgr8"), ("apng", "apng", "rgb24")])
def test_animations(tmp_path, container, codec, pix_fmt):
    path = write_video(tmp_path / f"v.{container}", numbered(20), fps=10, codec=codec, pix_fmt=pix_fmt)
    row, frames = decoded(path)
    assert row["frames"] == 20 and row["fps"] == pytest.approx(10)
    assert np.abs([frame.mean() - (10 + 6 * k) for k, frame in enumerate(frames)]).max() < 20  # GIF's 256 colours
