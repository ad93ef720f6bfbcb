#!/usr/bin/env bash
# etils 1.15.0 with TensorFlow installed: EPATH_USE_TF, which says whether epath reaches gs:// and s3:// by TensorFlow or
# by fsspec, counts only if it is set before the first path of whatever kind is used in the process, also a local one:
# epath.gpath._is_tf_installed is cached. JAX's compilation cache and Orbax use such paths, at moments nobody thinks of.
# Set later, the variable changes nothing, without a word: Orbax then writes a checkpoint in gs:// by TensorFlow, which
# knows other accounts and servers than TensorStore, by which the same save writes its arrays.
# One would expect a variable that is read through a function at each call (epath.gpath._epath_use_tf) to hold from then on.
# Seen: the same path, s3://bucket/x, is asked for by fsspec where the variable comes first, and by TensorFlow where a
# look at a local folder does. The script fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "etils[epath]==1.15.0" fsspec==2026.9.0 tensorflow-cpu==2.21.0
cat >"$folder/ask.py" <<'PYTHON'
import os
import sys

from etils import epath

for word in sys.argv[1:]:
    if word == "variable":
        os.environ["EPATH_USE_TF"] = "0"
    else:
        epath.Path("/").exists()
try:
    epath.Path("s3://bucket/x").exists()
except Exception as error:
    print("fsspec" if "s3fs" in str(error) else type(error).__name__)
PYTHON
ask() { TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/ask.py" "$@" 2>/dev/null; }
first="$(ask variable folder)" second="$(ask folder variable)"
echo "variable, then a local folder: $first; a local folder, then the variable: $second"
[ "$first" = fsspec ] && [ "$second" = UnimplementedError ]
echo "as stated"
