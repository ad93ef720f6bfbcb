"""Action recognition: fine-tunes on each split and scores the test videos. The command is evaluation/action.py."""

import json
import logging
import os
import pathlib

import jax
import ml_collections
import numpy as np
from flax import linen as nn

from evaluation import encoders
from evaluation.protocols.action import data as actions
from evaluation.protocols.action.classifier import (
    ActionClassifier,
    ActionNetwork,
    ClassProbabilities,
    optimizer,
)
from evaluation.protocols.action.data import ActionSplit
from evaluation.transfer import claim, config_identity, write, write_first_checkpoint
from input_pipeline.streams import windows
from input_pipeline.streams.order import Order
from vivi_jax import checkpoint, optim
from vivi_jax.build import Experiment, call_with_config
from vivi_jax.errors import ConfigError
from vivi_jax.models import build_encoder
from vivi_jax.train import train
from vivi_jax.train_step import TrainState, make_train_step

_LOG = logging.getLogger("evaluation.action")
_RAW_INPUT = dict(input_mean=(0.0, 0.0, 0.0), input_std=(1.0, 1.0, 1.0))  # of an encoder of normalised Lab


def evaluate(config: ml_collections.ConfigDict, *, source: str, data: str, splits: str, workdir: str) -> dict:
    """Fine-tunes and scores on each split; {"top1": mean over the splits, "splits": {number: {...}}, ...}.

    Raises:
      CheckpointError, ConfigError, DataError: before anything is trained, where that is possible.
    """
    encoder, phi_dim, pretrained = load_pretrained(source, config)
    root = pathlib.Path(workdir)
    loaded = call_with_config(
        "prepare",
        actions.load_splits,
        data,
        splits,
        str(root / "store"),
        max_missing=config.max_missing,
        **config.prepare,
    )
    results = {}
    for number, split in loaded.items():
        _LOG.info(
            "split %s: %d training and %d test videos of %d classes",
            number,
            len(split.train.videos),
            len(split.test.videos),
            len(split.class_names),
        )
        directory = root / f"split_{number}"
        claim(directory, {"config": config_identity(config), "checkpoint": source, "data": os.path.realpath(data)})
        results[number] = run_split(config, split, encoder, phi_dim, pretrained, directory)
    result = {
        "config": config.name,
        "checkpoint": source,
        "data": data,
        "top1": float(np.mean([split["top1"] for split in results.values()])),
        "splits": results,
    }
    if jax.process_index() == 0:
        write(root / "result.json", json.dumps(result, indent=1) + "\n")
        write(root / "result.md", markdown(result))
    return result


def run_split(
    config, split: ActionSplit, encoder: nn.Module, phi_dim: int | None, pretrained: dict, directory: pathlib.Path
) -> dict:
    """Trains on one split and scores it; nothing is done again that is done."""
    path = directory / "result.json"
    if path.exists():
        return json.loads(path.read_text())
    train_part = split.train
    if config.videos_per_class:
        train_part = train_part.take_per_class(config.videos_per_class, config.seed)
    method = make_method(config, encoder, len(split.class_names), phi_dim)
    experiment = make_parts(config, method, len(train_part.videos))

    batches = call_with_config(
        "data",
        windows.labelled_clips,
        train_part.store,
        train_part.videos,
        train_part.labels,
        Order(config.seed, config.batch_size, jax.process_index(), jax.process_count()),
        **config.data,
    )
    write_first_checkpoint(experiment, directory, pretrained, seed=config.seed, keep=config.run.keep_checkpoints)
    state = train(
        experiment,
        batches,
        str(directory),
        seed=config.seed,
        micro_batches=config.micro_batches,
        evaluators=[],
        **config.run,
    )
    result = score(config, method, state, split) | {
        "train_videos": len(train_part.videos),
        "steps": int(state.step),
        "classes": len(split.class_names),
    }
    _LOG.info("%s: top-1 %.1f %% of %d test videos", directory, 100 * result["top1"], result["test_videos"])
    if jax.process_index() == 0:
        write(path, json.dumps(result) + "\n")
    return result


def make_method(config, encoder: nn.Module, num_classes: int, phi_dim: int | None) -> ActionClassifier:
    network = call_with_config(
        "method",
        ActionNetwork,
        encoder,
        num_classes,
        phi_dim=phi_dim,
        hidden=config.method.hidden,
        dropout=config.method.dropout,
    )
    return ActionClassifier(network, color=config.method.color)


def make_parts(config, method: ActionClassifier, train_videos: int) -> Experiment:
    """The parts of a training run, as vivi_jax.build makes them for pretraining."""
    schedule = config.schedule
    # Steps in one unit of the schedule: a step, or an epoch of so many clips of each video.
    unit = schedule.clips_per_video * train_videos / config.batch_size if schedule.clips_per_video else 1.0
    total_steps, frozen_steps = max(round(schedule.total * unit), 1), round(schedule.frozen * unit)
    rate, _ = optim.piecewise(
        config.batch_size,
        lr=schedule.lr,
        total_steps=total_steps,
        warmup_steps=0,
        boundaries=tuple(round(b * unit) for b in schedule.boundaries),
        factor=schedule.factor,
    )
    adam = call_with_config("optimizer", optimizer, rate, frozen_steps=frozen_steps, **config.optimizer)
    step = make_train_step(
        method, adam, rate, seed=config.seed, total_steps=total_steps, micro_batches=config.micro_batches
    )
    return Experiment(method, adam, step, method.batch_spec(config.batch_size, config.data), total_steps)


def load_pretrained(source: str, config) -> tuple[nn.Module, int | None, dict]:
    """Returns (encoder, width of phi_8 or None, {"params": {part: tree}, "batch_stats": {part: tree}}).

    VDIM transfers phi_8 after the encoder (VDIM §4.1), under its name in methods/vdim.py; from a run without one, phi_8
    starts at random.
    """
    if source == "none":
        encoder, pretrained, phi_dim = (
            call_with_config("encoder", build_encoder, **config.encoder),
            {},
            config.method.phi_dim,
        )
    elif not config.method.phi_dim:  # frames
        encoder, variables, _ = encoders.load_encoder(source)
        pretrained = {name: {"encoder": tree} for name, tree in variables.items()}
        phi_dim = None
    else:
        run = checkpoint.load_config(source)
        if run["encoder"]["name"] != "vdim":
            raise ConfigError(
                f"{source} holds the image encoder {run['encoder']['name']!r}, {config.name} fine-tunes "
                "encoders of clips; use configs/action.py:ucf101_vito or hmdb51_vito"
            )
        state = checkpoint.load_state(source)
        encoder = build_encoder(**run["encoder"])
        phi_dim = run["method"].get("embed_dim", config.method.phi_dim)
        pretrained = {"params": state["params"], **state["model_state"]}
        pretrained = {
            name: {part: tree[part] for part in ("encoder", "phi_global") if part in tree}
            for name, tree in pretrained.items()
        }
        missing = [part for part in ("encoder", "phi_global") if part not in pretrained["params"]]
        if missing:
            _LOG.warning("%s has no %s: it starts at random", source, " and ".join(missing))
    encoder = encoder.for_transfer()
    if config.method.color == "lab":
        encoder = encoder.clone(**_RAW_INPUT)
    return encoder, phi_dim, pretrained


def score(config, method: ActionClassifier, state: TrainState, split: ActionSplit) -> dict:
    """{"top1", "test_videos", "test_windows"}; class probabilities averaged over the windows of a video (VDIM §4.1)."""
    part, data = split.test, config.data
    batches = call_with_config(
        "test",
        windows.test_clips,
        part.store,
        part.videos,
        views=data.views,
        frames=data.frames,
        fps=data.fps,
        image_size=data.image_size,
        **config.test,
    )
    classifier = ClassProbabilities(method.network, method.color)
    probabilities, video = encoders.extract_features(
        classifier,
        {"params": state.params, **state.model_state},
        ({"image": batch["clips"], "label": batch["video"]} for batch in batches),
    )
    correct = average_by_video(probabilities, video, len(part.videos)).argmax(axis=1) == part.labels
    return {"top1": float(correct.mean()), "test_videos": len(part.videos), "test_windows": len(video)}


def average_by_video(probabilities_NxC: np.ndarray, video_N: np.ndarray, videos: int) -> np.ndarray:
    """float64[videos, C], mean over the windows of each video, each of which has one or more."""
    total = np.zeros((videos, probabilities_NxC.shape[1]))
    np.add.at(total, video_N, probabilities_NxC)
    return total / np.bincount(video_N, minlength=videos)[:, None]


# ---- Report ---------------------------------------------------------------------------------------------------------


def markdown(result: dict) -> str:
    rows = [
        f"| {number} | {100 * split['top1']:.1f} | {split['train_videos']} | {split['test_videos']} | "
        f"{split['test_windows']} | {split['steps']} |"
        for number, split in result["splits"].items()
    ]
    return "\n".join(
        [
            f"# Action recognition: {result['config']}",
            "",
            f"Encoder: {result['checkpoint']}. Data: {result['data']}.",
            "",
            "| split | top-1, % | training videos | test videos | test windows | steps |",
            "|---|---|---|---|---|---|",
            *rows,
            f"| mean | {100 * result['top1']:.1f} | | | | |",
            "",
        ]
    )


# ---- Command line ---------------------------------------------------------------------------------------------------
