"""LARS by hand, masks, and the schedules of VITO A.2 at their known points."""
import jax.numpy as jnp
import numpy as np
import pytest

from configs import vito
from vivi_jax import build, optim
from vivi_jax.errors import ConfigError


def test_lars_equals_three_steps_by_hand_while_the_rate_changes():
    """BYOL's order: g + wd w, trust ratio, momentum, rate. With the rate before the momentum, step 2 differs."""
    rates = [0.5, 0.1, 0.7]
    optimizer = optim.lars(lambda step: jnp.asarray(rates)[step], weight_decay=0.01, momentum=0.9,
                           trust_coefficient=1e-3)
    rng = np.random.default_rng(0)
    params = {"dense": {"kernel": rng.normal(size=(3, 4)).astype(np.float32),
                        "bias": rng.normal(size=4).astype(np.float32)}}
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
    tree = {"conv": {"kernel": 0}, "norm": {"scale": 0, "bias": 0}}
    assert optim.decay_mask(tree) == {"conv": {"kernel": True}, "norm": {"scale": False, "bias": False}}
    with pytest.raises(ValueError, match="embedding"):
        optim.decay_mask({"table": {"embedding": 0}})


def test_the_papers_run_has_its_numbers():
    config = vito.get_config()
    total, warmup = build.steps(batch_size=config.batch_size, epochs=300, warmup_epochs=10,
                                examples_per_epoch=config.schedule.examples_per_epoch)
    assert (total, warmup) == (93835, 3127)
    schedule = optim.learning_rate(base_lr=0.3, batch_size=4096, warmup_steps=warmup, total_steps=total)
    np.testing.assert_allclose([schedule(0), schedule(warmup), schedule(total)], [0, 4.8, 0], atol=1e-6)
    np.testing.assert_allclose(schedule(warmup + (total - warmup) / 2), 2.4, rtol=1e-3)
    np.testing.assert_allclose([optim.ema_decay(step, base=0.99, total_steps=total) for step in (0, total / 2, total)],
                               [0.99, 0.995, 1.0], rtol=1e-6)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warmup_epochs"):
        optim.learning_rate(base_lr=0.3, batch_size=256, warmup_steps=10, total_steps=10)
