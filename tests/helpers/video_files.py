"""Small real video files for tests."""

import pathlib
from fractions import Fraction

import av
import cv2
import numpy as np

from input_pipeline.preparation import video

SETTINGS = {"fps": 25, "short_side": 256, "jpeg_quality": 95, "shot_rule": "auto"}


def decoded(path, frame_file=None, **settings):
    """(row, RGB frames) of one file."""
    frame_file = frame_file or pathlib.Path(str(path) + ".jpegs")
    row = video.decode_file(str(path), str(frame_file), **SETTINGS | settings)
    data, frames, start = frame_file.read_bytes(), [], 0
    for length in row["jpeg_bytes"]:
        frames.append(cv2.imdecode(np.frombuffer(data[start : start + length], np.uint8), cv2.IMREAD_COLOR)[..., ::-1])
        start += length
    assert start == len(data) and len(frames) == row["frames"]
    assert all(frame.shape == (row["height"], row["width"], 3) for frame in frames)
    return row, frames


def write_video(
    path,
    pictures,
    *,
    fps=25,
    times_ms=None,
    codec="libx264",
    pix_fmt="yuv444p",
    aspect=None,
    gop=12,
    bframes=0,
    container_options=None,
):
    """Encodes uint8 RGB pictures [T, H, W, 3] with little loss; `times_ms` gives each its time stamp."""
    pictures = np.asarray(pictures)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(100000))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        if codec == "libx264":
            stream.options = {"qp": "1", "preset": "ultrafast", "bf": str(bframes)}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(count, height=48, width=64):
    """Pictures whose grey level tells their number: number(picture) == i for i < 40."""
    return np.stack([np.full((height, width, 3), 10 + 6 * i, np.uint8) for i in range(count)])


def number(picture):
    return round((float(np.mean(picture)) - 10) / 6)


def scenes(lengths, seed=0, height=48, width=64):
    """A moving texture that changes its colours at once after each of the given numbers of frames."""
    rng = np.random.default_rng(seed)
    pictures = []
    for k, length in enumerate(lengths):
        texture = rng.integers(0, 60, (height, 2 * width + sum(lengths), 3), np.uint8)
        texture += np.array(np.roll([180, 90, 0], k), np.uint8)
        pictures += [texture[:, i : i + width] for i in range(length)]
    return np.stack(pictures)


def loop_video(path, source, count):
    """Repeats the packets of a video of key frames `count` times, without encoding them again."""
    with av.open(str(source)) as short, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(short.streams.video[0])
        packets = [packet for packet in short.demux(video=0) if packet.dts is not None]
        step = packets[1].dts - packets[0].dts
        for i in range(count * len(packets)):
            packet = av.Packet(bytes(packets[i % len(packets)]))
            packet.pts = packet.dts = i * step
            packet.time_base, packet.is_keyframe, packet.stream = packets[0].time_base, True, stream
            container.mux(packet)
    return path
