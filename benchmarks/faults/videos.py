"""R15: thousands of damaged videos through a preparation: no crash, no hang, each one in the ledger, memory bounded."""

import json
import os
import pathlib
import random
import resource
from fractions import Fraction

import av
import numpy as np

from benchmarks.faults import runs
from benchmarks.faults.damage import changed

SOURCES = (  # file name, codec, pixel format
    ("h264.mp4", "libx264", "yuv420p"),
    ("h264.mkv", "libx264", "yuv420p"),
    ("h264.ts", "libx264", "yuv420p"),
    ("h264.mov", "libx264", "yuv444p"),
    ("mpeg4.avi", "mpeg4", "yuv420p"),
    ("mpeg4.mp4", "mpeg4", "yuv420p"),
    ("mpeg2.mpg", "mpeg2video", "yuv420p"),
    ("vp8.webm", "libvpx", "yuv420p"),
    ("vp9.webm", "libvpx-vp9", "yuv420p"),
    ("mjpeg.avi", "mjpeg", "yuvj420p"),
)
MEMORY_MB = 640  # of a decoding child's address space; some 400 of it are the libraries'
LARGE_SIDE = 12_000  # pixels; one such picture takes 216 MB or more, in a file of two


def make_sources(folder: pathlib.Path) -> list[pathlib.Path]:
    """Ten small videos of drifting noise, one for each pair of container and codec."""
    folder.mkdir(parents=True)
    texture = np.random.default_rng(0).integers(0, 256, (6, 20, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for name, codec, pixels in SOURCES:
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=Fraction(25))
            stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
            for t in range(24):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[:, t : t + 64]), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return sorted(folder.iterdir())


def make_large(path: pathlib.Path) -> pathlib.Path:
    """A whole and valid video of pictures that nobody needs, a hundred times as large in memory as on the disk."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt = LARGE_SIDE, LARGE_SIDE, "yuvj420p"
        frame = av.VideoFrame(LARGE_SIDE, LARGE_SIDE, "yuvj420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to four changes of a file's bytes, at its head half of the time, where its structure is described."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.choice(("flip", "flip", "cut", "zero", "grow", "splice", "noise"))
        if kind == "splice":
            other, place = rng.choice(others), rng.randrange(len(data) or 1)
            data = data[:place] + other[rng.randrange(len(other)) :]
        elif kind == "noise":
            place = rng.randrange(min(len(data), 512) or 1)
            data = data[:place] + rng.randbytes(rng.randrange(1, 32)) + data[place + 16 :]
        elif rng.random() < 0.5:
            data = changed(data[:512], kind, rng) + data[512:]
        else:
            data = changed(data, kind, rng)
    return data


def hostile(count: int, folder: pathlib.Path) -> dict:
    """R15: prepares `count` mutated files in batches, each with a file of absurdly large pictures.

    Counts what is wrong, what became of them, and the most memory that a child (or the server that forks it) took.

    Seen failing: without the limits of size and memory, one of which is enough, the large file was decoded.
    """
    from input_pipeline.preparation.steps import Settings

    sources = make_sources(folder / "sources")
    large = make_large(folder / "large.avi")
    contents = [path.read_bytes() for path in sources]
    rng, wrong, outcomes, memory = random.Random(0), [], {}, 0.0
    done = 0
    while done < count:
        videos, out = folder / f"mutated{done}", folder / f"store{done}"
        videos.mkdir()
        batch = min(1000, count - done)
        for i in range(batch):
            which = rng.randrange(len(sources))
            (videos / f"{i:04d}-{sources[which].name}").write_bytes(mutated(contents[which], contents, rng))
        os.link(large, videos / large.name)
        settings = Settings(short_side=32, memory_mb=MEMORY_MB)
        try:
            answer = runs.in_child(_prepare, str(videos), str(out), settings, seconds=1800)
        except RuntimeError as error:
            wrong.append(f"a preparation of {batch} files: {error}")
            answer = {"children_mb": 0.0}
        ledger = out / "ledger.jsonl"
        lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
        if {line["input"] for line in lines} != {path.name for path in videos.iterdir()} or len(lines) != batch + 1:
            wrong.append(f"{len(lines)} lines in the ledger for {batch + 1} files")
        for line in lines:
            kind = "ok" if line["status"] == "ok" else line["reason"].split(":")[0]
            if line["input"] != large.name:
                outcomes[kind] = outcomes.get(kind, 0) + 1
            elif kind not in ("absurd size", "too large"):
                wrong.append(f"a video of {LARGE_SIDE} x {LARGE_SIDE} pixels: {kind}")
        memory = max(memory, answer["children_mb"])
        done += batch
    if memory > MEMORY_MB:
        wrong.append(f"a child held {memory:.0f} MiB")
    crashes = {kind: n for kind, n in outcomes.items() if "crashed" in kind}
    return {
        "files": count,
        "outcomes": dict(sorted(outcomes.items(), key=lambda item: -item[1])),
        "decoder crashes, contained": sum(crashes.values()),
        "children_peak_mb": round(memory, 1),
        "limit_mb": MEMORY_MB,
        "wrong": wrong,
    }


def _prepare(videos: str, out: str, settings) -> dict:
    from input_pipeline.preparation.local import prepare

    prepare(videos, out, settings, workers=2)
    return {"children_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}
