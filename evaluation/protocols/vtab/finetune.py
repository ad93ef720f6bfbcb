"""Fine-tunes an encoder with a new linear head, as VTAB does: SGD with momentum on all weights, also BatchNorm's.

One process with all its devices. The learning rate is an argument of the compiled step and a schedule is an array of
rates, so that one compilation serves every setting of a sweep.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from evaluation import encoders
from vivi_jax.distributed import sharding
from vivi_jax.distributed.prefetch import Prefetcher
from vivi_jax.errors import ConfigError
from vivi_jax.models.base import Encoder


class Classifier(nn.Module):
    """An encoder and a linear head on its pooled features; called as encoders are, the logits in place of features."""

    encoder: Encoder
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict]:
        """float [B, H, W, 3] in [0, 1] -> (logits float32 [B, num_classes], {})."""
        pooled, _ = self.encoder(images, train=train)
        # Zeros, as in VTAB's code: all settings start from the same predictions, and no seed is in them.
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(pooled), {}


def make_classifier(encoder: Encoder, variables: dict, *, num_classes: int, image_size: int) -> tuple[Classifier, dict]:
    """Returns (classifier, its variables): the encoder's weights and statistics, and a head of zeros.

    A classifier the encoder may have is left out. BatchNorm takes its statistics from the whole batch, also where
    pretraining took them per group.
    """
    module = Classifier(encoder.for_transfer(), num_classes)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda key, x: module.init(key, x, train=False), jax.random.key(0), image)
    wanted = shapes["params"]["encoder"]
    params = {name: variables["params"][name] for name in wanted}
    head = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["params"]["head"])
    statistics = {"encoder": variables["batch_stats"]} if variables.get("batch_stats") else {}
    return module, {"params": {"encoder": params, "head": head}, "batch_stats": statistics}


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A compiled training step. It is one program: other shapes are an error, never another compilation."""

    module: Classifier
    mesh: jax.sharding.Mesh
    batch_size: int
    step: jax.stages.Compiled  # (params, batch_stats, velocity, batch, learning rate) -> the first three, loss
    compile_seconds: float


def compile_trainer(
    module: Classifier, variables: dict, *, batch_size: int, image_size: int, momentum: float
) -> Trainer:
    """Compiles `train_step` for all devices.

    Raises:
      ConfigError: the batch does not divide over the devices, or there are several processes.
    """
    mesh = sharding.make_mesh()
    if jax.process_count() > 1:
        raise ConfigError(f"fine-tuning runs in one process, not in {jax.process_count()}; give each other tasks")
    if batch_size % mesh.size:
        raise ConfigError(f"batch_size={batch_size} does not divide over {mesh.size} devices")
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params, batch_stats = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables[name])
        for name in ("params", "batch_stats")
    )
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }
    start = time.perf_counter()
    step = jax.jit(
        functools.partial(train_step, module, momentum=momentum),
        donate_argnums=(0, 1, 2),
        in_shardings=(whole, whole, whole, split, whole),
        out_shardings=whole,
    )
    compiled = step.lower(params, batch_stats, params, batch, jax.ShapeDtypeStruct((), np.float32)).compile()
    return Trainer(module, mesh, batch_size, compiled, time.perf_counter() - start)


def train_step(
    module: Classifier,
    params: dict,
    batch_stats: dict,
    velocity: dict,
    batch: dict,
    learning_rate: jax.Array,
    *,
    momentum: float,
) -> tuple[dict, dict, dict, jax.Array]:
    """One step of heavy-ball SGD on the mean cross-entropy, without weight decay.

    velocity = momentum * velocity + gradient; params = params - learning_rate * velocity: TensorFlow's momentum
    optimizer, where a drop of the rate acts at once on the whole velocity.

    Args:
      batch: {"image": uint8[B, S, S, 3], "label": int32[B]}.
      learning_rate: float32 scalar.

    Returns:
      (params, batch_stats, velocity, loss before the step).
    """

    def loss_of(params):
        (logits, _), updated = module.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["image"].astype(jnp.float32) / 255,
            train=True,
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), updated

    (loss, updated), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient)
    params = jax.tree.map(lambda p, v: p - learning_rate * v, params, velocity)
    return params, updated.get("batch_stats", batch_stats), velocity, loss


@dataclasses.dataclass(frozen=True)
class Fit:
    variables: dict
    loss: float  # of the last step; not finite where the run diverged
    seconds: float
    wait_seconds: float  # of these, waiting for batches


def fit(trainer: Trainer, variables: dict, batches: Iterator[dict], learning_rates: np.ndarray) -> Fit:
    """Runs one step per learning rate (float32[steps]), from `variables`, which are not modified."""
    # Copies: the compiled step overwrites its arguments.
    params, batch_stats = jax.device_put(
        (jax.tree.map(np.array, variables["params"]), jax.tree.map(np.array, variables["batch_stats"])),
        sharding.replicated(trainer.mesh),
    )
    velocity = jax.tree.map(jnp.zeros_like, params)
    start, feed, loss = time.perf_counter(), Prefetcher(batches, trainer.mesh), np.nan
    try:
        for learning_rate, batch in zip(learning_rates, feed, strict=False):  # `batches` may be without end
            params, batch_stats, velocity, loss = trainer.step(params, batch_stats, velocity, batch, learning_rate)
        loss = float(loss)
    finally:
        feed.close()
    seconds = time.perf_counter() - start
    return Fit({"params": params, "batch_stats": batch_stats}, loss, seconds, feed.wait_seconds)


def learning_rates(lr: float, steps: int, *, decay_at: tuple[float, ...], decay_factor: float) -> np.ndarray:
    """float32[steps]: `lr`, times `decay_factor` after each share of the steps in `decay_at`.

    As in VTAB's code (tf.train.piecewise_constant) the step whose number is the boundary still has the old rate.
    """
    boundaries = np.array([round(share * steps) for share in decay_at])
    drops = (np.arange(steps)[:, None] > boundaries).sum(axis=1)
    return (lr * np.float64(decay_factor) ** drops).astype(np.float32)


def shuffled_batches(examples: dict[str, np.ndarray], *, batch_size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of examples held in memory: one permutation after another, batches running over their ends."""
    rng = np.random.Generator(np.random.Philox(seed))
    order = np.empty(0, np.int64)
    while True:
        while len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(examples["label"]))])
        rows, order = order[:batch_size], order[batch_size:]
        yield {name: array[rows] for name, array in examples.items()}


def accuracy(module: Classifier, variables: dict, batches: Iterable[dict]) -> float:
    """Share of the examples whose class has the largest logit, with the running statistics of BatchNorm."""
    logits, labels = encoders.extract_features(module, variables, batches)
    return float((logits.argmax(axis=1) == labels).mean())
