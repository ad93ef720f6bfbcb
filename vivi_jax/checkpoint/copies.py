"""Copies of runs and files of weights that lie in buckets, for what reads local ones."""

import logging
import os
import pathlib
import shutil
import uuid

from vivi_jax import files
from vivi_jax.buckets.client import ADDRESSES, Folder, cache_root
from vivi_jax.buckets.local import alone
from vivi_jax.buckets.places import InBucket
from vivi_jax.checkpoint import manifest
from vivi_jax.errors import CheckpointError

_LOG = logging.getLogger(__name__)
_KEPT = 2  # steps of a run; another process may be reading the one before the newest


def local_copy(source: str | os.PathLike[str]) -> str:
    """A path on this machine: `source` itself, or of gs:// and s3:// a copy in the cache (VIVI_JAX_CACHE).

    Of a run, the records and the newest good checkpoint; what is there already, and verifies, is not read again.

    Raises:
      CheckpointError: there is a run, but no good checkpoint in it.
      DataError: there is nothing, or it cannot be read.
    """
    address = os.fspath(source)
    if not address.startswith(ADDRESSES):
        return address
    address = address.rstrip("/")
    parent, _, name = address.rpartition("/")
    here = cache_root() / "runs" / files.digest(address)[:16] / name
    with alone(here.parent / "LOCK"):
        return _copied(Folder(address), Folder(parent), here)


def _copied(folder: Folder, parent: Folder, here: pathlib.Path) -> str:
    names = folder.names()
    if "config.json" not in names:
        files.write_bytes(here, parent.read(here.name))
        return str(here)
    for record in sorted(names):
        if "/" not in record and record.endswith((".json", ".jsonl")):
            here.mkdir(exist_ok=True)
            files.write_bytes(here / record, folder.read(record))
    checkpoints, problems = InBucket(folder.below("checkpoints")), []
    for step in reversed(manifest.written_steps(checkpoints)):
        problem = copy_step(checkpoints, here / "checkpoints", step)
        if problem is None:
            for old in manifest.steps(here / "checkpoints")[:-_KEPT]:
                shutil.rmtree(here / "checkpoints" / str(old), ignore_errors=True)
            return str(here)
        _LOG.warning("checkpoint %s is not used: %s", checkpoints / str(step), problem)
        problems.append(f"{step} ({problem})")
    raise CheckpointError(f"no checkpoint in {checkpoints} is good: {', '.join(problems) or 'there is none'}")


def copy_step(checkpoints: InBucket, to: pathlib.Path, step: int) -> str | None:
    """Copies a checkpoint; None, or what is wrong with it."""
    target, there = to / str(step), checkpoints / str(step)
    entries = there.read(manifest.MANIFEST)
    if target.is_dir() and (target / manifest.MANIFEST).read_bytes() == entries and manifest.verify(target) is None:
        return None
    unfinished = to / f".{uuid.uuid4().hex[:8]}" / str(step)
    try:
        there.copy(unfinished)
        if problem := manifest.verify(unfinished):
            return problem
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
    return None
