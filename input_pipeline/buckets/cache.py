"""What was read from buckets, kept on this machine: a folder for each store, named by the store's id.

    VIVI_JAX_CACHE      where, by default ~/.cache/vivi_jax; best on a disk of the machine's own
    VIVI_JAX_CACHE_GB   how much, in GB of 10^9 bytes; by default half of what the disk has free without it; 0: nothing

A shard's copy has each record at its own place, and holes where others are. No note says which are there: what does not
fit the store's checksum is read again. So many processes share a cache, and a kill leaves nothing to mend.

When it is full, nothing more is added. A training passes over all videos again and again; a rule that makes room, such
as "the longest unused goes first", would throw each record away before its next turn. Folders of other stores that no
process has open do make room, those first that were opened longest ago.
"""

import contextlib
import fcntl
import functools
import logging
import os
import pathlib
import shutil
import threading
from typing import BinaryIO

from vivi_jax.buckets.client import cache_root
from vivi_jax.errors import ConfigError, DataError

_LOG = logging.getLogger(__name__)
_IN_USE = "IN_USE"  # locked by each process that has the folder open, on this machine
_MAX_OPEN = 256  # files
_MEASURED = 64  # times while it fills: other processes may fill it too


class Cache:
    """What is kept of one store. Safe to share between threads and processes.

    Attributes:
      directory: pathlib.Path, of this store alone.

    Raises:
      ConfigError: no size.
      DataError: the folder cannot be written.
    """

    def __init__(self, identity: str):
        self.directory = cache_root() / "stores" / identity
        try:
            self._in_use = _hold(self.directory)
            self._limit = _limit(self.directory.parent)
            self._full = self._budget(0) <= 0
            for path in self.directory.glob("*.array_record") if self._full else ():  # the limit was lowered
                if _used(self.directory.parent) <= self._limit:
                    break
                path.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"cannot keep what is read from the bucket in {self.directory} ({error.strerror}); set VIVI_JAX_CACHE "
                "to a folder of a disk of this machine"
            ) from error
        self._left, self._lock = 0, threading.Lock()
        # A file that is evicted is closed when the last thread lets go of it.
        self._file = functools.lru_cache(maxsize=_MAX_OPEN)(self._open)

    def get(self, name: str, start: int, stop: int) -> bytes:
        """Bytes of a shard if they are here; zeros, fewer or others if not."""
        file = self._file(name)  # held, or it could be closed before it is read
        return os.pread(file.fileno(), stop - start, start)

    def put(self, name: str, start: int, data: bytes) -> None:
        """Keeps bytes of a shard, while there is room."""
        with self._lock:
            if not self._full and self._left < len(data):
                wanted = max(len(data), self._limit // _MEASURED)
                self._left = min(wanted, self._budget(wanted))
                self._full = self._left < len(data)
                if self._full:
                    self._say_full(f"{self._limit / 1e9:.3g} GB (VIVI_JAX_CACHE_GB)")
            if self._full:
                return
            self._left -= len(data)
        try:
            file = self._file(name)
            os.pwrite(file.fileno(), data, start)
        except OSError as error:
            self._full = True
            self._say_full(str(error))

    def _say_full(self, reason: str) -> None:
        _LOG.warning(
            "the cache %s is full (%s): what is not in it is read from the bucket each time", self.directory, reason
        )

    def _open(self, name: str) -> BinaryIO:
        return open(os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)

    def _budget(self, wanted: int) -> int:
        """Bytes that may be added, after other stores have made room for as many as are wanted."""
        root = self.directory.parent
        used = _used(root)
        folders = [path for path in root.iterdir() if path != self.directory]
        for folder in sorted(folders, key=_opened):
            if used + wanted <= self._limit:
                break
            size = _used(folder)
            if _removed(folder):
                _LOG.info("removed %s of the cache, to make room", folder)
                used -= size
        return self._limit - used


def _limit(root: pathlib.Path) -> int:
    given = os.environ.get("VIVI_JAX_CACHE_GB")
    if given is None:
        return (shutil.disk_usage(root).free + _used(root)) // 2
    try:
        size = float(given)
        if not 0 <= size < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(f"VIVI_JAX_CACHE_GB={given}: it is a size in GB, 0 or more") from None
    return int(size * 1e9)


def _hold(directory: pathlib.Path) -> BinaryIO:
    """Makes a folder and marks it as used, for as long as the file that is returned is open."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        mark = directory / _IN_USE
        try:
            file = open(mark, "ab")
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(mark)
            if mark.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:  # another process was just removing the folder
            pass


def _removed(folder: pathlib.Path) -> bool:
    """Whether a folder was removed: not if a process has it open."""
    with contextlib.suppress(FileNotFoundError), open(folder / _IN_USE, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return True
    return False


def _opened(folder: pathlib.Path) -> float:
    """When a process opened a folder last."""
    with contextlib.suppress(OSError):
        return (folder / _IN_USE).stat().st_mtime
    return 0.0


def _used(root: pathlib.Path) -> int:
    """Bytes on the disk below a folder: holes take none."""
    total = 0
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            total += path.lstat().st_blocks * 512
    return total
