"""What is measured of a training, by the product's evaluations: {measure: value in [0, 1]}."""

import pathlib
from collections.abc import Callable

import ml_collections
import numpy as np

from benchmarks import training
from benchmarks.small_paper import data
from benchmarks.small_paper.directions import DIRECTIONS
from benchmarks.small_paper.settings import SIZES
from configs import action
from evaluation import encoders, vid_robust
from evaluation.protocols.action import evaluate as actions
from evaluation.protocols.davis import data as davis_data
from evaluation.protocols.davis import evaluate as davis
from input_pipeline import images

FINE_TUNE_RATE = 0.01
SHORT_SIDE = 160  # of the frames in label propagation: maps of 20 x 20


def measures_of(setting: str) -> tuple[str, ...]:
    """What the directions need of a setting, beside what its training measures itself."""
    needed = {direction.measure for direction in DIRECTIONS.values() if setting in direction.contrast}
    return tuple(sorted(needed - {"knn_top1", "linear_top1"}))


def measure(setting: str, size: str, seed: int, out: pathlib.Path, run: pathlib.Path) -> dict[str, float]:
    """All measures of the finished training in `run`."""
    found: dict[str, float] = {}
    evaluated = [line for line in training.metrics(run) if "knn_top1" in line]
    for name in ("knn_top1", "linear_top1"):
        if evaluated:
            found |= {f"{name}_untrained": evaluated[0][name], name: evaluated[-1][name]}
    for name in measures_of(setting):
        found[name] = MEASURES[name](size, seed, out, run)
    return found


def few_labels(size: str, seed: int, out: pathlib.Path, run: pathlib.Path) -> float:
    """Top-1 on the held-out videos after fine-tuning on a few labels of each class, the same ones for a seed."""
    encoder, variables, image_size = encoders.load_encoder(str(run))
    folder, wanted = data.store(out, size, "scenes", seed), SIZES[size]
    train, test = (images.load_labelled(str(folder), split) for split in ("train", "test"))
    rng = np.random.Generator(np.random.Philox(seed))
    of_class = [rng.permutation(np.flatnonzero(train.labels == k)) for k in range(len(train.class_names))]
    chosen = train.take(np.concatenate([indices[: wanted.labels_per_class] for indices in of_class]))
    tuned = training.fine_tune(
        encoder,
        variables,
        training.pixels(chosen, image_size),
        classes=len(train.class_names),
        rate=FINE_TUNE_RATE,
        steps=wanted.fine_tune_steps,
        seed=seed,
    )
    return training.accuracy(*tuned, training.pixels(test, image_size))


def propagation(size: str, seed: int, out: pathlib.Path, run: pathlib.Path) -> float:
    """J (region similarity) of label propagation by VFS's procedure on rendered sequences, VITO Table 2."""
    encoder, variables, _ = encoders.load_encoder(str(run))
    found = davis_data.load(str(data.sequences(out, size, seed)))
    protocol = davis.choose_protocol("vfs", encoder, SHORT_SIDE)
    return davis.evaluate(encoder, variables, found, protocol, run / "propagation")["scores"]["J_mean"]


def robustness(size: str, seed: int, out: pathlib.Path, run: pathlib.Path) -> float:
    """Minus what the run's classifier loses where all frames near the middle one must be right (PM-10 minus PM-0)."""
    encoder, variables, image_size = encoders.load_encoder(str(run))
    folder = data.store(out, size, "scenes", seed)
    labels = images.load_labelled(str(folder), "test")
    frames, neighbours = data.frames_around_the_middle(folder / "test", labels, SIZES[size].robust_videos)
    batches = images.eval_batches(frames, batch_size=128, image_size=image_size)
    logits, truth = encoders.extract_logits(encoder, variables, batches)
    right = {frames.name(i): bool(logits[i].argmax() == truth[i]) for i in range(len(truth))}
    pm_0, pm_10 = (vid_robust.score(right, neighbours, k=k) for k in (0, data.NEIGHBOURS))
    return (pm_10 - pm_0) / len(neighbours)


def action_top1(size: str, seed: int, out: pathlib.Path, run: pathlib.Path, *, pretrained: bool = True) -> float:
    """Held-out top-1 after fine-tuning on a few labelled ones, from the run or from random weights (VDIM §4.1)."""
    workdir = run / ("action" if pretrained else "action-scratch")
    return actions.evaluate(
        action_config(size, seed),
        source=str(run) if pretrained else "none",
        data=str(data.store(out, size, "actions", seed)),
        splits="1",
        workdir=str(workdir),
        store=str(workdir / "store"),
    )["top1"]


def action_config(size: str, seed: int) -> ml_collections.ConfigDict:
    config, steps = action.get_config("demo"), SIZES[size].action_steps
    config.seed, config.videos_per_class = seed, SIZES[size].action_labels
    config.schedule.update(dict(total_steps=steps, boundaries=(steps // 2, 3 * steps // 4)))
    return config


def action_gain(size: str, seed: int, out: pathlib.Path, run: pathlib.Path) -> float:
    """action_top1 minus the same from random weights."""
    return action_top1(size, seed, out, run) - action_top1(size, seed, out, run, pretrained=False)


MEASURES: dict[str, Callable[[str, int, pathlib.Path, pathlib.Path], float]] = {
    "few_labels_top1": few_labels,
    "propagation": propagation,
    "robustness": robustness,
    "action_top1": action_top1,
    "action_gain": action_gain,
}
