"""Action recognition: fine-tunes on each split and scores the test videos. The command is evaluation/action.py."""

import dataclasses
import functools
import logging
import pathlib
from typing import Annotated

import jax
import ml_collections
import numpy as np

from evaluation import encoders, transfer
from evaluation.protocols import sweep
from evaluation.protocols.action import data as actions
from evaluation.protocols.action.classifier import ActionClassifier, ActionNetwork, ClassProbabilities, optimizer
from evaluation.protocols.action.data import ActionSplit
from input_pipeline.streams import windows
from input_pipeline.streams.order import Order
from vivi_jax import checkpoint
from vivi_jax.augment import vdim as augment_vdim
from vivi_jax.build import Experiment
from vivi_jax.config import Chance, Count, OneOf, call_with_config, check
from vivi_jax.errors import ConfigError
from vivi_jax.methods.base import Tree
from vivi_jax.models import build_encoder
from vivi_jax.models.base import Encoder

_LOG = logging.getLogger(__name__)


def evaluate(
    config: ml_collections.ConfigDict, *, source: str, data: str, splits: str, workdir: str, store: str
) -> dict:
    """Trains and scores on each split, its repeats being "split_1", "split_2", "split_3"; {"top1": mean, ...}.

    The result has the shape that transfer.evaluate says.

    Args:
      store: folder for decoded videos.

    Raises:
      CheckpointError, ConfigError, DataError: before anything is trained, where that is possible.
    """
    check_config(config)
    encoder, phi_dim, pretrained = load_pretrained(source, config)
    loaded = call_with_config(
        "prepare",
        actions.load_splits,
        data,
        splits,
        store,
        max_missing=config.max_missing,
        **config.prepare,
    )
    return transfer.evaluate(
        config,
        {f"split_{number}": make_repeat(config, split, encoder, phi_dim) for number, split in loaded.items()},
        pretrained,
        source=source,
        data=data,
        workdir=workdir,
        summary=lambda results: {},
        markdown=markdown,
    )


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks every value of the config, before anything is read."""
    keys = {"max_missing": Chance, "clips_per_video": Count, "prepare": dict}
    transfer.check_config(config, {"videos_per_class": Count | None, **keys}, optimizers={"adam": optimizer})
    check("prepare", actions.load_splits, config.prepare, besides=("data", "splits", "out", "max_missing"))
    check("method", {"color": Annotated[str, OneOf(augment_vdim.COLORS)]}, {"color": config.method.color})
    check("method", ActionNetwork, {key: value for key, value in config.method.items() if key != "color"})
    check("data", windows.labelled_clips, config.data)
    check("test", windows.test_clips, config.test, besides=tuple(config.data))
    if (config.test.stride is None) == (config.test.clips is None):
        raise ConfigError(
            f"config.test: give a stride or a number of clips, not stride={config.test.stride} and "
            f"clips={config.test.clips}"
        )


def make_repeat(
    config: ml_collections.ConfigDict, split: ActionSplit, encoder: Encoder, phi_dim: int | None
) -> transfer.Repeat:
    """Training on one split, and its score."""
    if held_out := config.get("held_out"):
        training, held = sweep.hold_out(len(split.train.videos), held_out)
        split = dataclasses.replace(split, train=split.train.take(training), test=split.train.take(held))
    train_part = split.train
    if config.videos_per_class:
        train_part = train_part.take_per_class(config.videos_per_class, config.seed)
    counts = {"train_videos": len(train_part.videos), "classes": len(split.class_names)}
    _LOG.info(
        "%d training and %d test videos of %d classes",
        counts["train_videos"],
        len(split.test.videos),
        counts["classes"],
    )
    method = make_method(config, encoder, counts["classes"], phi_dim)
    batches = call_with_config(
        "data",
        windows.labelled_clips,
        train_part.store,
        train_part.videos,
        train_part.labels,
        Order(config.seed, config.batch_size, jax.process_index(), jax.process_count()),
        **config.data,
    )

    def score(variables: dict[str, Tree], directory: pathlib.Path) -> dict:
        return score_videos(config, method, variables, split) | counts

    experiment = make_experiment(config, method, counts["train_videos"], seed=config.seed)
    return transfer.Repeat(config.seed, experiment, batches, score)


def make_method(
    config: ml_collections.ConfigDict, encoder: Encoder, num_classes: int, phi_dim: int | None
) -> ActionClassifier:
    """The classifier of config.method on the encoder."""
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


def make_experiment(
    config: ml_collections.ConfigDict, method: ActionClassifier, train_videos: int, *, seed: int
) -> Experiment:
    """As transfer's; an epoch is config.clips_per_video clips of each video."""
    clips = config.clips_per_video * train_videos
    adam = functools.partial(optimizer, steps_per_epoch=clips / config.batch_size)
    return transfer.make_experiment(config, method, clips, seed=seed, optimizers={"adam": adam})


def load_pretrained(source: str, config: ml_collections.ConfigDict) -> tuple[Encoder, int | None, transfer.Parts]:
    """Returns (encoder, width of phi_8 or None, pretrained parts).

    VDIM transfers phi_8 after the encoder (VDIM §4.1), under its name in methods/vdim.py; from a run without one, phi_8
    starts at random.
    """
    phi_dim = config.method.phi_dim
    if source == "none" or not phi_dim:  # phi_dim: clips, else frames
        encoder, pretrained = transfer.load_pretrained(source, config)
    else:
        run = checkpoint.load_config(source)
        if run["encoder"]["name"] != "vdim":
            raise ConfigError(
                f"{source} holds the image encoder {run['encoder']['name']!r}, {config.name} fine-tunes "
                "encoders of clips; use configs/action.py:ucf101_vito or hmdb51_vito"
            )
        state = checkpoint.load_state(source)
        encoder = build_encoder(**run["encoder"])
        phi_dim = run["method"].get("embed_dim", phi_dim)
        pretrained = {
            name: {part: tree[part] for part in ("encoder", "phi_global") if part in tree}
            for name, tree in {"params": state["params"], **state["model_state"]}.items()
        }
        if "phi_global" not in pretrained["params"]:
            _LOG.warning("%s has no phi_global: it starts at random", source)
    encoder = encoder.for_transfer()
    if config.method.color == "lab":  # is normalised already
        encoder = encoder.clone(input_mean=(0.0, 0.0, 0.0), input_std=(1.0, 1.0, 1.0))
    return encoder, phi_dim, pretrained


# ---- Score ----------------------------------------------------------------------------------------------------------


def score_videos(
    config: ml_collections.ConfigDict, method: ActionClassifier, variables: dict[str, Tree], split: ActionSplit
) -> dict:
    """{"top1", "test_videos", "test_windows"}; class probabilities averaged over the windows of a video (VDIM §4.1)."""
    part, data = split.test, config.data
    batches = call_with_config(
        "test",
        windows.test_clips,
        part.store,
        part.videos,
        views=data.views,
        frames=data.frames,
        downsample=data.downsample,
        fps=data.fps,
        image_size=data.image_size,
        **config.test,
    )
    probabilities, video = encoders.extract_features(
        ClassProbabilities(method.network, method.color),
        variables,
        ({"image": batch["clips"], "label": batch["video"]} for batch in batches),
    )
    correct = average_by_video(probabilities, video, len(part.videos)).argmax(axis=1) == part.labels
    return {"top1": float(correct.mean()), "test_videos": len(part.videos), "test_windows": len(video)}


def average_by_video(probabilities_NxC: np.ndarray, video_N: np.ndarray, videos: int) -> np.ndarray:
    """float64[videos, C], mean over the windows of each video, each of which has one or more."""
    total = np.zeros((videos, probabilities_NxC.shape[1]))
    np.add.at(total, video_N, probabilities_NxC)
    return total / np.bincount(video_N, minlength=videos)[:, None]


def markdown(result: dict) -> str:
    """A row per split, and their mean."""
    rows = [
        f"| {name.removeprefix('split_')} | {100 * split['top1']:.1f} | {split['train_videos']} | "
        f"{split['test_videos']} | {split['test_windows']} | {split['steps']} |"
        for name, split in result["repeats"].items()
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
