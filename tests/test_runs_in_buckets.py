"""Runs in gs://: killed and stopped anywhere they end as local ones, and no two write into one folder.

Against a real server of gs:// on this machine, behind a proxy that injects faults.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks.faults import buckets
from helpers.commands import ROOT, one_device
from helpers.frame_stores import jpeg, write_store
from vivi_jax import checkpoint, lock
from vivi_jax.buckets import client, runs
from vivi_jax.buckets.client import MISSING, Folder
from vivi_jax.buckets.runs import RunFolder
from vivi_jax.checkpoint import MANIFEST, Checkpoints, manifest
from vivi_jax.distributed import sharding
from vivi_jax.errors import CheckpointError, ConfigError, DataError

NEEDED = ("flask_cors", "gcp_storage_emulator", "gcsfs")


@pytest.fixture(scope="module")
def server():
    if not all(importlib.util.find_spec(name) for name in NEEDED):
        pytest.skip("servers, or gcsfs")
    with pytest.MonkeyPatch.context() as patch, buckets.serving("gs") as proxy:
        for name, value in buckets.environment("gs", proxy.url).items():
            patch.setenv(name, value)
        patch.setattr(client, "TRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"})
        yield proxy


@pytest.fixture
def address(server, request) -> str:
    server.fault = lambda method, path: None
    return f"gs://{buckets.BUCKET}/{request.node.name}"


def names(address: str) -> list[str]:
    return sorted(Folder(address).names())


# ---- Objects --------------------------------------------------------------------------------------------------------


def test_what_another_has_written_is_not_replaced(address):
    folder = Folder(address)
    first = folder.replace("a", b"1", MISSING)
    assert first and folder.replace("a", b"2", MISSING) is None and folder.look("a") == (b"1", first)
    second = folder.replace("a", b"3", first)
    assert second and folder.replace("a", None, first) is None and folder.read("a") == b"3"
    assert folder.replace("a", None, second) == MISSING == folder.look("a")[1]


def test_a_write_whose_answer_is_lost_has_been_made(server, address):
    """The next try finds what the first one wrote."""
    lost = []

    def lose_the_first(method, path):
        if method in ("POST", "DELETE") and method not in lost:
            lost.append(method)
            return buckets.Fault(keep=0)

    server.fault = lose_the_first
    folder = Folder(address)
    written = folder.replace("a", b"mine", MISSING)
    assert written and folder.look("a") == (b"mine", written)
    assert folder.replace("a", None, written) == MISSING and lost == ["POST", "DELETE"]


FAULTS = {  # what the server does to writes -> the line
    "login expired": (buckets.Fault(status=401), "401 Unauthorized.* log in again"),
    "no right": (buckets.Fault(status=403), r"403 Forbidden: give the account .* right to write .*objectUser"),
    "busy": (buckets.Fault(status=503), r"503 Service Unavailable, at each of 3 tries in \d+ s; .*it goes on"),
    "no bucket": (None, "there is no gs://no-such-bucket/run/.*check the names of the bucket"),
}


@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS)
def test_a_run_that_cannot_be_written_is_one_line_before_anything_is(server, address, fault, message):
    server.fault = lambda method, path: fault if method == "POST" else None
    address = address.replace("[", "-") if fault else "gs://no-such-bucket/run"
    with pytest.raises(DataError, match=message) as refused, lock.hold(address):
        raise AssertionError("it was let in")
    assert f"{address}/LOCK" in str(refused.value) and "\n" not in str(refused.value)


# ---- The lock -------------------------------------------------------------------------------------------------------


def test_one_folder_one_run(address, monkeypatch, caplog):
    with lock.hold(address):
        with pytest.raises(ConfigError, match=f"{address} is in use by process {os.getpid()} on .*--workdir"):
            with lock.hold(address):
                raise AssertionError("two in one folder")
        assert json.loads(Folder(address).read(lock.LOCK))["pid"] == os.getpid()
    assert not names(address)
    Folder(address).write(lock.LOCK, b'{"id": "x", "host": "elsewhere", "pid": 1, "machine": "another", "beat": 5}')
    monkeypatch.setattr(lock, "STALE", 1.5)
    with lock.hold(address):
        assert "no sign of life of process 1 on elsewhere for 1.5 s" in caplog.text
    assert not names(address)


def test_of_two_that_take_over_at_the_same_moment_one_has_it(address):
    folder, there = Folder(address), {"id": "dead"}
    folder.write(lock.LOCK, json.dumps(there).encode())
    both = [lock._Object(folder) for _ in range(2)]
    assert [one.read() for one in both] == [there, there]
    for name, one in zip("ab", both, strict=True):
        one.take_over({"id": name})
    assert [one.read()["id"] for one in both] == ["a", "a"]
    both[0].write({"id": "a", "beat": 1})
    both[1].write({"id": "b"})  # it has not seen that beat
    assert both[0].read() == {"id": "a", "beat": 1}


def test_a_holder_whose_lock_was_taken_over_ends_itself(address):
    code = "import sys, time; from vivi_jax import lock; lock.BEAT = 0.1\nwith lock.hold(sys.argv[1]): input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, address], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while not names(address):
            assert holder.poll() is None
        Folder(address).write(lock.LOCK, b'{"id": "another\'s", "host": "elsewhere", "pid": 7}')
        assert holder.wait(timeout=60) == lock.EXIT_CODE
        assert f"error: {address} was taken over by process 7 on elsewhere" in holder.stderr.read()
    finally:
        holder.kill()
        holder.communicate()
    assert json.loads(Folder(address).read(lock.LOCK))["pid"] == 7


# ---- Records --------------------------------------------------------------------------------------------------------


def test_records_are_there_for_the_next_start_and_nobody_else_writes_them(address):
    with contextlib.closing(RunFolder(address)) as first:
        (first.path / "metrics.jsonl").write_text("1\n")
        (first.path / "profile").mkdir()
        (first.path / "profile" / "trace").write_bytes(b"t")
        (first.path / ".half.tmp").write_text("")
        with first.published():
            pass
        with open(first.path / "metrics.jsonl", "a") as file:
            file.write("2\n")
        with pytest.raises(ZeroDivisionError), first.published():
            _ = 1 / 0
        assert names(address) == ["metrics.jsonl", "profile/trace"]
        with contextlib.closing(RunFolder(address)) as second:
            second.fetch()
            assert [path.name for path in second.path.iterdir()] == ["metrics.jsonl"]
            assert (second.path / "metrics.jsonl").read_text() == "1\n2\n"
            (second.path / "metrics.jsonl").write_text("other\n")
            second.publish()
            (first.path / "metrics.jsonl").write_text("1\n2\n3\n")
            with pytest.raises(ConfigError, match=f"{address}/metrics.jsonl was written by another command"):
                first.publish()
            assert Folder(address).read("metrics.jsonl") == b"other\n"
            with pytest.raises(DataError, match=f"^{address}/metrics.jsonl: line 1"), second.in_its_words():
                raise DataError(f"{second.path}/metrics.jsonl: line 1")
        assert not second.path.exists()


def test_who_watches_sees_the_records_grow(address, monkeypatch):
    monkeypatch.setattr(runs, "PUBLISH_SECONDS", 0.05)
    with contextlib.closing(RunFolder(address)) as folder, folder.published():
        (folder.path / "metrics.jsonl").write_text("1\n")
        while not names(address):
            pass
        assert Folder(address).read("metrics.jsonl") == b"1\n"


def test_s3_is_refused_with_what_to_do_instead():
    with pytest.raises(ConfigError, match="--workdir=s3://films/run: runs are kept on disks and in gs://, .*aws s3"):
        RunFolder("s3://films/run")


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def state(step: int) -> dict:
    return {"w": jax.random.normal(jax.random.key(step), (64, 32)), "step": jax.numpy.int32(step)}


def restored(address: str) -> tuple[int, str] | None:
    with contextlib.closing(Checkpoints(address, keep=2)) as checkpoints:
        found = checkpoints.restore(state(0), sharding.make_mesh(jax.devices()[:1]))
    return found and (found[0], checkpoint.state_sha256(found[1]))


@pytest.mark.slow
def test_checkpoints_are_exact_and_verified_and_half_ones_go(server, address):
    good = {step: (step, checkpoint.state_sha256(state(step))) for step in (1, 2, 3)}
    folder, order = Folder(f"{address}/checkpoints"), []
    with contextlib.closing(Checkpoints(address, keep=2, before_commit=lambda: order.append(names(address)))) as saved:
        for step in (1, 2, 3):
            saved.save(step, state(step))
        saved.wait()
        assert manifest.written_steps(saved.directory) == manifest.steps(saved.directory) == [2, 3]
    assert [sum(MANIFEST in name for name in there) for there in order] == [0, 1, 2]  # each before its own
    folder.write("1/commit_success.txt", b"")  # what a kill has left of an old one that was being removed
    assert restored(address) == good[3]
    assert manifest.steps(saved.directory) == [2, 3]

    # Cut off while it was written: as if it had never begun.
    manifest.begin(saved.directory, 3)
    folder.remove(f"3/{MANIFEST}")
    assert restored(address) == good[2]
    assert not [name for name in names(address) if "3" in name.split("/")]

    # Damaged: passed over, and kept.
    with contextlib.closing(Checkpoints(address, keep=2)) as saved:
        saved.save(3, state(3))
    largest = max((name for name in folder.names() if name.startswith("3/")), key=lambda name: len(folder.read(name)))
    data = bytearray(folder.read(largest))
    data[len(data) // 2] ^= 4
    folder.write(largest, bytes(data))
    assert restored(address) == good[2]
    assert Folder(address).read(f"checkpoints_rejected/{largest}") == data
    assert not [name for name in folder.names() if name.startswith("3/")]

    # A server that fails is no damage: nothing is set aside.
    server.fault = lambda method, path: buckets.Fault(status=503) if "alt=media" in path else None
    with pytest.raises(DataError, match=r"503 Service Unavailable, at each of 3 tries in \d+ s"):
        restored(address)
    server.fault = lambda method, path: buckets.Fault(status=403) if method == "POST" and "default" in path else None
    with contextlib.closing(Checkpoints(address, keep=2)) as saved:
        with pytest.raises(CheckpointError, match=f"could not write a checkpoint to {address}.* the steps 2\\. Start"):
            saved.save(3, state(3))
            saved.wait()
    server.fault = lambda method, path: None
    assert restored(address) == good[2]


# ---- Reading runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_in_a_bucket_is_read_as_a_verified_copy(server, address, tmp_path, monkeypatch):
    monkeypatch.setenv("VIVI_JAX_CACHE", str(tmp_path / "cache"))
    with contextlib.closing(Checkpoints(str(tmp_path / "run"), keep=2)) as saved:
        saved.save(1, state(1))
        saved.save(2, state(2))
    (tmp_path / "run" / "config.json").write_text('{"name": "a"}')
    folder = Folder(address)
    for path in filter(pathlib.Path.is_file, (tmp_path / "run").rglob("*")):
        folder.write(path.relative_to(tmp_path / "run").as_posix(), path.read_bytes())

    def read() -> tuple[str, int]:
        """The state, and how many of its objects were asked for."""
        before = len(server.seen)
        found = checkpoint.state_sha256(checkpoint.load_state(address))
        return found, sum("/default/" in path and "alt=media" in path for _, path, _ in server.seen[before:])

    assert checkpoint.load_config(address)["name"] == "a"
    good = {step: checkpoint.state_sha256(checkpoint.load_state(str(tmp_path / "run"), step)) for step in (1, 2)}
    assert read() == (good[2], 0)  # load_config has brought it
    copy = pathlib.Path(checkpoint.local_copy(address))
    largest = max((copy / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    again, objects = read()
    assert again == good[2] and objects > 5  # the copy was damaged
    folder.write(f"checkpoints/{largest.relative_to(copy / 'checkpoints').as_posix()}", bytes(data))
    largest.write_bytes(data)
    assert read()[0] == good[1]  # and now the run itself
    folder.write("weights.npz", b"npz")
    assert pathlib.Path(checkpoint.local_copy(f"{address}/weights.npz")).read_bytes() == b"npz"
    with pytest.raises(DataError, match=f"there is no {address}/nothing; check the names"):
        checkpoint.load_state(f"{address}/nothing")
    folder.remove("checkpoints/")
    with pytest.raises(CheckpointError, match=f"no checkpoint in {address}/checkpoints is good: there is none"):
        checkpoint.load_state(address)


# ---- Whole runs -----------------------------------------------------------------------------------------------------

STEPS, EVERY = 6, 3
# Starts a run per line; forks, as loading the libraries takes longer than the run.
STARTER = f"""
import json, os, pathlib, sys
del os.environ["EPATH_USE_TF"]  # of conftest.py
from benchmarks.faults import runs
from helpers import host
from vivi_jax import command_line, main
for line in sys.stdin:
    store, workdir, log = json.loads(line)
    def run():
        command_line.start_logging()
        config = host.systems(store, {STEPS // 2})["vito"]  # epochs of 8
        config.batch_size, config.evaluation.dataset, config.run.checkpoint_every = 4, "", {EVERY}
        config.run.keep_checkpoints = 1
        command_line.ended(lambda: main.run(config, workdir))
    process = runs.fork(run, pathlib.Path(log), runs.devices(1))
    print(process.pid, flush=True)
    print(process.wait(), flush=True)
"""


class Starter:
    def __init__(self, log: pathlib.Path):
        self.log = log
        environment = one_device() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, store: str, workdir: str) -> None:
        print(json.dumps([store, workdir, str(self.log)]), file=self.process.stdin, flush=True)
        self.pid = int(self.process.stdout.readline())

    def strike_at(self, number: int, moment: str):
        """The proxy's fault that sends the run a signal at its first write of such a name, which SIGKILL prevents."""
        struck = []

        def strike(method: str, path: str) -> buckets.Fault | None:
            if method != "POST" or moment not in path or struck:
                return None
            struck.append(path)
            os.kill(self.pid, number)
            return buckets.Fault(status=503) if number == signal.SIGKILL else None

        return strike

    def end(self) -> int:
        return int(self.process.stdout.readline())


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_and_stopped_ends_as_a_local_one(server, address, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    videos = [{"frames": 8, "fps": 2.0, "height": 48, "width": 64, "label": v % 2} for v in range(5)]
    frames = [jpeg(rng.integers(0, 256, (48, 64, 3), np.uint8)) for _ in range(40)]
    write_store(tmp_path / "store", videos, frames, class_names=("a", "b"))
    store = buckets.upload(server, tmp_path / "store", "store")
    monkeypatch.setenv("VIVI_JAX_CACHE", str(tmp_path / "cache"))
    starter = Starter(tmp_path / "log")
    try:
        starter.start(str(tmp_path / "store"), str(tmp_path / "run"))
        assert starter.end() == 0, starter.log.read_text()
        for number, moment in (
            (signal.SIGKILL, "checkpoints/3/default/ocdbt"),  # the first save has begun
            (signal.SIGTERM, "checkpoints/SAVING"),
            (signal.SIGKILL, f"checkpoints/6/{MANIFEST}"),  # Orbax has ended the save, and we have not
        ):
            server.fault = starter.strike_at(number, moment)
            starter.start(store, address)
            assert starter.end() == (-number if number == signal.SIGKILL else 128 + number), starter.log.read_text()
            if number == signal.SIGTERM:
                found = names(address)
                assert lock.LOCK not in found and "checkpoints/SAVING" not in found
                saved = manifest.written_steps(checkpoint.directory_of(address))
                assert [line["step"] for line in lines(address)] == list(range(1, saved[-1] + 1))
        server.fault = lambda method, path: None
        starter.start(store, address)
        assert starter.end() == 0, starter.log.read_text()
    finally:
        starter.process.stdin.close()
        starter.process.wait(timeout=60)
    summary, local = (
        json.loads(Folder(address).read("summary.json")),
        json.loads((tmp_path / "run/summary.json").read_text()),
    )
    assert summary["state_sha256"] == local["state_sha256"] and summary["step"] == STEPS
    assert summary["checkpoint"] == f"{address}/checkpoints/{STEPS}"
    assert [line["step"] for line in lines(address)] == list(range(1, STEPS + 1))
    whole = json.loads(Folder(address).read(f"checkpoints/{STEPS}/{MANIFEST}"))["files"]
    kept = {f"checkpoints/{STEPS}/{name}" for name in (*whole, MANIFEST)}
    records = {"config.json", "data.json", "metrics.jsonl", "summary.json"}
    others = set(names(address)) - kept - records
    assert kept | records <= set(names(address)) and all("events.out.tfevents" in name for name in others), others
    assert "Traceback" not in starter.log.read_text()


def lines(address: str) -> list[dict]:
    return [json.loads(line) for line in Folder(address).read("metrics.jsonl").decode().splitlines()]
