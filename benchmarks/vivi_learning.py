"""What each of VIVI's losses is worth on rendered videos of four shots: rows of the paper, from several seeds.

    python -m benchmarks.vivi_learning [--seeds=0,1,2] [--rows=Ex-YT-F,...] [--out=runs/vivi_learning]

Every row of the paper is its own config's demo variant (configs/vivi.py:PAPER): the same network and steps for all, and
the same number of frames a step for the exemplar rows; losses, sampling, labels and norms differ as in the paper. Top-1
accuracy of the frozen encoder on held-out videos, and accuracies on the pretext tasks. Writes
docs/results/vivi_learning.json.
"""

import argparse
import json
import pathlib
import statistics

from benchmarks import training
from benchmarks.results import record
from configs import vivi

COMPARED = ("Ex-YT-F", "Ex-YT-S", "VIVI-Ex(4)", "VIVI-Ex(4)-Co(100%)")  # all seeds, in the paper's order (Table 2, 1)
ONCE = ("VIVI-Rot(4)", "VIVI-Ex-Order", "VIVI-Ex(4)-Co(10%)")  # the first seed
ACCURACIES = ("knn_top1", "linear_top1")
PRETEXT = ("rotation_accuracy", "order_accuracy", "nce_accuracy", "triplet_active", "class_accuracy", "loss")
AVERAGED_STEPS = 50  # a batch of 8 videos says little about the accuracy on a pretext task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default=",".join(COMPARED + ONCE), help="rows of configs/vivi.py:PAPER")
    parser.add_argument("--out", default="runs/vivi_learning", help="folder for videos and runs")
    arguments = parser.parse_args()
    out, seeds = pathlib.Path(arguments.out), [int(seed) for seed in arguments.seeds.split(",")]
    # Even the shortest of the four shots has the frames that the demo's configs take of each.
    videos = ("--videos=480", "--shots=4", "--seconds=8", "--fps=10", "--seed=0")
    training.rendered_store(out, "input_pipeline.synthetic", videos, ("--short_side=96",))

    rows = []
    for row in arguments.rows.split(","):
        runs = [train(out, row, seed) for seed in (seeds if row in COMPARED else seeds[:1])]
        rows.append(
            {
                "row": row,
                "config": f"configs/vivi.py:{vivi.PAPER[row]},demo",
                "seeds": len(runs),
                **accuracies(runs),
                **pretext(runs),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    path = record(
        "vivi_learning",
        {"rows": rows, "steps": runs[0][-1]["step"], "averaged_steps": AVERAGED_STEPS},
        seeds=seeds,
        command=f"python -m benchmarks.vivi_learning --seeds={arguments.seeds} --rows='{arguments.rows}'",
    )
    print(f"wrote {path}")


def train(out: pathlib.Path, row: str, seed: int) -> list[dict]:
    """Lines of the run's metrics."""
    argument = vivi.PAPER[row]
    labelled = [f"--config.data.labelled_path={out / 'store'}"] if "co=" in argument else []
    config, run = f"configs/vivi.py:{argument},demo", out / f"{argument}-{seed}"
    return training.pretrain(run, config, out / "store", seed, "--config.run.log_every=1", *labelled)


def accuracies(runs: list[list[dict]]) -> dict[str, dict]:
    """{measure: {"untrained", "trained": values by seed and their median}}."""
    found = {}
    for name in ACCURACIES:
        lines = [[line[name] for line in run if name in line] for run in runs]
        found[name] = {
            when: {
                "values": [values[at] for values in lines],
                "median": statistics.median(values[at] for values in lines),
            }
            for when, at in (("untrained", 0), ("trained", -1))
        }
    return found


def pretext(runs: list[list[dict]]) -> dict[str, dict]:
    """{metric: mean over the first and over the last steps, median of the seeds}, of those metrics the runs have."""
    found = {}
    for name in PRETEXT:
        lines = [[line[name] for line in run if name in line] for run in runs]
        if all(lines):
            found[name] = {
                "first": statistics.median(statistics.mean(values[:AVERAGED_STEPS]) for values in lines),
                "last": statistics.median(statistics.mean(values[-AVERAGED_STEPS:]) for values in lines),
            }
    return found


if __name__ == "__main__":
    main()
