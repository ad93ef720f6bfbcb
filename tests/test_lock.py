"""One directory, one run: who is refused, who takes over, and what is left behind."""

import json
import logging
import os
import pathlib
import resource
import subprocess
import sys
import threading
import time

import pytest

from helpers.commands import ROOT
from vivi_jax import files, lock
from vivi_jax.errors import ConfigError

HOLDER = """
import sys, time
from vivi_jax import lock
lock.BEAT = 0.1
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(directory: pathlib.Path) -> subprocess.Popen:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_is_refused_while_the_first_lives_and_takes_over_once_it_is_killed(tmp_path, caplog):
    directory = tmp_path / "run"
    holder = start_holder(directory)
    try:
        with pytest.raises(
            ConfigError, match=f"run is in use by process {holder.pid} on .* since 20.*use another --out"
        ):
            with lock.hold(directory, option="--out"):
                raise AssertionError("two in one directory")
    finally:
        holder.kill()  # as the kernel does: nothing is cleaned up
        holder.wait()
    with caplog.at_level(logging.WARNING), lock.hold(directory):
        assert json.loads((directory / lock.LOCK).read_text())["pid"] == os.getpid()
    assert f"process {holder.pid}, which held it, is gone" in caplog.text


def test_a_process_id_that_is_used_again_holds_nothing(tmp_path):
    with lock.hold(tmp_path / "run"):
        there = json.loads((tmp_path / "run" / lock.LOCK).read_text())
    (tmp_path / "run").mkdir()
    files.write_json(tmp_path / "run" / lock.LOCK, there | {"started": there["started"] - 1})
    with lock.hold(tmp_path / "run"):
        pass


def test_the_lock_of_another_host_is_taken_over_only_without_a_sign_of_life(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 2.5)
    path = tmp_path / lock.LOCK
    there = {"id": "x", "host": "elsewhere", "pid": 1, "started": 1, "machine": "another", "beat": 5, "since": "today"}
    files.write_json(path, there)

    def beat():
        time.sleep(1.2)
        files.write_json(path, there | {"beat": 6})

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ConfigError, match="in use by process 1 on elsewhere since today"):
        with lock.hold(tmp_path):
            pass
    thread.join()
    assert json.loads(path.read_text())["beat"] == 6  # untouched
    with caplog.at_level(logging.WARNING), lock.hold(tmp_path):
        pass
    assert "no sign of life of process 1 on elsewhere for 2.5 s" in caplog.text and not path.exists()


def test_a_lock_that_was_cut_off_while_it_was_made_holds_nothing_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "UNWRITTEN", 1.0)
    (tmp_path / lock.LOCK).write_text("")
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_that_does_not_fit_on_the_disk_is_not_left(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(ConfigError, match="cannot write to"), lock.hold(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_holder_whose_lock_was_taken_over_ends_itself(tmp_path):
    holder = start_holder(tmp_path)
    files.write_json(tmp_path / lock.LOCK, {"id": "another's", "host": "elsewhere", "pid": 7})
    assert holder.wait(timeout=30) == lock.EXIT_CODE
    assert "was taken over by process 7 on elsewhere" in holder.stderr.read()
    assert json.loads((tmp_path / lock.LOCK).read_text())["id"] == "another's"


def test_an_empty_directory_is_removed_with_the_parents_made_and_no_other(tmp_path):
    (tmp_path / "there").mkdir()
    with lock.hold(tmp_path / "there" / "made" / "run"):
        assert (tmp_path / "there" / "made" / "run" / lock.LOCK).exists()
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with lock.hold(tmp_path / "there"):
        pass
    with lock.hold(tmp_path / "run"):
        (tmp_path / "run" / "result").touch()
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "run", tmp_path / "run" / "result", tmp_path / "there"]


@pytest.mark.parametrize("address", ["gs:/bucket/run", "s3://b", "file:///tmp/x"])
def test_an_address_is_no_directory(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--workdir={address}: .* local files only"):
        with lock.hold(address):
            pass
    assert not list(tmp_path.iterdir())
