#!/usr/bin/env bash
# onnxruntime 1.31.0 with its default optimisations makes a Pad of zeros and the MaxPool behind it one MaxPool, which pads
# with -inf: where values at the border are negative, the result is another one, without a word. Without optimisations it
# is right, and so is 1.32.0. Networks that pad signed values with zeros before pooling are BiT's and timm's resnetv2_*_bit.
# The script fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cat > "$folder/pool.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

nodes = [
    helper.make_node("Pad", ["x", "pads"], ["padded"]),
    helper.make_node("MaxPool", ["padded"], ["y"], kernel_shape=[3, 3], strides=[2, 2]),
]
pads = numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads")
given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])
result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2, 2])
graph = helper.make_graph(nodes, "pool", [given], [result], [pads])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model)
x, found = np.full((1, 1, 4, 4), -1, np.float32), {}
for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.__members__[level]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found[level] = session.run(None, {"x": x})[0].ravel().tolist()
print(onnxruntime.__version__, found)
right, version = [0, 0, 0, -1], sys.argv[1]
assert onnxruntime.__version__ == version and found["ORT_DISABLE_ALL"] == right
assert found["ORT_ENABLE_ALL"] == (right if version == "1.32.0" else [-1, -1, -1, -1])
PYTHON
for version in 1.31.0 1.32.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "onnxruntime==$version" onnx==1.23.2 numpy==2.4.6
  "$folder/$version/bin/python" "$folder/pool.py" "$version"
done
echo "as stated"
