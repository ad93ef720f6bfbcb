"""Decoding: which picture lands where on the grid, how it is scaled and turned, and what is refused and why."""

import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from helpers.colours import MATRIX, exact_rgb
from helpers.commands import children
from helpers.video_files import SETTINGS, decoded, loop_video, number, numbered, scenes, write_video
from input_pipeline.preparation import pixels, video
from input_pipeline.preparation.sandbox import Sandbox
from vivi_jax.errors import DataError

SLOW = SETTINGS | {"short_side": 720}
LIMITS = {"memory_mb": 2048, "cpu_s": 60, "wall_s": 120}


# --- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "container, codec, pix_fmt",
    [
        ("mp4", "libx264", "yuv444p"),
        ("mkv", "ffv1", "bgr0"),
        ("avi", "ffv1", "bgr0"),
        ("avi", "libx264", "yuv444p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("ts", "libx264", "yuv444p"),
    ],
)
@pytest.mark.parametrize("native, fps", [(25, 25), (24, 25), (24, 10), (Fraction(30000, 1001), 25), (10, 25)])
def test_frame_k_is_the_picture_on_display_at_k_over_rate(tmp_path, container, codec, pix_fmt, native, fps):
    path = write_video(tmp_path / f"v.{container}", numbered(40), fps=native, codec=codec, pix_fmt=pix_fmt)
    row, frames = decoded(path, fps=fps)
    rate = min(Fraction(fps), Fraction(native))  # never raised
    assert row["fps"] == pytest.approx(float(rate), rel=1e-3)
    found = [number(frame) for frame in frames]
    assert len(found) == -(-40 * rate // native)  # ceil(duration * rate)
    for k, picture in enumerate(found):  # containers round time stamps to 1 ms
        assert picture in {int((k / rate + error) * native) for error in (0, Fraction(2, 1000))}
    if rate == native:
        assert found == list(range(40))


def test_variable_frame_rate_goes_by_time_stamps(tmp_path):
    times = [0, 40, 80, 500, 540, 1000, 1400]  # ms; the last picture is on display for 40 ms
    path = write_video(tmp_path / "v.mp4", numbered(7), times_ms=times)
    row, frames = decoded(path)
    assert row["fps"] == 25  # as where it moves; the average is 4.9
    assert [number(frame) for frame in frames] == [sum(t <= 40 * k for t in times) - 1 for k in range(36)]


@pytest.mark.parametrize("container", ["avi", "mp4", "mkv"])
def test_b_frames(tmp_path, container):  # AVI does not store when to show them
    pictures = np.concatenate([numbered(40)[::2], numbered(40)[1::2]])
    _, frames = decoded(write_video(tmp_path / f"v.{container}", pictures, bframes=3, gop=40))
    assert [number(frame) for frame in frames] == [*range(0, 40, 2), *range(1, 40, 2)]


def test_unordered_time_stamps(sample_data, tmp_path):
    row, _ = decoded(sample_data / "videos/codec/unordered_pts.mov", tmp_path / "frames")
    assert row["frames"] == 4


def test_one_picture_is_a_video_of_one_frame(tmp_path):
    row, frames = decoded(write_video(tmp_path / "v.mp4", numbered(1)))
    assert row["shot_starts"] == [0] and number(frames[0]) == 0 and len(frames) == 1


# --- space ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width, short_side, expected",
    [
        (90, 160, 45, (45, 80)),
        (160, 90, 45, (80, 45)),
        (48, 64, 256, (48, 64)),  # never enlarged
        (37, 51, 30, (30, 41)),
        (37, 51, 37, (37, 51)),
    ],
)  # odd sizes
def test_short_side(tmp_path, height, width, short_side, expected):
    row, _ = decoded(write_video(tmp_path / "v.mp4", numbered(3, height, width)), short_side=short_side)
    assert (row["height"], row["width"]) == expected


def test_pixels_become_square(tmp_path):
    path = write_video(tmp_path / "v.mp4", numbered(3, 60, 80), aspect=Fraction(4, 3))
    row, _ = decoded(path, short_side=30)
    assert (row["height"], row["width"]) == (30, 53)  # 60 x 106.7 on display


def test_colours_and_place_survive(tmp_path):
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48], picture[:32, 48:], picture[32:, :48] = [220, 40, 30], [30, 200, 40], [40, 50, 210]
    _, (frame, *_) = decoded(write_video(tmp_path / "v.mp4", [picture] * 3), short_side=32)
    for rows, columns in [((2, 14), (2, 22)), ((2, 14), (26, 46)), ((18, 30), (2, 22)), ((18, 30), (26, 46))]:
        part = frame[slice(*rows), slice(*columns)].reshape(-1, 3).astype(int)
        assert np.abs(part - picture[2 * rows[0], 2 * columns[0]]).max() < 12


def yuv_frame(luma_HxW, blue_HxW, red_HxW, colorspace=None):
    """A picture of 4:2:0, limited range, from planes of full size, float; tagged with a value of H.273, table 4."""
    planes = [
        luma_HxW,
        *(cv2.resize(chroma, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for chroma in (blue_HxW, red_HxW)),
    ]
    planes = [plane.round().clip(16, 240).astype(np.uint8).reshape(-1, luma_HxW.shape[1]) for plane in planes]
    frame = av.VideoFrame.from_ndarray(np.concatenate(planes), format="yuv420p")
    if colorspace is not None:
        frame.colorspace = colorspace
    return frame


@pytest.mark.parametrize("width, height", [(320, 240), (214, 160), (160, 120), (159, 119), (128, 96), (107, 80)])
def test_scaling_is_neither_dark_nor_coloured(width, height):
    """Against averages over areas and the matrix of BT.601, in float64; swscale by default is 1 to 3 levels dark."""
    luma = cv2.GaussianBlur(np.kron(np.random.default_rng(0).uniform(60, 180, (12, 16)), np.ones((20, 20))), (5, 5), 0)
    down, across = np.mgrid[:240, :320]
    blue, red = 128 + 40 * np.sin(across / 50), 128 + 30 * np.cos(down / 34)
    frame = yuv_frame(luma, blue, red)
    result = pixels.to_bgr(frame, VideoReformatter(), (width, height), (False, 0), "bt601")[..., ::-1]
    exact = exact_rgb(frame, (width, height), "bt601")
    error = result - exact
    assert np.abs(error.mean(axis=(0, 1))).max() < 0.05 and np.abs(error).mean() < 0.35 and np.abs(error).max() < 1.5


def write_untagged(path, size, tag=None, codec="libx264", pix_fmt="yuv420p"):
    """Pictures of (Y, Cb, Cr) = (90, 110, 160)."""
    width, height = size
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.options = {"qp": "5", "preset": "ultrafast"} if codec == "libx264" else {}
        if tag is not None:
            stream.codec_context.colorspace = tag
        for k in range(3):
            frame = yuv_frame(*(np.full((height, width), level, float) for level in (90, 110, 160)), colorspace=tag)
            if pix_fmt != "yuv420p":
                frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = k, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


BT709, BT601 = 1, 6  # of H.273, table 4


@pytest.mark.parametrize(
    "tag, size, given, expected, noted",
    [
        (None, (1280, 720), "bt601", "bt601", True),
        (None, (1280, 720), "bt709", "bt709", True),
        (None, (720, 1280), "bt601", "bt601", True),
        (None, (704, 576), "bt601", "bt601", False),
        (None, (704, 576), "bt709", "bt709", False),
        (BT709, (1280, 720), "bt601", "bt709", False),
        (BT709, (64, 48), "bt601", "bt709", False),
        (BT601, (1280, 720), "bt709", "bt601", False),
        (BT601, (64, 48), "bt709", "bt601", False),
    ],
)
def test_untagged_colours(tmp_path, tag, size, given, expected, noted):
    path = write_untagged(tmp_path / "v.mp4", size, tag)
    row, frames = decoded(path, short_side=48, untagged_matrix=given)
    rgb = np.array(MATRIX[expected]([90, 110, 160]))
    assert np.abs(frames[1].mean(axis=(0, 1)) - rgb).max() < 2
    name = {"bt601": "BT.601", "bt709": "BT.709"}[expected]
    assert row["notes"] == ([f"untagged colours: {size[0]} x {size[1]}, read as {name}"] if noted else [])


@pytest.mark.parametrize(
    "codec, pix_fmt, container",
    [("ffv1", "bgr0", "mkv"), ("ffv1", "gray", "mkv"), ("mjpeg", "yuvj420p", "avi"), ("png", "rgb24", "mov")],
)
def test_colours_that_need_no_tag(tmp_path, codec, pix_fmt, container):
    """Red, green and blue, grey, and JPEG, of which JFIF says BT.601."""
    path = write_untagged(tmp_path / f"v.{container}", (1280, 720), codec=codec, pix_fmt=pix_fmt)
    (row, frames), (other, others) = (decoded(path, short_side=48, untagged_matrix=m) for m in ("bt601", "bt709"))
    assert row["notes"] == other["notes"] == [] and np.array_equal(frames, others)


TURNS = {  # (a, b, c, d) of the display matrix: a point (x, y), y down, goes to (a x + c y, b x + d y)
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): np.rot90,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda p: np.rot90(p.transpose(1, 0, 2), 2),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_orientation_tag(tmp_path, matrix):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:], picture[24:, :32] = 230, 150, 80
    path = write_video(tmp_path / "v.mp4", [picture] * 2)
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    _, (frame, _) = decoded(path)
    expected = TURNS[matrix](picture)
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("degrees, clockwise", [(0, 0), (90, 1), (180, 2), (270, 3)])
def test_rotation_of_real_recordings(sample_data, tmp_path, degrees, clockwise):
    path = sample_data / f"videos/codec/rot_{degrees}.mov"
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    _, (frame, *_) = decoded(path, tmp_path / "frames", short_side=320)
    assert np.abs(frame.astype(int) - np.rot90(stored, -clockwise)).mean() < 4


# --- the same again, and in little memory -----------------------------------------------------------------------------


def test_same_bytes_every_time(tmp_path):
    path = write_video(tmp_path / "v.mp4", scenes([20, 20]))
    decoded(path, tmp_path / "a")
    decoded(path, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_memory_does_not_grow_with_length(tmp_path):
    peak = {}
    short = write_video(tmp_path / "short.mp4", numbered(10, 240, 320), gop=1)
    for count in (4, 40):  # 400 pictures of 320 x 240 are 92 MB
        path = loop_video(tmp_path / f"{count}.mp4", short, count)
        code = (
            "import pathlib; from input_pipeline.preparation import video; video.decode_file("
            f"{str(path)!r}, {str(tmp_path / 'frame_file')!r}, **{SETTINGS!r});"
            "print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
        )
        peak[count] = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert peak[40] - peak[4] < 20_000  # KiB


# --- refused --------------------------------------------------------------------------------------------------------


def text(folder):
    path = folder / "notes.mp4"
    path.write_text("these are notes, line after line\n" * 200)
    return path


def playlist(folder):
    write_video(folder / "real.ts", numbered(10))
    path = folder / "list.m3u8"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.ts\n#EXT-X-ENDLIST\n")
    return path


def concatenation(folder):
    write_video(folder / "real.mp4", numbered(10))
    path = folder / "list.mp4"
    path.write_text("ffconcat version 1.0\nfile real.mp4\n")
    return path


def picture(folder):
    path = folder / "picture.mp4"
    path.write_bytes(cv2.imencode(".png", numbered(1)[0])[1].tobytes())
    return path


def empty(folder):
    path = folder / "empty.mp4"
    path.touch()
    return path


def sound(folder):
    path = folder / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cover_only(folder):
    path = sound(folder)
    with av.open(str(path)) as song, av.open(str(folder / "cover.mp4"), "w") as container:
        audio = container.add_stream_from_template(song.streams.audio[0])
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")))
        container.mux(cover.encode())
        for packet in song.demux(audio=0):
            if packet.dts is not None:
                packet.stream = audio
                container.mux(packet)
    return folder / "cover.mp4"


def claims(side):
    """A motion-JPEG file, all headers of which say side x side."""

    def make(folder):
        path = write_video(folder / "huge.avi", numbered(5), codec="mjpeg", pix_fmt="yuvj420p")
        data = path.read_bytes().replace(struct.pack(">BHH", 8, 48, 64), struct.pack(">BHH", 8, side, side))
        path.write_bytes(data.replace(struct.pack("<II", 64, 48), struct.pack("<II", side, side)))
        return path

    return make


def million_fps(folder):
    path = folder / "fast.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1_000_000)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for shown in numbered(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())
    return path


def ten_hours(folder):
    path = write_video(folder / "long.mkv", numbered(20))
    where = path.read_bytes().index(b"\x44\x89\x88") + 3
    data = bytearray(path.read_bytes())
    struct.pack_into(">d", data, where, 36_000_000.0)
    path.write_bytes(data)
    return path


def cut_short(container, codec="libx264"):
    def make(folder):
        path = write_video(
            folder / f"cut.{container}",
            scenes([60], height=96, width=128),
            codec=codec,
            pix_fmt="yuv420p",
            container_options={"movflags": "faststart"} if container == "mp4" else {},
        )
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return make


def overwritten(folder):
    path = write_video(folder / "hole.mp4", scenes([60]))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "make, reason",
    [
        (empty, "empty file"),
        (text, "not a video"),
        (playlist, "not a video"),
        (concatenation, "not a video"),
        (picture, "not a video"),
        (sound, "no video stream"),
        (cover_only, "no video stream"),
        (claims(65535), "absurd size"),
        (claims(12000), "absurd size: 12000 x 12000"),
        (million_fps, "absurd frame rate"),
        (ten_hours, "truncated: its header says 36000.0 s, it ends after 0.8 s"),
        (overwritten, "truncated or damaged"),
        (cut_short("mp4"), "truncated or damaged"),
        (cut_short("mkv"), "truncated"),
        (cut_short("ts"), "truncated"),
        (cut_short("avi", "mpeg4"), "truncated"),
        (cut_short("flv", "flv1"), "truncated"),
        (lambda folder: folder / "none.mp4", "unreadable: No such file"),
        (lambda folder: folder, "not a video: a folder, but not of numbered pictures"),
    ],
)
def test_refused_with_the_reason(tmp_path, make, reason):
    with pytest.raises(video.Refused, match=f"^{reason}"):
        video.decode_file(str(make(tmp_path)), str(tmp_path / "frames"), **SETTINGS)


def test_damaged_recording_is_not_half_kept(sample_data, tmp_path):
    with pytest.raises(video.Refused, match="^truncated or damaged"):
        decoded(sample_data / "videos/codec/corrupted.mp4", tmp_path / "frames")


def test_names_are_never_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("a.ts", numbered(5))
    with pytest.raises(video.Refused, match="unreadable"):
        video.decode_file("concat:a.ts|a.ts", "frames", **SETTINGS)
    pathlib.Path("concat:a.ts|a.ts").write_bytes(pathlib.Path("a.ts").read_bytes())
    assert decoded("concat:a.ts|a.ts", pathlib.Path("frames"))[0]["frames"] == 5


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """Takes many seconds to decode with SLOW settings, but not to make."""
    folder = tmp_path_factory.mktemp("long")
    short = write_video(folder / "short.mp4", numbered(8, 720, 1280), pix_fmt="yuv420p", gop=1)
    return loop_video(folder / "v.mp4", short, 400)


@pytest.mark.parametrize(
    "limits, reason",
    [
        ({"cpu_s": 1}, "too slow: more than 1 s of CPU time"),
        ({"wall_s": 0.3}, "too slow: more than 0.3 s"),
    ],
)
def test_a_limit_refuses_the_file_and_not_the_next_one(long_video, tmp_path, limits, reason):
    sandbox = Sandbox(**LIMITS | limits)
    row = sandbox.decode(str(long_video), str(tmp_path / "frames"), **SLOW)
    assert row == {"status": "refused", "reason": reason} | ({"retry": True} if "wall_s" in limits else {})
    short = write_video(tmp_path / "v.mp4", numbered(3))
    assert sandbox.decode(str(short), str(tmp_path / "frames"), **SETTINGS)["status"] == "ok"
    sandbox.close()


def test_a_limit_of_memory_that_no_file_could_meet_is_no_fault_of_the_file(tmp_path):
    path = write_video(tmp_path / "v.mp4", numbered(3))
    sandbox = Sandbox(**LIMITS | {"memory_mb": 64})
    with pytest.raises(
        DataError, match=r"memory_mb=64: the decoder takes \d+ MiB before it opens a file; give \d+ or more"
    ):
        sandbox.decode(str(path), str(tmp_path / "frames"), **SETTINGS)
    sandbox.close()


@pytest.mark.parametrize(
    "what, times, expected",
    [
        (signal.SIGSEGV, 2, {"status": "refused", "reason": "crashed the decoder, twice: SIGSEGV"}),
        (
            signal.SIGKILL,
            1,
            {
                "status": "refused",
                "reason": "killed from outside: the decoder process was ended by SIGKILL",
                "retry": True,
            },
        ),
    ],
)
def test_a_crash_of_the_decoder_is_told_from_a_kill(long_video, tmp_path, what, times, expected):
    """Of a crash, which may be of a moment, only the second counts; after both the next file is decoded as ever."""
    sandbox = Sandbox(**LIMITS)
    rows, hit = [], set()
    arguments = str(long_video), str(tmp_path / "frames")
    thread = threading.Thread(target=lambda: rows.append(sandbox.decode(*arguments, **SLOW)))
    thread.start()
    while thread.is_alive() and len(hit) < times:
        if (tmp_path / "frames").exists():  # then the child is decoding
            for child in set(children(sandbox._server.pid)) - hit:
                hit.add(child)
                os.kill(child, what)
        time.sleep(0.01)
    thread.join()
    assert rows == [expected]
    short = write_video(tmp_path / "v.mp4", numbered(3))
    row = sandbox.decode(str(short), str(tmp_path / "frames"), **SETTINGS)
    assert row["status"] == "ok" and row["frames"] == 3
    sandbox.close()


def test_a_decoding_process_stays_below_its_limit_of_memory(tmp_path):
    """A picture enlarged to 32 million pixels takes 400 MiB or more, which one limit allows and the other does not."""
    path = write_video(tmp_path / "v.mp4", numbered(1, 64, 64))
    code = """
import resource, sys
from input_pipeline.preparation.sandbox import Sandbox
sandbox = Sandbox(memory_mb=int(sys.argv[3]), cpu_s=60, wall_s=120)
large = dict(function="decode_head", frames=1, short_side=5700, image_size=5600)
row = sandbox.decode(sys.argv[1], sys.argv[2], **large)
sandbox.close()
print(row["status"], row["reason"], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, sep="|")
"""
    found = {}
    for limit in (550, 4096):
        arguments = [sys.executable, "-c", code, str(path), str(tmp_path / "frames"), str(limit)]
        run = subprocess.run(arguments, capture_output=True, text=True, check=True)
        status, reason, peak = run.stdout.strip().split("|")
        found[limit] = status, reason
        assert int(peak) < limit
    assert found == {550: ("refused", "too large: more than 550 MiB of memory"), 4096: ("ok", "")}


def test_closing_ends_the_file_in_work(long_video, tmp_path):
    sandbox = Sandbox(**LIMITS)
    arguments = str(long_video), str(tmp_path / "frames")

    def decode_until_closed():
        with pytest.raises(DataError, match="the decoder process ended"):
            sandbox.decode(*arguments, **SLOW)

    thread = threading.Thread(target=decode_until_closed)
    thread.start()
    while not (tmp_path / "frames").exists():
        time.sleep(0.01)
    child = children(sandbox._server.pid)[0]
    closing = threading.Thread(target=sandbox.close)
    closing.start()
    deadline = time.monotonic() + 5
    while pathlib.Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not pathlib.Path(f"/proc/{child}").exists()
    closing.join()
    thread.join()


def test_full_disk_is_no_fault_of_the_video(tmp_path):
    path = write_video(tmp_path / "v.mp4", scenes([40]))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from input_pipeline.preparation.sandbox import Sandbox;"
        f"Sandbox(**{LIMITS!r}).decode({str(path)!r}, {str(tmp_path / 'frame_file')!r}, **{SETTINGS!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith("OSError: [Errno 27] File too large")
