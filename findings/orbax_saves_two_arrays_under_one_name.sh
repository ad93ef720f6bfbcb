#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: an array's name in the checkpoint is its path in the tree joined by dots, and dots in keys are
# not escaped. So {"head.bias": x, "head": {"bias": y}} has two leaves and one place: both come back as x, or both as y,
# without a word on saving or restoring, with a template and without, with OCDBT (the default) and without. Flat names of
# PyTorch beside nested ones lead there. One would expect an error, or two names: the checkpoint's metadata has both leaves.
# Seen: saved 1 and 2, restored 2 and 2 with OCDBT, 1 and 1 without. The script fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

print("orbax-checkpoint", ocp.__version__)
tree = {"head.bias": np.full(3, 1, np.float32), "head": {"bias": np.full(3, 2, np.float32)}}
blank = {"head.bias": np.zeros(3, np.float32), "head": {"bias": np.zeros(3, np.float32)}}


def report(name: str, back: dict) -> None:
    found = [float(back["head.bias"][0]), float(back["head"]["bias"][0])]
    print(f"{name}: saved [1.0, 2.0], restored {found}")
    assert found[0] == found[1]


for use_ocdbt in (True, False):
    path = Path(sys.argv[1]) / f"ocdbt_{use_ocdbt}"
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt))
    checkpointer.save(path, tree)
    report(f"PyTreeCheckpointHandler(use_ocdbt={use_ocdbt})", checkpointer.restore(path))
with ocp.StandardCheckpointer() as standard:
    standard.save(Path(sys.argv[1]) / "standard", tree)
    standard.wait_until_finished()
    report("StandardCheckpointer, with a template", standard.restore(Path(sys.argv[1]) / "standard", blank))
print("as stated")
PYTHON
