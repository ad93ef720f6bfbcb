"""What the evaluations that train need at full size: their steps compiled for hardware that is not at hand.

    python -m benchmarks.protocols                # the rows that are missing; may be killed at any time
    python -m benchmarks.protocols --first=2      # at most so many

Each row compiles the training step of a protocol's config, with the paper's network, image size and batch, for all
devices of a topology, as vivi_jax.plan does for pretraining: "gpu:h100x8" is eight simulated CPU devices and a
roofline, TPUs are the TPU compiler's. Writes docs/results/protocols.json, from which docs/segmentation.md,
docs/detection.md and docs/action.md have their tables.
"""

import argparse
import importlib
import json
import subprocess
import sys

from benchmarks import results

COMMAND = "python -m benchmarks.protocols"
# config -> (classes, training images or videos) of the data set
PROTOCOLS = {
    "segmentation.py:voc": (21, 10_582),
    "segmentation.py:ade20k": (150, 20_210),
    "detection.py:coco": (80, 118_287),
    "detection.py:lvis": (1203, 100_170),
    "detection.py:retinanet": (80, 118_287),
    "action.py:ucf101_vito": (101, 9537),
    "action.py:ucf101_vdim": (101, 9537),
}
# Which config on which topology.
ROWS = [f"{config} gpu:h100x8" for config in PROTOCOLS] + [
    "segmentation.py:voc v5e:2x4",
    "segmentation.py:ade20k v5e:2x4",
    "detection.py:retinanet v5e:2x4",
    "detection.py:coco v5e:4x4",
    "detection.py:lvis v5e:4x4",
    "action.py:ucf101_vito v5e:2x4",
    "action.py:ucf101_vdim v5e:2x4",
]


def compile_row(config_name: str, topology_name: str) -> dict:
    """One row, in this process: it fixes the devices."""
    import jax

    from evaluation import transfer
    from evaluation.protocols.action import evaluate as action
    from evaluation.protocols.detection import evaluate as detection
    from evaluation.protocols.segmentation import evaluate as segmentation
    from vivi_jax.distributed import sharding
    from vivi_jax.planning import chips
    from vivi_jax.planning import planner as plan
    from vivi_jax.train_step import create

    protocol, variant = config_name.split(".py:")
    config = importlib.import_module(f"configs.{protocol}").get_config(variant)
    classes, examples = PROTOCOLS[config_name]
    topology = chips.parse_topology(topology_name)
    mesh = sharding.make_mesh(plan.devices(topology))
    if protocol == "segmentation":
        encoder, _ = transfer.load_pretrained("none", config)
        method = segmentation.make_method(config, encoder, classes)
        experiment = transfer.make_experiment(config, method, examples, seed=0)
    elif protocol == "detection":
        encoder, _ = detection.load_pretrained("none", config)
        experiment = transfer.make_experiment(config, detection.make_method(config, encoder, classes), examples, seed=0)
    else:
        encoder, phi_dim, _ = action.load_pretrained("none", config)
        method = action.make_method(config, encoder, classes, phi_dim)
        experiment = action.make_experiment(config, method, examples, seed=0)
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    return {"config": config_name, **plan.compile_for(topology, mesh, experiment, state)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=len(ROWS), help="compute at most so many rows")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(compile_row(*options.row.split(" "))))
        return
    path = results.RESULTS / "protocols.json"
    done = json.loads(path.read_text())["values"]["rows"] if path.exists() else {}
    for row in [row for row in ROWS if row not in done][: options.first]:
        print(f"{row}: {len(done)} of {len(ROWS)} rows are there", flush=True)
        found = subprocess.run(
            [sys.executable, "-m", "benchmarks.protocols", f"--row={row}"],
            cwd=results.ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        if found.returncode:
            sys.exit(f"error: compiling {row} ended with status {found.returncode}")
        done[row] = json.loads(found.stdout.splitlines()[-1]) | {"commit": results.commit()}
        done = {row: done[row] for row in ROWS if row in done}
        print(f"wrote {results.record('protocols', {'rows': done}, command=COMMAND, seeds=[])}", flush=True)


if __name__ == "__main__":
    main()
