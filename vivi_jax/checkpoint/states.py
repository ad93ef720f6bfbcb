"""Saves, verifies and restores the training state: Orbax, plus a manifest of hashes in every checkpoint (manifest.py).

A run goes on from its newest good checkpoint: one that verifies, and whose values are finite.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from etils import epy
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from vivi_jax.buckets.client import ADDRESSES, Folder
from vivi_jax.buckets.places import InBucket
from vivi_jax.checkpoint import manifest
from vivi_jax.checkpoint.copies import local_copy
from vivi_jax.checkpoint.manifest import newest_good_step, verify
from vivi_jax.distributed import processes, replicas, sharding
from vivi_jax.errors import CheckpointError, ConfigError, DataError, NotFinite
from vivi_jax.methods.base import classified_encoder

with epy.lazy_imports():  # at the first checkpoint: a sixth of what importing the core takes, and mistakes need none
    import fsspec.config
    import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run, in WORKDIR/checkpoints/<step>/; the folder is made by the first save.

    `save` returns as soon as the state is copied off the accelerator; a thread writes it and then its manifest. An
    error in that thread is raised by the next `save` or by `close`.

    Args:
      workdir: run directory, or gs://BUCKET/FOLDER.
      keep: good checkpoints that are left once a newer one is written; one more while it is being written.
      before_commit: called by process 0 when a checkpoint is written, before its manifest makes it a good one.
    """

    def __init__(self, workdir: str, *, keep: int, before_commit: Callable[[], None] = lambda: None):
        if keep < 1:
            raise ConfigError(f"config.run.keep_checkpoints={keep}: must be 1 or more")
        self.directory = directory_of(workdir)
        self._keep, self._before_commit = keep, before_commit
        # Of a bucket, gcsfs, aiohttp and google-auth each have errors of their own.
        self._failures = (Exception,) if isinstance(self.directory, InBucket) else (OSError, ValueError)
        self._manager: ocp.CheckpointManager | None = None
        self._finisher: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failed = False
        absl_logging.get_absl_logger().addFilter(_is_no_traceback_of_orbax)

    def _open(self) -> "ocp.CheckpointManager":
        if self._manager is None:
            self._manager = _manager(self.directory)
        return self._manager

    def save(self, step: int, state) -> None:
        """Begins saving; waits for the save before, if that is still under way.

        Raises:
          NotFinite: a value of the state is NaN or infinite; nothing is written.
          CopiesDiffer: devices that should hold the same do not; nothing is written.
          CheckpointError: it cannot be written, or the one before could not.
        """
        self.wait()
        if not all_finite(state):
            raise NotFinite(f"the state after step {step} is not finite", step)
        replicas.check_alike(state, step)
        try:
            manager = self._open()
            if jax.process_index() == 0:
                manifest.begin(self.directory, step)
            manager.save(step, args=ocp.args.StandardSave(state))
        except self._failures as error:
            raise self._cannot_write(error) from error
        self._finisher = threading.Thread(target=self._finish, args=(manager, step), name="checkpoint")
        self._finisher.start()

    def _finish(self, manager: "ocp.CheckpointManager", step: int) -> None:
        try:
            manager.wait_until_finished()
            if jax.process_index() == 0:
                self._before_commit()
                manifest.commit(self.directory, step, keep=self._keep)
        except BaseException as error:  # raised again by wait(), in the thread that can act on it
            self._error = error

    def wait(self) -> None:
        """Returns once everything saved is on disk with its manifest; raises what went wrong on the way."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._error is not None:
            error, self._error = self._error, None
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: BaseException) -> CheckpointError:
        self._failed = True
        try:
            good = ", ".join(map(str, manifest.written_steps(self.directory))) or "(none)"
        except DataError:  # the bucket's server does not answer
            good = "(unknown)"
        text = " ".join(str(error).split())
        full = "RESOURCE_EXHAUSTED" in text or "No space left" in text
        return CheckpointError(
            f"could not write a checkpoint to {self.directory}: "
            f"{'the disk is full' if full else text[:300]}; good there are the steps {good}. "
            f"{'Make room, and start' if full else 'Start'} the same command again"
        )

    def restore(self, state_like, mesh: Mesh):
        """Returns (step, state) of the newest good checkpoint, or None where there is none yet.

        Newer ones, which are not good, are moved to WORKDIR/checkpoints_rejected.

        Args:
          state_like: tree of arrays or ShapeDtypeStructs; the restored state has its structure, placed on `mesh` as
            sharding.state_sharding says (which may differ from the mesh it was saved on).

        Raises:
          CheckpointError: there are checkpoints and none is good; or a leaf is missing, or of another shape or dtype.
        """
        self.wait()
        unfit: list[int] = []
        target = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            state_like,
            sharding.state_sharding(state_like, mesh),
        )
        while (step := self._newest_good(unfit)) is not None:
            with _bucket_named(self.directory):
                manager = self._open()
                manager.reload()
                there = manager.item_metadata(step).tree
            _check_fits(there, target, self.directory / str(step))
            with _bucket_named(self.directory):
                state = manager.restore(step, args=ocp.args.StandardRestore(target))
            if all_finite(state):
                break
            unfit.append(step)
        processes.broadcast_from_process0(lambda: manifest.set_aside(self.directory, step))
        if step is None:
            return None
        manager.reload()
        return step, state

    def _newest_good(self, unfit: list[int]) -> int | None:
        return processes.broadcast_from_process0(functools.partial(newest_good_step, self.directory, unfit=unfit))

    def newest(self) -> int | None:
        """The newest checkpoint that was written to its end, as far as its manifest tells; alike on all processes.

        Process 0 looks, as it writes the manifests: elsewhere the newest may not be there yet.
        """

        return processes.broadcast_from_process0(lambda: max(manifest.written_steps(self.directory), default=None))

    def close(self) -> None:
        """Waits for what is being written; raises what went wrong, unless that was raised before."""
        failed = self._failed
        try:
            self.wait()
            if self._manager is not None:
                self._manager.close()
        except self._failures as error:  # Orbax says once more that it could not write
            if not failed:
                raise error if isinstance(error, CheckpointError) else self._cannot_write(error) from error


def directory_of(workdir: str | os.PathLike[str]) -> pathlib.Path | InBucket:
    """WORKDIR/checkpoints."""
    if str(workdir).startswith(ADDRESSES):
        return InBucket(Folder(str(workdir)).below("checkpoints"))
    return pathlib.Path(workdir).absolute() / "checkpoints"


def _manager(directory: pathlib.Path | InBucket) -> "ocp.CheckpointManager":
    handler = ocp.StandardCheckpointHandler()
    # Orbax gives a save 20 minutes by the wall clock, and folders that it makes asynchronously ten; it drops a save
    # that was written when that clock jumps. What hangs is the watchdog's. 20 days are the most that its milliseconds
    # take.
    patient = ocp.options.AsyncOptions(timeout_secs=20 * 24 * 3600, create_directories_asynchronously=False)
    if isinstance(directory, pathlib.Path):
        options = ocp.CheckpointManagerOptions(async_options=patient)
        return ocp.CheckpointManager(directory, options=options, item_handlers=handler)
    # Orbax reads and writes a bucket by TensorStore and by etils.epath over gcsfs, which keeps lists of what was there.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # On a bucket half saves are no rubbish by default.
    options = ocp.CheckpointManagerOptions(async_options=patient, cleanup_tmp_directories=True)
    with _bucket_named(directory):
        return ocp.CheckpointManager(str(directory), options=options, item_handlers=handler)


@contextlib.contextmanager
def _bucket_named(directory: pathlib.Path | InBucket) -> Iterator[None]:
    """Around what Orbax reads: of a bucket, whatever fails is a DataError."""
    try:
        yield
    except Exception as error:
        if isinstance(directory, pathlib.Path) or isinstance(error, DataError):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"cannot read {directory}: {text}; start the same command again: it goes on") from error


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of what it raises, in each of its threads; what it raises is said by _cannot_write."""
    return not (record.exc_info and "orbax" in pathlib.Path(record.pathname).parts)


@jax.jit
def _finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def all_finite(state) -> bool:
    """Whether no value of a tree of arrays is NaN or infinite. Reads each once, on the devices that hold it."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return not leaves or bool(_finite(leaves))


def _check_fits(there, here, directory: manifest.Directory) -> None:
    """Orbax would cast dtypes without a word, and names what else differs over many lines."""

    def leaves(tree) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    was, now = leaves(there), leaves(here)
    different = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    if different:
        name = different[0]
        more = f", and {len(different) - 1} more arrays differ" if len(different) > 1 else ""
        raise CheckpointError(
            f"checkpoint {directory} does not fit: {name} is {was.get(name, 'absent')} there, "
            f"{now.get(name, 'absent')} here{more}{manifest.written_by(directory)}. Use the config and the version it "
            "was written with, or another --workdir"
        )


def state_sha256(state) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all leaves: equal if and only if two states are, bit for bit.

    With several processes all must call it: of a sharded array each has a part only.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def load_state(workdir: str, step: int | None = None) -> dict:
    """The state of a run as a plain tree of arrays on the first local device, without the run's code.

    Args:
      workdir: run directory, also in a bucket (see local_copy).
      step: which checkpoint; the newest good one by default.

    Raises:
      CheckpointError: no such run, no checkpoint, or one that does not verify.
    """
    directory = pathlib.Path(local_copy(workdir)).absolute() / "checkpoints"
    if step is None:
        step = newest_good_step(directory)
        if step is None:
            raise CheckpointError(
                f"no checkpoint in {directory}: is {workdir} a run directory (made by "
                "python -m vivi_jax.main --workdir=...)?"
            )
    elif problem := verify(directory / str(step)):
        raise CheckpointError(f"checkpoint {directory / str(step)} does not verify: {problem}")
    return read(directory, step)


def read(directory: pathlib.Path, step: int) -> dict:
    """As load_state, of a checkpoint that was verified, in WORKDIR/checkpoints."""
    with ocp.CheckpointManager(directory.absolute(), item_handlers=ocp.StandardCheckpointHandler()) as manager:
        placement = SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), manager.item_metadata(step).tree
        )
        return manager.restore(step, args=ocp.args.StandardRestore(target))


def load_config(workdir: str) -> dict:
    """The resolved config of a run, from its config.json; one of an earlier version in today's words.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    path = pathlib.Path(local_copy(workdir)) / "config.json"
    try:
        return upgrade(json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(
            f"no {path}: is {workdir} a run directory (made by python -m vivi_jax.main --workdir=...)?"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def upgrade(config: dict) -> dict:
    """The sections that readers of checkpoints use, from any version's config, in today's words."""
    if "ema_base" in config.get("method", {}):  # up to 0.1.0
        config["ema"] = {"name": "cosine", "base": config["method"].pop("ema_base")}
    return config


def load_encoder(workdir: str) -> tuple[dict, dict]:
    """Returns (keyword arguments of models.build_encoder, its variables) from a run's newest good checkpoint.

    With the classifier that supervised training or co-training learnt.
    """
    config = load_config(workdir)
    state = load_state(workdir)
    return classified_encoder(config["encoder"], state["params"], state["model_state"])
