"""Fine-tuning: the step against NumPy, the head of zeros, BatchNorm's mode, schedules, order, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from evaluation.protocols.vtab import finetune
from vivi_jax.errors import ConfigError
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import BatchNorm

B, S, CLASSES = 16, 4, 3


class Flat(Encoder):
    """The channel means, through one dense layer and BatchNorm: small enough to be written out in NumPy."""

    num_classes: int | None = None
    bn_groups: int = 2

    def for_transfer(self):
        return self.clone(num_classes=None, bn_groups=1)

    @nn.compact
    def __call__(self, images, *, train):
        x = BatchNorm(groups=self.bn_groups, name="norm")(nn.Dense(5, name="dense")(images.mean((1, 2))), train)
        if self.num_classes:
            nn.Dense(self.num_classes, name="classifier")(x)
        return x, {}


@pytest.fixture(scope="module")
def ready():
    """(classifier, variables, compiled trainer) of an encoder that was trained with a classifier of 7."""
    encoder = Flat(num_classes=7)
    variables = encoder.init(jax.random.key(0), jnp.zeros((2, S, S, 3)), train=False)
    module, variables = finetune.make_classifier(encoder, variables, num_classes=CLASSES, image_size=S)
    return module, variables, finetune.compile_trainer(module, variables, batch_size=B, image_size=S, momentum=0.9)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (B, S, S, 3)).astype(np.uint8),
        "label": rng.integers(0, CLASSES, B).astype(np.int32),
    }


def test_the_head_is_zero_and_the_old_classifier_gone(ready):
    module, variables, _ = ready
    assert set(variables["params"]["encoder"]) == {"dense", "norm"}
    assert not any(leaf.any() for leaf in jax.tree.leaves(variables["params"]["head"]))
    assert variables["params"]["head"]["kernel"].shape == (5, CLASSES)
    logits, _ = module.apply(variables, make_batch()["image"] / np.float32(255), train=False)
    assert (np.asarray(logits) == 0).all()


def numpy_fit(variables, batches, rates):
    """The same in float64, by hand: dense, BatchNorm on the batch's statistics, head, cross-entropy, heavy ball."""
    p = {
        f"{a}.{b}": np.asarray(leaf, np.float64)
        for a, b, leaf in (
            ("dense", "kernel", variables["params"]["encoder"]["dense"]["kernel"]),
            ("dense", "bias", variables["params"]["encoder"]["dense"]["bias"]),
            ("norm", "scale", variables["params"]["encoder"]["norm"]["scale"]),
            ("norm", "bias", variables["params"]["encoder"]["norm"]["bias"]),
            ("head", "kernel", variables["params"]["head"]["kernel"]),
            ("head", "bias", variables["params"]["head"]["bias"]),
        )
    }
    v, running, losses = {k: 0 * x for k, x in p.items()}, np.zeros(5), []
    for batch, rate in zip(batches, rates, strict=True):
        x = batch["image"].mean((1, 2)) / 255
        h = x @ p["dense.kernel"] + p["dense.bias"]
        mean, inv = h.mean(0), 1 / np.sqrt(h.var(0) + 1e-5)
        running = 0.9 * running + 0.1 * mean
        n = (h - mean) * inv
        y = n * p["norm.scale"] + p["norm.bias"]
        logits = y @ p["head.kernel"] + p["head.bias"]
        prob = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        losses.append(-np.log(prob[np.arange(B), batch["label"]]).mean())
        d_logits = (prob - np.eye(CLASSES)[batch["label"]]) / B
        d_y = d_logits @ p["head.kernel"].T
        d_n = d_y * p["norm.scale"]
        d_h = inv * (d_n - d_n.mean(0) - n * (d_n * n).mean(0))
        gradient = {
            "dense.kernel": x.T @ d_h,
            "dense.bias": d_h.sum(0),
            "norm.scale": (d_y * n).sum(0),
            "norm.bias": d_y.sum(0),
            "head.kernel": y.T @ d_logits,
            "head.bias": d_logits.sum(0),
        }
        v = {k: 0.9 * v[k] + gradient[k] for k in p}
        p = {k: p[k] - rate * v[k] for k in p}
    return p, running, losses


def test_training_equals_numpy(ready):
    """All weights move, BatchNorm uses the whole batch's statistics (not the pretraining's two groups) and updates the
    running ones, and a drop of the rate acts on the whole velocity."""
    module, variables, trainer = ready
    batches, rates = [make_batch(seed) for seed in range(6)], np.array([1, 1, 1, 1, 0.1, 0.1], np.float32)
    fit = finetune.fit(trainer, variables, iter(batches), rates)
    expected, running, losses = numpy_fit(variables, batches, rates)
    params = fit.variables["params"]
    assert fit.loss == pytest.approx(losses[-1], rel=1e-4)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(params["head"][name], expected[f"head.{name}"], rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(params["encoder"]["dense"]["kernel"], expected["dense.kernel"], rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(params["encoder"]["norm"]["scale"], expected["norm.scale"], rtol=1e-3)
    np.testing.assert_allclose(fit.variables["batch_stats"]["encoder"]["norm"]["mean"], running, rtol=1e-3, atol=1e-5)
    assert not variables["params"]["head"]["kernel"].any()  # what is given stays as it was: the next run starts there


def test_one_program_serves_all_rates_and_no_other_shape(ready):
    _, variables, trainer = ready
    first = [finetune.fit(trainer, variables, iter([make_batch()]), np.array([lr], np.float32)) for lr in (0.5, 0.25)]
    bias = [np.asarray(fit.variables["params"]["head"]["bias"]) for fit in first]
    np.testing.assert_allclose(bias[0], 2 * bias[1], rtol=1e-5)
    with pytest.raises((TypeError, ValueError)):
        small = {name: x[:8] for name, x in make_batch().items()}
        finetune.fit(trainer, variables, iter([small]), np.array([0.5], np.float32))


def test_a_batch_the_devices_cannot_share_is_refused(ready):
    module, variables, _ = ready
    with pytest.raises(ConfigError, match="batch_size=12 does not divide over 8 devices"):
        finetune.compile_trainer(module, variables, batch_size=12, image_size=S, momentum=0.9)


def test_rates_drop_after_the_boundaries():
    """The README's example of VTAB: 2500 steps, 0.01, x0.1 at 750, 1500, 2250; the boundary's step has the old rate."""
    rates = finetune.learning_rates(0.01, 2500, decay_at=(0.3, 0.6, 0.9), decay_factor=0.1)
    assert rates.dtype == np.float32 and len(rates) == 2500
    steps = np.flatnonzero(np.diff(rates)) + 1  # first step with a new rate
    assert steps.tolist() == [751, 1501, 2251]
    np.testing.assert_allclose(rates[[0, 751, 1501, 2499]], [1e-2, 1e-3, 1e-4, 1e-5], rtol=1e-6)


def test_every_example_comes_once_per_pass_and_the_seed_says_in_which_order():
    held = {"image": np.arange(10), "label": np.arange(10)}

    def first(seed):
        batches = finetune.shuffled_batches(held, batch_size=4, seed=seed)
        return np.concatenate([next(batches)["label"] for _ in range(5)])

    assert sorted(first(0)[:10]) == sorted(first(0)[10:]) == list(range(10))
    assert first(0).tolist() == first(0).tolist() != first(1).tolist()


def test_accuracy_counts_and_uses_running_statistics(ready):
    module, variables, _ = ready
    fit = finetune.fit(ready[2], variables, iter([make_batch()] * 30), np.full(30, 0.5, np.float32))
    images, labels = make_batch()["image"], make_batch()["label"]
    logits, _ = module.apply(jax.device_get(fit.variables), images / np.float32(255), train=False)
    expected = (np.asarray(logits).argmax(1) == labels).mean()
    parts = [{"image": images[i : i + 6], "label": labels[i : i + 6]} for i in range(0, B, 6)]
    assert finetune.accuracy(module, fit.variables, parts) == pytest.approx(expected)
    assert 1 / 3 < expected <= 1
