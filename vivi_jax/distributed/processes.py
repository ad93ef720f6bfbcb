"""One process or many: how they find each other, agree before they start, and stop at the same step.

A run on many hosts is the same command on every host. Each process reads its share of every batch, computes on its own
devices, and meets the others in the collectives of the step. What one process decides alone (to stop, to refuse the
data, to resume from another checkpoint) would leave the others waiting for ever: so such decisions are exchanged here.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vivi_jax import files
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError

# (rank, number of processes): set by hand, by Open MPI, by Slurm. jax.distributed finds the coordinator of the last two
# itself where it can, that of TPU VMs and GKE always.
_RANKS = (
    ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
_SHUTDOWN_SECONDS = 60  # what a process waits for the others at its end; after an error in one they never come


def start(*, start_timeout_seconds: float, heartbeat_seconds: int) -> None:
    """Connects the processes of the run; must come before anything else of JAX. One process alone connects nothing.

    Found by itself: TPU VMs, GKE, Slurm, Open MPI. Elsewhere the environment says it: JAX_COORDINATOR_ADDRESS=host:port
    (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      start_timeout_seconds: ends this process with one line on stderr if the others are not there by then.
      heartbeat_seconds: after so long a silence a process counts as dead, which ends all others.

    Raises:
      ConfigError: the environment has several processes, but not where they meet.
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
    """Runs `prepare` on every process; all go on or none does.

    Args:
      prepare: returns (result, facts): what must be equal on all processes, as a nested JSON dict.

    Returns:
      This process's result.

    Raises:
      ConfigError: another process failed, or its facts differ: which, and in what. A ValueError of prepare itself is
        raised as it is.
    """
    result, facts, failure = None, {}, None
    try:
        result, facts = prepare()
    except ValueError as error:  # ConfigError, DataError, CheckpointError: the user's to mend
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
    """decide() of process 0, a JSON value, on every process; and its ValueError, if it raises one."""
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


class StopConsensus:
    """Whether any process was asked to stop: the same answer on every process at the same step.

    With several processes the answer to a step's question comes with the next: nobody waits for it.
    """

    def __init__(self, mesh: Mesh):
        self._several = jax.process_count() > 1
        self._split = sharding.batch_sharding(mesh)
        self._devices = mesh.size
        self._any = jax.jit(lambda flags: flags.max(), out_shardings=sharding.replicated(mesh))
        self._answer = None

    def __call__(self, asked: bool) -> bool:
        if not self._several:
            return asked
        flags = jax.make_array_from_callback(
            (self._devices,),
            self._split,
            lambda index: np.full(len(range(*index[0].indices(self._devices))), asked, np.int32),
        )
        answer, self._answer = self._answer, self._any(flags)
        return answer is not None and bool(answer)


def leave(code: int) -> None:
    """Ends this process at once, after the others have come as far if they do within 5 s."""
    if jax.process_count() > 1:
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
