"""From a config to an experiment. No data and no device is touched: tests and planning use it as training does."""

import dataclasses

import ml_collections
import optax

from vivi_jax import optim
from vivi_jax.config import Count, Seed, Whole, call_with_config, check, without_name
from vivi_jax.distributed.in_parts import StepInParts
from vivi_jax.errors import ConfigError, lookup
from vivi_jax.methods import METHODS
from vivi_jax.methods.base import BatchSpec, Method
from vivi_jax.models import build_encoder
from vivi_jax.train_step import TrainStep, make_step_in_parts, make_train_step

# What a config of pretraining has at its top.
KEYS = {
    "name": str,
    "seed": Seed,
    "batch_size": Count,
    "micro_batches": Count,
    "reproducible": Whole,
    "init_from": str,
} | dict.fromkeys(
    ("encoder", "method", "ema", "data", "optimizer", "schedule", "evaluation", "run", "hosts", "own"), dict
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a training run is made of."""

    method: Method
    optimizer: optax.GradientTransformation
    train_step: TrainStep | StepInParts
    batch_spec: BatchSpec  # of the global batch
    total_steps: int


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Every section of the config becomes the keyword arguments of one function, so an unknown key is an error."""
    check("", KEYS, config)
    method = build_method(config)
    schedule, total_steps = call_with_config(
        "schedule",
        lookup("config.schedule.name", config.schedule.name, optim.SCHEDULES),
        config.batch_size,
        **without_name(config.schedule),
    )
    optimizer = call_with_config(
        "optimizer",
        lookup("config.optimizer.name", config.optimizer.name, optim.OPTIMIZERS),
        schedule,
        **without_name(config.optimizer),
    )
    ema = call_with_config(
        "ema", lookup("config.ema.name", config.ema.name, optim.EMA_SCHEDULES), total_steps, **without_name(config.ema)
    )
    parts = method, optimizer, schedule, ema
    if config.reproducible and config.micro_batches > 1:
        raise ConfigError(
            f"config.micro_batches={config.micro_batches} with config.reproducible={config.reproducible}, which takes "
            "its parts of a batch one after the other anyway: leave config.micro_batches at 1, and where memory is "
            "short take more parts"
        )
    if config.reproducible:
        train_step = make_step_in_parts(*parts, seed=config.seed, parts=config.reproducible)
    else:
        train_step = make_train_step(*parts, seed=config.seed, micro_batches=config.micro_batches)
    batch_spec = method.batch_spec(config.batch_size, config.data)
    return Experiment(method, optimizer, train_step, batch_spec, total_steps)


def build_method(config: ml_collections.ConfigDict) -> Method:
    """The method with its encoder: all that reading a checkpoint needs of a config."""
    method = lookup("config.method.name", config.method.name, METHODS)
    return call_with_config("method", method, build_encoder(**config.encoder), **without_name(config.method))
