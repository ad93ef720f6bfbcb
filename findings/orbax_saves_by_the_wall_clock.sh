#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: the deadline of an asynchronous save (AsyncOptions.timeout_secs, 1200 s) is measured by
# time.time(), the wall clock. If that jumps ahead by 20 minutes while arrays are written (a virtual machine that wakes,
# a first contact with a time server), the save fails with "ChainedFuture completed 0/1 futures but timed out", although
# nothing was slow: the arrays lie in the temporary folder, which is never renamed. One would expect the monotonic clock.
# Here time.time() jumps once, by 1201 s, when the first file of an array is there. With timeout_secs of days it is saved.
# Seen: TimeoutError and no step with the default; step 1 with 20 days. The script fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import threading
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

print("orbax-checkpoint", ocp.__version__)
right = time.time


def save(name: str, timeout: int) -> tuple[str, int | None]:
    """What the save raised, and the newest step, where the clock jumps once while the arrays are written."""
    folder, ahead, done = Path(sys.argv[1]) / name, [0], threading.Event()
    options = ocp.CheckpointManagerOptions(async_options=ocp.options.AsyncOptions(timeout_secs=timeout))

    def jump() -> None:
        while not done.is_set() and not any(path.is_file() for path in folder.rglob("*ocdbt.process_0/d/*")):
            time.sleep(0.001)
        ahead[0] = 1201

    raised = "nothing"
    with ocp.CheckpointManager(folder, options=options) as manager:
        time.time = lambda: right() + ahead[0]
        jumper = threading.Thread(target=jump)
        jumper.start()
        began = time.monotonic()
        try:
            manager.save(1, args=ocp.args.StandardSave({"x": np.random.default_rng(0).random(2**25)}))
            manager.wait_until_finished()
        except (TimeoutError, ValueError) as error:
            raised = f"{type(error).__name__}: {error}"
        finally:
            done.set()
            jumper.join()
            time.time = right
        print(f"{name}: {time.monotonic() - began:.1f} s by the monotonic clock; raised {raised[:120]}")
    latest = ocp.CheckpointManager(folder).latest_step()
    print(f"{name}: latest step {latest}")
    return raised, latest


raised, latest = save("default_1200_s", 1200)
assert "timed out" in raised.lower() and latest is None
raised, latest = save("20_days", 20 * 24 * 3600)
assert raised == "nothing" and latest == 1
print("as stated")
PYTHON
