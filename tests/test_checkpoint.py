"""Checkpoints on disk: exact, verified, and the newest good one is found whatever happened to the others."""

import json
import logging

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vivi_jax import checkpoint
from vivi_jax.checkpoint import MANIFEST, Checkpoints
from vivi_jax.distributed import sharding
from vivi_jax.errors import CheckpointError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple


def make_state(step: int) -> State:
    params = {"encoder": {"kernel": jax.random.normal(jax.random.key(step), (64, 32)), "bias": jnp.zeros(3)}}
    return State(jnp.int32(step), params, optax.chain(optax.trace(0.9), optax.scale(0.1)).init(params))


def save(workdir, *steps: int) -> None:
    checkpoints = Checkpoints(workdir, keep=10)
    for step in steps:
        checkpoints.save(step, make_state(step))
    checkpoints.close()


def restore(workdir, devices: int = 1):
    checkpoints = Checkpoints(workdir, keep=10)
    try:
        return checkpoints.restore(make_state(0), sharding.make_mesh(jax.devices()[:devices]))
    finally:
        checkpoints.close()


@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, devices):
    save(tmp_path, 3)
    step, state = restore(tmp_path, devices)
    assert step == 3 and isinstance(state, State)
    assert checkpoint.state_sha256(state) == checkpoint.state_sha256(make_state(3))


def test_the_hash_sees_one_bit():
    state = make_state(1)
    kernel = np.array(state.params["encoder"]["kernel"])
    kernel.view(np.uint32)[5, 7] ^= 1
    other = state.replace(params={"encoder": {**state.params["encoder"], "kernel": kernel}})
    assert checkpoint.state_sha256(state) != checkpoint.state_sha256(other)


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path) is None


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def every_file(directory) -> list:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def test_a_flipped_bit_in_any_file_is_noticed(tmp_path):
    save(tmp_path, 1)
    directory = tmp_path / "checkpoints" / "1"
    files = [path for path in every_file(directory) if path.stat().st_size]
    assert len(files) > 5
    for path in files:
        before = path.read_bytes()
        flip_a_bit(path)
        assert checkpoint.verify(directory) is not None, path
        path.write_bytes(before)
    assert checkpoint.verify(directory) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_a_bit(path),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.unlink(),
    ],
    ids=["bit", "cut", "missing"],
)
def test_a_damaged_checkpoint_is_passed_over_named_and_kept_aside(tmp_path, caplog, damage):
    save(tmp_path, 1, 2)
    largest = max(every_file(tmp_path / "checkpoints" / "2" / "default" / "d"), key=lambda p: p.stat().st_size)
    damage(largest)
    with caplog.at_level(logging.WARNING):
        step, state = restore(tmp_path)
    assert step == 1 and checkpoint.state_sha256(state) == checkpoint.state_sha256(make_state(1))
    assert "checkpoints/2 is not used" in caplog.text
    assert (tmp_path / "checkpoints_rejected" / "2").is_dir()
    save(tmp_path, 2)  # the run writes that step again
    assert restore(tmp_path)[0] == 2


def test_a_save_cut_off_before_its_manifest_is_not_used(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2" / MANIFEST).unlink()
    assert restore(tmp_path)[0] == 1


def test_no_good_checkpoint_is_an_error_that_names_them(tmp_path):
    save(tmp_path, 1)
    flip_a_bit(tmp_path / "checkpoints" / "1" / "default" / "_METADATA")
    with pytest.raises(CheckpointError, match="none of the checkpoints .* verifies: 1 .*SHA-256"):
        restore(tmp_path)
    assert (tmp_path / "checkpoints" / "1").is_dir()  # not moved: this may be all there is


def test_only_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 3]


def test_the_encoder_is_loaded_without_the_code_of_the_run(tmp_path):
    save(tmp_path, 4)
    (tmp_path / "config.json").write_text(json.dumps({"encoder": {"name": "resnet", "depth": 18}}))
    state = checkpoint.load_state(tmp_path)
    np.testing.assert_array_equal(state["params"]["encoder"]["kernel"], make_state(4).params["encoder"]["kernel"])
    assert checkpoint.load_config(tmp_path)["encoder"]["depth"] == 18


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="is .* a run directory"):
        checkpoint.load_encoder(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.load_state(tmp_path)
