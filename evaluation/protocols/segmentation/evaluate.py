"""Semantic segmentation: fine-tunes each repeat and scores its masks. The command is evaluation/segmentation.py."""

import json
import logging
import os
import pathlib
import time

import jax
import ml_collections
import numpy as np
import optax
from flax import linen as nn

from evaluation import encoders
from evaluation.protocols import interpolation as dense
from evaluation.protocols.segmentation import data as data_sets
from evaluation.protocols.segmentation import report as segmentation_report
from evaluation.protocols.segmentation.data import SegmentationSet
from evaluation.protocols.segmentation.network import FCN, Segmenter, confusion, predict, scores
from evaluation.transfer import claim, config_identity, write, write_first_checkpoint
from vivi_jax import optim
from vivi_jax.build import Experiment, call_with_config
from vivi_jax.errors import ConfigError, lookup
from vivi_jax.models import build_encoder
from vivi_jax.train import train
from vivi_jax.train_step import TrainState, make_train_step

_LOG = logging.getLogger("evaluation.segmentation")


def evaluate(config: ml_collections.ConfigDict, *, source: str, data: str, workdir: str) -> dict:
    """Trains and scores each repeat; {"miou": mean, "miou_std", "repeats": [{...}], "iou": means per class, ...}.

    Raises:
      CheckpointError, ConfigError, DataError: before anything is trained, where that is possible.
    """
    encoder, pretrained = load_pretrained(source, config)
    train_set, val_set = lookup("config.name", config.name, data_sets.DATASETS)(data)
    root, start = pathlib.Path(workdir), time.perf_counter()
    for part in (train_set, val_set):
        found = data_sets.check(part)
        _LOG.info(
            "%s: %d images, %.1f million labelled pixels, %d of %d classes",
            part.source,
            found["images"],
            found["labelled_pixels"] / 1e6,
            found["classes"],
            len(part.class_names),
        )
    _LOG.info("all masks read and checked in %.0f s", time.perf_counter() - start)
    claim(root, {"config": config_identity(config), "checkpoint": source, "data": os.path.realpath(data)})
    repeats = [
        run_repeat(config, repeat, encoder, pretrained, train_set, val_set, root / f"repeat_{repeat}")
        for repeat in range(config.repeats)
    ]
    result = {
        "config": config.name,
        "checkpoint": source,
        "data": data,
        **segmentation_report.over_repeats(repeats, val_set.class_names),
        "train_images": len(train_set),
        "val_images": len(val_set),
        "repeats": repeats,
    }
    if jax.process_index() == 0:
        write(root / "result.json", json.dumps(result, indent=1) + "\n")
        write(root / "result.md", segmentation_report.markdown(result))
    return result


def run_repeat(
    config,
    repeat: int,
    encoder: nn.Module,
    pretrained: dict,
    train_set: SegmentationSet,
    val_set: SegmentationSet,
    directory: pathlib.Path,
) -> dict:
    """Trains once and scores it; nothing is done again that is done."""
    path = directory / "result.json"
    if path.exists():
        return json.loads(path.read_text())
    seed, fill = config.seed + repeat, mean_colour(encoder)
    experiment = make_parts(config, encoder, len(val_set.class_names), len(train_set), seed=seed)

    def batches(first_step: int):
        return call_with_config(
            "data",
            data_sets.train_batches,
            train_set,
            first_step,
            seed=seed,
            batch_size=config.batch_size,
            fill=fill,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **config.data,
        )

    directory.mkdir(parents=True, exist_ok=True)
    write_first_checkpoint(experiment, directory, pretrained, seed=seed, keep=config.run.keep_checkpoints)
    state = train(
        experiment, batches, str(directory), seed=seed, micro_batches=config.micro_batches, evaluators=[], **config.run
    )
    result = score(config, experiment.method, state, val_set, fill, directory) | {
        "seed": seed,
        "steps": int(state.step),
    }
    _LOG.info("%s: mIoU %.1f %%", directory, 100 * result["miou"])
    if jax.process_index() == 0:
        write(path, json.dumps(result) + "\n")
    return result


def make_parts(config, encoder: nn.Module, classes: int, train_images: int, *, seed: int) -> Experiment:
    """The parts of a training run, as vivi_jax.build makes them for pretraining."""
    options = dict(config.method)
    encoder, layer = dense.dense_encoder(encoder, 0, output_stride=options.pop("output_stride"), dilate=True)
    method = Segmenter(call_with_config("method", FCN, encoder, layer, classes, **options))
    rate, total_steps = call_with_config(
        "schedule", poly, config.batch_size, train_images=train_images, **config.schedule
    )
    sgd = call_with_config("optimizer", optim.sgd, rate, **config.optimizer)
    step = make_train_step(method, sgd, rate, seed=seed, total_steps=total_steps, micro_batches=config.micro_batches)
    return Experiment(method, sgd, step, method.batch_spec(config.batch_size, config.data), total_steps)


def poly(batch_size: int, *, lr: float, power: float, epochs: float, train_images: int) -> tuple[optax.Schedule, int]:
    """(lr * (1 - step / steps) ** power, steps of the run, rounded down)."""
    total_steps = int(epochs * train_images / batch_size)
    if total_steps < 1:
        raise ConfigError(
            f"config.schedule: {epochs} epochs of {train_images} images are less than one batch of "
            f"{batch_size}; raise epochs or lower config.batch_size"
        )
    return optax.polynomial_schedule(lr, 0.0, power, total_steps), total_steps


def load_pretrained(source: str, config) -> tuple[nn.Module, dict]:
    """Returns (encoder, {"params": {"encoder": tree}, "batch_stats": {"encoder": tree}}), {} for "none"."""
    if source == "none":
        return call_with_config("encoder", build_encoder, **config.encoder), {}
    encoder, variables, _ = encoders.load_encoder(source)
    return encoder, {name: {"encoder": tree} for name, tree in variables.items()}


def mean_colour(encoder: nn.Module) -> tuple[int, int, int]:
    """RGB that the encoder's input normalisation turns into (nearly) zeros."""
    return tuple(round(255 * channel) for channel in encoder.input_mean)


def score(
    config,
    method: Segmenter,
    state: TrainState,
    val_set: SegmentationSet,
    fill: tuple[int, int, int],
    directory: pathlib.Path,
) -> dict:
    """scores() of all validation images; draws config.pictures of them, evenly spaced over the list."""
    classes = len(val_set.class_names)
    total, drawn = np.zeros((classes, classes), np.int64), {}
    chosen = set(np.linspace(0, len(val_set) - 1, config.pictures).round().astype(int)) if config.pictures else set()
    found = call_with_config(
        "test",
        predict,
        method.network,
        {"params": state.params, **state.model_state},
        val_set,
        fill=fill,
        **config.test,
    )
    for i, image, mask, predicted in found:
        total += confusion(mask, predicted, classes)
        if i in chosen:
            drawn[i] = image, mask, predicted
    if drawn and jax.process_index() == 0:
        segmentation_report.draw([drawn[i] for i in sorted(drawn)], val_set.class_names, directory / "predictions.png")
    return scores(total)


# ---- Command line ---------------------------------------------------------------------------------------------------
