"""What the benchmarks of learning share: rendered data, the commands of a run, its metrics, fine-tuning on pixels."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np

from evaluation.protocols.vtab import finetune
from input_pipeline import images
from input_pipeline.store import META
from vivi_jax.models.base import Encoder

MOMENTUM, DECAY_AT, DECAY_FACTOR = 0.9, (0.3, 0.6, 0.9), 0.1  # of fine-tuning, as configs/vtab.py
BATCH_SIZE = 64  # of fine-tuning
TRAINERS: dict[tuple[finetune.Classifier, int], finetune.Trainer] = {}  # encoders of one kind share a program


def python(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def rendered_store(out: pathlib.Path, module: str, arguments: Sequence[str], preparation: Sequence[str]) -> None:
    """Renders videos by a command of input_pipeline and prepares them: OUT/videos, OUT/store/{train,test}.

    What is there already stays; a broken-off call is gone on with.
    """
    if all((out / "store" / split / META).exists() for split in ("train", "test")):
        return
    python(module, f"--out={out / 'videos'}", *arguments)
    for split in ("train", "test"):
        folders = (f"--videos={out / 'videos' / split}", f"--out={out / 'store' / split}")
        python("input_pipeline.prepare", *folders, "--labels=folder", *preparation)


def pretrain(run: pathlib.Path, config: str, store: pathlib.Path, seed: int, *options: str) -> list[dict]:
    """Trains on STORE/train with k-NN and linear probe on STORE; lines of the run's metrics."""
    python(
        "vivi_jax.main",
        f"--config={config}",
        f"--workdir={run}",
        f"--config.seed={seed}",
        f"--config.data.path={store / 'train'}",
        f"--config.evaluation.dataset={store}",
        *options,
    )
    return metrics(run)


def metrics(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fine_tune(
    encoder: Encoder,
    variables: dict,
    examples: dict[str, np.ndarray],
    *,
    classes: int,
    rate: float,
    steps: int,
    seed: int,
) -> tuple[finetune.Classifier, dict]:
    """(classifier, its variables) after `steps` of SGD on `examples`, see pixels()."""
    size = examples["image"].shape[1]
    module, start = finetune.make_classifier(encoder, variables, num_classes=classes, image_size=size)
    if (module, size) not in TRAINERS:
        TRAINERS[module, size] = finetune.compile_trainer(
            module, start, batch_size=BATCH_SIZE, image_size=size, momentum=MOMENTUM
        )
    batches = finetune.shuffled_batches(examples, batch_size=BATCH_SIZE, seed=seed)
    rates = finetune.learning_rates(rate, steps, decay_at=DECAY_AT, decay_factor=DECAY_FACTOR)
    return module, jax.device_get(finetune.fit(TRAINERS[module, size], start, batches, rates).variables)


def accuracy(module: finetune.Classifier, variables: dict, examples: dict[str, np.ndarray]) -> float:
    batches = (
        {name: x[i : i + BATCH_SIZE] for name, x in examples.items()}
        for i in range(0, len(examples["label"]), BATCH_SIZE)
    )
    return finetune.accuracy(module, variables, batches)


def pixels(labelled: images.LabelledImages, image_size: int) -> dict[str, np.ndarray]:
    """{"image": uint8[N, S, S, 3], "label": int32[N]} of the central squares."""
    batches = list(images.eval_batches(labelled, batch_size=256, image_size=image_size))
    return {name: np.concatenate([part[name] for part in batches]) for name in ("image", "label")}
