"""Attention pooling and projector: closed forms and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vivi_jax.errors import ConfigError
from vivi_jax.models.heads import AttentionPool, MultiScalePool, Projector


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def random_variables(module, *inputs, **options) -> dict:
    """Variables drawn with NumPy, biases included."""
    shapes = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, **options), *inputs)
    return jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)


@pytest.fixture
def maps() -> dict[str, np.ndarray]:
    return {"stage3": normal(4, 6, 5, 8), "stage4": normal(4, 3, 2, 16)}


def test_attention_pool_against_numpy(maps):
    x = maps["stage3"]
    pool = AttentionPool(hidden=7)
    variables = random_variables(pool, x)
    pooled, mask = pool.apply(variables, x)
    p = jax.tree.map(np.float64, variables["params"])
    hidden = np.maximum(np.float64(x) @ p["mlp1"]["kernel"] + p["mlp1"]["bias"], 0)
    weights = np.exp((hidden @ p["mlp2"]["kernel"] + p["mlp2"]["bias"])[..., 0])
    weights /= weights.sum((1, 2), keepdims=True)
    np.testing.assert_allclose(mask, weights, atol=1e-6)
    np.testing.assert_allclose(pooled, (weights[..., None] * np.float64(x)).sum((1, 2)), atol=1e-5)
    np.testing.assert_allclose(np.asarray(mask).sum((1, 2)), 1, atol=1e-6)


def test_constant_logits_are_global_average_pooling(maps):
    pool = MultiScalePool(hidden=7)
    variables = jax.tree.map(np.zeros_like, random_variables(pool, maps))
    pooled, masks = pool.apply(variables, maps)
    average, no_masks = MultiScalePool(pooling="average").apply({}, maps)
    np.testing.assert_allclose(pooled, average, atol=1e-6)
    np.testing.assert_allclose(
        average, np.concatenate([np.mean(maps[s], (1, 2)) for s in ("stage3", "stage4")], 1), atol=1e-6
    )
    np.testing.assert_allclose(masks["stage4"], 1 / 6, atol=1e-6)
    assert no_masks == {}


def test_scales_are_separate_modules_in_the_given_order(maps):
    pool = MultiScalePool(stages=("stage4", "stage3"), hidden=7)
    variables = random_variables(pool, maps)
    pooled, masks = pool.apply(variables, maps)
    assert pooled.shape == (4, 24) and pooled.dtype == jnp.float32
    assert {s: m.shape for s, m in masks.items()} == {"stage3": (4, 6, 5), "stage4": (4, 3, 2)}
    alone, _ = AttentionPool(7).apply({"params": variables["params"]["stage3"]}, maps["stage3"])
    np.testing.assert_allclose(pooled[:, 16:], alone, atol=1e-6)


def test_the_mask_of_a_view_depends_on_that_view_alone(maps):
    pool = MultiScalePool(hidden=7)
    variables = random_variables(pool, maps)
    together = pool.apply(variables, maps)
    alone = pool.apply(variables, jax.tree.map(lambda x: x[2:3], maps))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2:3], b, atol=1e-6), together, alone)


def test_masks_stay_finite_and_normalised_in_bfloat16_with_huge_logits(maps):
    pool = MultiScalePool(hidden=7, dtype="bfloat16")
    variables = jax.tree.map(lambda a: 100 * a, random_variables(pool, maps))
    pooled, masks = pool.apply(variables, jax.tree.map(jnp.bfloat16, maps))
    for mask in masks.values():
        assert mask.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(mask).sum((1, 2)), 1, atol=1e-5)
    assert np.isfinite(pooled).all()


@pytest.mark.parametrize(
    "options, message", [(dict(pooling="max"), "pooling='max'"), (dict(stages=("stage5",)), "stage5")]
)
def test_unknown_pooling_and_stage_are_named(maps, options, message):
    with pytest.raises(ConfigError, match=message):
        MultiScalePool(**options).init(jax.random.key(0), maps)


def test_projector_against_numpy():
    x = normal(16, 12)
    projector = Projector(hidden=32, out=5)
    variables = random_variables(projector, x, train=True)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "dense1": {"kernel": (12, 32), "bias": (32,)},
        "norm": {"scale": (32,), "bias": (32,)},
        "dense2": {"kernel": (32, 5)},
    }
    z, updated = projector.apply(variables, x, train=True, mutable=["batch_stats"])
    p = jax.tree.map(np.float64, variables["params"])
    hidden = np.float64(x) @ p["dense1"]["kernel"] + p["dense1"]["bias"]
    scale, bias = p["norm"]["scale"], p["norm"]["bias"]
    normalised = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5) * scale + bias
    np.testing.assert_allclose(z, np.maximum(normalised, 0) @ p["dense2"]["kernel"], atol=1e-4)
    before = variables["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(updated["batch_stats"]["norm"]["mean"], 0.9 * before + 0.1 * hidden.mean(0), atol=1e-5)


def test_projector_with_group_norm_treats_examples_separately():
    x = normal(16, 12)
    projector = Projector(hidden=64, out=5, norm="group", dtype="bfloat16")
    variables = random_variables(projector, x, train=True)
    assert set(variables) == {"params"}
    z = projector.apply(variables, x, train=True)
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z[:3], projector.apply(variables, x[:3], train=True), atol=1e-2)
