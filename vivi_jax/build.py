"""From a config to an experiment. No data and no device is touched: tests and planning use it as training does."""

import dataclasses

import ml_collections
import optax

from vivi_jax import optim
from vivi_jax.config import Count, Seed, call_with_config, check, without_name
from vivi_jax.errors import lookup
from vivi_jax.methods import METHODS
from vivi_jax.methods.base import BatchSpec, Method
from vivi_jax.models import build_encoder
from vivi_jax.train_step import TrainStep, make_train_step

# What a config of pretraining has at its top.
KEYS = {"name": str, "seed": Seed, "batch_size": Count, "micro_batches": Count, "init_from": str} | dict.fromkeys(
    ("encoder", "method", "ema", "data", "optimizer", "schedule", "evaluation", "run", "hosts", "own"), dict
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a training run is made of."""

    method: Method
    optimizer: optax.GradientTransformation
    train_step: TrainStep
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
    train_step = make_train_step(method, optimizer, schedule, ema, seed=config.seed, micro_batches=config.micro_batches)
    batch_spec = method.batch_spec(config.batch_size, config.data)
    return Experiment(method, optimizer, train_step, batch_spec, total_steps)


def build_method(config: ml_collections.ConfigDict) -> Method:
    """The method with its encoder: all that reading a checkpoint needs of a config."""
    method = lookup("config.method.name", config.method.name, METHODS)
    return call_with_config("method", method, build_encoder(**config.encoder), **without_name(config.method))
