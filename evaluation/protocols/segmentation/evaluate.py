"""Semantic segmentation: fine-tunes each repeat and scores its masks. The command is evaluation/segmentation.py."""

import functools
import logging
import pathlib
import time
from collections.abc import Iterator
from typing import Annotated

import jax
import ml_collections
import numpy as np

from evaluation import transfer
from evaluation.protocols import sweep
from evaluation.protocols.interpolation import dense_encoder
from evaluation.protocols.segmentation import data as segmentation_data
from evaluation.protocols.segmentation import report
from evaluation.protocols.segmentation.data import SegmentationSet
from evaluation.protocols.segmentation.network import FCN, Segmenter, confusion, predict, scores
from vivi_jax.config import Count, OneOf, Whole, call_with_config, check
from vivi_jax.errors import lookup
from vivi_jax.methods.base import Tree
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import OUTPUT_STRIDES

METHOD = {"output_stride": Annotated[int, OneOf(OUTPUT_STRIDES)], "channels": Count, "dilation": Count}
_LOG = logging.getLogger(__name__)


def evaluate(config: ml_collections.ConfigDict, *, source: str, data: str, workdir: str) -> dict:
    """Trains and scores each repeat; {"miou": mean, "miou_std", "pixel_accuracy", "iou": {class: mean}, ...}.

    The result has the shape that transfer.evaluate says.

    Raises:
      CheckpointError, ConfigError, DataError: before anything is trained, where that is possible.
    """
    check_config(config)
    encoder, pretrained = transfer.load_pretrained(source, config)
    train_set, val_set = load_sets(config.name, data)
    if held_out := config.get("held_out"):
        train_set, val_set = (train_set.take(rows) for rows in sweep.hold_out(len(train_set), held_out))
    method = make_method(config, encoder, len(val_set.class_names))
    fill = mean_colour(encoder)

    def repeat(seed: int) -> transfer.Repeat:
        def batches(first_step: int) -> Iterator[dict[str, np.ndarray]]:
            return call_with_config(
                "data",
                segmentation_data.train_batches,
                train_set,
                first_step,
                seed=seed,
                batch_size=config.batch_size,
                fill=fill,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                **config.data,
            )

        def score(variables: dict[str, Tree], directory: pathlib.Path) -> dict:
            sizes = {"train_images": len(train_set), "val_images": len(val_set)}
            return score_masks(config, method, variables, val_set, fill, directory) | sizes

        experiment = transfer.make_experiment(config, method, len(train_set), seed=seed)
        return transfer.Repeat(seed, experiment, batches, score)

    return transfer.evaluate(
        config,
        transfer.numbered(config, repeat),
        pretrained,
        source=source,
        data=data,
        workdir=workdir,
        summary=functools.partial(report.over_repeats, class_names=val_set.class_names),
        markdown=report.markdown,
    )


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks every value of the config, before anything is read."""
    transfer.check_config(config, {"repeats": Count, "pictures": Whole})
    check("method", METHOD, config.method)
    check("data", segmentation_data.train_batches, config.data, besides=(*transfer.FROM_CODE, "first_step", "fill"))
    check("test", predict, config.test, besides=("fill",))


def load_sets(name: str, data: str) -> tuple[SegmentationSet, SegmentationSet]:
    """The training and validation images of config.name, all masks read and checked.

    Raises:
      DataError: no such data there, or one line with all that is wrong with them.
    """
    sets, start = lookup("config.name", name, segmentation_data.DATASETS)(data), time.perf_counter()
    for part in sets:
        found = segmentation_data.check(part)
        _LOG.info(
            "%s: %d images, %.1f million labelled pixels, %d of %d classes",
            part.source,
            found["images"],
            found["labelled_pixels"] / 1e6,
            found["classes"],
            len(part.class_names),
        )
    _LOG.info("all masks read and checked in %.0f s", time.perf_counter() - start)
    return sets


def make_method(config: ml_collections.ConfigDict, encoder: Encoder, num_classes: int) -> Segmenter:
    """An FCN on the encoder's last feature map, made finer."""
    options = config.method.to_dict()
    encoder, layer = dense_encoder(encoder, 0, output_stride=options.pop("output_stride"), dilate=True)
    return Segmenter(call_with_config("method", FCN, encoder, layer, num_classes, **options))


def mean_colour(encoder: Encoder) -> tuple[int, int, int]:
    """RGB that the encoder's input normalisation turns into (nearly) zeros."""
    red, green, blue = (round(255 * channel) for channel in encoder.input_mean)
    return red, green, blue


def score_masks(
    config: ml_collections.ConfigDict,
    method: Segmenter,
    variables: dict[str, Tree],
    val_set: SegmentationSet,
    fill: tuple[int, int, int],
    directory: pathlib.Path,
) -> dict:
    """scores() of all validation images; draws config.pictures of them, evenly spaced over the list."""
    classes = len(val_set.class_names)
    total, drawn = np.zeros((classes, classes), np.int64), {}
    chosen = set(np.linspace(0, len(val_set) - 1, config.pictures).round().astype(int)) if config.pictures else set()
    found = call_with_config("test", predict, method.network, variables, val_set, fill=fill, **config.test)
    for i, image, mask, predicted in found:
        total += confusion(mask, predicted, classes)
        if i in chosen:
            drawn[i] = image, mask, predicted
    if drawn and jax.process_index() == 0:
        report.draw([drawn[i] for i in sorted(drawn)], val_set.class_names, directory / "predictions.png")
    return scores(total)
