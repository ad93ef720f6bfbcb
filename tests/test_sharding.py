"""Placement on a mesh: the state in experiment, the losses' memory, and runs that go on on other numbers of devices."""

import functools

import chex
import jax
import numpy as np
import pytest

from helpers.vito import batch, embeddings, initial_state, tiny
from vivi_jax import losses
from vivi_jax.build import Experiment
from vivi_jax.checkpoint import Checkpoints
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError
from vivi_jax.loop import compile_step


def test_rows_stay_with_the_process_that_reads_them():
    devices = jax.devices()[:8]
    mesh = sharding.make_mesh(devices[::-1], fsdp=2)
    assert mesh.shape == {"data": 4, "fsdp": 2}
    assert list(mesh.devices.ravel()) == sorted(devices, key=lambda d: (d.process_index, d.id))
    rows = sharding.batch_sharding(mesh).devices_indices_map((16, 3))
    first_and_stop = [rows[device][0].indices(16)[:2] for device in mesh.devices.ravel()]
    assert first_and_stop == [(2 * i, 2 * i + 2) for i in range(8)]


def test_large_arrays_are_split_along_their_longest_axis_that_divides_and_small_ones_stay_whole():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    state = {"kernel": shape((3, 3, 64, 256)), "odd": shape((301, 4096 + 1)), "bias": shape((256,)), "step": shape(())}
    placed = sharding.state_sharding(state, sharding.make_mesh(jax.devices()[:8], fsdp=4))
    assert placed["kernel"].shard_shape(state["kernel"].shape) == (3, 3, 64, 64)
    assert all(placed[name].is_fully_replicated for name in ("odd", "bias", "step"))
    whole = sharding.state_sharding(state, sharding.make_mesh(jax.devices()[:8]))
    assert all(place.is_fully_replicated for place in whole.values())


def test_a_number_of_parts_that_does_not_divide_the_devices_is_refused():
    with pytest.raises(ConfigError, match="config.run.fsdp=3 does not divide the 8 device"):
        sharding.make_mesh(jax.devices()[:8], fsdp=3)


@pytest.mark.parametrize("devices", [1, 8])
def test_info_nce_in_blocks_equals_the_dense_loss_in_value_and_gradient(monkeypatch, devices):
    online, target = embeddings(2)  # [B, V, D]
    queries, keys = online[:, 1:], target[:, 0]  # two queries an example
    dense = jax.value_and_grad(losses.info_nce, argnums=(0, 1))(queries, keys)
    split = jax.device_put((queries, keys), sharding.batch_sharding(sharding.make_mesh(jax.devices()[:devices])))
    monkeypatch.setattr(losses, "SMALLEST_IN_PARTS", len(queries))
    blocked = jax.jit(jax.value_and_grad(lambda *x: losses.info_nce(*x), argnums=(0, 1)))(*split)
    chex.assert_trees_all_close(blocked, dense, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size, views", [(4096, 2), (4096, 3), (16_384, 2), (65_536, 2)])
def test_the_loss_needs_no_more_memory_than_its_share_of_one_matrix_of_logits(batch_size, views):
    devices = 8
    split = sharding.batch_sharding(sharding.make_mesh(jax.devices()[:devices]))
    z = jax.ShapeDtypeStruct((batch_size, views, 256), np.float32)
    compiled = jax.jit(jax.value_and_grad(losses.moclr), in_shardings=split).lower(z, z).compile()
    queries = batch_size // devices * (views - 1)  # of a device, against one view's keys
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * queries * batch_size * 4


# --- a step and a run over other devices -----------------------------------------------------------------------------


def run(state, mesh, steps: int):
    """(state, losses) after `steps` steps of the tiny VITO on `mesh`, as the training loop does them."""
    method, optimizer, step = tiny("batch")
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch().items()}
    state = jax.device_put(jax.device_get(state), sharding.state_sharding(state, mesh))  # a copy: the step donates it
    compiled = compile_step(Experiment(method, optimizer, step, spec, 100), state, mesh)
    data, values = jax.device_put(batch(), sharding.batch_sharding(mesh)), []
    for _ in range(steps):
        state, metrics = compiled(state, data)
        values.append(float(metrics["loss"]))
    return state, values


@pytest.mark.slow
def test_a_state_in_parts_trains_as_a_whole_one(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)
    devices = jax.devices()[:8]
    whole, whole_losses = run(initial_state("batch"), sharding.make_mesh(devices), 3)
    parts, parts_losses = run(initial_state("batch"), sharding.make_mesh(devices, fsdp=8), 3)
    assert not parts.params["encoder"]["conv3"]["kernel"].is_fully_replicated
    assert not parts.target["params"]["encoder"]["conv3"]["kernel"].is_fully_replicated
    np.testing.assert_allclose(parts_losses, whole_losses, rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(parts.params), jax.device_get(whole.params), atol=1e-4)


@pytest.mark.slow
def test_a_run_saved_on_eight_devices_goes_on_on_two_on_one_and_in_parts(tmp_path):
    mesh = sharding.make_mesh(jax.devices()[:8])
    state, _ = run(initial_state("batch"), mesh, 2)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, state)
    checkpoints.wait()
    _, straight = run(state, mesh, 3)
    for devices, fsdp in ((2, 1), (1, 1), (8, 4)):
        mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=fsdp)
        step, restored = checkpoints.restore(initial_state("batch"), mesh)
        assert step == 2
        np.testing.assert_allclose(run(restored, mesh, 3)[1], straight, rtol=1e-5)
    checkpoints.close()
