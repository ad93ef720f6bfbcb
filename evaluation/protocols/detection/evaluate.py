"""Object detection: fine-tunes each repeat and scores its boxes. The command is evaluation/detection.py."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from evaluation import transfer
from evaluation.protocols import sweep
from evaluation.protocols.detection import data as detection_data
from evaluation.protocols.detection import report
from evaluation.protocols.detection.data import DetectionSet
from evaluation.protocols.detection.method import DETECTORS, Detector
from evaluation.protocols.detection.scores import METRICS, check_truth, read_rows, to_rows
from vivi_jax import files
from vivi_jax.build import Experiment
from vivi_jax.config import Count, Whole, call_with_config, check
from vivi_jax.distributed import sharding
from vivi_jax.distributed.prefetch import Prefetcher
from vivi_jax.errors import ConfigError, lookup
from vivi_jax.methods.base import Tree
from vivi_jax.models.base import Encoder

PLACES = ("_annotations", "_images")  # how keys of config.data end that name files


def evaluate(config: ml_collections.ConfigDict, *, source: str, data: str, workdir: str) -> dict:
    """Trains and scores each repeat; {"AP": mean, "AP50": mean, ..., "AP_std", ...}.

    The result has the shape that transfer.evaluate says.

    Raises:
      CheckpointError, ConfigError, DataError: before anything is trained, where that is possible.
    """
    check_config(config)
    encoder, pretrained = load_pretrained(source, config)
    train_set = detection_data.load_set(data, config.data.train_annotations, config.data.train_images)
    test_set = detection_data.load_set(data, config.data.test_annotations, config.data.test_images)
    if held_out := config.get("held_out"):
        train_set, test_set = (train_set.take(rows) for rows in sweep.hold_out(len(train_set), held_out))
    detection_data.check_sets(train_set, test_set)
    truth = detection_data.read_annotations(test_set.source)
    if held_out:
        truth = detection_data.only_images(truth, test_set.image_ids)
    check_truth(config.metric, truth, test_set.source)
    detector = make_method(config, encoder, len(train_set.category_ids))

    def repeat(seed: int) -> transfer.Repeat:
        experiment = transfer.make_experiment(config, detector, len(train_set), seed=seed)
        batches = functools.partial(make_batches, config, train_set, seed)
        return transfer.Repeat(seed, experiment, batches, score)

    def score(variables: dict[str, Tree], directory: pathlib.Path) -> dict:
        path = directory / "detections.json"
        if path.exists():
            rows = read_rows(path)
        else:
            rows = detect(config, detector, variables, test_set)
            if jax.process_index() == 0:
                files.write_json(path, rows, indent=None)
        scores = METRICS[config.metric](truth, rows)
        if jax.process_index() == 0:
            report.pictures(test_set, truth, rows, directory / "pictures", config.pictures)
        sizes = {"train_images": len(train_set), "test_images": len(test_set), "detections": len(rows)}
        return scores | {"metric": config.metric} | sizes

    repeats = transfer.numbered(config, repeat)
    for made in repeats.values():
        made.batches(0)  # checks config.data
    check_test(config, detector, next(iter(repeats.values())).experiment)
    return transfer.evaluate(
        config,
        repeats,
        pretrained,
        source=source,
        data=data,
        workdir=workdir,
        summary=report.spread,
        markdown=report.markdown,
    )


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks the values of the config that no other call reads before the data are."""
    transfer.check_config(config, {"repeats": Count, "pictures": Whole, "metric": str, "network": dict})
    lookup("config.metric", config.metric, METRICS)
    places = {key: value for key, value in config.data.items() if key.endswith(PLACES)}
    check("data", dict.fromkeys(places, str), places)
    check(
        "data",
        detection_data.train_batches,
        {key: value for key, value in config.data.items() if key not in places},
        besides=(*transfer.FROM_CODE, "first_step"),
    )
    of_code = ("encoder", "num_classes", "image_size", "max_boxes")
    check("method", Detector, config.method, besides=of_code)
    form = lookup("config.method.form", config.method.form, DETECTORS)
    check("method.options", form, config.method.options)
    check("test", {"batch_size": Count}, {"batch_size": config.test.batch_size})
    check("test", Detector.detect, {key: value for key, value in config.test.items() if key != "batch_size"})


def load_pretrained(source: str, config: ml_collections.ConfigDict) -> tuple[Encoder, transfer.Parts]:
    """As transfer.load_pretrained, with config.network's values and ready for fine-tuning."""
    encoder, pretrained = transfer.load_pretrained(source, config)
    check("network", type(encoder), config.network)
    return call_with_config("network", encoder.for_transfer().clone, **config.network), pretrained


def make_method(config: ml_collections.ConfigDict, encoder: Encoder, num_classes: int) -> Detector:
    """The detector of config.method on the encoder."""
    return call_with_config(
        "method",
        Detector,
        encoder,
        num_classes=num_classes,
        image_size=config.data.image_size,
        max_boxes=config.data.max_boxes,
        **config.method.to_dict(),
    )


def make_batches(
    config: ml_collections.ConfigDict, dataset: DetectionSet, seed: int, first_step: int
) -> Iterator[dict[str, np.ndarray]]:
    """This process's training batches; of config.data, the places of files are left out."""
    options = {key: value for key, value in config.data.items() if not key.endswith(PLACES)}
    return call_with_config(
        "data",
        detection_data.train_batches,
        dataset,
        first_step,
        seed=seed,
        batch_size=config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **options,
    )


# ---- Detections -----------------------------------------------------------------------------------------------------


def detect(
    config: ml_collections.ConfigDict, detector: Detector, variables: dict[str, Tree], dataset: DetectionSet
) -> list[dict]:
    """Detections of all images, as rows of COCO's results format; the same on every process."""
    mesh = sharding.make_mesh()
    step = make_detect(config, detector, mesh)
    batches = detection_data.scoring_batches(
        dataset,
        batch_size=config.test.batch_size,
        image_size=detector.image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    rows = []
    with contextlib.closing(Prefetcher(batches, mesh)) as feed:
        for batch in feed:
            found = {name: np.asarray(value) for name, value in step(variables, batch).items()}
            for row, index in enumerate(found.pop("index")):
                if index >= 0:
                    height, width = dataset.sizes[index]
                    place = detection_data.letterbox(height, width, detector.image_size)
                    rows += to_rows(dataset, index, place, {name: value[row] for name, value in found.items()})
    return rows


def make_detect(config: ml_collections.ConfigDict, detector: Detector, mesh: Mesh) -> Callable[[dict, dict], dict]:
    """Returns detect(variables, batch of detection_data.scoring_batches) -> detections, and the batch's "index"."""
    options = {key: value for key, value in config.test.items() if key != "batch_size"}

    def detect_own(variables: dict, batch: dict) -> dict:
        return {
            **call_with_config("test", detector.detect, variables, batch["image"], **options),
            "index": batch["index"],
        }

    # Each device its own images: left to the compiler, lax.top_k of a split batch is computed by each as a whole.
    split = sharding.batch_sharding(mesh).spec
    by_device = jax.shard_map(
        detect_own, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False
    )
    return jax.jit(by_device, out_shardings=sharding.replicated(mesh))


def check_test(config: ml_collections.ConfigDict, detector: Detector, experiment: Experiment) -> None:
    """Checks config.test, without data and without computing.

    Raises:
      ConfigError: a key that nothing takes, or batches that do not divide over the devices.
    """
    mesh, rows = sharding.make_mesh(), config.test.batch_size
    if rows % mesh.size:
        raise ConfigError(f"config.test.batch_size={rows} does not divide over {mesh.size} devices")
    params, model_state, *_ = jax.eval_shape(lambda: detector.init(jax.random.key(0), experiment.batch_spec))
    batch = {
        "image": jax.ShapeDtypeStruct((rows, *detector.image_size, 3), np.uint8),
        "index": jax.ShapeDtypeStruct((rows,), np.int32),
    }
    jax.eval_shape(make_detect(config, detector, mesh), {"params": params, **model_state}, batch)
