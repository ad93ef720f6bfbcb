"""One directory, one run: a lock that says who holds it, and that outlives no process.

The lock is the file LOCK in the directory: {"host", "pid", "since", ...} of its holder, who writes a new "beat" into it
every BEAT seconds. A second command

- on the same machine asks the system whether that very process lives (its id and its start, as ids are used again). If
  so it is refused, else it takes the lock over at once;
- on another machine waits for a beat: it is refused when one comes, and takes over, with a warning, after STALE seconds
  without. No clocks are compared.

A holder whose lock was taken over all the same, as it or its disk stood still for long, ends itself.

In a bucket LOCK is an object. It is made only where there is none, and written and removed only while it is as it was
last seen, which the bucket's server decides: of two that take over at the same moment one is refused.

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
from vivi_jax.buckets.client import MISSING, Folder
from vivi_jax.errors import ConfigError, DataError

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
      ConfigError: a living process holds it, or it is no directory of a file system or of gs://.
      DataError: the bucket cannot be read or written.
    """
    address = os.fspath(directory)
    if address.startswith("gs://"):
        with _held(_Object(Folder(address)), address, option):
            yield
        return
    files.refuse_remote(option, address)
    directory = pathlib.Path(directory).absolute()
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(directory, error, option) from error
        with _held(_File(directory / LOCK), directory, option):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty: something was written
            for path in made:
                path.rmdir()


class _File:
    """The lock on a disk. `read` is the newest, and {} while it is being made, or gone."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def make(self, me: dict) -> bool:
        """Whether there was none, and now it is this; where it cannot be written, as on a full disk, none is left."""
        try:
            with open(self._path, "x") as file:
                try:
                    json.dump(me, file)
                    file.flush()
                except OSError:
                    self._path.unlink(missing_ok=True)
                    raise
        except FileExistsError:
            return False
        return True

    def read(self) -> dict:
        try:
            return _content(self._path.read_bytes())
        except OSError:
            return {}

    def write(self, me: dict) -> None:
        """Writes it, whatever is there."""
        files.write_json(self._path, me, indent=None)

    def take_over(self, me: dict) -> None:
        """Writes it, in place of the one that was read; which of two that do so has it is seen by reading."""
        self.write(me)
        time.sleep(0.5)

    def remove(self) -> None:
        self._path.unlink()


class _Object:
    """The lock in a bucket, as _File: written and removed only if it is as it was last read or written here."""

    def __init__(self, folder: Folder):
        self._folder, self._generation = folder, MISSING

    def make(self, me: dict) -> bool:
        return self._replace(me, MISSING)

    def read(self) -> dict:
        data, self._generation = self._folder.look(LOCK)
        return _content(data or b"")

    def write(self, me: dict) -> None:
        self._replace(me, self._generation)

    take_over = write

    def remove(self) -> None:
        self._folder.replace(LOCK, None, self._generation)

    def _replace(self, me: dict, generation: bytes) -> bool:
        written = self._folder.replace(LOCK, json.dumps(me).encode(), generation)
        self._generation = written or self._generation
        return written is not None


@contextlib.contextmanager
def _held(lock: _File | _Object, directory: str | pathlib.Path, option: str) -> Iterator[None]:
    try:
        me = _take(lock, directory, option)
    except OSError as error:
        raise _cannot_write(directory, error, option) from error
    released = threading.Event()
    beats = threading.Thread(target=_beat, args=(lock, directory, me, released), name="lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        released.set()
        beats.join()
        try:
            if lock.read().get("id") == me["id"]:
                lock.remove()
        except DataError as error:  # of a bucket; the next start sees that this process is gone
            _LOG.warning("the lock of %s is left behind: %s", directory, error)


def _cannot_write(directory: str | pathlib.Path, error: OSError, option: str) -> ConfigError:
    return ConfigError(f"cannot write to {directory}: {error.strerror}; use another {option}")


def _take(lock: _File | _Object, directory: str | pathlib.Path, option: str) -> dict:
    """Makes the lock this process's; returns what it says of it."""
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
        if lock.make(me):
            return me
        there = lock.read()
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
    lock.take_over(me)
    there = lock.read()
    if there.get("id") != me["id"]:  # another took over at the same moment
        raise _refused(directory, there, option)
    return me


def _refused(directory: str | pathlib.Path, there: dict, option: str) -> ConfigError:
    return ConfigError(
        f"{directory} is in use by {_who(there)} since {there.get('since')} ({there.get('command')}): wait for its "
        f"end, end it, or use another {option}"
    )


def _who(there: dict) -> str:
    return f"process {there.get('pid')} on {there.get('host')}" if there else "a process that wrote nothing into it"


def _content(data: bytes) -> dict:
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _beat(lock: _File | _Object, directory: str | pathlib.Path, me: dict, released: threading.Event) -> None:
    while not released.wait(BEAT):
        try:
            there = lock.read()
            if there.get("id", me["id"]) != me["id"]:
                print(f"error: {directory} was taken over by {_who(there)}; ending", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)  # two must not write
            me["beat"] += 1
            lock.write(me)
        except (OSError, DataError):  # no room, or no answer: the next beat may find some
            pass


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
