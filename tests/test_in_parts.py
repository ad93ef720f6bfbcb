"""Steps in parts (config.reproducible): the same bits on any number of devices, and the numbers of the usual step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import vito
from helpers.networks import TinyEncoder
from vivi_jax import checkpoint, losses
from vivi_jax.build import Experiment, build
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError
from vivi_jax.loop import SKIPPED, compile_step
from vivi_jax.methods.base import MethodState, init_network
from vivi_jax.planning import planner
from vivi_jax.train_step import create, make_step_in_parts, make_train_step

BATCH, SPEC = (
    16,
    {
        "image": jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((16,), jnp.int32),
    },
)


class Contrast:
    """An encoder and its average on images with noise of their own: all that a step has, and quick to compile."""

    def __init__(self, norm: str):
        self.network = TinyEncoder(norm=norm)

    def init(self, key, batch):
        params, model_state = init_network(self.network, key, jnp.zeros((1, 8, 8, 3)))
        return MethodState(
            {"encoder": params}, model_state, {"params": {"encoder": params}, "model_state": model_state}
        )

    def embed(self, params, model_state, target, batch, keys):
        noise_B = jax.random.key_data(keys["image"])[:, 0].astype(jnp.float32) / 2.0**32
        images = batch["image"].astype(jnp.float32) / 255 + 0.1 * noise_B[:, None, None, None]

        def project(params, state):
            (z, _), state = self.network.apply(
                {"params": params["encoder"], **state}, images, train=True, mutable=list(state)
            )
            return losses.unit_length(z) / 0.3, state

        z, model_state = project(params, model_state)
        t, target_state = project(target["params"], target["model_state"])
        embeddings = {"online": z, "target": jax.lax.stop_gradient(t)}
        return embeddings, model_state, target | {"model_state": target_state}

    def loss(self, embeddings, batch, loss_state, step):
        weights = 1 + batch["label"][:, None] / 10
        return losses.info_nce(embeddings["online"] * weights, embeddings["target"]), loss_state, {}


def rate(step):
    return 0.3 / (1 + step)


@functools.cache
def experiment(norm: str, parts: int) -> Experiment:
    """In parts; 0: the usual step."""
    method, optimizer = Contrast(norm), optax.lars(rate, weight_decay=1e-4)
    made = method, optimizer, rate, lambda step: 0.9
    step = make_step_in_parts(*made, seed=3, parts=parts) if parts else make_train_step(*made, seed=3, micro_batches=1)
    return Experiment(method, optimizer, step, SPEC, 100)


def batch() -> dict:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, SPEC["image"].shape, dtype=np.uint8),
        "label": rng.integers(0, 5, BATCH).astype(np.int32),
    }


def run(norm: str, parts: int, devices: int, steps: int, **options):
    """(state, metrics of the last step) after some steps."""
    made, mesh = experiment(norm, parts), sharding.make_mesh(jax.devices()[:devices])
    state = jax.jit(lambda: create(made.method, made.optimizer, SPEC, 0))()
    state = jax.device_put(jax.device_get(state), sharding.state_sharding(state, mesh))
    step = compile_step(made, state, mesh, **options)
    data, metrics = jax.device_put(batch(), sharding.batch_sharding(mesh)), {}
    for _ in range(steps):
        state, metrics = step(state, data)
    return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.slow
def test_the_same_bits_on_one_two_and_four_devices_with_batch_norm():
    one, metrics = run("batch", 4, 1, 4)
    for devices in (2, 4):
        many, metrics_of_many = run("batch", 4, devices, 4)
        assert checkpoint.state_sha256(many) == checkpoint.state_sha256(one)
        assert metrics_of_many == metrics
    usual = [checkpoint.state_sha256(run("batch", 0, devices, 4)[0]) for devices in (1, 4)]
    assert usual[0] != usual[1]  # without parts they differ: else this test would show nothing


@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_in_parts_is_the_usual_step_with_group_norm(parts):
    in_parts, metrics = run("group", parts, 1, 2)
    usual, usual_metrics = run("group", 0, 1, 2)
    chex.assert_trees_all_close(in_parts, usual, atol=1e-6)
    chex.assert_trees_all_close(metrics, usual_metrics, rtol=1e-5)


def test_running_statistics_follow_the_mean_of_the_parts():
    state, _ = run("batch", 4, 1, 1)
    of_parts = []
    for part in range(4):
        made = experiment("batch", 4)
        start = create(made.method, made.optimizer, SPEC, 0)
        rows = {name: x[part * 4 : (part + 1) * 4] for name, x in batch().items()}
        of_parts.append(made.train_step.programs.embed(start, rows, part)[1])
    mean = jax.tree.map(lambda *x: np.mean([np.asarray(one, np.float64) for one in x], axis=0), *of_parts)
    chex.assert_trees_all_close((state.model_state, state.target["model_state"]), mean, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped_in_parts_too(monkeypatch):
    monkeypatch.setitem(globals(), "rate", lambda step: jnp.nan)
    experiment.cache_clear()
    try:
        start, _ = run("group", 2, 1, 0)
        state, metrics = run("group", 2, 2, 1, skip_not_finite=True)
    finally:
        experiment.cache_clear()
    assert metrics[SKIPPED] == 1 and state.step == 1
    chex.assert_trees_all_equal(state.params, start.params)


@pytest.mark.parametrize(
    "parts, devices, fsdp, message",
    [
        (4, 8, 1, "config.reproducible=4: it must be a multiple of the 8 device"),
        (32, 8, 1, "divisor of the 16 rows of 'image'"),
        (8, 8, 2, "config.run.fsdp=2: with config.reproducible every device holds the whole state"),
    ],
)
def test_what_does_not_divide_is_refused(parts, devices, fsdp, message):
    made = experiment("group", parts)
    state = jax.eval_shape(lambda: create(made.method, made.optimizer, SPEC, 0))
    with pytest.raises(ConfigError, match=message):
        compile_step(made, state, sharding.make_mesh(jax.devices()[:devices], fsdp=fsdp))


def test_parts_and_micro_batches_do_not_go_together_and_a_plan_is_of_one_program():
    config = vito.get_config("demo")
    config.reproducible, config.micro_batches = 8, 2
    with pytest.raises(ConfigError, match="config.micro_batches=2 with config.reproducible=8"):
        build(config)
    with pytest.raises(ConfigError, match="config.reproducible=8: its step is several programs"):
        planner.plan(config, "gpu:h100x8")
