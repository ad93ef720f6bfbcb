"""Saves, verifies and restores the training state: Orbax, plus a manifest of hashes beside every checkpoint.

A checkpoint is good when its MANIFEST.json is there and every file has the size and SHA-256 the manifest says. Orbax
itself does not look: a flipped bit in its tensor files loads without a word. A run goes on from its newest good one.
"""

import hashlib
import json
import logging
import pathlib
import shutil
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from vivi_jax import files
from vivi_jax.distributed import processes, sharding
from vivi_jax.errors import CheckpointError
from vivi_jax.methods.base import classified_encoder

_LOG = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"


class Checkpoints:
    """The checkpoints of one run, in WORKDIR/checkpoints/<step>/.

    `save` returns as soon as the state is copied off the accelerator; a thread writes it and then its manifest. An
    error in that thread is raised by the next `save` or by `close`.
    """

    def __init__(self, workdir: str, *, keep: int):
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        )
        self._finisher: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state) -> None:
        """Begins saving; waits for the save before, if that is still under way."""
        self.wait()
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._finisher = threading.Thread(target=self._finish, args=(step,), name="checkpoint")
        self._finisher.start()

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(self.directory / str(step))
        except BaseException as error:  # raised again by wait(), in the thread that can act on it
            self._error = error

    def wait(self) -> None:
        """Returns once everything saved is on disk with its manifest; raises what went wrong on the way."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"could not write a checkpoint to {self.directory}: {error}; the checkpoints before it are untouched"
            ) from error

    def restore(self, state_like, mesh: Mesh):
        """Returns (step, state) of the newest good checkpoint, or None where there is none yet.

        Args:
          state_like: tree of arrays or ShapeDtypeStructs; the restored state has its structure, placed on `mesh` as
            sharding.state_sharding says (which may differ from the mesh it was saved on).
        """
        step = processes.broadcast_from_process0(self._settle)
        self._manager.reload()
        if step is None:
            return None
        target = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            state_like,
            sharding.state_sharding(state_like, mesh),
        )
        return step, self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def _settle(self) -> int | None:
        """The newest good step; the folders of newer ones are moved out of the way."""
        step = newest_good_step(self.directory)
        # Newer steps are damaged or were cut off while being written. They are moved aside, so that the run can write
        # these steps again and nothing that might be of use is deleted.
        for newer in [s for s in steps(self.directory) if step is None or s > step]:
            aside = self.directory.parent / "checkpoints_rejected" / str(newer)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            shutil.move(self.directory / str(newer), aside)
        return step

    def close(self) -> None:
        self.wait()
        self._manager.close()


def steps(directory: pathlib.Path) -> list[int]:
    """Steps that have a folder, newest last; no promise that they are whole."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def newest_good_step(directory: pathlib.Path) -> int | None:
    """Newest step that verifies; each newer one that does not is named in the log. None where no step was saved.

    Raises:
      CheckpointError: there are finished checkpoints, and not one verifies.
    """
    damaged = []
    for step in reversed(steps(directory)):
        problem = verify(directory / str(step))
        if problem is None:
            return step
        _LOG.warning("checkpoint %s is not used: %s", directory / str(step), problem)
        if (directory / str(step) / MANIFEST).exists():
            damaged.append(f"{step} ({problem})")
    if damaged:
        raise CheckpointError(
            f"none of the checkpoints in {directory} verifies: {', '.join(damaged)}. Restore one "
            "from a backup, or move the folder away to start from the beginning"
        )
    return None


def write_manifest(directory: pathlib.Path) -> None:
    """Writes MANIFEST.json: {relative path: {"bytes", "sha256"}} of every file in the folder."""
    entries = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    files.write_json(directory / MANIFEST, entries)


def verify(directory: pathlib.Path) -> str | None:
    """None if every file is as the manifest says; else what is wrong, in a few words."""
    manifest = directory / MANIFEST
    if not manifest.exists():
        return "it was not finished (no manifest)"
    try:
        entries = json.loads(manifest.read_text())
        for name, expected in entries.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if files.sha256(path) != expected["sha256"]:
                return f"the content of {name} has changed (SHA-256 differs)"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


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
      workdir: run directory.
      step: which checkpoint; the newest good one by default.

    Raises:
      CheckpointError: no such run, no checkpoint, or one that does not verify.
    """
    directory = pathlib.Path(workdir).absolute() / "checkpoints"
    if step is None:
        step = newest_good_step(directory)
        if step is None:
            raise CheckpointError(
                f"no checkpoint in {directory}: is {workdir} a run directory (made by "
                "python -m vivi_jax.main --workdir=...)?"
            )
    elif problem := verify(directory / str(step)):
        raise CheckpointError(f"checkpoint {directory / str(step)} does not verify: {problem}")
    with ocp.CheckpointManager(directory, item_handlers=ocp.StandardCheckpointHandler()) as manager:
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
    path = pathlib.Path(workdir) / "config.json"
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
