#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93: what the colours of a picture with opacity are hangs on its format. Of AVIF,
# IMREAD_COLOR_RGB gives BGR as soon as a pixel is not opaque (red and blue are swapped), and RGB where all are. Of TIFF,
# every mode multiplies the colours by the opacity (half opaque is half as bright), also IMREAD_UNCHANGED, which gives the
# opacity too. PNG and JPEG 2000 give the colours as stored. One would expect the flag to say the order of channels, and
# opacity to be left out alike.
# Seen, (200, 100, 10) at opacity 128 as RGB: PNG (200, 100, 10), AVIF (11, 100, 200), TIFF (100, 50, 5).
# The script fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q opencv-python-headless==5.0.0.93 pillow==12.3.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import cv2
import numpy as np
from PIL import Image

print("OpenCV", cv2.__version__)
seen = {}
for opacity in (255, 128):
    for form, options in (("PNG", {}), ("JPEG2000", {}), ("AVIF", {"quality": 100}), ("TIFF", {})):
        file = io.BytesIO()
        Image.new("RGBA", (16, 16), (200, 100, 10, opacity)).save(file, form, **options)
        data = np.frombuffer(file.getvalue(), np.uint8)
        rgb = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)[8, 8].astype(int)
        unchanged = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)[8, 8, 2::-1].astype(int)
        seen[form, opacity] = rgb
        print(f"{form}, opacity {opacity}: IMREAD_COLOR_RGB {rgb}, IMREAD_UNCHANGED, as RGB, {unchanged}")
        expected = (100, 50, 5) if (form, opacity) == ("TIFF", 128) else (200, 100, 10)
        assert np.abs(unchanged - expected).max() <= 2
for (form, opacity), rgb in seen.items():
    shown = {("AVIF", 128): (10, 100, 200), ("TIFF", 128): (100, 50, 5)}.get((form, opacity), (200, 100, 10))
    assert np.abs(rgb - shown).max() <= 2, (form, opacity)
print("as stated")
PYTHON
