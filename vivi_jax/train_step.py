"""The training state and the one step that every method shares: pure functions of arrays.

What a method is: methods/base.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vivi_jax.distributed import sharding
from vivi_jax.distributed.in_parts import Programs, StepInParts, mean_in_order, sum_in_order
from vivi_jax.errors import ConfigError
from vivi_jax.methods.base import Batch, BatchSpec, Keys, Method, Metrics, Tree


@flax.struct.dataclass
class TrainState:
    """All that a run is, at one step. Random keys are no part of it: they follow from (seed, step)."""

    step: jax.Array  # int32[], steps done
    params: Tree  # float32, the online network
    model_state: Tree  # BatchNorm's running statistics, or {}
    target: Tree  # {} or {"params", "model_state"}: parts of the online network, their moving average
    opt_state: Tree
    loss_state: Tree  # what the loss keeps from step to step, or {}


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# Compiler options of the step on GPUs. Without XLA's products by Triton: in jax 0.11.2 the pass that prepares them ends
# the process at VITO's bfloat16 step.
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}


def create(method: Method, optimizer: optax.GradientTransformation, batch: Batch | BatchSpec, seed: int) -> TrainState:
    """The state at step 0. Only the shapes of `batch` matter."""
    start = method.init(jax.random.key(seed), batch)
    return TrainState(
        jnp.zeros((), jnp.int32),
        start.params,
        start.model_state,
        start.target,
        optimizer.init(start.params),
        start.loss_state,
    )


def make_train_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema: optax.Schedule | None,
    *,
    seed: int,
    micro_batches: int,
) -> TrainStep:
    """Returns train_step(state, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
      schedule: learning rate by step; for the metrics, the optimizer has its own.
      ema: decay of the target's moving average by step; None for methods without a target network.
    """
    gradients = plain_gradients if micro_batches == 1 else micro_batched_gradients(micro_batches)
    update = make_update(optimizer, schedule, ema)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = example_keys(seed, state.step, batch)
        return update(state, gradients(method, sharding.replicate_params(state), batch, keys))

    return train_step


def make_update(
    optimizer: optax.GradientTransformation, schedule: optax.Schedule, ema: optax.Schedule | None
) -> Callable[[TrainState, "Gradients"], tuple[TrainState, Metrics]]:
    """What a step makes of the gradients; for the arguments see make_train_step."""

    def update(state: TrainState, found: Gradients) -> tuple[TrainState, Metrics]:
        if bool(state.target) != (ema is not None):
            raise ConfigError(f"config.ema: the method has {'a' if state.target else 'no'} target network to average")
        grads, model_state, target, loss_state, metrics = found
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Tree = optax.apply_updates(state.params, updates)
        if ema is not None:  # xi <- (1 - lambda_xi) xi + lambda_xi theta (VITO Eq. 2), of the parts the target has
            decay = ema(state.step)
            online = {part: params[part] for part in target["params"]}
            target = target | {"params": optax.incremental_update(online, state.target["params"], 1 - decay)}
            metrics = metrics | {"ema_decay": jnp.asarray(decay)}
        metrics = metrics | {
            "learning_rate": jnp.asarray(schedule(state.step)),
            "gradient_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, params, model_state, target, opt_state, loss_state), metrics

    return update


def example_keys(seed: int, step: jax.Array, batch: Batch, part: jax.Array | int = 0) -> dict[str, jax.Array]:
    """One key per row of every array of the global batch, a function of (seed, step, array, row) alone.

    Args:
      part: where `batch` is one of equal parts of the global batch, its number.
    """
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return {
        name: jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(step_key, i)))(
            part * len(x) + jnp.arange(len(x))
        )
        for i, (name, x) in enumerate(sorted(batch.items()))
    }


class Gradients(NamedTuple):
    """Of the loss on one batch, and what else the method has changed."""

    grads: Tree  # of params
    model_state: Tree
    target: Tree
    loss_state: Tree
    metrics: Metrics


def plain_gradients(method: Method, state: TrainState, batch: Batch, keys: Keys) -> Gradients:
    """The gradient of the method's loss on the batch."""

    def loss_fn(params):
        embeddings, model_state, target = method.embed(params, state.model_state, state.target, batch, keys)
        loss, loss_state, metrics = method.loss(embeddings, batch, state.loss_state, state.step)
        return loss, (model_state, target, loss_state, {"loss": loss, **metrics})

    grads, changed = jax.grad(loss_fn, has_aux=True)(state.params)
    return Gradients(grads, *changed)


def micro_batched_gradients(micro_batches: int) -> Callable[[Method, TrainState, Batch, Keys], Gradients]:
    """`plain_gradients` in the memory of one micro-batch, by caching embeddings (Gao et al. 2021, "GradCache").

    Pass 1 embeds micro-batch after micro-batch without keeping activations; the loss and its gradient with respect to
    the embeddings are then taken over the whole batch, negatives included; pass 2 embeds again and pulls that gradient
    back. Exact for networks that treat examples separately (GroupNorm). BatchNorm uses the statistics of each
    micro-batch, and its running statistics are updated once per micro-batch.
    """

    def split(x: jax.Array) -> jax.Array:
        # Micro-batch j takes rows j, j + n, ...: with rows sharded over devices in blocks, every device keeps its own.
        return jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0)

    def merge(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    def gradients(method: Method, state: TrainState, batch: Batch, keys: Keys) -> Gradients:
        micro = jax.tree.map(split, (batch, keys))

        def embed(carry, examples):
            embeddings, *carry = method.embed(state.params, *carry, *examples)
            return carry, embeddings

        (model_state, target), embeddings = jax.lax.scan(embed, [state.model_state, state.target], micro)

        def loss_fn(embeddings):
            loss, loss_state, metrics = method.loss(embeddings, batch, state.loss_state, state.step)
            return loss, (loss_state, {"loss": loss, **metrics})

        cotangents, (loss_state, metrics) = jax.grad(loss_fn, has_aux=True)(jax.tree.map(merge, embeddings))

        def accumulate(grads, examples_and_cotangents):
            examples, cotangents = examples_and_cotangents
            _, pull_back = jax.vjp(
                lambda params: method.embed(params, state.model_state, state.target, *examples)[0], state.params
            )
            return jax.tree.map(jnp.add, grads, pull_back(cotangents)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, _ = jax.lax.scan(accumulate, zeros, (micro, jax.tree.map(split, cotangents)))
        return Gradients(grads, model_state, target, loss_state, metrics)

    return gradients


def make_step_in_parts(
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema: optax.Schedule | None,
    *,
    seed: int,
    parts: int,
) -> StepInParts:
    """make_train_step's step, with the same bits on every number of devices that divides `parts`.

    As in micro_batched_gradients the network is gone through twice, a part at a time; BatchNorm normalises each part
    separately. Its running statistics follow the mean of the parts. Besides it costs memory and traffic of one gradient
    for each part, and every device computes the loss of the whole batch.
    """
    apply_gradients = make_update(optimizer, schedule, ema)

    def embed(state: TrainState, rows: Batch, part: jax.Array):
        keys = example_keys(seed, state.step, rows, part)
        embeddings, model_state, target = method.embed(state.params, state.model_state, state.target, rows, keys)
        return embeddings, (model_state, target.get("model_state", {}))

    def cotangents(state: TrainState, labels: Batch, embeddings: Tree):
        def loss_fn(embeddings: Tree):
            loss, loss_state, metrics = method.loss(embeddings, labels, state.loss_state, state.step)
            return loss, (loss_state, {"loss": loss, **metrics})

        return jax.grad(loss_fn, has_aux=True)(embeddings)

    def pull_back(state: TrainState, rows: Batch, part: jax.Array, cotangents: Tree) -> Tree:
        keys = example_keys(seed, state.step, rows, part)

        def embeddings(params: Tree) -> Tree:
            return method.embed(params, state.model_state, state.target, rows, keys)[0]

        return jax.vjp(embeddings, state.params)[1](cotangents)[0]

    def update(state: TrainState, statistics: tuple[Tree, Tree], grads: Tree, of_loss: tuple[Tree, Metrics]):
        model_state, target_state = jax.tree.map(mean_in_order, statistics)
        target = state.target | {"model_state": target_state} if state.target else state.target
        found = Gradients(jax.tree.map(sum_in_order, grads), model_state, target, *of_loss)
        return apply_gradients(state, found)

    return StepInParts(Programs(embed, cotangents, pull_back, update), parts)
