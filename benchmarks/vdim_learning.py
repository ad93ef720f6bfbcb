"""What VDIM's pretraining is worth on rendered actions: fine-tuning on few labels, pretrained against from scratch.

    python -m benchmarks.vdim_learning [--seeds=0,1,2] [--videos_per_class=8] [--out=runs/vdim_learning]

The classes differ by motion only. Pretraining (configs/vdim.py:demo) sees all training clips and no label; fine-tuning
(configs/action.py:demo) sees the labels of a few of each class, the same ones and for the same steps from pretrained
and from random weights. Top-1 accuracy on held-out clips. Writes docs/results/vdim_learning.json.
"""

import argparse
import json
import pathlib
import statistics

from benchmarks import training
from benchmarks.results import record
from input_pipeline.rendered.actions import ACTIONS

VIDEOS = 960
STARTS = ("pretrained", "from scratch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--videos_per_class", type=int, default=8, help="labelled clips of each class")
    parser.add_argument("--out", default="runs/vdim_learning", help="folder for videos and runs")
    arguments = parser.parse_args()
    out, seeds = pathlib.Path(arguments.out), [int(seed) for seed in arguments.seeds.split(",")]
    prepare(out)

    accuracy = {start: [] for start in STARTS}
    for seed in seeds:
        run = out / f"pretrained-{seed}"
        training.python(
            "vivi_jax.main",
            "--config=configs/vdim.py:demo",
            f"--workdir={run}",
            f"--config.seed={seed}",
            f"--config.data.path={out / 'store' / 'train'}",
        )
        for start, checkpoint in zip(STARTS, (str(run), "none"), strict=True):
            accuracy[start].append(fine_tune(out, start, checkpoint, seed, arguments.videos_per_class))
            print(json.dumps({"seed": seed, "start": start, "top1": accuracy[start][-1]}), flush=True)

    gains = [pretrained - scratch for pretrained, scratch in zip(*accuracy.values(), strict=True)]
    rows = [{"start": start, "top1": values, "median": statistics.median(values)} for start, values in accuracy.items()]
    values = {
        "rows": rows,
        "gain_median": statistics.median(gains),
        "gain_min": min(gains),
        "target_gain": 0.2,
        "videos_per_class": arguments.videos_per_class,
        "classes": len(ACTIONS),
        "videos": VIDEOS,
    }
    command = (
        f"python -m benchmarks.vdim_learning --seeds={arguments.seeds} --videos_per_class={arguments.videos_per_class}"
    )
    print(json.dumps(values, indent=1), f"\nwrote {record('vdim_learning', values, command=command, seeds=seeds)}")


def prepare(out: pathlib.Path) -> None:
    """Renders clips and prepares them at 12.5 frames/s, of which the demo's 8 span a cycle: OUT/store/{train,test}."""
    videos = (f"--videos={VIDEOS}", "--seed=0")
    training.rendered_store(out, "input_pipeline.synthetic_actions", videos, ("--short_side=64", "--fps=12.5"))


def fine_tune(out: pathlib.Path, start: str, checkpoint: str, seed: int, videos_per_class: int) -> float:
    """Top-1 on the held-out clips, in [0, 1]."""
    workdir = out / f"action-{start.replace(' ', '_')}-{seed}"
    training.python(
        "evaluation.action",
        "--config=configs/action.py:demo",
        f"--checkpoint={checkpoint}",
        f"--data={out / 'store'}",
        f"--workdir={workdir}",
        f"--config.seed={seed}",
        f"--config.videos_per_class={videos_per_class}",
    )
    return json.loads((workdir / "result.json").read_text())["top1"]


if __name__ == "__main__":
    main()
