#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg's mpegts demuxer and H.264 parser): a lost transport packet marks the picture before the one that
# lost it as corrupt, nothing at all if it was of the first picture, and where two whole recordings are joined a whole
# picture is marked. One would expect the damaged picture to be marked, and none of two whole recordings.
# The script fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

folder = Path(sys.argv[1])


def recording() -> bytes:
    with av.open(str(folder / "part.ts"), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"qp": "10", "bf": "0"}, width=160, height=120)
        for k in range(20):
            noise = np.random.default_rng(k).integers(0, 256, (120, 160, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(noise)
            frame.pts, frame.time_base = k, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return (folder / "part.ts").read_bytes()


def marked(data: bytes) -> list[int]:
    (folder / "v.ts").write_bytes(data)
    with av.open(str(folder / "v.ts")) as container:
        return [k for k, packet in enumerate(container.demux(video=0)) if packet.size and packet.is_corrupt]


whole = recording()
packets = [whole[at : at + 188] for at in range(0, len(whole), 188)]
begins = [k for k, packet in enumerate(packets) if packet[1:3] == b"\x41\x00"]
lost = {}
for picture in (0, 1, 10):
    lost[picture] = marked(b"".join(packet for k, packet in enumerate(packets) if k != begins[picture] + 3))
print(av.__version__, av.library_versions["libavformat"])
print("lost in picture -> marked:", lost, "; whole:", marked(whole), "; two whole ones joined:", marked(whole + whole))
assert lost == {0: [], 1: [0], 10: [9]} and marked(whole) == [] and marked(whole + whole) == [18]
print("as stated")
PYTHON
