"""What pretraining on rendered videos is worth on real images: k-NN, linear probe and fine-tuning of three encoders.

    python -m benchmarks.transfer --data=DIR --datasets=cifar10,dtd [--seeds=0,1,2] [--out=runs/learning]

DIR/NAME holds class folders. The encoders share one architecture (configs/vito.py:demo): `VITO` is pretrained without
labels on the demo's videos (the runs of benchmarks.learning, done here where they are not), `supervised` is trained for
as many steps on the same videos' labels (batches of the middle frames), `random` is not trained. Fine-tuning tries two
learning rates on a fifth of the training images, held out, then trains on all with the better one. Writes
docs/results/transfer.json.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks import learning
from benchmarks.results import RESULTS, record
from benchmarks.training import accuracy, fine_tune, pixels
from evaluation import probe
from evaluation.encoders import load_encoder, random_variables
from input_pipeline import images
from vivi_jax.models.base import Encoder

IMAGE_SIZE, BATCH_SIZE, NEIGHBOURS = 64, 64, 5  # the demo's image and batch size; k-NN among few images
LEARNING_RATES = (0.1, 0.01)
SUPERVISED_RATE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--datasets", required=True, help="comma-separated folders in it, with one folder per class")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300, help="of the fine-tuning")
    parser.add_argument("--out", default="runs/learning", help="folder for videos and runs")
    parser.add_argument("--results", default=str(RESULTS), help="folder of transfer.json")
    args = parser.parse_args()
    out, seeds, datasets = pathlib.Path(args.out), [int(s) for s in args.seeds.split(",")], args.datasets.split(",")
    learning.prepare(out)
    sets = {name: probe.load_sets(str(pathlib.Path(args.data, name)), k=NEIGHBOURS) for name in datasets}

    scores: dict[tuple[str, str, str], list[float]] = {}
    for seed in seeds:
        for kind, encoder, variables in encoders(out, seed):
            for name in datasets:
                top1 = probe.evaluate(
                    encoder,
                    variables,
                    sets[name],
                    modes=("knn", "linear"),
                    image_size=IMAGE_SIZE,
                    batch_size=BATCH_SIZE,
                    k=NEIGHBOURS,
                )
                top1["finetune_top1"] = finetune_top1(encoder, variables, sets[name], steps=args.steps, seed=seed)
                print(json.dumps({"dataset": name, "encoder": kind, "seed": seed, **top1}), flush=True)
                for measure, value in top1.items():
                    scores.setdefault((name, kind, measure), []).append(value)

    rows = [
        {
            "dataset": name,
            "encoder": kind,
            "measure": measure,
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
        for (name, kind, measure), values in scores.items()
    ]
    sizes = {
        name: {"classes": len(s["train"].class_names), **{split: len(s[split]) for split in s}}
        for name, s in sets.items()
    }
    command = (
        f"python -m benchmarks.transfer --data=DIR --datasets={args.datasets} --seeds={args.seeds} --steps={args.steps}"
    )
    path = record(
        "transfer",
        {"rows": rows, "sizes": sizes, "finetune_steps": args.steps},
        seeds=seeds,
        command=command,
        directory=pathlib.Path(args.results),
    )
    print(f"wrote {path}")


def encoders(out: pathlib.Path, seed: int) -> Iterator[tuple[str, Encoder, dict]]:
    """(kind, encoder, variables) of the three."""
    learning.train(out, "VITO", learning.METHODS["VITO"], seed)
    run = out / f"vito-{seed}"
    encoder, pretrained, _ = load_encoder(str(run))
    steps = json.loads((run / "summary.json").read_text())["step"]
    yield "VITO", encoder, pretrained
    random = jax.device_get(random_variables(encoder, seed))
    yield "random", encoder, random
    frames = images.load_folder(out / "store" / "train")
    _, variables = fine_tune(
        encoder,
        random,
        pixels(frames, IMAGE_SIZE),
        classes=len(frames.class_names),
        rate=SUPERVISED_RATE,
        steps=steps,
        seed=seed,
    )
    yield "supervised", encoder, {name: tree["encoder"] for name, tree in variables.items()}


def finetune_top1(
    encoder: Encoder, variables: dict, sets: dict[str, images.LabelledImages], *, steps: int, seed: int
) -> float:
    """Test accuracy after fine-tuning on all training images, at the rate that is better on a held-out fifth."""
    whole = pixels(sets["train"], IMAGE_SIZE)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(whole["label"]))
    held_out, rest = ({name: x[rows] for name, x in whole.items()} for rows in np.split(order, [len(order) // 5]))
    how: dict = dict(classes=len(sets["train"].class_names), steps=steps, seed=seed)
    trials = [accuracy(*fine_tune(encoder, variables, rest, rate=rate, **how), held_out) for rate in LEARNING_RATES]
    best = LEARNING_RATES[int(np.argmax(trials))]
    return accuracy(*fine_tune(encoder, variables, whole, rate=best, **how), pixels(sets["test"], IMAGE_SIZE))


if __name__ == "__main__":
    main()
