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
from flax import linen as nn

from benchmarks import learning
from benchmarks.results import RESULTS, record
from evaluation import probe
from evaluation.encoders import load_encoder, random_variables
from evaluation.protocols.vtab import finetune
from input_pipeline import images

IMAGE_SIZE, BATCH_SIZE, NEIGHBOURS = 64, 64, 5  # the demo's image and batch size; k-NN among few images
LEARNING_RATES, MOMENTUM, DECAY_AT, DECAY_FACTOR = (0.1, 0.01), 0.9, (0.3, 0.6, 0.9), 0.1  # as configs/vtab.py
SUPERVISED_RATE = 0.1
TRAINERS: dict[finetune.Classifier, finetune.Trainer] = {}  # the three encoders of a data set share one program


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


def encoders(out: pathlib.Path, seed: int) -> Iterator[tuple[str, nn.Module, dict]]:
    """(kind, encoder, variables) of the three."""
    learning.train(out, "VITO", learning.METHODS["VITO"], seed)
    run = out / f"vito-{seed}"
    encoder, pretrained, _ = load_encoder(str(run))
    steps = json.loads((run / "summary.json").read_text())["step"]
    yield "VITO", encoder, pretrained
    random = jax.device_get(random_variables(encoder, seed))
    yield "random", encoder, random
    frames = images.load_folder(out / "store" / "train")
    _, variables = train(encoder, random, pixels(frames), len(frames.class_names), SUPERVISED_RATE, steps, seed)
    yield "supervised", encoder, {name: tree["encoder"] for name, tree in variables.items()}


def finetune_top1(
    encoder: nn.Module, variables: dict, sets: dict[str, images.LabelledImages], *, steps: int, seed: int
) -> float:
    """Test accuracy after fine-tuning on all training images, at the rate that is better on a held-out fifth."""
    classes, whole = len(sets["train"].class_names), pixels(sets["train"])
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(whole["label"]))
    held_out, rest = ({name: x[rows] for name, x in whole.items()} for rows in np.split(order, [len(order) // 5]))
    trials = [
        accuracy(*train(encoder, variables, rest, classes, rate, steps, seed), held_out) for rate in LEARNING_RATES
    ]
    best = LEARNING_RATES[int(np.argmax(trials))]
    return accuracy(*train(encoder, variables, whole, classes, best, steps, seed), pixels(sets["test"]))


def train(encoder, variables, examples, classes, rate, steps, seed) -> tuple[finetune.Classifier, dict]:
    """(classifier, its variables) after `steps` on `examples`."""
    module, start = finetune.make_classifier(encoder, variables, num_classes=classes, image_size=IMAGE_SIZE)
    if module not in TRAINERS:
        TRAINERS[module] = finetune.compile_trainer(
            module, start, batch_size=BATCH_SIZE, image_size=IMAGE_SIZE, momentum=MOMENTUM
        )
    batches = finetune.shuffled_batches(examples, batch_size=BATCH_SIZE, seed=seed)
    rates = finetune.learning_rates(rate, steps, decay_at=DECAY_AT, decay_factor=DECAY_FACTOR)
    return module, jax.device_get(finetune.fit(TRAINERS[module], start, batches, rates).variables)


def accuracy(module: finetune.Classifier, variables: dict, examples: dict[str, np.ndarray]) -> float:
    batches = (
        {name: x[i : i + BATCH_SIZE] for name, x in examples.items()}
        for i in range(0, len(examples["label"]), BATCH_SIZE)
    )
    return finetune.accuracy(module, variables, batches)


def pixels(labelled: images.LabelledImages) -> dict[str, np.ndarray]:
    """{"image": uint8[N, S, S, 3], "label": int32[N]} of the central squares."""
    batches = list(images.eval_batches(labelled, batch_size=256, image_size=IMAGE_SIZE))
    return {name: np.concatenate([part[name] for part in batches]) for name in ("image", "label")}


if __name__ == "__main__":
    main()
