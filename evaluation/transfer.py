"""The runner of the protocols that fine-tune an encoder: repeated training runs from pretrained weights, their scores.

A protocol states only what is its own: the data, method and score of each repeat, and its table. It leaves

    WORKDIR/evaluation.json    config, checkpoint and data, which the folder belongs to
    WORKDIR/REPEAT/            checkpoints and metrics.jsonl, as of any run of vivi_jax.main, and result.json
    WORKDIR/result.{json,md}   {"config", "checkpoint", "data", means of the scores, "repeats": {REPEAT: its result}}

Started again, it goes on from there: finished repeats are read, others continue from their newest checkpoint.
"""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from evaluation import encoders
from vivi_jax import files, metrics, optim
from vivi_jax.build import Experiment
from vivi_jax.config import Count, Part, Seed, call_with_config, check, without_name
from vivi_jax.distributed import processes, sharding, watchdog
from vivi_jax.errors import CheckpointError, lookup
from vivi_jax.loop import train
from vivi_jax.methods.base import Method, Tree
from vivi_jax.models.base import Encoder
from vivi_jax.train_step import TrainState, create, make_train_step

_LOG = logging.getLogger(__name__)
Parts = dict[str, dict[str, Tree]]  # {"params": {part of a network: tree}, "batch_stats": likewise}


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One training run of a protocol and its score.

    Attributes:
      seed: of the first weights, the data and the random numbers of training.
      experiment: see make_experiment.
      batches: first step -> this process's training batches from there on.
      score: (the trained network's variables, the repeat's folder) -> JSON values, of which the floats are scores.
        Every process calls it; only process 0 may write into the folder.
    """

    seed: int
    experiment: Experiment
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    score: Callable[[dict[str, Tree], pathlib.Path], dict[str, Any]]


# What the config of every protocol has at its top.
KEYS = {"name": str, "seed": Seed, "batch_size": Count, "micro_batches": Count, "held_out": Part} | dict.fromkeys(
    ("encoder", "method", "data", "optimizer", "schedule", "test", "run", "sweep"),  # the last is for --sweep alone
    dict,
)
FROM_CODE = ("seed", "batch_size", "process_index", "process_count", "threads")  # of streams; no keys of config.data


def check_config(
    config: ml_collections.ConfigDict,
    keys: Mapping[str, Any],
    *,
    optimizers: Mapping[str, Callable[..., optax.GradientTransformation]] = optim.OPTIMIZERS,
) -> None:
    """Checks what all protocols share, before data are read: the top of the config, optimizer, schedule and run.

    Args:
      keys: those at the top that only this protocol has -> what their values may be.

    Raises:
      ConfigError: an unknown key, or a value that cannot be.
    """
    check("", {**KEYS, **keys}, config)
    schedule = lookup("config.schedule.name", config.schedule.name, optim.SCHEDULES)
    check("schedule", schedule, without_name(config.schedule), besides=("batch_size", "examples_per_epoch"))
    optimizer = lookup("config.optimizer.name", config.optimizer.name, optimizers)
    check("optimizer", optimizer, without_name(config.optimizer), besides=("steps_per_epoch",))
    check("run", train, config.run, besides=("seed", "micro_batches", "workdir"))


def numbered(config: ml_collections.ConfigDict, make: Callable[[int], Repeat]) -> dict[str, Repeat]:
    """config.repeats of them, from their seeds: {"repeat_0": make(config.seed), "repeat_1": make(config.seed + 1)}."""
    return {f"repeat_{n}": make(config.seed + n) for n in range(config.repeats)}


def evaluate(
    config: ml_collections.ConfigDict,
    repeats: Mapping[str, Repeat],
    pretrained: Parts,
    *,
    source: str,
    data: str,
    workdir: str,
    summary: Callable[[dict[str, dict]], dict],
    markdown: Callable[[dict], str],
) -> dict:
    """Trains and scores the repeats that have no result yet; writes and returns the result of all.

    Args:
      repeats: name of its folder in `workdir` -> the repeat.
      pretrained: weights that each repeat starts from.
      source, data: --checkpoint and --data of the command.
      summary: results of the repeats -> what the result says of them beside the means of their scores.
      markdown: the result -> result.md.

    Raises:
      ConfigError: `workdir` was begun with other values, or the batches do not divide over the devices.
      CheckpointError: `pretrained` does not fit the network.
    """
    root = pathlib.Path(workdir)
    for repeat in repeats.values():
        sharding.check_batch_sizes(repeat.experiment.batch_spec, config.micro_batches, sharding.make_mesh())
    identity = {"config": json.loads(config.to_json()), "checkpoint": source, "data": os.path.realpath(data)}
    free = ("config.run", "config.repeats")

    def claim(*, write: bool = True) -> None:
        processes.broadcast_from_process0(
            lambda: files.claim(root / "evaluation.json", identity, free=free, write=write)
        )

    claim(write=False)
    processes.broadcast_from_process0(lambda: [metrics.check(root / name) for name in repeats])
    with processes.locked(workdir):
        results = {
            name: train_and_score(config, repeat, pretrained, root / name, claim) for name, repeat in repeats.items()
        }
        return write_result(config, results, root, source=source, data=data, summary=summary, markdown=markdown)


def write_result(
    config: ml_collections.ConfigDict,
    results: dict[str, dict],
    root: pathlib.Path,
    *,
    source: str,
    data: str,
    summary: Callable[[dict[str, dict]], dict],
    markdown: Callable[[dict], str],
) -> dict:
    """Writes ROOT/result.json and .md, and returns what is in them; see `evaluate`."""
    result = {
        "config": config.name,
        "checkpoint": source,
        "data": data,
        **means(results),
        **summary(results),
        "repeats": results,
    }
    if jax.process_index() == 0:
        files.write_json(root / "result.json", result)
        files.write_text(root / "result.md", markdown(result))
    return result


def train_and_score(
    config: ml_collections.ConfigDict,
    repeat: Repeat,
    pretrained: Parts,
    directory: pathlib.Path,
    claim: Callable[[], None],
) -> dict:
    """The content of DIRECTORY/result.json: repeat.score()'s, with "seed" and "steps"."""
    path = directory / "result.json"
    if path.exists():
        return json.loads(path.read_text())
    state = train(
        repeat.experiment,
        repeat.batches,
        str(directory),
        seed=repeat.seed,
        micro_batches=config.micro_batches,
        evaluators=[],
        claim=claim,
        initial=lambda: first_state(repeat.experiment, pretrained, seed=repeat.seed),
        **config.run,
    )
    with watchdog.watched(config.run.watchdog_seconds, f"the scoring of {directory}", watchdog.SCORING):
        result = repeat.score({"params": state.params, **state.model_state}, directory)
    result |= {"seed": repeat.seed, "steps": int(state.step)}
    main_score = next(name for name, value in result.items() if isinstance(value, float))
    _LOG.info("%s: %s %.1f %%", directory, main_score, 100 * result[main_score])
    if jax.process_index() == 0:
        files.write_json(path, result)
    return result


def means(results: Mapping[str, dict]) -> dict[str, float]:
    """The mean over the repeats of each of their scores, which are the floats."""
    first = next(iter(results.values()))
    names = [name for name, value in first.items() if isinstance(value, float)]
    return {name: float(np.mean([result[name] for result in results.values()])) for name in names}


# ---- The experiment -------------------------------------------------------------------------------------------------


def load_pretrained(source: str, config: ml_collections.ConfigDict) -> tuple[Encoder, Parts]:
    """(encoder, its weights as the part "encoder" of a network); of "none" that of config.encoder and no weights.

    Raises:
      CheckpointError: nothing there, or it does not verify.
    """
    loaded = encoders.load_encoder(source, random=config.encoder)
    return loaded.encoder, {name: {"encoder": tree} for name, tree in loaded.variables.items()}


def make_experiment(
    config: ml_collections.ConfigDict,
    method: Method,
    examples_per_epoch: int,
    *,
    seed: int,
    optimizers: Mapping[str, Callable[..., optax.GradientTransformation]] = optim.OPTIMIZERS,
) -> Experiment:
    """The experiment of one repeat, as vivi_jax.build makes it for pretraining.

    Raises:
      ConfigError: a section has a key that its function does not take, or an impossible value.
    """
    schedule, total_steps = call_with_config(
        "schedule",
        lookup("config.schedule.name", config.schedule.name, optim.SCHEDULES),
        config.batch_size,
        examples_per_epoch=examples_per_epoch,
        **without_name(config.schedule),
    )
    optimizer = call_with_config(
        "optimizer",
        lookup("config.optimizer.name", config.optimizer.name, optimizers),
        schedule,
        **without_name(config.optimizer),
    )
    step = make_train_step(method, optimizer, schedule, None, seed=seed, micro_batches=config.micro_batches)
    return Experiment(method, optimizer, step, method.batch_spec(config.batch_size, config.data), total_steps)


def first_state(experiment: Experiment, pretrained: Parts, *, seed: int) -> TrainState:
    """The state at step 0, with the pretrained weights in it."""
    state = jax.jit(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, seed))()
    params, model_state = with_pretrained(state.params, state.model_state, pretrained)
    return state.replace(params=params, model_state=model_state)


def with_pretrained(params: Tree, model_state: Tree, pretrained: Parts) -> tuple[Tree, Tree]:
    """Puts pretrained parts over random ones.

    Parts are the encoder and phi; leaves that only the checkpoint has (an image classifier, say) are left out.

    Raises:
      CheckpointError: a leaf is missing or has another shape.
    """

    def overwrite(tree: dict, loaded: dict, where: str) -> dict:
        def leaf(path: tuple, old: jax.Array) -> jax.Array:
            new: Any = loaded
            for entry in path:
                new = new.get(entry.key) if isinstance(new, dict) else None
            if new is None or new.shape != old.shape:
                raise CheckpointError(
                    f"{where}{jax.tree_util.keystr(path)} has the shape {old.shape} here and "
                    f"{'is missing' if new is None else new.shape} in the checkpoint"
                )
            return new

        parts = {part: tree[part] for part in loaded if part in tree}
        return tree | jax.tree_util.tree_map_with_path(leaf, parts)

    params = overwrite(params, pretrained.get("params", {}), "params")
    statistics = pretrained.get("batch_stats", {})
    return params, {name: overwrite(tree, statistics, name) for name, tree in model_state.items()}
