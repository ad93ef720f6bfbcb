"""What pretraining on the demo's videos is worth: each method from three seeds, against its untrained network.

    python -m benchmarks.learning [--seeds=0,1,2] [--methods="VITO,MoCLR,MoCo v3"] [--out=runs/learning]

VITO and MoCLR train the same network for the same steps on the same rendered videos and differ only in what the papers
differ in: frames, pooling, scales and crops (configs/vito.py:demo and configs/vito.py:demo,moclr). MoCo v3 trains a ViT
on the same videos for twice the steps (configs/moco_v3.py:demo): it is compared with its own untrained network, not
with the others. Top-1 accuracy on held-out videos, whose labels no training sees. Writes docs/results/learning.json.
"""

import argparse
import json
import pathlib
import statistics

from benchmarks import training
from benchmarks.results import record

METHODS = {
    "VITO": "configs/vito.py:demo",
    "MoCLR": "configs/vito.py:demo,moclr",
    "MoCo v3": "configs/moco_v3.py:demo",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", default="runs/learning", help="folder for videos and runs")
    arguments = parser.parse_args()
    out, seeds = pathlib.Path(arguments.out), [int(seed) for seed in arguments.seeds.split(",")]
    prepare(out)
    rows = []
    for method in arguments.methods.split(","):
        runs = [train(out, method, METHODS[method], seed) for seed in seeds]
        for name in ("knn_top1", "linear_top1"):
            for when, line in (("untrained", 0), ("trained", -1)):
                values = [run[line][name] for run in runs]
                rows.append(
                    {
                        "method": method,
                        "measure": name,
                        "when": when,
                        "step": runs[0][line]["step"],
                        "median": statistics.median(values),
                        "min": min(values),
                        "max": max(values),
                    }
                )
    path = record(
        "learning",
        {"rows": rows},
        seeds=seeds,
        command=f"python -m benchmarks.learning --seeds={arguments.seeds} --methods='{arguments.methods}'",
    )
    print(json.dumps(rows, indent=1), f"\nwrote {path}")


def prepare(out: pathlib.Path) -> None:
    """Renders the demo's videos and prepares them: OUT/store/{train,test}."""
    training.rendered_store(out, "input_pipeline.synthetic", ("--videos=480", "--seed=0"), ("--short_side=96",))


def train(out: pathlib.Path, method: str, config: str, seed: int) -> list[dict]:
    """Lines of the run's metrics that have an accuracy: untrained first, trained last."""
    lines = training.pretrain(out / f"{method.lower().replace(' ', '_')}-{seed}", config, out / "store", seed)
    return [line for line in lines if "knn_top1" in line]


if __name__ == "__main__":
    main()
