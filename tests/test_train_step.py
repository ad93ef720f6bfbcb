"""The step: micro-batches equal the whole batch, one device equals many, the target is a moving average."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.vito import BATCH, TOTAL_STEPS, VIEWS, batch, initial_state, tiny
from vivi_jax import optim
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError
from vivi_jax.train_step import example_keys


@functools.cache
def one_step(norm: str, micro_batches: int = 1, devices: int = 1):
    """State and metrics after one step on `devices` devices, fetched."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    state = jax.device_put(initial_state(norm), sharding.replicated(mesh))
    data = jax.device_put(batch(), sharding.batch_sharding(mesh))
    return jax.device_get(tiny(norm, micro_batches)[2](state, data))


@pytest.mark.slow
def test_micro_batches_on_eight_devices_equal_the_whole_batch_on_one_with_group_norm():
    (state, metrics), (whole_state, whole_metrics) = one_step("group", 2, devices=8), one_step("group")
    np.testing.assert_allclose(metrics["loss"], whole_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], whole_metrics["gradient_norm"], rtol=1e-4)
    chex.assert_trees_all_close(state, whole_state, atol=1e-5)


@pytest.mark.slow
def test_batch_norm_sees_the_global_batch():
    one, many = one_step("batch"), one_step("batch", devices=8)
    np.testing.assert_allclose(many[1]["loss"], one[1]["loss"], rtol=1e-5)
    chex.assert_trees_all_close(many[0].model_state, one[0].model_state, atol=1e-5)
    chex.assert_trees_all_close(many[0].params, one[0].params, atol=1e-4)


@pytest.mark.slow
def test_batch_norm_per_micro_batch_differs_as_stated():
    whole, split = one_step("batch"), one_step("batch", micro_batches=2)
    assert abs(whole[1]["loss"] - split[1]["loss"]) > 1e-4


def test_the_target_is_the_moving_average_and_starts_elsewhere():
    before = initial_state("group")
    kernel, target_kernel = (tree["projector"]["dense2"]["kernel"] for tree in (before.params, before.target["params"]))
    assert np.abs(kernel - target_kernel).max() > 0.01
    after, metrics = one_step("group")
    decay = optim.ema_cosine(TOTAL_STEPS, base=0.99)(0)
    np.testing.assert_allclose(metrics["ema_decay"], decay)
    average = jax.tree.map(lambda xi, theta: decay * xi + (1 - decay) * theta, before.target["params"], after.params)
    chex.assert_trees_all_close(after.target["params"], average, atol=1e-6)


def test_online_and_target_keep_their_own_statistics():
    state, _ = one_step("batch")
    online, target = (
        tree["batch_stats"]["encoder"]["norm3"]["mean"] for tree in (state.model_state, state.target["model_state"])
    )
    assert np.abs(online).max() > 0 and np.abs(target).max() > 0 and np.abs(online - target).max() > 1e-3


def test_projections_have_norm_one_over_root_temperature():
    method, state = tiny("batch")[0], initial_state("batch")
    z, _ = method.project(method.network, state.params, state.model_state, jnp.asarray(batch()["views"][:, 0]) / 255)
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=-1), 1 / np.sqrt(0.1), rtol=1e-5)


def test_projections_of_zero_have_a_loss_and_gradients():
    """No unit of the projector's hidden layer is active: all similarities are 0, each positive one of BATCH keys."""
    method, state = tiny("batch")[0], initial_state("batch")
    params = {
        **state.params,
        "projector": {
            **state.params["projector"],
            "norm": {"scale": np.ones(16, np.float32), "bias": np.full(16, -100.0, np.float32)},
        },
    }

    def loss(params):
        keys = example_keys(0, 0, batch())
        embeddings, _, _ = method.embed(params, state.model_state, state.target, batch(), keys)
        return method.loss(embeddings, batch(), {}, 0)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, VIEWS * (VIEWS - 1) * np.log(BATCH), rtol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))  # NaN would count


@pytest.mark.slow
def test_steps_after_the_first_trace_and_compile_nothing():
    step, state = jax.jit(chex.assert_max_traces(tiny("group")[2].__wrapped__, n=1)), initial_state("group")
    for _ in range(3):
        state, _ = step(state, batch())
    assert state.step == 3 and step._cache_size() == 1


def test_a_batch_that_does_not_divide_names_the_nearest_that_does():
    spec = {"views": jax.ShapeDtypeStruct((100, 2, 8, 8, 3), jnp.uint8)}
    with pytest.raises(ConfigError, match="100 rows of 'views'.*nearest number that does is 96"):
        sharding.check_batch_sizes(spec, 2, sharding.make_mesh(jax.devices()[:8]))
