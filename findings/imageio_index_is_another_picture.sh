#!/usr/bin/env bash
# imageio 2.38.1 with PyAV 18.1.0: iio.imread(path, index=k) seeks, takes the key picture's time times the rate for its
# number and counts on from there. Matroska's times are whole milliseconds, and that number is rounded down: at 29.97
# pictures a second (ordinary H.264, closed groups, constant rate) index=k gives picture k + 1 after some key pictures, and
# the right one after others. In MP4, at 25/s, and when all pictures are read in order, it is right.
# One would expect index=k to be the k-th picture, or an error.
# Seen, of index 0, 5, ... 55: MP4 29.97/s and Matroska 25/s none wrong, Matroska 29.97/s 4: 15 -> 16, 20 -> 21,
# 40 -> 41, 45 -> 46.
# The script fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q imageio==2.38.1 av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from fractions import Fraction
from pathlib import Path

import av
import imageio
import imageio.v3 as iio
import numpy as np


def write(path: Path, rate: Fraction) -> None:
    """60 pictures, a key picture every 12; picture k shows k in binary, as 8 black or white blocks, over noise."""
    texture = np.random.default_rng(0).integers(0, 256, (16, 92, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate, width=128, height=64, pix_fmt="yuv420p")
        stream.codec_context.gop_size = 12
        for k in range(60):
            picture = texture[:, 2 * k : 2 * k + 128].copy()
            picture[:16] = np.array([255 * (k >> b & 1) for b in range(8)], np.uint8).repeat(16)[None, :, None]
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = k, 1 / rate
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def shown(picture: np.ndarray) -> int:
    return sum(int(picture[8, 16 * b + 4 : 16 * b + 12, 1].mean() > 128) << b for b in range(8))


print("imageio", imageio.__version__, "av", av.__version__)
ntsc, wrong = Fraction(30000, 1001), {}
for name, rate in (("mp4", ntsc), ("mkv", Fraction(25)), ("mkv", ntsc)):
    path = Path(sys.argv[1]) / f"x.{name}"
    write(path, rate)
    assert [shown(picture) for picture in iio.imiter(path, plugin="pyav")] == list(range(60))
    found = {k: shown(iio.imread(path, index=k, plugin="pyav")) for k in range(0, 60, 5)}
    wrong[name, rate] = {k: n for k, n in found.items() if k != n}
    print(f"{name}, {float(rate):.2f}/s: {len(wrong[name, rate])} of {len(found)} wrong; index -> picture", wrong[name, rate])
for (name, rate), pictures in wrong.items():
    assert bool(pictures) == (name == "mkv" and rate != 25)
    assert all(n == k + 1 for k, n in pictures.items())
print("as stated")
PYTHON
