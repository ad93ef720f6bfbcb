"""Losses against float64 oracles with loops, closed forms, and on 1, 2 and 8 devices."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vivi_jax import losses, sharding


def embeddings(seed: int, batch: int = 16, views: int = 3, dim: int = 8, temperature: float = 0.1):
    """Two float32[B, V, D] of norm 1/sqrt(temperature)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2, batch, views, dim))
    return (z / np.linalg.norm(z, axis=-1, keepdims=True) / np.sqrt(temperature)).astype(np.float32)


def moclr_oracle(online, target) -> float:
    """VITO §3.1 written out: sum over ordered pairs of views, mean over examples, one negative per other example."""
    online, target = online.astype(np.float64), target.astype(np.float64)
    batch, views, _ = online.shape
    total = 0.0
    for i in range(views):
        for j in range(views):
            if i == j:
                continue
            for b in range(batch):
                positive = np.exp(online[b, i] @ target[b, j])
                negatives = sum(np.exp(online[b, i] @ target[n, j]) for n in range(batch) if n != b)
                total += -np.log(positive / (positive + negatives)) / batch
    return total


def gradient_oracle(function, x, epsilon=1e-6) -> np.ndarray:
    """Central differences in float64."""
    x = x.astype(np.float64)
    grad = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += epsilon
        down[index] -= epsilon
        grad[index] = (function(up) - function(down)) / (2 * epsilon)
    return grad


def test_moclr_value_and_gradient_equal_the_written_out_loss():
    online, target = embeddings(0, batch=4, views=3, dim=3)
    value, grad = jax.value_and_grad(losses.moclr)(online, target)
    np.testing.assert_allclose(value, moclr_oracle(online, target), rtol=1e-5)
    np.testing.assert_allclose(grad, gradient_oracle(lambda z: moclr_oracle(z, target), online), rtol=1e-3, atol=1e-5)


def test_moclr_sends_no_gradient_to_the_target():
    online, target = embeddings(1)
    np.testing.assert_array_equal(jax.grad(losses.moclr, argnums=1)(online, target), 0.0)


@pytest.mark.parametrize("views, pairs", [(2, 2), (3, 6)])
def test_orthogonal_examples_have_the_closed_form(views, pairs):
    batch, temperature = 8, 0.1
    z = np.repeat(np.eye(batch, dtype=np.float32)[:, None], views, axis=1) / np.sqrt(temperature)  # [B, V, B]
    expected = pairs * np.log(1 + (batch - 1) * np.exp(-1 / temperature))
    np.testing.assert_allclose(losses.moclr(z, z), expected, atol=1e-5)


def test_identical_embeddings_cost_the_log_of_the_batch_size():
    z = np.ones((32, 2, 4), np.float32)
    np.testing.assert_allclose(losses.moclr(z, z), 2 * np.log(32), rtol=1e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_one_device_equals_many(devices):
    online, target = embeddings(2)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    split = jax.device_put((online, target), sharding.over_batch(mesh))
    value, grad = jax.jit(jax.value_and_grad(losses.moclr))(*split)
    value_1, grad_1 = jax.value_and_grad(losses.moclr)(online, target)
    np.testing.assert_allclose(value, value_1, rtol=1e-6)
    np.testing.assert_allclose(grad, grad_1, rtol=1e-5, atol=1e-7)


def test_collapse_indicators_know_a_point_a_line_and_a_sphere():
    point = np.ones((64, 8), np.float32)
    line = np.outer(np.where(np.arange(64) % 2, 1.0, -1.0), np.ones(8)).astype(np.float32)
    sphere = np.concatenate([np.eye(8), -np.eye(8)]).astype(np.float32)
    measured = [losses.collapse_indicators(jnp.asarray(z)) for z in (point, line, sphere)]
    np.testing.assert_allclose([m["embedding_std"] for m in measured], [0, 1, 1], atol=1e-3)
    np.testing.assert_allclose([m["embedding_effective_rank"] for m in measured[1:]], [1, 8], rtol=1e-4)
