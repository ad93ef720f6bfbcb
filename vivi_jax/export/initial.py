"""The state of a run that starts from weights: config.init_from."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vivi_jax import checkpoint, export
from vivi_jax.build import Experiment
from vivi_jax.errors import CheckpointError, ConfigError, DataError
from vivi_jax.export.weight_files import SUFFIXES
from vivi_jax.methods.base import encoder_variables
from vivi_jax.models import ENCODERS, build_encoder
from vivi_jax.models.base import CLASSIFIER, Encoder
from vivi_jax.train_step import TrainState, create

_LOG = logging.getLogger(__name__)
# Fields of encoders that may differ: the same weights are the same function of an image, or nearly (kernel_eps).
OF_TRAINING = frozenset(
    "dtype remat num_classes kernel_init last_scale norm_decay bn_groups kernel_eps output_stride dilate "
    "stochastic_depth freeze_patches image_size frames".split()
)
Part = dict[str, Any]  # collection ("params", "batch_stats", ...) -> tree of a part of the network


def initial_state(source: str, experiment: Experiment, *, method: str, seed: int) -> tuple[TrainState, dict[str, Any]]:
    """The state at step 0 with the weights of a run, or of a file that vivi_jax.export reads.

    The encoder's parameters and statistics are taken, without a classifier; from a run of the same method also those of
    its heads whose arrays have the same names and shapes. All else is as `create` makes it, and the target network is a
    copy of the online one.

    Args:
      source: run directory, whose newest good checkpoint is read, or file of weights; also in a bucket.
      method: config.method.name of this run.
      seed: of what is random.

    Returns:
      (the state, as NumPy arrays; what was taken, as JSON values: {"init_from", "step" of a run or None, "taken" and
      "random": names of parts, "sha256" of what was taken})

    Raises:
      ConfigError: nothing of this kind is there, it does not verify, or its encoder is another one.
    """
    try:
        kwargs, parts, step = read(source, method)
        check_same_encoder(experiment.method.network.encoder, build_encoder(**kwargs))  # pyright: ignore[reportAttributeAccessIssue]
        state, taken = with_parts(experiment, seed, parts)
    except (CheckpointError, ConfigError, DataError) as error:
        raise ConfigError(f"config.init_from={source}: {error}") from None
    about = {
        "init_from": source,
        "step": step,
        "taken": taken,
        "random": sorted(state.params.keys() - set(taken)),
        "sha256": checkpoint.state_sha256({part: parts[part] for part in taken}),
    }
    _LOG.info(
        "starting from %s%s: %s from there, %s",
        source,
        "" if step is None else f", step {step}",
        ", ".join(taken),
        f"random: {', '.join(about['random'])}" if about["random"] else "nothing is random",
    )
    return state, about


def read(source: str, method: str) -> tuple[dict[str, Any], dict[str, Part], int | None]:
    """(arguments of build_encoder, what may be taken by the names of parts, step of a run)."""
    source = checkpoint.local_copy(source)
    path = pathlib.Path(source)
    if path.is_file():
        kwargs, variables = export.load_encoder(source)
        params = {name: tree for name, tree in variables["params"].items() if name != CLASSIFIER}
        return kwargs, {"encoder": variables | {"params": params}}, None
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"there is neither a file of weights ({', '.join(SUFFIXES)}) nor a run directory (a folder with "
            "config.json and checkpoints)"
        )
    config, state = checkpoint.load_config(source), checkpoint.load_state(source)
    variables = encoder_variables(state["params"], state["model_state"])
    export.check_weights(build_encoder(**config["encoder"]), variables)
    parts = {"encoder": variables}
    if config["method"]["name"] == method:
        parts = {name: part(state["params"], state["model_state"], name) for name in state["params"]}
    return config["encoder"], parts, int(state["step"])


def part(params: dict, model_state: dict, name: str) -> Part:
    """What a state has of a part of the network."""
    return {"params": params[name]} | {of: trees[name] for of, trees in model_state.items() if name in trees}


def check_same_encoder(here: Encoder, there: Encoder) -> None:
    """Raises ConfigError, with the field and both values, if the same weights would be other functions."""
    names = {kind: name for name, kind in ENCODERS.items()}
    if type(here) is not type(there):
        different = [("name", names[type(there)], names[type(here)])]
    else:
        fields = {field.name for field in dataclasses.fields(here)} - OF_TRAINING - {"parent", "name"}
        both = [(name, getattr(there, name), getattr(here, name)) for name in sorted(fields)]
        different = [(name, was, now) for name, was, now in both if was != now]
    if different:
        raise ConfigError(
            "its encoder is another one: "
            + "; ".join(f"config.encoder.{name} is {was!r} there, {now!r} here" for name, was, now in different)
        )


def with_parts(experiment: Experiment, seed: int, parts: dict[str, Part]) -> tuple[TrainState, list[str]]:
    """(the state at step 0 with these parts where their arrays fit, the names of those that do)."""

    def random() -> TrainState:
        return create(experiment.method, experiment.optimizer, experiment.batch_spec, seed)

    like = jax.eval_shape(random)
    taken = [name for name in sorted(like.params) if name in parts and not misfits(like, name, parts[name])]
    if "encoder" not in taken:
        raise CheckpointError(f"its encoder does not fit: {misfits(like, 'encoder', parts['encoder'])[0]}")

    @jax.jit
    def start(parts: dict[str, Part]) -> TrainState:
        state = random()
        network = {"params": state.params, **state.model_state}
        for name, own in parts.items():
            for collection, tree in own.items():
                network[collection] = network[collection] | {name: tree}
        params = network.pop("params")
        target = of_target({"params": params, "model_state": network}, state.target)
        opt_state = experiment.optimizer.init(params)
        return dataclasses.replace(state, params=params, model_state=network, target=target, opt_state=opt_state)

    given = {name: jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), parts[name]) for name in taken}
    return jax.tree.map(np.array, start(given)), taken  # arrays of their own: all are donated


def misfits(like: TrainState, name: str, given: Part) -> list[str]:
    """The arrays of a part that another has not, or in another shape, in words."""
    trees: list[dict[tuple[str, ...], Any]] = [
        flatten_dict(part(like.params, like.model_state, name)),  # pyright: ignore[reportAssignmentType]
        flatten_dict(given),
    ]
    expected, there = ({"/".join(path): np.shape(leaf) for path, leaf in tree.items()} for tree in trees)
    return [
        f"{array} is {there.get(array, 'absent')} there, {expected.get(array, 'absent')} here"
        for array in sorted(expected.keys() | there.keys())
        if expected.get(array) != there.get(array)
    ]


def of_target(online: dict, target: dict) -> dict:
    """What the target network has of the online one."""
    values = flatten_dict(online, keep_empty_nodes=True)
    return unflatten_dict({path: values[path] for path in flatten_dict(target, keep_empty_nodes=True)})
