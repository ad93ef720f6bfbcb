"""Optimizers, learning-rate and momentum schedules, parameter masks. All updates are optax's."""

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


def cosine(
    batch_size: int, *, base_lr: float, epochs: float, warmup_epochs: float, examples_per_epoch: int
) -> tuple[optax.Schedule, int]:
    """Linear warm-up from 0 to base_lr * batch_size / 256, then cosine to 0 at the last step (VITO A.2, BYOL).

    Returns:
      (learning rate by step, steps of the run); the run's and the warm-up's steps are rounded down.
    """
    total_steps, warmup_steps = (int(n * examples_per_epoch / batch_size) for n in (epochs, warmup_epochs))
    if total_steps < 1:
        raise ConfigError(
            f"config.schedule: {epochs} epochs of {examples_per_epoch} examples are less than one batch "
            f"of {batch_size}; raise epochs or lower config.batch_size"
        )
    check_warmup(warmup_steps, total_steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, base_lr * batch_size / 256, warmup_steps=warmup_steps, decay_steps=total_steps
    ), total_steps


def piecewise(
    batch_size: int, *, lr: float, total_steps: int, warmup_steps: int, boundaries: tuple[int, ...], factor: float
) -> tuple[optax.Schedule, int]:
    """Linear warm-up from 0 to `lr`, then times `factor` at each of `boundaries` (steps): VIVI §4, VDIM §4.

    The papers give the rate itself, so it does not follow batch_size.

    Returns:
      (learning rate by step, steps of the run).
    """
    del batch_size
    check_warmup(warmup_steps, total_steps)
    decayed = optax.piecewise_constant_schedule(lr, {step: factor for step in boundaries})
    return (lambda step: decayed(step) * jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))), total_steps


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """Raises ConfigError unless the warm-up is shorter than the run."""
    if not 0 <= warmup_steps < total_steps:
        raise ConfigError(
            f"the warm-up ({warmup_steps} steps) must be shorter than the run ({total_steps} steps); "
            "shorten it in config.schedule, or make the run longer"
        )


SCHEDULES = {"cosine": cosine, "piecewise": piecewise}


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
