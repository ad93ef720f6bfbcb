"""Real runs in real processes: terminated, resumed; the end must be that of a straight run, bit for bit.

Kills are in test_faults.py.
"""

import json
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest

from helpers.commands import start_module
from helpers.runs import STEPS, logged_steps, small_vito
from helpers.video_files import write_video
from input_pipeline.preparation.local import prepare
from vivi_jax import checkpoint
from vivi_jax.lock import LOCK


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> pathlib.Path:
    """Twelve prepared videos of noise that drifts."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(12):
        texture = np.random.default_rng(i).integers(0, 256, (6, 20, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        write_video(folder / f"{i:02}.mp4", [texture[:, t : t + 64] for t in range(70)])
    out = tmp_path_factory.mktemp("prepared") / "store"
    prepare(str(folder), str(out), workers=2)
    return out


def start(workdir, store, *flags: str) -> subprocess.Popen:
    with open(f"{workdir}.log", "a") as log:  # a file, so that a full pipe never stops the run
        return start_module("vivi_jax.main", *small_vito(store, workdir), *flags, stdout=log, stderr=log)


def finish(workdir, store) -> dict:
    """Runs to the end; returns summary.json."""
    assert start(workdir, store).wait(timeout=300) == 0, pathlib.Path(f"{workdir}.log").read_text()
    return json.loads((workdir / "summary.json").read_text())


def wait_for_a_new_step(process, workdir) -> None:
    """Returns once this start of the run has done a step (a resumed run first cuts the log back, then grows it)."""
    known, deadline = set(logged_steps(workdir)), time.monotonic() + 200
    while True:
        steps = logged_steps(workdir)
        if set(steps) - known:
            return
        known &= set(steps)
        assert process.poll() is None and time.monotonic() < deadline, pathlib.Path(f"{workdir}.log").read_text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory) -> dict:
    workdir = tmp_path_factory.mktemp("straight") / "run"
    return {"workdir": workdir, **finish(workdir, store)}


def assert_equal_to(straight, workdir, summary) -> None:
    assert summary["step"] == straight["step"] == STEPS
    assert summary["state_sha256"] == straight["state_sha256"]
    assert logged_steps(workdir) == list(range(1, STEPS + 1))  # nothing missing, nothing twice


@pytest.mark.slow
def test_sigterm_saves_leaves_and_goes_on_bit_for_bit(straight, store, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, store)
    wait_for_a_new_step(process, workdir)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert time.monotonic() - sent < 10
    saved = checkpoint.newest_good_step(workdir / "checkpoints")
    assert saved == logged_steps(workdir)[-1] < STEPS  # the very step it was at, not the last regular save
    assert_equal_to(straight, workdir, finish(workdir, store))


@pytest.mark.slow
def test_sigterm_while_starting_ends_at_once(store, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, store)
    while not (workdir / LOCK).exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(2)  # initialising or compiling
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) in (128 + signal.SIGTERM, -signal.SIGTERM)  # the latter before the handler is set
    assert not workdir.exists() or (workdir / "metrics.jsonl").exists() or process.returncode < 0


@pytest.mark.slow
def test_ctrl_c_saves_and_meanwhile_no_second_run_is_let_in(straight, store, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, store)
    wait_for_a_new_step(process, workdir)
    process.send_signal(signal.SIGSTOP)  # it must not end before the second has looked
    with open(f"{workdir}.second.log", "w") as log:
        second = start_module("vivi_jax.main", *small_vito(store, workdir), stdout=log, stderr=log)
    assert second.wait(timeout=200) == 1
    process.send_signal(signal.SIGCONT)
    errors = pathlib.Path(f"{workdir}.second.log").read_text().splitlines()
    assert (
        errors[-1].startswith(f"error: {workdir} is in use by process {process.pid} on ") and "Traceback" not in errors
    )
    assert process.poll() is None, "the first run ended before the second was refused: make it longer"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    log = pathlib.Path(f"{workdir}.log").read_text()
    assert "SIGINT: saved, stopping at step" in log and "Traceback" not in log and not (workdir / LOCK).exists()
    assert checkpoint.newest_good_step(workdir / "checkpoints") == logged_steps(workdir)[-1] < STEPS
    assert_equal_to(straight, workdir, finish(workdir, store))


@pytest.mark.slow
def test_a_finished_run_does_nothing(straight, store):
    assert finish(straight["workdir"], store)["state_sha256"] == straight["state_sha256"]


@pytest.mark.slow
def test_a_workdir_of_another_config_is_refused_with_the_difference(straight, store):
    assert start(straight["workdir"], store, "--config.optimizer.weight_decay=0.5").wait(timeout=100) == 1
    last = pathlib.Path(f"{straight['workdir']}.log").read_text().splitlines()[-1]
    assert last.startswith("error: ") and "optimizer.weight_decay: 0.0001 there, 0.5 here" in last
