"""The scalars of a run: to metrics.jsonl, TensorBoard, Weights & Biases and the console."""

import importlib.util
import itertools
import json
import logging
import os
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Callable

import jax
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from vivi_jax import files
from vivi_jax.distributed import processes
from vivi_jax.errors import ConfigError, DataError

_LOG = logging.getLogger(__name__)
RATE = "examples_per_second"  # in the line of each step, and of no evaluation


class MetricWriter:
    """Writes scalars of one run. Only process 0 writes; on the others every call does nothing.

    Args:
      workdir: gets metrics.jsonl (one {"step": ..., name: value, ...} a line) and TensorBoard events.
      first_step: lines after this step are dropped, so that a resumed run's file reads like a straight run's.
      wandb: project of Weights & Biases that gets them too; "": none.
      name: of the run there; by default `workdir`.
    """

    def __init__(self, workdir: str | os.PathLike[str], first_step: int, wandb: str = "", *, name: str = ""):
        self._writer = jax.process_index() == 0
        if not self._writer:
            return
        path = pathlib.Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        # A kill may have cut the last line, or left lines past the checkpoint.
        kept = itertools.takewhile(lambda line: line["step"] <= first_step, read(workdir))
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._jsonl = open(path, "a", buffering=1)
        self._events = Events(workdir, first_step)
        self._wandb = WeightsAndBiases(workdir, wandb, name or str(workdir)) if wandb else None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends the scalars of a step; steps must grow."""
        if self._writer:
            self._jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
            self._events.write(step, scalars)
            if self._wandb:
                self._wandb.write(step, scalars)

    def close(self) -> None:
        """Closes all of them."""
        if self._writer:
            self._jsonl.close()
            self._events.close()
            if self._wandb:
                self._wandb.close()


class Events:
    """TensorBoard's file of one start, beside those of the starts before it.

    Only tensorboard's format is used. Its own writer loads TensorFlow to open a file where that is installed, and
    writes in a thread, so that a kill loses two minutes.

    Args:
      first_step: what earlier files have behind this step is not shown.
    """

    def __init__(self, workdir: str | os.PathLike[str], first_step: int):
        now = time.time_ns()  # TensorBoard reads the files in the order of their names
        path = pathlib.Path(workdir, f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}")
        self._records = RecordWriter(open(path, "xb"))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def _add(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        event = Event(wall_time=time.time(), step=step)
        for name, value in scalars.items():
            event.summary.MergeFrom(scalar_pb(name, value))
        self._add(event)

    def close(self) -> None:
        self._records.close()


class WeightsAndBiases:
    """A run of Weights & Biases. What fails there is one line of the log, and then it gets no more of this start.

    Its id is in WORKDIR/wandb.json, so that the next start goes on in the same run; its own files are in WORKDIR/wandb.
    Whether it is online, and whose it is, is said by W&B's own variables and settings (WANDB_MODE, WANDB_ENTITY, ...).
    """

    def __init__(self, workdir: str | os.PathLike[str], project: str, name: str):
        self._run = None
        self._try(lambda: self._start(pathlib.Path(workdir), project, name))

    def _start(self, workdir: pathlib.Path, project: str, name: str) -> None:
        wandb = importlib.import_module("wandb")  # an extra, and it takes seconds

        # W&B would ask for a key on a terminal, and wait for the answer without end.
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise ConfigError("there is no key; run `wandb login`, or set WANDB_MODE=offline")
        path = workdir / "wandb.json"
        if not path.exists():
            files.write_json(path, {"id": secrets.token_hex(4)})
        begun = [p for p in (workdir / "config.json", workdir.parent / "evaluation.json") if p.exists()]
        run = wandb.init(
            project=project,
            id=json.loads(path.read_text())["id"],
            resume="allow",
            name=name,
            dir=workdir,
            config=json.loads(begun[0].read_text()) if begun else None,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60, finish_timeout=60),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # of any kind: the network, the account, the library's own faults
            self._run = None
            said = (str(error).splitlines() or [type(error).__name__])[0]
            _LOG.warning("Weights & Biases: %s. The run goes on without it", said)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if run := self._run:
            # A row of W&B has a number of its own, which must grow, also where a run goes on from an older step.
            self._try(lambda: run.log({"step": step, **scalars}, step=max(step, run.step), commit=True))

    def close(self) -> None:
        if run := self._run:
            self._try(lambda: run.finish(exit_code=0 if sys.exc_info()[0] is None else 1))


def check_wandb(project: str) -> None:
    """Raises ConfigError if Weights & Biases is asked for and not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f'config.run.wandb={project!r} needs a package: pip install -c constraints.txt -e ".[wandb]"')


def read(workdir: str | os.PathLike[str]) -> list[dict]:
    """The lines of a run's metrics.jsonl, [] where there are none yet; a last one that was cut is left out.

    Raises:
      DataError: any other damage, which no kill does.
    """
    remedy = ": the run goes on from its checkpoints, and the file is a record of it only"
    return files.read_json_lines(pathlib.Path(workdir, "metrics.jsonl"), keys=("step",), remedy=remedy)


def evaluated(workdir: str | os.PathLike[str], step: int) -> bool:
    """Whether metrics.jsonl has the line of the evaluation at a step, beside that of the step itself; alike on all."""
    return processes.broadcast_from_process0(
        lambda: any(line["step"] == step and RATE not in line for line in read(workdir))
    )


def check(workdir: str | os.PathLike[str]) -> None:
    """Raises DataError if what is there of a run's records is damaged."""
    read(workdir)
    _read_bad_steps(workdir)


def _read_bad_steps(workdir: str | os.PathLike[str]) -> list[dict]:
    path = pathlib.Path(workdir, "bad_steps.jsonl")
    remedy = ", or put it back: batches that it left out come again without it"
    lines = files.read_json_lines(path, keys=("step", "action"), cut=False, remedy=remedy)
    for number, line in enumerate(lines, 1):
        if line["action"] == "roll_back" and not isinstance(line.get("back_to"), int):
            raise DataError(f"{path}: line {number} is damaged (back_to is missing); take it out{remedy}")
    return lines


class BadSteps:
    """RUN/bad_steps.jsonl: the steps whose loss or state was not finite, what was done, and their examples.

    A line is {"step", "found": what was not finite, "action": "stop", "skip" or "roll_back", "batch", "examples", and
    of roll_back "back_to"}. "batch" is the number that the data's stream was asked for: main.open_data(config)(batch)
    yields these examples again. "examples" are their numbers, [first, behind the last], in the order of all.

    Process 0 reads and writes the file. All processes have its lines, as the batches that come next follow from them.

    Raises:
      DataError: the file is damaged (ConfigError with several processes).
    """

    def __init__(self, workdir: str | os.PathLike[str], batch_size: int):
        self.path = pathlib.Path(workdir) / "bad_steps.jsonl"
        self._batch_size = batch_size
        self._writes = jax.process_index() == 0
        self.lines = processes.broadcast_from_process0(lambda: _read_bad_steps(workdir))

    def go_on_from(self, step: int) -> None:
        """Forgets what was found after `step`, for it comes again, if it does; not where the run stopped."""
        self.lines = [
            line for line in self.lines if line["action"] == "stop" or line.get("back_to", line["step"]) <= step
        ]

    def skipped_batches(self) -> int:
        """By how many batches the stream is ahead of the steps, as roll-backs have left some out."""
        return sum(line["step"] - line["back_to"] for line in self.lines if line["action"] == "roll_back")

    def count(self, action: str) -> int:
        return sum(line["action"] == action for line in self.lines)

    def add(self, step: int, found: str, action: str, **more: int) -> dict:
        """Notes a step, in the file too."""
        batch = step - 1 + self.skipped_batches()
        examples = [batch * self._batch_size, (batch + 1) * self._batch_size]
        line = {"step": step, "found": found, "action": action, "batch": batch, "examples": examples, **more}
        self.lines.append(line)
        if self._writes:
            files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        return line


class Progress:
    """The console line: how far, how fast, how long still, and the share of time spent waiting for data."""

    def __init__(self, first_step: int, total_steps: int, batch_size: int):
        self._total_steps, self._batch_size = total_steps, batch_size
        self._step = first_step
        self.start(0.0)

    def start(self, wait_seconds: float) -> None:
        """The next step begins now: what came before, such as compiling, is no part of the first rate."""
        self._time, self._waited = time.perf_counter(), wait_seconds

    def rates(self, step: int, wait_seconds: float) -> dict[str, float]:
        """Rates since the last call; `wait_seconds` counts from the start of the run."""
        now = time.perf_counter()
        seconds, steps_done = max(now - self._time, 1e-9), step - self._step
        waited = wait_seconds - self._waited
        self._step, self._time, self._waited = step, now, wait_seconds
        return {
            RATE: steps_done * self._batch_size / seconds,
            "data_wait_share": min(1.0, waited / seconds),
        }

    def show(self, step: int, scalars: dict[str, float]) -> None:
        """Prints the line of a step: over the one before on a terminal, on a new line elsewhere."""
        if jax.process_index() != 0:
            return
        left = (self._total_steps - step) * self._batch_size / max(scalars["examples_per_second"], 1e-9)
        done = step / self._total_steps
        text = (
            f"[{'#' * int(20 * done):20}] step {step}/{self._total_steps}  loss {scalars['loss']:.3f}  "
            f"lr {scalars['learning_rate']:.3g}  {scalars['examples_per_second']:.1f} examples/s  "
            f"data wait {scalars['data_wait_share']:.0%}  ETA {duration(left)}"
        )
        terminal = sys.stderr.isatty()
        print(
            f"\r\033[K{text}" if terminal else text,
            end="" if terminal and step < self._total_steps else "\n",
            file=sys.stderr,
            flush=True,
        )


def duration(seconds: float) -> str:
    """Two units at most, rounded down.

    >>> duration(90061), duration(3725), duration(42)
    ('1 d 1 h', '1 h 2 min', '42 s')
    """
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // smaller)} {smaller_unit}"
    return f"{int(seconds)} s"
