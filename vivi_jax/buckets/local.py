"""Copies of folders and files of buckets, for what reads local ones; and the way back, for what is written.

A copy lies in VIVI_JAX_CACHE/data/SCHEME/BUCKET/NAME, whoever asks for it, and is kept. Each time it is asked for, the
bucket is listed; objects whose files are as they were written here are only asked for whether they have changed. So a
copy is what is in the bucket when a command begins, and one that was cut off goes on. Needs no JAX.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator

from vivi_jax import files
from vivi_jax.buckets.client import ADDRESSES, Folder, cache_root
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
_AT_A_TIME = 64  # objects
_NOTE_EVERY = 1000  # objects


def copied(source: str) -> str:
    """A path on this machine: `source` itself, or of gs:// and s3:// a copy of the folder or file there.

    Objects whose names end in "/", by which consoles mark empty folders, are left out.

    Raises:
      DataError: nothing is there, it cannot be read or kept, or its names are those of no files.
    """
    if not source.startswith(ADDRESSES):
        return source
    address = source.rstrip("/")
    root = cache_root() / "data"
    here = files.inside(root, address.replace("://", "/", 1))
    notes = root / ".notes" / f"{files.digest(address)[:16]}.json"
    folder = Folder(address)
    names = sorted(name for name in folder.names() if not name.endswith("/"))
    try:
        with alone(notes.with_suffix(".lock")):
            if names:
                _bring(folder, here, names, notes)
            else:
                _bring(Folder(address.rpartition("/")[0]), here.parent, [here.name], notes)
    except OSError as error:
        raise DataError(
            f"cannot keep a copy of {address} in {here} ({error.strerror}); set VIVI_JAX_CACHE to a folder of a disk "
            "that has room"
        ) from error
    return str(here)


@contextlib.contextmanager
def alone(lock: pathlib.Path) -> Iterator[None]:
    """Lets one process of this machine at a time into the block, by a file that is made and left."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _bring(folder: Folder, here: pathlib.Path, names: list[str], notes: pathlib.Path) -> None:
    """Makes the files below `here` the objects of a folder; what was one and is gone there goes here.

    Args:
      notes: keeps what is known of the files: {name: (generation there, SHA-256 of the file)}.
    """
    known, read = _known(notes), 0

    def bring(name: str) -> tuple[str, str] | None:
        """What is known of an object now, if it was read."""
        path, (generation, sha256) = files.inside(here, name), known.get(name, ("", ""))
        good = path.is_file() and files.sha256(path) == sha256
        found = folder.changed(name, bytes.fromhex(generation) if good else b"")
        if found is None:
            return None
        data, now = found
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, data)
        return now.hex(), files.sha256(path)

    with concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
        try:
            for n, (name, found) in enumerate(zip(names, pool.map(bring, names), strict=True), 1):
                if found:
                    known[name], read = found, read + 1
                if n % _NOTE_EVERY == 0:
                    files.write_json(notes, known, indent=None)
        finally:
            pool.shutdown(cancel_futures=True)
            files.write_json(notes, known, indent=None)
    for name in known.keys() - set(names):
        files.inside(here, name).unlink(missing_ok=True)
        del known[name]
    files.write_json(notes, known, indent=None)
    _LOG.info("%s: read %d objects of %d to %s; the others were there", folder.address, read, len(names), here)


def _known(notes: pathlib.Path) -> dict[str, tuple[str, str]]:
    try:
        found = json.loads(notes.read_text())
        return {name: (bytes.fromhex(generation).hex(), sha256) for name, (generation, sha256) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # not yet made, or damaged: all is read again
        return {}


@contextlib.contextmanager
def written(out: str) -> Iterator[str]:
    """Yields where to write a file or folder: `out` itself, or a temporary place, from where it goes to the bucket.

    Nothing goes there if the block raises.

    Raises:
      DataError: it cannot be written there; before the block runs, if that is known then.
    """
    if not out.startswith(ADDRESSES):
        yield out
        return
    parent, _, name = out.rstrip("/").rpartition("/")
    folder = Folder(parent)
    folder.names()  # raises what is wrong with the bucket before the work is done
    with tempfile.TemporaryDirectory(prefix="vivi_jax_out_") as scratch:
        yield os.path.join(scratch, name)
        paths = sorted(path for path in pathlib.Path(scratch).rglob("*") if path.is_file())
        for path in paths:
            folder.write(path.relative_to(scratch).as_posix(), path.read_bytes())
    _LOG.info("wrote %d objects to %s", len(paths), out)
