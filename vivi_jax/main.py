"""Trains: `python -m vivi_jax.main --config=configs/vito.py --config.data.path=STORE --workdir=RUN`.

From the config to the experiment, from the experiment to train(). The only file that joins the core, the input
pipeline and the evaluation. Started again with the same --workdir, a run goes on where it was; a finished one
does nothing.

On many hosts: the same command on each of them (docs/scale.md).
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
from absl import flags
from ml_collections import config_flags

from evaluation import probe
from input_pipeline.streams import sources
from input_pipeline.streams.decode import Batches
from input_pipeline.streams.order import Order
from vivi_jax import checkpoint, command_line, files, metrics
from vivi_jax.buckets.client import ADDRESSES
from vivi_jax.buckets.runs import RunFolder
from vivi_jax.build import Experiment, build
from vivi_jax.config import Count, Within, call_with_config, check
from vivi_jax.distributed import processes, watchdog
from vivi_jax.errors import ConfigError
from vivi_jax.export.initial import initial_state
from vivi_jax.methods.base import encoder_variables
from vivi_jax.train import Evaluator, train
from vivi_jax.train_step import TrainState

_LOG = logging.getLogger("vivi_jax.main")
CONFIG = command_line.define_config(None, "a name or file, such as vito, with variants: vito:demo")
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; by default runs/<config.name>.")
MAY_CHANGE = flags.DEFINE_list(
    "may_change", [], "Keys or sections of the config, such as schedule, in which a run goes on with other values."
)
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Only print every key, and what variants and flags changed.")
# What may be in a bucket.
REMOTE = ("workdir", "config.data.path", "config.data.labelled_path", "config.evaluation.dataset", "config.init_from")
FLAGS = {"config": CONFIG, "workdir": WORKDIR, "may_change": MAY_CHANGE, "print_config": PRINT_CONFIG}


def main(values: dict) -> None:
    config = values["config"]
    call_with_config("hosts", processes.start, **config.hosts)
    if jax.process_index() != 0:  # one host's log is enough; what goes wrong is said by all
        command_line.set_log_level(logging.WARNING)
    if values["print_config"]:
        if config.data.path:
            fit_to_data(config)
        filename = config_flags.get_config_filename(flags.FLAGS["config"])  # pyright: ignore[reportAttributeAccessIssue]
        print(command_line.config_text(config, filename))
        return
    run(config, values["workdir"] or f"runs/{config.name}", may_change=tuple(values["may_change"]))


def run(config, workdir: str, *, may_change: tuple[str, ...] = ()) -> None:
    """Trains what `config` says, on all processes that have been started, to its end.

    Args:
      may_change: prefixes of the config's keys whose values may differ from those that the run was begun with.
    """
    start = time.time()
    opened = processes.run_on_all(lambda: (RunFolder(workdir), {}))
    with contextlib.closing(opened) as folder, folder.in_its_words():
        parts = processes.run_on_all(functools.partial(prepare, config, folder, may_change))
        experiment, batches, evaluators, claim, initial = parts
        with processes.locked(workdir), folder.published():
            processes.broadcast_from_process0(folder.fetch)  # again: until now another may have written there
            state = train(
                experiment,
                batches,
                folder,
                seed=config.seed,
                micro_batches=config.micro_batches,
                evaluators=evaluators,
                claim=lambda: processes.broadcast_from_process0(claim),
                initial=initial,
                **config.run,
            )
            with watchdog.watched(config.run.watchdog_seconds, "the summary"):
                summarise(config, folder, state, time.time() - start)


def summarise(config, folder: RunFolder, state: TrainState, seconds: float) -> None:
    """Writes WORKDIR/summary.json."""
    summary = {
        "config": config.name,
        "step": int(state.step),
        "seconds_this_start": round(seconds, 1),
        "checkpoint": f"{folder.address}/checkpoints/{int(state.step)}",
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "state_sha256": checkpoint.state_sha256(state),
    }
    if jax.process_index() == 0:
        files.write_json(folder.path / "summary.json", summary)
        _LOG.info("done: step %d, checkpoint %s", summary["step"], summary["checkpoint"])


def prepare(
    config, folder: RunFolder, may_change: tuple[str, ...]
) -> tuple[tuple[Experiment, Callable[[int], Iterator[dict]], list[Evaluator], Callable[[], None], Any], dict]:
    """The parts of the run, what takes its directory, what it starts from, and what must be equal on all hosts."""
    check_sections(config)
    fit_to_data(config)
    experiment = build(config)
    batches = open_data(config)  # raises what is wrong with the data now, before anything is written
    evaluators = online_evaluation(config, experiment.method)
    say_length(config, experiment.total_steps, batches.examples)
    facts = {
        "config": json.loads(config.to_json()),
        "code": code_identity(),
        "local devices": jax.local_device_count(),
        "data": sources.identities(config.data),
    }

    def claim(write: bool = True) -> None:
        with folder.in_its_words():
            sources.claim(folder.path, facts["data"], write=write)  # first: from other data other values may follow
            claim_workdir(folder, config, may_change, write=write)
            metrics.check(folder.path)
            if write and initial:
                files.write_json(folder.path / "init_from.json", facts["init_from"])
            folder.publish()

    if jax.process_index() == 0:
        folder.fetch()
        claim(write=False)
    if initial := weights_to_start_from(config, experiment, folder):
        facts["init_from"] = initial[1]
    return (experiment, batches, evaluators, claim, initial and (lambda: initial[0])), facts


def weights_to_start_from(config, experiment: Experiment, folder: RunFolder) -> tuple[TrainState, dict] | None:
    """What config.init_from says to begin with, see initial_state; None: nothing, or the run has begun."""
    source = config.get("init_from", "")
    if not source or checkpoint.newest_good_step(checkpoint.directory_of(folder.address)) is not None:
        return None
    return initial_state(source, experiment, method=config.method.name, seed=config.seed)


def check_sections(config) -> None:
    """Checks the sections that build() does not, before anything is opened or written."""
    sources.check_keys(config.data)
    check("evaluation", probe.make_evaluator, config.evaluation)
    check("run", train, config.run, besides=("seed", "micro_batches", "workdir"))
    check("hosts", processes.start, config.hosts)
    if "own" in config:
        check("own", {"largest_batch": Annotated[int, Within(2)], "paper": str}, config.own)
        check("", {"batch_size": Count | None}, {"batch_size": config.batch_size})


def fit_to_data(config) -> None:
    """Fills in what the variant `own` of a config leaves to the data, see configs/common.py; leaves others as they are.

    A run that is made as short as its warm-up gets a shorter warm-up.

    Raises:
      DataError: not even two examples can be used.
    """
    if "own" not in config:
        return
    warmup, epochs = (config.schedule.get(key) or 0 for key in ("warmup_epochs", "epochs"))
    if 0 < epochs <= warmup:
        config.schedule.warmup_epochs = epochs / 10
        _LOG.info("the warm-up is %g epochs, a tenth of the run", config.schedule.warmup_epochs)
    if None not in (config.batch_size, config.schedule.examples_per_epoch):
        return
    level = logging.getLogger("input_pipeline").level
    logging.getLogger("input_pipeline").setLevel(logging.ERROR)  # open_data opens them again, and tells
    try:
        least = 2 * jax.process_count()
        order = Order(config.seed, least, jax.process_index(), jax.process_count())
        examples = sources.open_stream(config.data, order).examples
    finally:
        logging.getLogger("input_pipeline").setLevel(level)
    if config.batch_size is None:
        config.batch_size = fitting_batch(examples, config.own.largest_batch)
    if config.schedule.examples_per_epoch is None:
        config.schedule.examples_per_epoch = examples


def fitting_batch(examples: int, largest: int) -> int:
    """The largest power of two that is neither above `largest` nor above the number of examples (2 or more).

    >>> [fitting_batch(examples, 256) for examples in (2, 20, 255, 200_000)]
    [2, 16, 128, 256]
    """
    return 1 << min(examples, largest).bit_length() - 1


def say_length(config, total_steps: int, examples: int) -> None:
    """Logs how long the run is, in its own data; and if an epoch of the config is not a pass over them."""
    passes = total_steps * config.batch_size / examples
    _LOG.info(
        "%d steps of %d examples: %.4g passes over the %d videos or images that are used",
        total_steps,
        config.batch_size,
        passes,
        examples,
    )
    per_epoch = config.schedule.get("examples_per_epoch")
    if "own" in config:
        _LOG.info("for comparison, the paper: %s", config.own.paper)
        if config.batch_size < min(16, config.own.largest_batch):
            _LOG.warning("a batch of %d compares each with few others: more videos would help most", config.batch_size)
    elif per_epoch and per_epoch > 2 * examples:
        _LOG.warning(
            "an epoch of this config is %d examples (config.schedule.examples_per_epoch), not a pass over your %d; for "
            "your own videos take its variant own, such as --config=vito:own",
            per_epoch,
            examples,
        )


def open_data(config) -> Batches:
    """First step -> batches of this process's share of what config.data says."""
    order = Order(config.seed, config.batch_size, jax.process_index(), jax.process_count())
    return sources.open_stream(config.data, order, num_classes=config.method.get("num_classes"))


def code_identity() -> dict[str, str]:
    """SHA-256 (its beginning) of every source file, and the versions of the libraries that decide the numbers."""
    root = pathlib.Path(__file__).resolve().parents[1]
    packages = ("vivi_jax", "input_pipeline", "evaluation")
    files = [path for package in packages for path in (root / package).rglob("*.py")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files} | {
        library: importlib.metadata.version(library) for library in ("jax", "jaxlib", "flax", "optax", "numpy")
    }


def online_evaluation(config, method) -> list[Evaluator]:
    """k-NN and linear probe of the online encoder on labelled images, as a hook of the loop."""
    options = config.evaluation.to_dict()
    if not options["dataset"]:
        return []
    if not options["dataset"].startswith(ADDRESSES):
        files.refuse_remote("--config.evaluation.dataset", options["dataset"])
    evaluate = call_with_config("evaluation", probe.make_evaluator, method.network.encoder, **options)
    return [lambda step, state: evaluate(encoder_variables(state.params, state.model_state))]


def claim_workdir(folder: RunFolder, config, may_change: tuple[str, ...] = (), *, write: bool = True) -> None:
    """Writes config.json into a new run directory; refuses one that was started with another config.

    `config.run` and `config.hosts` may change between starts: they say how often to log and save, not what to compute.
    What else changes by `may_change` is noted in config_changes.jsonl, with the step of the newest checkpoint.
    """
    step = max(checkpoint.steps(checkpoint.directory_of(folder.address)), default=0)
    if step and "init_from" in may_change:
        raise ConfigError(
            f"--may_change=init_from: {folder.address} is at step {step}, and weights are read before the first; use "
            "another --workdir"
        )
    identity = json.loads(config.to_json())
    for key in ("init_from", "reproducible"):
        if not identity.get(key):
            identity.pop(key, None)  # as runs have it that were begun before there was this key
    changes = files.claim(
        folder.path / "config.json",
        identity,
        free=("run", "hosts"),
        changing=may_change,
        change_option="--may_change",
        write=write,
    )
    if changes and write:
        line = {"step": step, "changes": {key: {"was": was, "now": now} for key, was, now in changes}}
        with open(folder.path / "config_changes.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        _LOG.warning("from step %d on: %s", step, "; ".join(f"{key} {was} -> {now}" for key, was, now in changes))


if __name__ == "__main__":
    command_line.run(main, FLAGS, optional=["workdir"], remote=REMOTE)
