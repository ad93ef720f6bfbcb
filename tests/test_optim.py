"""LARS by hand, masks, and the schedules of VITO A.2 at their known points."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from configs import vito
from vivi_jax import optim
from vivi_jax.config import without_name
from vivi_jax.errors import ConfigError


def test_lars_equals_three_steps_by_hand_while_the_rate_changes():
    """BYOL's order: g + wd w, trust ratio, momentum, rate. With the rate before the momentum, step 2 differs."""
    rates = [0.5, 0.1, 0.7]
    optimizer = optim.lars(
        lambda step: jnp.asarray(rates)[step], weight_decay=0.01, momentum=0.9, trust_coefficient=1e-3
    )
    rng = np.random.default_rng(0)
    params = {
        "dense": {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
    }
    state = optimizer.init(params)
    w = {name: value.astype(np.float64) for name, value in params["dense"].items()}
    mu = {name: np.zeros_like(value) for name, value in w.items()}
    for rate in rates:
        grads = {"dense": {name: rng.normal(size=value.shape).astype(np.float32) for name, value in w.items()}}
        updates, state = optimizer.update(grads, state, params)
        params = {"dense": {name: params["dense"][name] + updates["dense"][name] for name in w}}
        for name in w:
            g = grads["dense"][name].astype(np.float64)
            if name == "kernel":
                g = g + 0.01 * w[name]
                g = g * 1e-3 * np.linalg.norm(w[name]) / np.linalg.norm(g)
            mu[name] = 0.9 * mu[name] + g
            w[name] = w[name] - rate * mu[name]
    for name in w:
        np.testing.assert_allclose(params["dense"][name], w[name], rtol=1e-5)


def test_lars_leaves_a_zero_kernel_its_plain_gradient():
    optimizer = optim.lars(lambda step: 1.0, weight_decay=0.0, momentum=0.0, trust_coefficient=1e-3)
    params, grads = {"kernel": jnp.zeros((2, 2))}, {"kernel": jnp.ones((2, 2))}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -1.0)


def test_masks_follow_names_and_refuse_unknown_ones():
    vector, matrix = np.zeros(3), np.zeros((3, 3))
    tree = {"conv": {"kernel": matrix}, "norm": {"scale": vector, "bias": vector}}
    assert optim.decay_mask(tree) == {"conv": {"kernel": True}, "norm": {"scale": False, "bias": False}}
    with pytest.raises(ConfigError, match="embedding"):
        optim.decay_mask({"table": {"embedding": matrix}})


def test_the_papers_run_has_its_numbers():
    config = vito.get_config()
    schedule, total = optim.cosine(4096, **without_name(config.schedule))
    warmup = 3127
    assert total == 93835
    np.testing.assert_allclose([schedule(0), schedule(warmup), schedule(total)], [0, 4.8, 0], atol=1e-6)
    assert schedule(warmup - 1) < schedule(warmup) > schedule(warmup + 100)
    np.testing.assert_allclose(schedule(warmup + (total - warmup) / 2), 2.4, rtol=1e-3)
    np.testing.assert_allclose(
        [optim.ema_cosine(total, base=0.99)(step) for step in (0, total / 2, total)],
        [0.99, 0.995, 1.0],
        rtol=1e-6,
    )


def test_piecewise_rates_fall_at_their_steps_and_warm_up_in_a_line():
    schedule, total = optim.piecewise(1, lr=0.8, total_steps=120, warmup_steps=4, boundaries=(90, 110), factor=0.1)
    assert total == 120
    np.testing.assert_allclose(
        [schedule(step) for step in (0, 1, 4, 89, 91, 109, 111)], [0.16, 0.32, 0.8, 0.8, 0.08, 0.08, 0.008], rtol=1e-5
    )
    without_warmup, _ = optim.piecewise(1, lr=0.8, total_steps=120, warmup_steps=0, boundaries=(), factor=0.1)
    np.testing.assert_allclose([without_warmup(0), without_warmup(119)], 0.8, rtol=1e-6)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warm-up"):
        optim.cosine(256, base_lr=0.3, epochs=10, warmup_epochs=10, examples_per_epoch=256)
    with pytest.raises(ConfigError, match="warm-up"):
        optim.piecewise(256, lr=0.3, total_steps=10, warmup_steps=10, boundaries=(), factor=0.1)
    with pytest.raises(ConfigError, match="less than one batch"):
        optim.cosine(256, base_lr=0.3, epochs=0.5, warmup_epochs=0, examples_per_epoch=256)


def test_a_duration_is_in_steps_epochs_or_examples():
    for given, steps, unit in (
        (dict(total_steps=7), 7, 1),
        (dict(epochs=2.5), 10, 4),
        (dict(examples=512), 2, 1 / 256),
    ):
        assert optim.durations(256, 1024, given, optim.LENGTHS) == [(steps, unit)]
    assert optim.durations(49, 1, dict(epochs=49), optim.LENGTHS)[0][0] == 1  # 49 * (1 / 49) is less
    for given, message in (
        ({}, "exactly one of total_steps, epochs, examples, and has none"),
        (dict(total_steps=7, epochs=2.0), "has total_steps=7 and epochs=2.0"),
        (dict(total_steps=7, epoch=1), "'epoch' is unknown, did you mean 'epochs'?"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            optim.durations(256, 1024, given, optim.LENGTHS)
    with pytest.raises(ConfigError, match="warmup_epochs needs examples_per_epoch, .* give warmup_steps"):
        optim.durations(256, None, dict(warmup_epochs=1.0), optim.WARMUPS)


def test_poly_falls_to_zero_along_its_power():
    rate, steps = optim.poly(16, lr=0.04, power=0.9, epochs=45.0, examples_per_epoch=10582)
    assert steps == 29761 and float(rate(0)) == pytest.approx(0.04) and float(rate(steps)) == 0
    assert float(rate(steps // 2)) == pytest.approx(0.04 * 0.5**0.9, rel=1e-3)
