"""One process or many: how they find each other, agree before they start, and stop at the same step.

A run on many hosts is the same command on every host. Each process reads its share of every batch, computes on its own
devices, and meets the others in the collectives of the step. If one process alone decided to stop, to refuse the data
or to resume from another checkpoint, the others would wait for ever: such decisions are exchanged here.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vivi_jax import files, lock
from vivi_jax.config import Count, Positive
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError

# Environment variables of (rank, number of processes): set by hand, by Open MPI, by Slurm. jax.distributed finds the
# coordinator itself on TPU VMs and GKE, and where it can under Open MPI and Slurm.
_RANKS = (
    ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
_SHUTDOWN_SECONDS = 60  # a process waits so long for the others at its end; after an error in one they never come


def start(*, start_timeout_seconds: Positive, heartbeat_seconds: Count) -> None:
    """Connects the processes of the run; must be called before any other use of JAX. A single process does nothing.

    TPU VMs, GKE, Slurm and Open MPI are detected. Elsewhere set in the environment JAX_COORDINATOR_ADDRESS=host:port
    (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      start_timeout_seconds: ends this process with one line on stderr if the others are not there by then.
      heartbeat_seconds: a process that is silent for longer counts as dead, which ends all others.

    Raises:
      ConfigError: the environment names several processes, but no address where they meet.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    rank, count = next(
        ((int(os.environ[r]), int(os.environ[n])) for r, n in _RANKS if r in os.environ and n in os.environ),
        (None, None),
    )
    if count == 1 and not address:
        return
    if address and count is None:
        raise ConfigError("JAX_COORDINATOR_ADDRESS is set, but not JAX_NUM_PROCESSES and JAX_PROCESS_ID")
    faulthandler.enable()  # where a peer is dead, JAX aborts this process: then with the stacks of all threads
    who = "this process" if rank is None else f"process {rank} of {count}"
    timer = threading.Timer(start_timeout_seconds, _give_up, (who, address or "the coordinator", start_timeout_seconds))
    timer.daemon = True
    timer.start()
    try:
        # Its own time-out aborts with a stack trace, so ours comes first.
        jax.distributed.initialize(
            address,
            count if address else None,
            rank if address else None,
            **_by_hand(address),
            initialization_timeout=int(start_timeout_seconds) + 60,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if "must be defined" not in str(error) and "should be defined" not in str(error):
            raise
        if count is not None:  # N processes that do not know of each other would be N runs in one directory
            raise ConfigError(
                f"this is process {rank} of {count}, and they do not know where to meet: set "
                "JAX_COORDINATOR_ADDRESS to HOST:PORT of the first, the same for all"
            ) from error
    finally:
        timer.cancel()


def _by_hand(address: str | None) -> dict:
    return {"cluster_detection_method": "deactivate"} if address else {}


def _give_up(who: str, address: str, seconds: float) -> None:
    print(
        f"error: {who} has waited {seconds:g} s for the others at {address}: start the same command on all hosts, "
        "see that they reach this address, or raise config.hosts.start_timeout_seconds",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the connection cannot be interrupted from here


def exchange(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order. Every process must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(text)])).ravel()
    padded = np.zeros(-(-lengths.max() // 4096) * 4096, np.uint8)  # few sizes, few programs to compile
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def run_on_all(prepare: Callable[[], tuple[Any, dict]]) -> Any:
    """Runs `prepare` on every process; succeeds on every process or raises on every process.

    Args:
      prepare: returns (result, facts); facts, a nested dict of JSON values, must be equal on all processes.

    Returns:
      This process's result.

    Raises:
      ConfigError: another process failed, or its facts differ; the message says which process, and what differs.
      ValueError: what prepare itself raised on this process.
    """
    result, facts, failure = None, {}, None
    try:
        result, facts = prepare()
    except ValueError as error:  # ConfigError, DataError, CheckpointError: for the user to fix
        failure = error
    everyone = exchange({"host": socket.gethostname(), "failure": failure and str(failure), "facts": facts})
    if failure is not None:
        raise failure
    for i, other in enumerate(everyone):
        if other["failure"]:
            raise ConfigError(f"process {i} ({other['host']}): {other['failure']}")
    first = everyone[0]
    for i, other in enumerate(everyone):
        different = [
            f"{key}: {was!r} there, {now!r} here" for key, was, now in files.config_diff(first["facts"], other["facts"])
        ]
        if different:
            more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
            raise ConfigError(
                f'process {i} ({other["host"]}) differs from process 0 ({first["host"]}, "there"): '
                f"{'; '.join(different[:5])}{more}. Start all hosts with the same command, code and data"
            )
    return result


def broadcast_from_process0(decide: Callable[[], Any]) -> Any:
    """Runs decide() on process 0 only; every process returns its result, a JSON value.

    Raises:
      ConfigError: decide() raised a ValueError, with its message.
    """
    if jax.process_count() == 1:
        return decide()
    answer = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except ValueError as error:
            answer = {"failure": str(error)}
    answer = exchange(answer)[0]
    if "failure" in answer:
        raise ConfigError(answer["failure"])
    return answer["value"]


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of a run's directory (lock.py): one for all processes, held by the first.

    Raises:
      ConfigError: another command holds it; on every process.
    """
    with contextlib.ExitStack() as held:
        broadcast_from_process0(lambda: held.enter_context(lock.hold(directory)))
        yield


class StopConsensus:
    """Whether any process was asked to stop, and by which signal: the same answer on every process at the same step.

    With several processes a call returns the answer to the question of the call before, so that no process waits.
    """

    def __init__(self, mesh: Mesh):
        self._several = jax.process_count() > 1
        self._split = sharding.batch_sharding(mesh)
        self._devices_here = len(mesh.local_devices)
        self._any = jax.jit(lambda flags: flags.max(), out_shardings=sharding.replicated(mesh))
        self._answer = None

    def __call__(self, asked: int) -> int:
        """Takes the signal that this process was sent, or 0; returns one that any was sent, or 0."""
        if not self._several:
            return asked
        flags = jax.make_array_from_process_local_data(self._split, np.full(self._devices_here, asked, np.int32))
        answer, self._answer = self._answer, self._any(flags)
        return 0 if answer is None else int(answer)


def leave(code: int) -> None:
    """Ends this process with an exit code, without waiting more than 5 s for the others."""
    if jax.process_count() > 1:
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
