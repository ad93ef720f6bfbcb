"""What makes a checkpoint good: a manifest of the hashes of its files, its step, and the versions that wrote it.

A checkpoint is good when its MANIFEST.json is there, names the step of its folder, and every file has the size and
SHA-256 it says. Orbax itself does not look: a flipped bit in its tensor files loads without a word.

While a checkpoint is written, the file SAVING beside it names its step. So a folder without manifest that was cut off
differs from one whose manifest was lost. Needs no JAX.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import re
import shutil
from collections.abc import Collection

from vivi_jax import files
from vivi_jax.errors import CheckpointError

_LOG = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"
SAVING = "SAVING"  # beside the checkpoints: the step that is being written
FORMAT = 2  # of the manifest; 1, up to 0.1.0, was the content of "files" alone
_LIBRARIES = ("vivi_jax", "jax", "flax", "optax", "orbax-checkpoint")


def steps(directory: pathlib.Path) -> list[int]:
    """Steps that have a folder, newest last; no promise that they are whole. Folders of other names are not ours."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name, re.ASCII))


def newest_good_step(directory: pathlib.Path, *, unfit: Collection[int] = ()) -> int | None:
    """Newest step that verifies; each newer one that does not is named in the log. None where no step was saved.

    Args:
      unfit: steps that verify, but hold NaN or infinity.

    Raises:
      CheckpointError: there are checkpoints, and not one is good; unless all there is was cut off while being written.
    """
    bad = []
    for step in reversed(steps(directory)):
        problem = "it holds values that are not finite" if step in unfit else verify(directory / str(step))
        if problem is None:
            return step
        _LOG.warning("checkpoint %s is not used: %s", directory / str(step), problem)
        if step != being_saved(directory) or (directory / str(step) / MANIFEST).exists():
            bad.append(f"{step} ({problem})")
    if bad:
        raise CheckpointError(
            f"none of the checkpoints in {directory} is good: {', '.join(bad)}. Restore one from a backup, with its "
            f"{MANIFEST}, or move the folder away to start from the beginning"
        )
    return None


def being_saved(directory: pathlib.Path) -> int | None:
    """The step whose writing has begun and not ended."""
    try:
        return int((directory / SAVING).read_text())
    except (FileNotFoundError, ValueError):
        return None


def begin(directory: pathlib.Path, step: int) -> None:
    """Says that the checkpoint of this step is being written."""
    # The same name always, of the one process that writes here: the next save takes away what a kill left.
    files.write_bytes(directory / SAVING, f"{step}\n".encode(), unfinished=directory / f".{SAVING}.tmp")


def commit(directory: pathlib.Path, step: int, *, keep: int) -> None:
    """Makes the checkpoint of a step good; only then removes older ones, so that `keep` good ones are left."""
    write_manifest(directory / str(step))
    (directory / SAVING).unlink(missing_ok=True)
    for old in [s for s in steps(directory) if s < step][: -(keep - 1) or None]:
        (directory / str(old) / MANIFEST).unlink(missing_ok=True)  # first: a kill leaves no half of a good one
        shutil.rmtree(directory / str(old))


def set_aside(directory: pathlib.Path, step: int | None) -> None:
    """Moves the checkpoints newer than `step` (None: all) to checkpoints_rejected/, so that they can be written again.

    They are damaged or were cut off; nothing that might be of use is deleted.
    """
    for newer in [s for s in steps(directory) if step is None or s > step]:
        aside = directory.parent / "checkpoints_rejected" / str(newer)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        shutil.move(directory / str(newer), aside)


def write_manifest(directory: pathlib.Path) -> None:
    """Writes MANIFEST.json of a checkpoint's folder, which is named by its step.

    {"format", "step", "versions": {library: version}, "files": {relative path: {"bytes", "sha256"}}}
    """
    entries = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    content = {"format": FORMAT, "step": int(directory.name), "versions": versions(), "files": entries}
    files.write_json(directory / MANIFEST, content)


@functools.cache
def versions() -> dict[str, str]:
    """Of the libraries that decide what a checkpoint looks like, and a hash of this package's source."""
    root, digest = pathlib.Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    found = {library: importlib.metadata.version(library) for library in _LIBRARIES}
    return found | {"source": digest.hexdigest()[:12]}


def written_by(directory: pathlib.Path) -> str:
    """The versions in a manifest that differ from today's, in words; "" where it holds none, or all are the same."""
    then = json.loads((directory / MANIFEST).read_text()).get("versions", {})
    different = [
        f"{name} {then[name]} there, {now} here" for name, now in versions().items() if then.get(name, now) != now
    ]
    return f" (written with {', '.join(different)})" if different else ""


def verify(directory: pathlib.Path) -> str | None:
    """None if every file is as the manifest says; else what is wrong, in a few words."""
    manifest = directory / MANIFEST
    try:
        if not manifest.exists():
            return f"it has no {MANIFEST}: its writing was cut off, or the file was lost"
        content = json.loads(manifest.read_text())
        if "format" in content:
            if content["format"] > FORMAT:
                return f"it is of a later version of vivi_jax (format {content['format']}, here {FORMAT})"
            if str(content["step"]) != directory.name:
                return f"it is the checkpoint of step {content['step']}, renamed or copied"
        for name, expected in (entries := content["files"] if "format" in content else content).items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if files.sha256(path) != expected["sha256"]:
                return f"the content of {name} has changed (SHA-256 differs)"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    except OSError as error:  # of a disk, say: older checkpoints may be readable
        return f"it cannot be read ({error})"
    return None if entries else f"{MANIFEST} is damaged"
