"""Real runs in real processes: killed, terminated, resumed; the end must be that of a straight run, bit for bit."""

import json
import pathlib
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from helpers.commands import start_module
from helpers.runs import CHECKPOINT_EVERY, STEPS, logged_steps, small_vito
from helpers.video_files import write_video
from input_pipeline.preparation.local import prepare
from input_pipeline.rendered.shapes import write_videos
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
def test_kills_change_nothing(straight, store, tmp_path):
    """At once after the first step, and three times in or shortly after saving; each start takes most of a kill."""
    workdir, moments = tmp_path / "run", random.Random(0)
    for in_saving in (False, True, True, True):
        process = start(workdir, store)
        wait_for_a_new_step(process, workdir)
        while in_saving and logged_steps(workdir)[-1] % CHECKPOINT_EVERY:
            assert process.poll() is None, "the run ended before it was killed: make it longer"
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2) if in_saving else 0)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: make it longer"
    assert_equal_to(straight, workdir, finish(workdir, store))


@pytest.mark.slow
def test_a_finished_run_does_nothing(straight, store):
    assert finish(straight["workdir"], store)["state_sha256"] == straight["state_sha256"]


@pytest.mark.slow
def test_a_workdir_of_another_config_is_refused_with_the_difference(straight, store):
    assert start(straight["workdir"], store, "--config.optimizer.weight_decay=0.5").wait(timeout=100) == 1
    last = pathlib.Path(f"{straight['workdir']}.log").read_text().splitlines()[-1]
    assert last.startswith("error: ") and "optimizer.weight_decay: 0.0001 there, 0.5 here" in last


@pytest.mark.slow
def test_a_kill_changes_nothing_where_videos_and_labelled_images_stream_side_by_side(tmp_path):
    write_videos(tmp_path / "videos", videos=16, seed=0, size=64, seconds=3.0, classes=("disc", "star"), shots=2)
    prepare(str(tmp_path / "videos"), str(tmp_path / "store"), labels="folder", workers=2)

    def start_vivi(name: str) -> subprocess.Popen:
        flags = [
            "--config=configs/vivi.py:ex2,co=100,demo",
            f"--workdir={tmp_path / name}",
            f"--config.data.path={tmp_path / 'store'}",
            f"--config.data.labelled_path={tmp_path / 'store'}",
            "--config.method.num_classes=2",
            "--config.batch_size=4",
            "--config.data.labelled_batch_size=4",
            "--config.data.image_size=32",
            "--config.data.frames=2",
            "--config.encoder.width=0.125",
            "--config.run.log_every=1",
            "--config.run.checkpoint_every=5",
            "--config.schedule.total_steps=60",
        ]
        with open(tmp_path / f"{name}.log", "a") as log:
            return start_module("vivi_jax.main", *flags, stdout=log, stderr=log)

    summaries = []
    for name, kills in (("straight", 0), ("killed", 1)):
        for _ in range(kills):
            process = start_vivi(name)
            wait_for_a_new_step(process, tmp_path / name)
            time.sleep(0.3)
            process.kill()
            assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: make it longer"
        assert start_vivi(name).wait(timeout=300) == 0, (tmp_path / f"{name}.log").read_text()
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
        assert logged_steps(tmp_path / name) == list(range(1, 61))
    assert summaries[0]["step"] == 60 and summaries[0]["state_sha256"] == summaries[1]["state_sha256"]
