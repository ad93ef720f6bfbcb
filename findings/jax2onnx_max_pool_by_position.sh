#!/usr/bin/env bash
# jax2onnx 0.17.1 converts flax's nn.max_pool only if its window is given by keyword: by position, as flax's own signature
# and documentation have it, tracing ends in a TypeError of jax2onnx's replacement. And it requires orbax-checkpoint
# below 0.11.37, so that beside a newer Orbax pip silently brings an older one. The script fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax2onnx==0.17.1 jax==0.10.2 flax==0.12.8
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata

from flax import linen as nn
from jax2onnx import to_onnx

requires = [line for line in importlib.metadata.requires("jax2onnx") if line.startswith("orbax-checkpoint")]
print("requires", requires)
assert any("<0.11.37" in line for line in requires)
to_onnx(lambda x: nn.max_pool(x, window_shape=(3, 3), strides=(2, 2)), [("B", 8, 8, 3)])
try:
    to_onnx(lambda x: nn.max_pool(x, (3, 3), strides=(2, 2)), [("B", 8, 8, 3)])
except TypeError as error:
    print("TypeError:", error)
    assert "positional argument" in str(error)
else:
    raise SystemExit("by position it works now")
print("as stated")
PYTHON
