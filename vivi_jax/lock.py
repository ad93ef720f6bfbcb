"""One directory, one run: a lock that says who holds it, and that outlives no process.

The lock is the file LOCK in the directory: {"host", "pid", "since", ...} of its holder, who writes a new "beat" into it
every BEAT seconds. A second command

- on the same machine asks the system whether that very process lives (its id and its start, as ids are used again). If
  so it is refused, else it takes the lock over at once;
- on another machine waits for a beat: it is refused when one comes, and takes over, with a warning, after STALE seconds
  without. No clocks are compared.

A holder whose lock was taken over all the same, as it or its disk stood still for long, ends itself.

Locks of the system (flock, and filelock over it) do not reach other hosts on NFS as many clusters mount it, nor on
mounted buckets, and do not say who holds them. Needs no JAX.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

from vivi_jax import files
from vivi_jax.errors import ConfigError

_LOG = logging.getLogger(__name__)
LOCK = "LOCK"
BEAT, STALE = 15.0, 120.0  # seconds; NFS may show a change to another host only after 60
UNWRITTEN = 10.0  # seconds; between a lock's making and its content is one write
EXIT_CODE = 1  # of a holder that has lost its lock


@contextlib.contextmanager
def hold(directory: str | os.PathLike[str], *, option: str = "--workdir") -> Iterator[None]:
    """Holds the lock of a directory, which is made; one that is empty at the end is removed, with the parents made.

    Args:
      option: the command line's option that names the directory, for the message.

    Raises:
      ConfigError: a living process holds it, or it is no directory of a file system.
    """
    files.refuse_remote(option, os.fspath(directory))
    directory = pathlib.Path(directory).absolute()
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            me = _take(directory, option)
        except OSError as error:
            raise ConfigError(f"cannot write to {directory}: {error.strerror}; use another {option}") from error
        released = threading.Event()
        beats = threading.Thread(target=_beat, args=(directory / LOCK, me, released), name="lock", daemon=True)
        beats.start()
        try:
            yield
        finally:
            released.set()
            beats.join()
            if _read(directory / LOCK).get("id") == me["id"]:
                (directory / LOCK).unlink()
    finally:
        with contextlib.suppress(OSError):  # not empty: something was written
            for path in made:
                path.rmdir()


def _take(directory: pathlib.Path, option: str) -> dict:
    """Makes the lock this process's; returns what it says of it."""
    path = directory / LOCK
    me = {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "machine": _machine(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(sys.argv)[:300],
        "beat": 0,
    }
    seen, until, patience = None, 0.0, STALE
    while True:
        with contextlib.suppress(FileExistsError):
            _make(path, me)
            return me
        there = _read(path)
        if there.get("machine") and there["machine"] == me["machine"]:
            if there.get("started") == _started(there.get("pid", 0)):
                raise _refused(directory, there, option)
            _LOG.warning("taking over %s: process %s, which held it, is gone", directory, there.get("pid"))
            break
        if seen and there.get("id") == seen.get("id") and there.get("beat") != seen.get("beat"):
            raise _refused(directory, there, option)
        if there != seen:
            patience = STALE if there else min(UNWRITTEN, STALE)
            _LOG.info("%s is held by %s; waiting up to %g s for a sign of life", directory, _who(there), patience)
            seen, until = there, time.monotonic() + patience
        elif time.monotonic() > until:
            _LOG.warning("taking over %s: no sign of life of %s for %g s", directory, _who(there), patience)
            break
        time.sleep(1)
    files.write_json(path, me, indent=None)
    time.sleep(0.5)
    there = _read(path)
    if there.get("id") != me["id"]:  # another took over at the same moment
        raise _refused(directory, there, option)
    return me


def _refused(directory: pathlib.Path, there: dict, option: str) -> ConfigError:
    return ConfigError(
        f"{directory} is in use by {_who(there)} since {there.get('since')} ({there.get('command')}): wait for its "
        f"end, end it, or use another {option}"
    )


def _make(path: pathlib.Path, me: dict) -> None:
    """Makes the lock; where it cannot be written, as on a full disk, none is left.

    Raises:
      FileExistsError: there is one.
    """
    with open(path, "x") as file:
        try:
            json.dump(me, file)
            file.flush()
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _who(there: dict) -> str:
    return f"process {there.get('pid')} on {there.get('host')}" if there else "a process that wrote nothing into it"


def _read(path: pathlib.Path) -> dict:
    """What the lock says; {} while it is being made, or gone."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _beat(path: pathlib.Path, me: dict, released: threading.Event) -> None:
    while not released.wait(BEAT):
        there = _read(path)
        if there.get("id", me["id"]) != me["id"]:
            print(f"error: {path.parent} was taken over by {_who(there)}; ending", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)  # two must not write
        me["beat"] += 1
        with contextlib.suppress(OSError):  # no room: the next beat may find some
            files.write_json(path, me, indent=None)


def _started(pid: int) -> int | None:
    """When a process of this machine started, in ticks since the boot; None where there is none (or no Linux)."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # of a dead process only the exit code is left


def _machine() -> str | None:
    """This boot of this machine, and the space in which its process ids count; None where it is no Linux."""
    try:
        return (
            f"{pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        )
    except OSError:
        return None
