"""The training state and the one step that every method shares: pure functions of arrays.

A method (vivi_jax/methods) gives two functions. `embed` takes examples to embeddings, each example by itself apart from
batch normalisation; `loss` takes the embeddings of the whole global batch to a scalar. That cut is what lets a batch of
any size run on one device: see `micro_batched_gradients`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vivi_jax import optim
from vivi_jax.distributed import sharding

Tree = Any
Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a run is, at one step. Random keys are no part of it: they follow from (seed, step)."""

    step: jax.Array  # int32[], steps done
    params: Tree  # float32, the online network
    model_state: Tree  # BatchNorm's running statistics, or {}
    target: Tree  # {} or {"params", "model_state"}: the moving average of the online network
    opt_state: Tree


def create(method, optimizer: optax.GradientTransformation, batch: Batch, seed: int) -> TrainState:
    """The state at step 0. Only the shapes of `batch` matter."""
    params, model_state, target = method.init(jax.random.key(seed), batch)
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, target, optimizer.init(params))


def make_train_step(
    method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    total_steps: int,
    micro_batches: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """Returns train_step(state, batch) -> (state, metrics), to be jitted with the state donated."""
    gradients = plain_gradients if micro_batches == 1 else micro_batched_gradients(micro_batches)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        keys = example_keys(seed, state.step, batch)
        grads, model_state, target, metrics = gradients(method, sharding.replicate_params(state), batch, keys)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if target:  # xi <- (1 - lambda_xi) xi + lambda_xi theta (VITO Eq. 2)
            decay = optim.ema_decay(state.step, base=method.ema_base, total_steps=total_steps)
            target |= {"params": optax.incremental_update(params, state.target["params"], 1 - decay)}
            metrics["ema_decay"] = decay

        metrics["learning_rate"] = schedule(state.step)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, model_state, target, opt_state), metrics

    return train_step


def example_keys(seed: int, step: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """One key per row of every array of the global batch, a function of (seed, step, array, row) alone."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return {
        name: jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(step_key, i)))(jnp.arange(len(x)))
        for i, (name, x) in enumerate(sorted(batch.items()))
    }


def plain_gradients(method, state: TrainState, batch: Batch, keys: Batch) -> tuple[Tree, Tree, Tree, dict]:
    """Returns (gradients, new model_state, new target, metrics) of the method's loss on the batch."""

    def loss_fn(params):
        embeddings, model_state, target = method.embed(params, state.model_state, state.target, batch, keys)
        loss, metrics = method.loss(embeddings, batch)
        return loss, (model_state, target, {"loss": loss, **metrics})

    grads, (model_state, target, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    return grads, model_state, target, metrics


def micro_batched_gradients(micro_batches: int):
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

    def gradients(method, state: TrainState, batch: Batch, keys: Batch):
        micro = jax.tree.map(split, (batch, keys))

        def embed(carry, examples):
            embeddings, *carry = method.embed(state.params, *carry, *examples)
            return carry, embeddings

        (model_state, target), embeddings = jax.lax.scan(embed, [state.model_state, state.target], micro)
        (loss, metrics), cotangents = jax.value_and_grad(method.loss, has_aux=True)(
            jax.tree.map(merge, embeddings), batch
        )

        def accumulate(grads, examples_and_cotangents):
            examples, cotangents = examples_and_cotangents
            _, pull_back = jax.vjp(
                lambda params: method.embed(params, state.model_state, state.target, *examples)[0], state.params
            )
            return jax.tree.map(jnp.add, grads, pull_back(cotangents)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, _ = jax.lax.scan(accumulate, zeros, (micro, jax.tree.map(split, cotangents)))
        return grads, model_state, target, {"loss": loss, **metrics}

    return gradients
