"""From a config to the parts of a run. No data and no device is touched: tests and planning use it as training does."""

import dataclasses

import jax
import ml_collections
import optax

from vivi_jax import optim
from vivi_jax.errors import ConfigError, lookup
from vivi_jax.methods import METHODS
from vivi_jax.models import build_encoder
from vivi_jax.train_step import make_train_step


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a training run is made of."""

    method: object
    optimizer: optax.GradientTransformation
    train_step: object  # (state, batch) -> (state, metrics)
    batch_spec: dict[str, jax.ShapeDtypeStruct]  # of the global batch
    total_steps: int


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Every section of the config becomes the keyword arguments of one function, so an unknown key is an error."""
    encoder = call_with_config("encoder", build_encoder, **config.encoder)
    method = call_with_config(
        "method", lookup("config.method.name", config.method.name, METHODS), encoder, **without_name(config.method)
    )
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
    train_step = make_train_step(
        method, optimizer, schedule, seed=config.seed, total_steps=total_steps, micro_batches=config.micro_batches
    )
    batch_spec = method.batch_spec(config.batch_size, config.data)
    return Experiment(method, optimizer, train_step, batch_spec, total_steps)


def without_name(section: ml_collections.ConfigDict) -> dict:
    """A section without its `name`, which chose the function that gets the others."""
    return {key: value for key, value in section.items() if key != "name"}


def call_with_config(section: str, function, *args, **kwargs):
    """Calls a config section's function; a key it does not know is the user's error, with the section named."""
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ConfigError(f"config.{section}: {error}") from error
