"""What a VTAB sweep costs beside its training steps: `python -m benchmarks.vtab --data=DIR --tasks=NAMES`.

DIR holds class folders as for evaluation.vtab. The whole sweep (4 trial runs and 3 final ones per task) is run by that
command on a ResNet-50 with random weights, with small images and few steps, so that a CPU can. Writes
docs/results/vtab.json: images per second in training, the share of time that is not in the training step (waiting for
images, measuring, compiling), and the compilations, at most one per task.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from benchmarks.results import record

SWEEP = dict(image_size=64, batch_size=32, steps="(5,10)")
ENCODER = dict(depth=50, width=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as workdir:
        options = {**SWEEP, **{f"encoder.{name}": value for name, value in ENCODER.items()}}
        subprocess.run(
            [
                sys.executable,
                "-m",
                "evaluation.vtab",
                "--config=configs/vtab.py:demo",
                "--checkpoint=none",
                "--protocol=v2",
                f"--tasks={arguments.tasks}",
                f"--data={arguments.data}",
                f"--workdir={workdir}",
                *(f"--config.{key}={value}" for key, value in options.items()),
            ],
            check=True,
        )
        cost = json.loads(pathlib.Path(workdir, "vtab.json").read_text())["cost"]
    tasks = len(arguments.tasks.split(","))
    path = record(
        "vtab",
        {"tasks": tasks, **SWEEP, **ENCODER, **cost},
        seeds=[0],
        command=f"python -m benchmarks.vtab --data=DIR --tasks={arguments.tasks}",
    )
    print(json.dumps(cost, indent=1), f"\nwrote {path}")


if __name__ == "__main__":
    main()
