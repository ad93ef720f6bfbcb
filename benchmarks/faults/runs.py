"""Small runs of the three systems in processes of their own, which faults can be done to.

A process that starts Python and loads the libraries spends ten seconds before it does anything that a fault could hurt.
So this process loads them once, starts no thread and no backend of JAX, and forks: a run begins milliseconds later and
is a process like any other, with its own memory, signals and exit code.
"""

import atexit
import contextlib
import dataclasses
import faulthandler
import fcntl
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from input_pipeline.preparation.local import prepare
from input_pipeline.preparation.steps import Settings
from input_pipeline.rendered.shapes import write_videos
from vivi_jax import command_line, main

SYSTEMS = ("vito", "vivi", "vdim")
STEPS = 60
CHECKPOINT_EVERY = 5
PATIENCE = 900  # seconds after which a run that should have ended has hung, also on a busy machine


def flags(system: str, store: str | pathlib.Path, workdir: str | pathlib.Path) -> list[str]:
    """Command line of a run of STEPS steps of a network of few channels."""
    own = {
        "vito": [
            "--config=configs/vito.py:demo,views=2",
            "--config.encoder.width=0.125",
            "--config.method.projector_hidden=16",
            "--config.method.attention_hidden=8",
            "--config.schedule.examples_per_epoch=8",
            f"--config.schedule.epochs={STEPS}.0",
        ],
        "vivi": [
            "--config=configs/vivi.py:ex2,co=100,demo",
            f"--config.data.labelled_path={store}",
            "--config.method.num_classes=2",
            "--config.data.labelled_batch_size=8",
            "--config.data.frames=2",
            "--config.encoder.width=0.125",
            f"--config.schedule.total_steps={STEPS}",
            "--config.schedule.warmup_steps=5",
        ],
        "vdim": [
            "--config=configs/vdim.py:layers=68,demo",
            "--config.method.embed_dim=16",
            "--config.data.frames=8",
            "--config.data.offset=4",
            "--config.encoder.frames=8",
            "--config.data.image_size=48",
            f"--config.schedule.total_steps={STEPS}",
            "--config.schedule.warmup_steps=5",
        ],
    }
    return [
        own[system][0],  # --config comes before what changes it
        f"--workdir={workdir}",
        f"--config.data.path={store}",
        "--config.batch_size=8",
        "--config.data.image_size=32",
        "--config.run.log_every=1",
        f"--config.run.checkpoint_every={CHECKPOINT_EVERY}",
        *own[system][1:],
    ]


def make_store(folder: pathlib.Path) -> pathlib.Path:
    """A frame store of 24 rendered videos of two classes, with two shots each, in three shards."""
    videos, store = folder / "videos", folder / "store"
    write_videos(videos, videos=24, seed=0, size=48, seconds=3.0, classes=("ring", "star"), shots=2, workers=2)
    prepare_store(str(videos), store)
    return store


def prepare_store(videos: str, store: pathlib.Path) -> None:
    """The preparation of the store, which may have been begun."""
    prepare(videos, str(store), Settings(videos_per_shard=8), labels="folder", workers=2)


@dataclasses.dataclass
class Process:
    """A forked process; `log` has all that it prints."""

    pid: int
    log: pathlib.Path
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, as subprocess has it, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Its exit code; None if it has not ended by then, and is killed."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if self.code is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGABRT)  # the stacks of all threads go to its log
            time.sleep(2)
            self.signal(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.code = -signal.SIGKILL
            return None
        return self.code

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def fork(function: Callable[[], Any], log: pathlib.Path, environment: dict[str, str] | None = None) -> Process:
    """Runs function() in a child, as a command: SystemExit is its exit code, and other exceptions a traceback and 1."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _as_command(function, log, environment or {})
    return Process(pid, log)


def _as_command(function: Callable[[], Any], log: pathlib.Path, environment: dict[str, str]) -> NoReturn:
    code = 0
    try:
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        faulthandler.enable()
        function()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        # What the end of an interpreter does, in its order, without unwinding the parent's frames.
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def devices(count: int) -> dict[str, str]:
    """Environment of a process with so many devices; the compiler optimises a little, as a run lasts seconds."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=1"}


def start(arguments: list[str], log: pathlib.Path, environment: dict[str, str] | None = None) -> Process:
    """`python -m vivi_jax.main ARGUMENTS` in a fork of this process."""
    return fork(lambda: main_command(arguments), log, devices(1) | (environment or {}))


def main_command(arguments: list[str]) -> None:
    """What `python -m vivi_jax.main ARGUMENTS` does, in this process."""
    sys.argv = ["vivi_jax.main", *arguments]
    command_line.run(main.main, main.FLAGS, optional=["workdir"], remote=main.REMOTE)


def in_child(function: Callable[..., Any], *arguments: Any, seconds: float = 7200) -> Any:
    """function(*arguments), a JSON value, computed in a fork: this process must stay without a backend of JAX."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    log = pathlib.Path(tempfile.gettempdir(), f"vivi_jax_faults_{os.getpid()}_{time.monotonic_ns()}.log")
    process = fork(lambda: writer.send(json.dumps(function(*arguments))), log)
    writer.close()
    try:
        answer = json.loads(reader.recv()) if reader.poll(seconds) else None
    except EOFError:
        answer = None
    code = process.wait(30)
    if answer is None or code != 0:
        raise RuntimeError(f"{function.__name__} ended with {code}:\n{log.read_text()[-4000:]}")
    log.unlink()
    return answer


def logged(workdir: pathlib.Path) -> list[dict]:
    """The whole lines of a run's metrics."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def logged_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the metrics, in their order."""
    return [line["step"] for line in logged(workdir) if "loss" in line]


def wait_for_step(process: Process, workdir: pathlib.Path, more: int = 1) -> bool:
    """Waits until this start of the run has done `more` steps; False if it ended before."""
    known, new = set(logged_steps(workdir)), set()
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        steps = set(logged_steps(workdir))
        known &= steps  # a run that goes on first cuts the log back to its checkpoint
        new = steps - known
        if len(new) >= more:
            return True
        time.sleep(0.01)
    return False


def ended_well(workdir: pathlib.Path, sha256: str) -> list[str]:
    """What is wrong with a finished run, against the SHA-256 of the straight one's state: [] if nothing is."""
    wrong = []
    summary = workdir / "summary.json"
    if not summary.exists():
        return ["it has no summary"]
    if json.loads(summary.read_text())["state_sha256"] != sha256:
        wrong.append("its state differs from the straight run's")
    if logged_steps(workdir) != list(range(1, STEPS + 1)):
        wrong.append("its metrics lack steps or have some twice")
    if left := [path.name for path in (workdir / "checkpoints").iterdir() if "tmp" in path.name]:
        wrong.append(f"half a save is left: {left}")
    return wrong


def newest_good(workdir: pathlib.Path) -> int:
    """The newest step whose checkpoint has its manifest; 0 where there is none."""
    return max((int(path.parent.name) for path in workdir.glob("checkpoints/*/MANIFEST.json")), default=0)


@dataclasses.dataclass(frozen=True)
class Straight:
    """A run that nothing happened to: SHA-256 of its last state, seconds to its first step and to its end."""

    workdir: pathlib.Path
    sha256: str
    first_step: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all rows use and none changes: a store, and a straight run of each system."""

    folder: pathlib.Path
    store: pathlib.Path

    def straight(self, system: str) -> Straight:
        """The straight run, made by whichever row asks first; one that asks meanwhile waits."""
        workdir, times = self.folder / f"{system}-straight", self.folder / f"{system}-times.json"
        with open(self.folder / f"{system}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if not times.exists():
                    self._run(system, workdir, times)
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # by name: processes that were forked meanwhile hold the file open
        found = json.loads(times.read_text())
        sha256 = json.loads((workdir / "summary.json").read_text())["state_sha256"]
        return Straight(workdir, sha256, found["first_step"], found["seconds"])

    def _run(self, system: str, workdir: pathlib.Path, times: pathlib.Path) -> None:
        warm = self.folder / f"{system}-warm"
        process = start(flags(system, self.store, warm), warm.with_suffix(".log"))  # fills the cache of compiled steps
        wait_for_step(process, warm, CHECKPOINT_EVERY + 1)
        process.signal(signal.SIGKILL)
        process.wait()
        began = time.monotonic()
        process = start(flags(system, self.store, workdir), workdir.with_suffix(".log"))
        wait_for_step(process, workdir)
        first = time.monotonic() - began
        if (code := process.wait()) != 0:
            raise RuntimeError(f"the straight run of {system} ended with {code}:\n{process.log.read_text()[-3000:]}")
        times.write_text(json.dumps({"first_step": first, "seconds": time.monotonic() - began}))
