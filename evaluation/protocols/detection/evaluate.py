"""Object detection: fine-tunes each repeat and scores its boxes. The command is evaluation/detection.py."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from evaluation import encoders
from evaluation.protocols.detection import data as detection_data
from evaluation.protocols.detection import report as detection_report
from evaluation.protocols.detection.data import DetectionSet
from evaluation.protocols.detection.method import Detector
from evaluation.protocols.detection.scores import METRICS, check_truth, read_rows, to_rows
from evaluation.transfer import claim, config_identity, write, write_first_checkpoint
from vivi_jax import optim
from vivi_jax.build import Experiment, call_with_config, without_name
from vivi_jax.distributed import sharding
from vivi_jax.distributed.prefetch import Prefetcher
from vivi_jax.errors import ConfigError, lookup
from vivi_jax.models import build_encoder
from vivi_jax.train import train
from vivi_jax.train_step import TrainState, make_train_step

_LOG = logging.getLogger("evaluation.detection")


def evaluate(config: ml_collections.ConfigDict, *, source: str, data: str, workdir: str) -> dict:
    """Trains and scores config.runs times; {"AP": mean over the runs, ..., "runs": {seed: its scores}, ...}.

    Raises:
      CheckpointError, ConfigError, DataError: before anything is trained, where that is possible.
    """
    encoder, pretrained = load_pretrained(source, config)
    train_set = detection_data.load_set(data, config.data.train_annotations, config.data.train_images)
    test_set = detection_data.load_set(data, config.data.test_annotations, config.data.test_images)
    detection_data.check_sets(train_set, test_set)
    truth = detection_data.read_annotations(test_set.source)
    check_truth(config.metric, truth, test_set.source)
    detector = make_detector(config, encoder, len(train_set.category_ids))
    check_sections(config, detector, train_set)

    root, runs = pathlib.Path(workdir), {}
    for seed in range(config.seed, config.seed + config.runs):
        directory = root / f"seed_{seed}"
        identity = config_identity(config) | {"seed": seed}
        identity.pop("runs")  # more may be asked for later
        claim(directory, {"config": identity, "checkpoint": source, "data": os.path.realpath(data)})
        runs[seed] = run(config, seed, detector, pretrained, train_set, test_set, truth, directory)
    result = {
        "config": config.name,
        "checkpoint": source,
        "data": data,
        "metric": config.metric,
        **detection_report.means(runs),
        "runs": runs,
    }
    if jax.process_index() == 0:
        write(root / "result.json", json.dumps(result, indent=1) + "\n")
        write(root / "result.md", detection_report.markdown(result))
    return result


def run(
    config,
    seed: int,
    detector: Detector,
    pretrained: dict,
    train_set: DetectionSet,
    test_set: DetectionSet,
    truth: dict,
    directory: pathlib.Path,
) -> dict:
    """Trains with one seed and scores; nothing is done again that is done."""
    path, rows_path = directory / "result.json", directory / "detections.json"
    if path.exists():
        return json.loads(path.read_text())
    if rows_path.exists():
        rows = read_rows(rows_path)
    else:
        experiment = make_parts(config, detector, seed, len(train_set))
        write_first_checkpoint(experiment, directory, pretrained, seed=seed, keep=config.run.keep_checkpoints)
        state = train(
            experiment,
            lambda first_step: make_batches(config, train_set, seed, first_step),
            str(directory),
            seed=seed,
            micro_batches=config.micro_batches,
            evaluators=[],
            **config.run,
        )
        rows = detect(config, detector, state, test_set)
        if jax.process_index() == 0:
            write(rows_path, json.dumps(rows) + "\n")
    scores = METRICS[config.metric](truth, rows) | {
        "train_images": len(train_set),
        "test_images": len(test_set),
        "detections": len(rows),
    }
    _LOG.info("%s: AP %.1f on %d images", directory, 100 * scores["AP"], len(test_set))
    if jax.process_index() == 0:
        detection_report.pictures(test_set, truth, rows, directory / "pictures", config.pictures)
        write(path, json.dumps(scores) + "\n")
    return scores


def detect(config, detector: Detector, state: TrainState, dataset: DetectionSet) -> list[dict]:
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
    rows, variables = [], {"params": state.params, **state.model_state}
    with contextlib.closing(Prefetcher(batches, mesh)) as feed:
        for batch in feed:
            found = {name: np.asarray(value) for name, value in step(variables, batch).items()}
            for row, index in enumerate(found.pop("index")):
                if index >= 0:
                    place = detection_data.letterbox(*dataset.sizes[index], detector.image_size)
                    rows += to_rows(dataset, index, place, {name: value[row] for name, value in found.items()})
    return rows


# ---- Method, schedule, batches ---------------------------------------------------------------------------------------


def load_pretrained(source: str, config) -> tuple[nn.Module, dict]:
    """(encoder with config.network's values, its weights {"params": {"encoder": tree}, "batch_stats": likewise}).

    Of "none" there are no weights. A classifier is left out, and BatchNorm takes its statistics from the whole batch.
    """
    if source == "none":
        encoder, pretrained = call_with_config("encoder", build_encoder, **config.encoder), {}
    else:
        encoder, variables, _ = encoders.load_encoder(source)
        pretrained = {name: {"encoder": tree} for name, tree in variables.items()}
    return call_with_config("network", encoder.for_transfer().clone, **config.network), pretrained


def make_detector(config, encoder: nn.Module, num_classes: int) -> Detector:
    method = config.method.to_dict()
    return call_with_config(
        "method",
        Detector,
        encoder,
        num_classes=num_classes,
        image_size=config.data.image_size,
        max_boxes=config.data.max_boxes,
        **method,
    )


def make_parts(config, detector: Detector, seed: int, train_images: int) -> Experiment:
    """The parts of a training run, as vivi_jax.build makes them for pretraining."""
    rate, total_steps = call_with_config("schedule", schedule, config.batch_size, train_images, **config.schedule)
    optimizer = call_with_config(
        "optimizer",
        lookup("config.optimizer.name", config.optimizer.name, optim.OPTIMIZERS),
        rate,
        **without_name(config.optimizer),
    )
    step = make_train_step(
        detector, optimizer, rate, seed=seed, total_steps=total_steps, micro_batches=config.micro_batches
    )
    return Experiment(detector, optimizer, step, detector.batch_spec(config.batch_size, config.data), total_steps)


def schedule(
    batch_size: int,
    train_images: int,
    *,
    unit: str,
    total: float,
    warmup: float,
    boundaries: tuple[float, ...],
    factor: float,
    lr: float,
):
    """(learning rate by step, steps): optim.piecewise with its times in steps or in epochs."""
    steps = lookup("config.schedule.unit", unit, {"step": 1.0, "epoch": train_images / batch_size})
    return optim.piecewise(
        batch_size,
        lr=lr,
        total_steps=max(round(total * steps), 1),
        warmup_steps=round(warmup * steps),
        boundaries=tuple(round(time * steps) for time in boundaries),
        factor=factor,
    )


def make_batches(config, dataset: DetectionSet, seed: int, first_step: int) -> Iterator[dict]:
    """This process's training batches; of config.data, the places of files are left out."""
    options = {key: value for key, value in config.data.items() if not key.endswith(("_annotations", "_images"))}
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


def make_detect(config, detector: Detector, mesh: Mesh) -> Callable[[dict, dict], dict]:
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


def check_sections(config, detector: Detector, train_set: DetectionSet) -> None:
    """Goes through training and testing without data and without computing, for what is wrong with the config.

    Raises:
      ConfigError: a key that nothing takes, or batches that do not divide over the devices.
    """
    mesh, rows = sharding.make_mesh(), config.test.batch_size
    if rows % mesh.size:
        raise ConfigError(f"config.test.batch_size={rows} does not divide over {mesh.size} devices")
    experiment = make_parts(config, detector, config.seed, len(train_set))
    sharding.check_batch_sizes(experiment.batch_spec, config.micro_batches, mesh)
    make_batches(config, train_set, config.seed, 0)
    params, model_state, *_ = jax.eval_shape(lambda: detector.init(jax.random.key(0), experiment.batch_spec))
    batch = {
        "image": jax.ShapeDtypeStruct((rows, *detector.image_size, 3), np.uint8),
        "index": jax.ShapeDtypeStruct((rows,), np.int32),
    }
    jax.eval_shape(make_detect(config, detector, mesh), {"params": params, **model_state}, batch)


# ---- Command line ---------------------------------------------------------------------------------------------------
