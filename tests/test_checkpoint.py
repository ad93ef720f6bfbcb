"""Checkpoints on disk: exact, verified, and the newest good one is found whatever happened to the others."""

import itertools
import json
import logging
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.commands import ROOT, one_device
from vivi_jax import checkpoint
from vivi_jax.checkpoint import MANIFEST, Checkpoints, manifest
from vivi_jax.checkpoint import __main__ as command
from vivi_jax.distributed import sharding
from vivi_jax.errors import CheckpointError, CopiesDiffer, NotFinite


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


def restore(workdir, devices: int = 1, like: State | None = None):
    checkpoints = Checkpoints(workdir, keep=10)
    try:
        return checkpoints.restore(like or make_state(0), sharding.make_mesh(jax.devices()[:devices]))
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
    with pytest.raises(CheckpointError, match="none of the checkpoints .* is good: 1 .*SHA-256"):
        restore(tmp_path)
    assert (tmp_path / "checkpoints" / "1").is_dir()  # not moved: this may be all there is


def test_only_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 3]


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, caplog):
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "2" / MANIFEST
    path.unlink()
    path.mkdir()  # an error of the system, as of a disk
    assert restore(tmp_path)[0] == 1
    assert "checkpoints/2 is not used: it cannot be read (" in caplog.text


@pytest.mark.slow
def test_verifying_leaves_the_accelerator_alone(tmp_path):
    save(tmp_path, 1)
    done = subprocess.run(
        [sys.executable, "-m", "vivi_jax.checkpoint", "verify", str(tmp_path)],
        cwd=ROOT,
        env=one_device() | {"JAX_PLATFORMS": "tpu"},  # which there is none of, or one that is in use
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and done.stdout.endswith("checkpoints/1: good\n"), done.stderr


# --- what is finite ---------------------------------------------------------------------------------------------------


def with_a_nan(state: State) -> State:
    return state.replace(params={"encoder": {**state.params["encoder"], "bias": jnp.array([0, jnp.nan, 0])}})


def save_as_it_is(workdir, step: int, state: State) -> None:
    """As a version that did not look at the values."""
    checkpoints = Checkpoints(workdir, keep=10)
    checkpoints._open().save(step, args=checkpoint.states.ocp.args.StandardSave(state))
    checkpoints._open().wait_until_finished()
    manifest.commit(workdir / "checkpoints", step, keep=10)
    checkpoints.close()


def test_a_state_that_is_not_finite_is_not_saved_and_leaves_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(NotFinite, match="state after step 5 is not finite") as raised:
        checkpoints.save(5, with_a_nan(make_state(5)))
    checkpoints.close()
    assert raised.value.step == 5 and not list(tmp_path.iterdir())


def test_a_clock_that_jumps_while_a_state_is_saved_changes_nothing(tmp_path, monkeypatch):
    right, hours = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: right() + 3600 * next(hours))  # each look is an hour later
    save(tmp_path, 3)
    assert next(hours) > 5 and checkpoint.newest_good_step(tmp_path / "checkpoints") == 3


def with_another_bit(array: jax.Array, device: int, bit: int) -> jax.Array:
    """The array, with one bit of its last element's copy on one device flipped."""
    shards = array.addressable_shards
    pieces = [np.array(shard.data) for shard in shards]
    pieces[device].reshape(-1)[-1:].view(f"uint{8 * array.dtype.itemsize}")[...] ^= 1 << bit
    placed = [jax.device_put(piece, shard.device) for piece, shard in zip(pieces, shards, strict=True)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, placed)


@pytest.mark.parametrize(("fsdp", "copies"), [(1, "8 devices"), (2, "4 devices")])
def test_copies_of_which_one_has_another_bit_are_not_saved(tmp_path, fsdp, copies):
    mesh = sharding.make_mesh(fsdp=fsdp)
    params = {
        "kernel": jax.random.normal(jax.random.key(0), (128, 128)),  # large enough to be split
        "half": jnp.ones(5, jnp.bfloat16),
        "count": jnp.int32(7),
    }
    params = jax.device_put(params, sharding.state_sharding(params, mesh))
    checkpoints = Checkpoints(tmp_path, keep=10)
    for name, bit in (("kernel", 0), ("kernel", 31), ("half", 7), ("count", 30)):
        wrong = params | {name: with_another_bit(params[name], 5, bit)}
        of = copies if name == "kernel" else "8 devices"
        line = rf"after step 5 the copies of {name} on the {of} .* look at cpu:5 of process 0\."
        with pytest.raises(CopiesDiffer, match=line):
            checkpoints.save(5, wrong)
    assert not (tmp_path / "checkpoints").exists()
    checkpoints.save(5, params)
    checkpoints.close()
    assert checkpoint.newest_good_step(tmp_path / "checkpoints") == 5


def test_of_two_copies_that_differ_both_are_named(tmp_path):
    params = jax.device_put({"bias": jnp.zeros(3)}, sharding.replicated(sharding.make_mesh(jax.devices()[:2])))
    wrong = {"bias": with_another_bit(params["bias"], 1, 3)}
    with pytest.raises(CopiesDiffer, match="look at cpu:0 of process 0, cpu:1 of process 0"):
        Checkpoints(tmp_path, keep=1).save(1, wrong)


def test_a_checkpoint_that_is_not_finite_is_passed_over(tmp_path, capsys):
    save(tmp_path, 1)
    save_as_it_is(tmp_path, 2, with_a_nan(make_state(2)))
    with pytest.raises(SystemExit) as ended:
        command.main(["verify", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1 and [line.split(": ")[1] for line in lines] == [
        "good",
        "it holds values that are not finite",
    ]
    assert restore(tmp_path)[0] == 1
    assert "2 is not used: it holds values that are not finite" in capsys.readouterr().err
    assert (tmp_path / "checkpoints_rejected" / "2").is_dir()
    command.main(["verify", str(tmp_path)])  # all good now: ends well
    assert capsys.readouterr().out.endswith("checkpoints/1: good\n")


def test_where_no_checkpoint_is_finite_the_run_does_not_begin_anew(tmp_path):
    save_as_it_is(tmp_path, 2, with_a_nan(make_state(2)))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is good: 2 .it holds values that are not finite"):
            restore(tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]


# --- whose checkpoint it is -------------------------------------------------------------------------------------------


def test_a_renamed_and_a_copied_checkpoint_are_noticed(tmp_path, caplog):
    save(tmp_path, 1, 2)
    directory = tmp_path / "checkpoints"
    shutil.copytree(directory / "1", directory / "30")
    (directory / "2").rename(directory / "20")
    assert restore(tmp_path)[0] == 1
    assert "30 is not used: it is the checkpoint of step 1, renamed or copied" in caplog.text
    assert "20 is not used: it is the checkpoint of step 2, renamed or copied" in caplog.text


def test_manifests_of_the_first_format_count_and_empty_or_later_ones_do_not(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "1" / MANIFEST
    content = json.loads(path.read_text())
    assert content["step"] == 1 and {"vivi_jax", "jax", "orbax-checkpoint", "source"} <= content["versions"].keys()
    path.write_text(json.dumps(content["files"]))
    assert restore(tmp_path)[0] == 1
    for wrong, problem in (({}, "is damaged"), ([], "is damaged"), (content | {"format": 3}, "of a later version")):
        path.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=problem):
            restore(tmp_path)


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    save(tmp_path, 1, 100)
    for name in ("0200", "\u0665\u0660\u0660", "\u00b2", "300.old", "-5"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 100]
    assert restore(tmp_path)[0] == 100
    assert checkpoint.load_state(tmp_path)["step"] == 100
    save(tmp_path, 101)
    assert restore(tmp_path)[0] == 101


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda p: p | {"bias": jnp.zeros(4)}, r"params.encoder.bias is float32\[3\] there, float32\[4\] here"),
        (lambda p: p | {"bias": jnp.zeros(3, jnp.bfloat16)}, r"bias is float32\[3\] there, bfloat16\[3\] here"),
        (lambda p: p | {"new": jnp.zeros(())}, r"params.encoder.new is absent there, float32\[\] here\."),
        (lambda p: {"bias": p["bias"]}, r"params.encoder.kernel is float32\[64, 32\] there, absent here\."),
    ],
)
def test_a_checkpoint_of_another_shape_dtype_or_structure_is_one_line(tmp_path, change, line):
    save(tmp_path, 1)
    here = make_state(1)
    with pytest.raises(CheckpointError, match=line) as raised:
        restore(tmp_path, like=here.replace(params={"encoder": change(here.params["encoder"])}))
    assert "\n" not in str(raised.value) and checkpoint.steps(tmp_path / "checkpoints") == [1]


def test_the_versions_that_differ_are_named(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "1" / MANIFEST
    content = json.loads(path.read_text())
    content["versions"]["optax"] = "0.1.2"
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"\(written with optax 0.1.2 there, \S+ here\)"):
        restore(tmp_path, like=make_state(1).replace(params={}))


# --- saves that are cut off -------------------------------------------------------------------------------------------


def test_with_one_kept_the_old_one_goes_only_after_the_new_one_is_good(tmp_path):
    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    manifest.begin(checkpoints.directory, 2)
    checkpoints._open().save(2, args=checkpoint.states.ocp.args.StandardSave(make_state(2)))
    checkpoints._open().wait_until_finished()
    assert checkpoint.newest_good_step(checkpoints.directory) == 1  # killed here, between Orbax's commit and ours
    manifest.commit(checkpoints.directory, 2, keep=1)
    assert checkpoint.steps(checkpoints.directory) == [2] and checkpoint.newest_good_step(checkpoints.directory) == 2
    with pytest.raises(OSError):
        manifest.commit(checkpoints.directory, 3, keep=1)  # which is not there
    assert checkpoint.newest_good_step(checkpoints.directory) == 2
    checkpoints.close()


def test_what_a_kill_left_of_saying_what_is_saved_goes_with_the_next_save(tmp_path):
    code = f"""
        import os, pathlib
        from vivi_jax.checkpoint import manifest
        os.replace = lambda *_: os.kill(os.getpid(), 9)  # between writing and renaming
        manifest.begin(pathlib.Path({str(tmp_path)!r}), 5)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    manifest.begin(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == [manifest.SAVING]


def test_a_run_whose_first_save_was_cut_off_begins_anew(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "checkpoints" / "5" / MANIFEST).unlink()
    manifest.begin(tmp_path / "checkpoints", 5)
    assert restore(tmp_path) is None
    assert (tmp_path / "checkpoints_rejected" / "5").is_dir()


def test_lost_manifests_are_an_error_and_no_new_beginning(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "checkpoints" / "5" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is good: 5 .it has no MANIFEST.json.*Restore one from a backup"):
        restore(tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [5]


def test_what_a_kill_left_of_an_old_checkpoint_that_was_being_removed_goes_at_the_next_start(tmp_path):
    save(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoints" / "1" / MANIFEST).unlink()
    assert restore(tmp_path)[0] == 3
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 3] and not (tmp_path / "checkpoints_rejected").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line_that_names_the_good_steps(tmp_path):
    save(tmp_path, 1, 2)
    code = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        import jax.numpy as jnp
        from vivi_jax import command_line
        from vivi_jax.checkpoint import Checkpoints
        command_line.start_logging()
        def run():
            checkpoints = Checkpoints(sys.argv[1], keep=3)
            try:
                checkpoints.save(3, {"a": jnp.arange(4e6), "b": jnp.zeros(3)})
                checkpoints.save(4, {"a": jnp.arange(4e6), "b": jnp.zeros(3)})
            finally:
                checkpoints.close()
        command_line.ended(run)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        cwd=ROOT,
        env=one_device(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "could not write a checkpoint to" in done.stderr and "good there are the steps 1, 2. " in done.stderr
    assert restore(tmp_path)[0] == 2


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
