"""Optimizers, learning-rate and momentum schedules, parameter masks. All updates are optax's."""

import difflib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from vivi_jax.config import Chance, Count, Decay, NonNegative, Positive, Share
from vivi_jax.errors import ConfigError

# Which parameters with two axes or more get weight decay and the LARS trust ratio, by leaf name. Those with one axis
# (biases, normalisation, tokens) get neither: BYOL's code, whose details VITO A.2 adopts, excludes them. A name that is
# not here is an error, never a guess.
DECAYED = {"kernel": True, "patch_kernel": False, "relative_position_bias_table": False}  # the last: Swin's code


def decay_mask(params: dict) -> dict:
    """Tree of bools with the structure of `params`: True where weight decay and the trust ratio apply.

    >>> decay_mask({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
    {'dense': {'bias': False, 'kernel': True}}

    Raises:
      ConfigError: a parameter with two axes or more whose name has no rule.
    """

    def decayed(path, leaf) -> bool:
        name = path[-1].key
        if leaf.ndim <= 1:
            return False
        if name not in DECAYED:
            raise ConfigError(
                f"parameter {jax.tree_util.keystr(path)}: no rule for weight decay of leaves named {name!r}; add it to "
                "vivi_jax.optim.DECAYED"
            )
        return DECAYED[name]

    return jax.tree_util.tree_map_with_path(decayed, params)


Length = NonNegative | None
# Keys of config.schedule, of each row exactly one: the length of the run, and of the warm-up where there is one.
LENGTHS = ("total_steps", "epochs", "examples")
WARMUPS = ("warmup_steps", "warmup_epochs", "warmup_examples")


def durations(
    batch_size: int, examples_per_epoch: int | None, given: Mapping[str, float], *rows: tuple[str, ...]
) -> list[tuple[float, float]]:
    """Durations in steps, not rounded, from the keys of config.schedule that give them in steps, epochs or examples.

    >>> durations(256, 1024, {"epochs": 2.5, "warmup_steps": 3}, LENGTHS, WARMUPS)
    [(10.0, 4.0), (3.0, 1.0)]

    Args:
      examples_per_epoch: None if nothing says it; then nothing can be given in epochs.
      given: key -> value.
      rows: of each, exactly one key must be given.

    Returns:
      For each of `rows`: (steps, steps in one of its units).

    Raises:
      ConfigError: none or several of a row, a key of no row, a part of a step, or epochs without examples_per_epoch.
    """
    known = [key for row in rows for key in row]
    if unknown := [key for key in given if key not in known]:
        nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"config.schedule: {unknown[0]!r} is unknown, did you mean {nearest!r}?")
    found = []
    for row in rows:
        keys = [key for key in row if given.get(key) is not None]
        if len(keys) != 1:
            has = " and ".join(f"{key}={given[key]}" for key in keys) or "none"
            raise ConfigError(f"config.schedule needs exactly one of {', '.join(row)}, and has {has}")
        unit = keys[0].rsplit("_", 1)[-1]
        if unit == "epochs" and not examples_per_epoch:
            raise ConfigError(
                f"config.schedule.{keys[0]} needs examples_per_epoch, which is not known here; give {row[0]}"
            )
        if unit == "steps" and given[keys[0]] != int(given[keys[0]]):
            raise ConfigError(f"config.schedule.{keys[0]}={given[keys[0]]}: steps are whole")
        examples = {"steps": batch_size, "epochs": examples_per_epoch or 0, "examples": 1}[unit]
        # Divided last: 49 epochs of 1 example in batches of 49 are 1 step, and not 1 - 1e-16, rounded down.
        found.append((given[keys[0]] * examples / batch_size, examples / batch_size))
    return found


def cosine(
    batch_size: int, *, base_lr: Positive, examples_per_epoch: Count | None = None, **lengths: Length
) -> tuple[optax.Schedule, int]:
    """Linear warm-up from 0 to base_lr * batch_size / 256, then cosine to 0 at the last step (VITO A.2, BYOL).

    Args:
      lengths: one of LENGTHS and one of WARMUPS.

    Returns:
      (learning rate by step, steps of the run); the run's and the warm-up's steps are rounded down.
    """
    (length, _), (warmup, _) = durations(batch_size, examples_per_epoch, lengths, LENGTHS, WARMUPS)
    total_steps, warmup_steps = int(length), int(warmup)
    check_length(warmup_steps, total_steps, batch_size, lengths)
    return optax.warmup_cosine_decay_schedule(
        0.0, base_lr * batch_size / 256, warmup_steps=warmup_steps, decay_steps=total_steps
    ), total_steps


def piecewise(
    batch_size: int,
    *,
    lr: Positive,
    boundaries: tuple[Positive, ...],
    factor: Share,
    examples_per_epoch: Count | None = None,
    **lengths: Length,
) -> tuple[optax.Schedule, int]:
    """Linear warm-up from 0 to `lr`, then times `factor` at each of `boundaries`: VIVI §4, VDIM §4, detection.

    The papers give the rate itself, so it does not follow batch_size.

    Args:
      boundaries: in the unit that the length is given in.
      lengths: one of LENGTHS and one of WARMUPS.

    Returns:
      (learning rate by step, steps of the run); steps are rounded to the nearest.
    """
    (length, unit), (warmup, _) = durations(batch_size, examples_per_epoch, lengths, LENGTHS, WARMUPS)
    total_steps, warmup_steps = round(length), round(warmup)
    check_length(warmup_steps, total_steps, batch_size, lengths)
    if sorted({*boundaries}) != list(boundaries):
        raise ConfigError(f"config.schedule.boundaries={tuple(boundaries)}: each must come after the one before")
    decayed = optax.piecewise_constant_schedule(lr, {round(time * unit): factor for time in boundaries})
    return (lambda step: decayed(step) * jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))), total_steps


def poly(
    batch_size: int, *, lr: Positive, power: NonNegative, examples_per_epoch: Count | None = None, **lengths: Length
) -> tuple[optax.Schedule, int]:
    """lr * (1 - step / steps) ** power (segmentation).

    Args:
      lengths: one of LENGTHS.

    Returns:
      (learning rate by step, steps of the run, rounded down).
    """
    ((length, _),) = durations(batch_size, examples_per_epoch, lengths, LENGTHS)
    check_length(0, int(length), batch_size, lengths)
    return optax.polynomial_schedule(lr, 0.0, power, int(length)), int(length)


def check_length(warmup_steps: int, total_steps: int, batch_size: int, given: Mapping[str, float | None]) -> None:
    """Raises ConfigError unless the run has a step, and is longer than its warm-up; `given`: the keys that say so."""
    run, warmup = (next((key for key in row if given.get(key) is not None), "") for row in (LENGTHS, WARMUPS))
    if total_steps < 1:
        raise ConfigError(
            f"config.schedule.{run}={given[run]:g} is less than one batch of {batch_size}: raise it, or lower "
            "config.batch_size"
        )
    if not 0 <= warmup_steps < total_steps:
        works = (
            f"{given[warmup] * total_steps / warmup_steps / 10:.2g}" if warmup != "warmup_steps" else total_steps // 10
        )
        raise ConfigError(
            f"the warm-up ({warmup_steps} steps) must be shorter than the run ({total_steps} steps, "
            f"config.schedule.{run}={given[run]:g}): make the run longer, or give --config.schedule.{warmup}={works}"
        )


SCHEDULES = {"cosine": cosine, "piecewise": piecewise, "poly": poly}


def ema_cosine(total_steps: int, *, base: Chance) -> optax.Schedule:
    """Decay of the target's moving average by step: `base` at step 0, 1 at the end, along a cosine (BYOL).

    >>> decay = ema_cosine(100, base=0.99)
    >>> [round(float(decay(step)), 4) for step in (0, 50, 100)]
    [0.99, 0.995, 1.0]
    """
    return lambda step: 1 - (1 - base) * (jnp.cos(jnp.pi * step / total_steps) + 1) / 2


def ema_constant(total_steps: int, *, decay: Chance) -> optax.Schedule:
    """The same decay at all steps (MoCo)."""
    del total_steps
    return lambda step: jnp.float32(decay)


def no_ema(total_steps: int) -> None:
    """For methods without a target network."""
    del total_steps


EMA_SCHEDULES = {"cosine": ema_cosine, "constant": ema_constant, "none": no_ema}


def lars(
    schedule: optax.Schedule, *, weight_decay: NonNegative, momentum: Decay, trust_coefficient: Positive
) -> optax.GradientTransformation:
    """LARS as in BYOL's code: decay, trust ratio, momentum, and the learning rate last.

    `optax.lars` multiplies by the learning rate before the momentum; that differs whenever the rate changes, so the
    four transforms are chained here in the published order.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), decay_mask),
        optax.trace(momentum),
        optax.scale_by_learning_rate(schedule),
    )


def sgd(schedule: optax.Schedule, *, weight_decay: NonNegative, momentum: Decay) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum; weight decay as L2 in the loss (added to the gradient), kernels only."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.trace(momentum),
        optax.scale_by_learning_rate(schedule),
    )


def adam(schedule: optax.Schedule, *, weight_decay: NonNegative, b1: Decay, b2: Decay) -> optax.GradientTransformation:
    """Adam with decoupled weight decay on kernels."""
    return optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask)


OPTIMIZERS = {"lars": lars, "sgd": sgd, "adam": adam}
