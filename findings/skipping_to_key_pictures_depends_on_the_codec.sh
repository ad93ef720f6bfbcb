#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1.2): codec_context.skip_frame = "NONKEY", the usual way to read key pictures alone, does nothing for
# VP9 (what WebM holds) and FFV1: every picture comes back, without a word; as does "NONINTRA" for VP8 and MPEG-4 too.
# With H.264, HEVC, AV1, VP8 and MPEG-4 NONKEY gives the key pictures. So samples of key pictures are dense for one half
# of a mixed collection and sparse for the other; frame.key_frame, or demuxing and looking at packet.is_keyframe, is right
# for all. One would expect a decoder without the option to refuse it, or the library to leave out the packets.
# Seen, of 60 pictures with 5 key pictures: libx264 5, libx265 5, libvpx (VP8) 5, mpeg4 5, libvpx-vp9 60, ffv1 60.
# PyAV 19.0.2 (FFmpeg 9.0.2) does the same. The script fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from fractions import Fraction

import av
import numpy as np

path = sys.argv[1] + "/x.mkv"
texture = np.random.default_rng(0).integers(0, 256, (16, 84, 3), np.uint8).repeat(4, 0).repeat(4, 1)
print("av", av.__version__, av.library_versions["libavcodec"])
came = {}
for codec in ("libx264", "libx265", "libvpx", "mpeg4", "libvpx-vp9", "ffv1"):
    with av.open(path, "w") as out:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = out.add_stream(codec, rate=25, width=96, height=64, pix_fmt="yuv420p", options=options)
        stream.codec_context.gop_size = 12
        for k in range(60):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[:, 2 * k : 2 * k + 96]))
            frame.pts, frame.time_base = k, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    for skip in ("DEFAULT", "NONKEY", "NONINTRA"):
        with av.open(path) as container:
            container.streams.video[0].codec_context.skip_frame = skip
            frames = list(container.decode(video=0))
            came[codec, skip] = len(frames), sum(frame.key_frame for frame in frames)
    print(f"{codec}: pictures, and key pictures among them, by skip_frame:", {s: came[codec, s] for c, s in came if c == codec})
    assert came[codec, "DEFAULT"] == (60, 5)
for codec in ("libx264", "libx265", "libvpx", "mpeg4"):
    assert came[codec, "NONKEY"] == (5, 5)
for codec in ("libvpx-vp9", "ffv1"):
    assert came[codec, "NONKEY"] == (60, 5)
assert came["libvpx", "NONINTRA"] == came["mpeg4", "NONINTRA"] == (60, 5) and came["libx264", "NONINTRA"] == (5, 5)
print("as stated")
PYTHON
