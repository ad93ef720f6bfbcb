"""Optimizers, learning-rate and momentum schedules, parameter masks. All updates are optax's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vivi_jax.errors import ConfigError

# Which parameters with two axes or more get weight decay and the LARS trust ratio, by leaf name. Those with one axis
# (biases, normalisation, tokens) get neither: BYOL's code, whose details VITO A.2 adopts, excludes them. A name that is
# not here is an error, never a guess.
DECAYED = {"kernel": True, "patch_kernel": False}


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


def run_length(
    batch_size: int,
    examples_per_epoch: int | None,
    *,
    steps: float | None = None,
    epochs: float | None = None,
    examples: float | None = None,
) -> tuple[float, Callable[[float], float]]:
    """The length of a run, of which config.schedule gives exactly one of `steps`, `epochs` and `examples`.

    >>> steps, in_steps = run_length(256, 1024, epochs=2.5)
    >>> steps, in_steps(0.5)
    (10.0, 2.0)

    Args:
      examples_per_epoch: None if nothing says it; then `epochs` cannot be given.

    Returns:
      (steps of the run, the function that turns its unit into steps), neither rounded.

    Raises:
      ConfigError: none or several of the three, epochs without examples_per_epoch, or less than one step.
    """
    lengths = {"steps": steps, "epochs": epochs, "examples": examples}
    given = {name: value for name, value in lengths.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(
            f"config.schedule needs exactly one of {', '.join(lengths)}, and has "
            f"{' and '.join(f'{name}={value}' for name, value in given.items()) or 'none'}"
        )
    ((name, value),) = given.items()
    if name == "epochs" and not examples_per_epoch:
        raise ConfigError("config.schedule.epochs needs examples_per_epoch, which is not known here; give steps")
    examples_per_unit = {"steps": batch_size, "epochs": examples_per_epoch or 0, "examples": 1}[name]

    def in_steps(time: float) -> float:
        return time * examples_per_unit / batch_size

    if in_steps(value) < 1:
        of = f" of {examples_per_epoch} examples" if name == "epochs" else ""
        raise ConfigError(
            f"config.schedule: {value} {name}{of} are less than one batch of {batch_size}; raise {name} or lower "
            "config.batch_size"
        )
    return in_steps(value), in_steps


def cosine(
    batch_size: int,
    *,
    base_lr: float,
    warmup: float,
    examples_per_epoch: int | None = None,
    steps: float | None = None,
    epochs: float | None = None,
    examples: float | None = None,
) -> tuple[optax.Schedule, int]:
    """Linear warm-up from 0 to base_lr * batch_size / 256, then cosine to 0 at the last step (VITO A.2, BYOL).

    Args:
      warmup: in the unit that the length is given in; others see run_length.

    Returns:
      (learning rate by step, steps of the run); the run's and the warm-up's steps are rounded down.
    """
    length, in_steps = run_length(batch_size, examples_per_epoch, steps=steps, epochs=epochs, examples=examples)
    total_steps, warmup_steps = int(length), int(in_steps(warmup))
    check_warmup(warmup_steps, total_steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, base_lr * batch_size / 256, warmup_steps=warmup_steps, decay_steps=total_steps
    ), total_steps


def piecewise(
    batch_size: int,
    *,
    lr: float,
    warmup: float,
    boundaries: tuple[float, ...],
    factor: float,
    examples_per_epoch: int | None = None,
    steps: float | None = None,
    epochs: float | None = None,
    examples: float | None = None,
) -> tuple[optax.Schedule, int]:
    """Linear warm-up from 0 to `lr`, then times `factor` at each of `boundaries`: VIVI §4, VDIM §4, detection.

    The papers give the rate itself, so it does not follow batch_size.

    Args:
      warmup, boundaries: in the unit that the length is given in; others see run_length.

    Returns:
      (learning rate by step, steps of the run); steps are rounded to the nearest.
    """
    length, in_steps = run_length(batch_size, examples_per_epoch, steps=steps, epochs=epochs, examples=examples)
    total_steps, warmup_steps = round(length), round(in_steps(warmup))
    check_warmup(warmup_steps, total_steps)
    decayed = optax.piecewise_constant_schedule(lr, {round(in_steps(time)): factor for time in boundaries})
    return (lambda step: decayed(step) * jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))), total_steps


def poly(
    batch_size: int,
    *,
    lr: float,
    power: float,
    examples_per_epoch: int | None = None,
    steps: float | None = None,
    epochs: float | None = None,
    examples: float | None = None,
) -> tuple[optax.Schedule, int]:
    """lr * (1 - step / steps) ** power (segmentation).

    Returns:
      (learning rate by step, steps of the run, rounded down).
    """
    length, _ = run_length(batch_size, examples_per_epoch, steps=steps, epochs=epochs, examples=examples)
    return optax.polynomial_schedule(lr, 0.0, power, int(length)), int(length)


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """Raises ConfigError unless the warm-up is shorter than the run."""
    if not 0 <= warmup_steps < total_steps:
        raise ConfigError(
            f"the warm-up ({warmup_steps} steps) must be shorter than the run ({total_steps} steps); "
            "shorten it in config.schedule, or make the run longer"
        )


SCHEDULES = {"cosine": cosine, "piecewise": piecewise, "poly": poly}


def ema_cosine(total_steps: int, *, base: float) -> optax.Schedule:
    """Decay of the target's moving average by step: `base` at step 0, 1 at the end, along a cosine (BYOL).

    >>> decay = ema_cosine(100, base=0.99)
    >>> [round(float(decay(step)), 4) for step in (0, 50, 100)]
    [0.99, 0.995, 1.0]
    """
    return lambda step: 1 - (1 - base) * (jnp.cos(jnp.pi * step / total_steps) + 1) / 2


def ema_constant(total_steps: int, *, decay: float) -> optax.Schedule:
    """The same decay at all steps (MoCo)."""
    del total_steps
    return lambda step: jnp.float32(decay)


def no_ema(total_steps: int) -> None:
    """For methods without a target network."""
    del total_steps


EMA_SCHEDULES = {"cosine": ema_cosine, "constant": ema_constant, "none": no_ema}


def lars(
    schedule: optax.Schedule, *, weight_decay: float, momentum: float, trust_coefficient: float
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


def sgd(schedule: optax.Schedule, *, weight_decay: float, momentum: float) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum; weight decay as L2 in the loss (added to the gradient), kernels only."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.trace(momentum),
        optax.scale_by_learning_rate(schedule),
    )


def adam(schedule: optax.Schedule, *, weight_decay: float, b1: float, b2: float) -> optax.GradientTransformation:
    """Adam with decoupled weight decay on kernels."""
    return optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask)


OPTIMIZERS = {"lars": lars, "sgd": sgd, "adam": adam}
