"""Losses against float64 oracles with loops, closed forms, and on 1, 2 and 8 devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.vito import embeddings
from vivi_jax import losses
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError


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
    split = jax.device_put((online, target), sharding.batch_sharding(mesh))
    value, grad = jax.jit(jax.value_and_grad(losses.moclr))(*split)
    value_1, grad_1 = jax.value_and_grad(losses.moclr)(online, target)
    np.testing.assert_allclose(value, value_1, rtol=1e-6)
    np.testing.assert_allclose(grad, grad_1, rtol=1e-5, atol=1e-7)


def test_collapse_indicators_know_a_point_a_line_and_a_sphere():
    point = np.ones((64, 8), np.float32)
    line = np.outer(np.where(np.arange(64) % 2, 1.0, -1.0), np.ones(8)).astype(np.float32)
    sphere = np.concatenate([np.eye(8), -np.eye(8)]).astype(np.float32)
    wide = np.pad(sphere, ((0, 0), (0, 24)))  # more dimensions than examples
    measured = [losses.collapse_indicators(jnp.asarray(z)) for z in (point, line, sphere, wide)]
    np.testing.assert_allclose([m["embedding_std"] for m in measured], [0, 1, 1, 0.5], atol=1e-3)
    np.testing.assert_allclose([m["embedding_effective_rank"] for m in measured[1:]], [1, 8, 8], rtol=1e-4)


def frames(shots: int, exemplars: int, dim: int = 3, seed: int = 0) -> np.ndarray:
    """float32[S, M, D], frames of a shot near each other."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(shots, 1, dim))
    return (centres + 0.4 * rng.normal(size=(shots, exemplars, dim))).astype(np.float32)


def semi_hard_oracle(exemplars, margin: float, groups: int = 1) -> tuple[float, int]:
    """The loss written out with loops, and how many pairs had no semi-hard negative."""
    total, pairs, without = 0.0, 0, 0
    for z_SxMxD in np.split(exemplars.astype(np.float64), groups):
        z_SxMxD = z_SxMxD / np.linalg.norm(z_SxMxD, axis=-1, keepdims=True)
        for s, shot in enumerate(z_SxMxD):
            others = np.delete(z_SxMxD, s, axis=0).reshape(-1, z_SxMxD.shape[-1])
            for a, p in itertools.permutations(shot, 2):
                d_ap, d_an = np.square(a - p).sum(), np.square(a - others).sum(axis=1)
                without += not (d_an > d_ap).any()
                d_an = d_an[d_an > d_ap].min() if (d_an > d_ap).any() else d_an.max()
                total, pairs = total + max(0.0, margin + d_ap - d_an), pairs + 1
    return total / pairs, without


@pytest.mark.parametrize("groups", [1, 2])
def test_semi_hard_triplet_value_and_gradient_equal_the_written_out_loss(groups):
    z = frames(4, 3)
    z[1] = z[0] + 0.01  # two shots in one place ...
    z[0, 0], z[1, 0] = -z[0, 0], -z[1, 0]  # ... whose first frames are opposite: farther apart than any negative
    expected, without = semi_hard_oracle(z, 0.5, groups)
    assert without > 0 if groups == 2 else without == 0
    loss = functools.partial(losses.semi_hard_triplet, margin=0.5, groups=groups)
    (value, shares), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(z)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(shares["triplet_semi_hard"], 1 - without / (4 * 3 * 2), rtol=1e-6)
    np.testing.assert_allclose(grad, gradient_oracle(lambda x: semi_hard_oracle(x, 0.5, groups)[0], z), atol=1e-4)


def test_without_a_semi_hard_negative_the_farthest_counts():
    """One pair at squared distance 4, negatives at 2 and 3.6: all nearer, so the farthest is taken."""
    angles = np.array([[0, np.pi], [np.pi / 2, np.arccos(-0.8)]])
    z = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)  # [2 shots, 2 frames, 2]
    value, shares = jax.jit(functools.partial(losses.semi_hard_triplet, margin=0.5, groups=1))(z)
    near = 2 - 2 * np.cos(angles[1, 1] - angles[1, 0])  # the second shot's pair, by its distance
    d_an = [2 - 2 * np.cos(angles[1, :, None] - angles[0])]  # from the second shot's frames to the first's
    semi_hard = [min(d for d in row if d > near) for row in d_an[0]]
    expected = ((0.5 + 4 - 3.6) + (0.5 + 4 - 2) + sum(max(0, 0.5 + near - d) for d in semi_hard)) / 4
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(shares["triplet_semi_hard"], 0.5)


def batch_hard_oracle(exemplars) -> float:
    z_SxMxD = exemplars.astype(np.float64)
    z_SxMxD = z_SxMxD / np.linalg.norm(z_SxMxD, axis=-1, keepdims=True)
    gaps = []
    for s, shot in enumerate(z_SxMxD):
        others = np.delete(z_SxMxD, s, axis=0).reshape(-1, z_SxMxD.shape[-1])
        for a in shot:
            gaps.append(np.linalg.norm(a - shot, axis=1).max() - np.linalg.norm(a - others, axis=1).min())
    return np.log1p(np.exp(gaps)).mean()


def test_batch_hard_triplet_value_and_gradient_equal_the_written_out_loss():
    z = frames(4, 3)
    loss = functools.partial(losses.batch_hard_triplet, groups=1)
    (value, _), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(z)
    np.testing.assert_allclose(value, batch_hard_oracle(z), rtol=1e-5)
    np.testing.assert_allclose(grad, gradient_oracle(batch_hard_oracle, z), atol=1e-4)


@pytest.mark.parametrize("shape, groups", [((4, 1, 3), 1), ((4, 2, 3), 3), ((4, 2, 3), 4)])
def test_a_triplet_loss_without_positives_or_negatives_is_refused(shape, groups):
    with pytest.raises(ConfigError, match="two frames of each shot, and equal groups of two shots"):
        losses.semi_hard_triplet(np.ones(shape, np.float32), margin=0.5, groups=groups)


@pytest.mark.parametrize("shots, predictions", [(2, 1), (4, 3)])
def test_shot_info_nce_of_identical_embeddings_is_the_log_of_the_candidates(shots, predictions):
    loss, shares = losses.shot_info_nce(np.ones((8, predictions, 4), np.float32), np.ones((8, shots, 4), np.float32))
    np.testing.assert_allclose(loss, np.log(1 + shots * (8 - 1)), rtol=1e-6)
    assert shares["nce_accuracy"] == 0  # a collapsed network predicts nothing


def test_shot_info_nce_ignores_the_other_shots_of_the_same_video():
    """One query at a time: the video's own other shots get no gradient, its target and all other videos do."""
    (predicted, _), (shots, _) = embeddings(0, batch=5, views=3, temperature=1), embeddings(1, 5, 4, temperature=1)
    gradient = jax.jit(jax.grad(lambda shots, queries: losses.shot_info_nce(queries, shots)[0]))
    for p, target in enumerate((1, 2, 3)):
        query = np.zeros_like(predicted)  # queries of zeros send no gradient to the shots, whatever their loss
        query[0, p] = predicted[0, p]
        grad = np.abs(gradient(shots, query)).max(axis=-1)  # [N, K]
        others = [k for k in range(4) if k != target]
        np.testing.assert_array_equal(grad[0, others], 0.0)
        assert (grad[1:] > 0).all() and grad[0, target] > 0


def test_shot_info_nce_equals_the_written_out_loss():
    (predicted, _), (shots, _) = embeddings(0, batch=5, views=3, temperature=1), embeddings(1, 5, 4, temperature=1)
    predicted += shots[:, 1:]  # some are right
    p, e = predicted.astype(np.float64), shots.astype(np.float64)
    terms = [
        -np.log(
            np.exp(p[i, k - 1] @ e[i, k])
            / (
                np.exp(p[i, k - 1] @ e[i, k])
                + sum(np.exp(p[i, k - 1] @ e[j, m]) for j in range(5) for m in range(4) if j != i)
            )
        )
        for i in range(5)
        for k in (1, 2, 3)
    ]
    loss, shares = losses.shot_info_nce(predicted, shots)
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)
    first = [
        all(p[i, k - 1] @ e[i, k] > p[i, k - 1] @ e[j, m] for j in range(5) for m in range(4) if j != i)
        for i in range(5)
        for k in (1, 2, 3)
    ]
    assert 0 < np.mean(first) < 1
    np.testing.assert_allclose(shares["nce_accuracy"], np.mean(first), rtol=1e-6)


def test_vivis_losses_are_the_same_on_eight_devices():
    def loss(z):
        values = (
            losses.semi_hard_triplet(z, margin=0.5, groups=1)[0],
            losses.semi_hard_triplet(z, margin=0.5, groups=8)[0],
            losses.shot_info_nce(z[:, 1:], z)[0],
        )
        return values[0] + 3 * values[1] + 9 * values[2], values  # one gradient, in which none hides another's error

    z = frames(16, 4, dim=8)
    split = jax.device_put(z, sharding.batch_sharding(sharding.make_mesh(jax.devices()[:8])))
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, values), grad = gradient(split)
    (_, values_1), grad_1 = gradient(z)
    np.testing.assert_allclose(values, values_1, rtol=1e-5)
    np.testing.assert_allclose(grad, grad_1, atol=1e-5)
