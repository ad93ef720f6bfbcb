"""Trains: `python -m vivi_jax.main --config=configs/vito.py --config.data.path=STORE --workdir=RUN`.

From the config to the experiment, from the experiment to train(). The only file that joins the core, the input
pipeline and the evaluation. Started again with the same --workdir, a run goes on where it was; a finished one
does nothing.

On many hosts: the same command on each of them (docs/scale.md).
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
from absl import flags
from ml_collections import config_flags

from evaluation import probe
from input_pipeline import images
from input_pipeline.store import META, FrameStore
from input_pipeline.streams import shots as shot_frames
from input_pipeline.streams import views as pipeline
from input_pipeline.streams import windows
from vivi_jax import checkpoint, command_line, files
from vivi_jax.build import Experiment, build, call_with_config
from vivi_jax.distributed import processes
from vivi_jax.errors import ConfigError, DataError, lookup
from vivi_jax.train import Evaluator, train

_LOG = logging.getLogger("vivi_jax.main")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "such as configs/vito.py, with variants: configs/vito.py:demo", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; by default runs/<config.name>.")


def main(values: dict) -> None:
    config = values["config"]
    call_with_config("hosts", processes.start, **config.hosts)
    if jax.process_index() != 0:  # one host's log is enough; what goes wrong is said by all
        command_line.set_log_level(logging.WARNING)
    run(config, values["workdir"] or f"runs/{config.name}")


def run(config, workdir: str) -> None:
    """Trains what `config` says, on all processes that have been started, to its end."""
    start = time.time()
    experiment, batches, evaluators = processes.run_on_all(functools.partial(prepare, config, workdir))

    state = train(
        experiment,
        batches,
        workdir,
        seed=config.seed,
        micro_batches=config.micro_batches,
        evaluators=evaluators,
        **config.run,
    )

    summary = {
        "config": config.name,
        "step": int(state.step),
        "seconds_this_start": round(time.time() - start, 1),
        "checkpoint": f"{workdir}/checkpoints/{int(state.step)}",
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "state_sha256": checkpoint.state_sha256(state),
    }
    if jax.process_index() == 0:
        pathlib.Path(workdir, "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        _LOG.info("done: step %d, checkpoint %s", summary["step"], summary["checkpoint"])


def prepare(config, workdir: str) -> tuple[tuple[Experiment, Callable[[int], Iterator[dict]], list[Evaluator]], dict]:
    """The parts of the run, and what must be equal on all hosts."""
    experiment = build(config)
    batches = lookup("config.data.source", config.data.source, SOURCES)(config)
    batches(0)  # raises what is wrong with the data now, before anything is written
    evaluators = online_evaluation(config, experiment.method)
    paths = {key: config.data[key] for key in ("path", "labelled_path") if config.data.get(key)}
    facts = {
        "config": json.loads(config.to_json()),
        "code": code_identity(),
        "local devices": jax.local_device_count(),
        "data": {f"config.data.{key}={path}": data_identity(path) for key, path in paths.items()},
    }
    if jax.process_index() == 0:
        claim_workdir(workdir, config)
    return (experiment, batches, evaluators), facts


def code_identity() -> dict[str, str]:
    """SHA-256 (its beginning) of every source file, and the versions of the libraries that decide the numbers."""
    root = pathlib.Path(__file__).resolve().parents[1]
    packages = ("vivi_jax", "input_pipeline", "evaluation")
    files = [path for package in packages for path in (root / package).rglob("*.py")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files} | {
        library: importlib.metadata.version(library) for library in ("jax", "jaxlib", "flax", "optax", "numpy")
    }


def data_identity(path: str) -> str:
    """SHA-256 (its beginning) of the names of all files under `path` and of a store's description. Opens no data."""
    if not os.path.isdir(path):
        return "not a folder"  # the name of a TFDS data set
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(path):
        folders.sort()
        digest.update(f"{os.path.relpath(folder, path)} {sorted(names)}".encode())
        if META in names:
            digest.update(pathlib.Path(folder, META).read_bytes())
    return digest.hexdigest()[:12]


def video_batches(config) -> Callable[[int], Iterator[dict]]:
    """First step -> batches of clips' views from a frame store."""
    store = FrameStore(config.data.path)
    options = {name: value for name, value in config.data.items() if name not in ("source", "path")}
    return functools.partial(call_with_config, "data", pipeline.clip_views, store, **share(config), **options)


def image_batches(config) -> Callable[[int], Iterator[dict]]:
    """First step -> batches of views of single images."""
    labelled = images.load_labelled(config.data.path, "train")
    options = {name: config.data[name] for name in ("views", "image_size", "min_crop_area")}
    return functools.partial(call_with_config, "data", pipeline.image_views, labelled, **share(config), **options)


def shot_batches(config) -> Callable[[int], Iterator[dict]]:
    """First step -> batches of shots, of labelled images, or of both (VIVI)."""
    streams = []
    kind = lookup("config.data.unlabelled", config.data.unlabelled, UNLABELLED)
    if kind:
        function, load, names = kind
        options = {name: config.data[name] for name in (*names, "frames", "image_size", "min_crop_area")}
        streams.append(
            functools.partial(call_with_config, "data", function, load(config.data.path), **share(config), **options)
        )
    if config.data.labelled_batch_size:
        streams.append(labelled_batches(config))
    return lambda first_step: zip_streams([stream(first_step) for stream in streams])


# config.data.unlabelled -> what yields batches of shots, what opens config.data.path, and the options of the former
UNLABELLED = {
    "videos": (shot_frames.shot_frames, FrameStore, ("shots", "frame_rate", "sampler")),
    "images": (shot_frames.image_frames, functools.partial(images.load_labelled, split="train"), ()),
    "none": None,
}


def labelled_batches(config) -> Callable[[int], Iterator[dict]]:
    """First step -> batches of labelled images."""
    if not config.data.labelled_path:
        raise ConfigError(
            "config.data.labelled_path is empty: give a folder with a folder of images per class, a "
            "prepared store with labels, or the name of a TFDS data set"
        )
    labelled, classes = images.load_labelled(config.data.labelled_path, "train"), config.method.num_classes
    if len(labelled.class_names) != classes:
        raise ConfigError(
            f"{labelled.source} has {len(labelled.class_names)} classes and not {classes}: set "
            f"--config.method.num_classes={len(labelled.class_names)}"
        )
    options = share(config) | dict(
        batch_size=config.data.labelled_batch_size,
        fraction=config.data.labelled_fraction,
        image_size=config.data.image_size,
        min_crop_area=config.data.min_crop_area,
    )
    return functools.partial(call_with_config, "data", pipeline.labelled_images, labelled, **options)


def zip_streams(streams: list[Iterator[dict]]) -> Iterator[dict]:
    """Batches with the arrays of all streams."""
    for batches in itertools.zip_longest(*streams):
        if None in batches:
            raise DataError(
                "one stream of the training data has ended before the other; none of them may end before the run does"
            )
        yield {name: array for batch in batches for name, array in batch.items()}


def window_batches(config) -> Callable[[int], Iterator[dict]]:
    """First step -> batches of two windows of consecutive frames from a frame store."""
    options = {name: value for name, value in config.data.items() if name not in ("source", "path")}
    return functools.partial(
        call_with_config, "data", windows.clip_pairs, FrameStore(config.data.path), **share(config), **options
    )


SOURCES = {"video": video_batches, "images": image_batches, "shots": shot_batches, "windows": window_batches}


def share(config) -> dict:
    """This process's share of every global batch."""
    return dict(
        seed=config.seed,
        batch_size=config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def online_evaluation(config, method) -> list[Evaluator]:
    """k-NN and linear probe of the online encoder on labelled images, as a hook of the loop."""
    options = config.evaluation.to_dict()
    if not options["dataset"]:
        return []
    evaluate = call_with_config("evaluation", probe.make_evaluator, method.network.encoder, **options)
    return [lambda step, state: evaluate(checkpoint.encoder_variables(state.params, state.model_state))]


def claim_workdir(workdir: str, config) -> None:
    """Writes config.json into a new run directory; refuses one that was started with another config.

    `config.run` and `config.hosts` may change between starts: they say how often to log and save, not what to compute.
    """
    files.claim(pathlib.Path(workdir, "config.json"), json.loads(config.to_json()), free=("run.", "hosts."))


if __name__ == "__main__":
    command_line.run(main, {"config": CONFIG, "workdir": WORKDIR}, optional=["workdir"])
