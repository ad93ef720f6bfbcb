#!/usr/bin/env bash
# PyAV 18.1.0: an encoder given RGB frames and told colorspace = BT.709, or color_range = full, writes that tag into the
# file and converts the pixels by BT.601 in the limited range all the same. Reading follows the tag, by PyAV too, so what
# was written comes back in other colours, without a word. With the frame converted first, by VideoReformatter and its
# dst_colorspace and dst_color_range, it is right. One would expect the automatic conversion to be the one of the tag.
# Seen, RGB (0, 200, 40) written and read: no tag (0, 200, 39), BT.709 (0, 171, 35), full range (13, 189, 48).
# The script fails when that changes.
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
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter


def read_back(converted: bool, space: Colorspace | None, width: ColorRange | None) -> np.ndarray:
    path = sys.argv[1] + "/x.mp4"
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=25, width=64, height=64, pix_fmt="yuv420p", options={"qp": "1"})
        if space:
            stream.codec_context.colorspace = space
        if width:
            stream.codec_context.color_range = width
        for k in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), (0, 200, 40), np.uint8))
            if converted:
                frame = VideoReformatter().reformat(
                    frame, format="yuv420p", dst_colorspace=space, dst_color_range=width or ColorRange.MPEG
                )
            frame.pts, frame.time_base = k, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        assert not space or frame.colorspace == space
        assert not width or frame.color_range == width
        return frame.to_ndarray(format="rgb24")[32, 32].astype(int)


print("av", av.__version__, av.library_versions["libswscale"])
tags = {"no tag": (None, None), "BT.709": (Colorspace.ITU709, None), "full range": (None, ColorRange.JPEG)}
error = {}
for name, (space, width) in tags.items():
    for converted in (False, True):
        rgb = read_back(converted, space, width)
        error[name, converted] = np.abs(rgb - (0, 200, 40)).max()
        print(f"{name}, {'converted first' if converted else 'RGB to the encoder'}: (0, 200, 40) comes back as {rgb}")
assert error["no tag", False] <= 3 and max(error[name, True] for name in tags) <= 3
assert error["BT.709", False] > 20 and error["full range", False] > 8
print("as stated")
PYTHON
