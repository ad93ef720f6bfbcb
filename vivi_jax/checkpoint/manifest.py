"""What makes a checkpoint good: a manifest of the hashes of its files, its step, and the versions that wrote it.

A checkpoint is good when its MANIFEST.json is there, names the step of its folder, and every file has the size and
SHA-256 it says. Orbax itself does not look: a flipped bit in its tensor files loads without a word.

While a checkpoint is written, the file SAVING beside it names its step. So a folder without manifest that was cut off
differs from one whose manifest was lost. Checkpoints lie on a disk or in a bucket (buckets/places.py). Needs no JAX.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import re
from collections.abc import Collection

from vivi_jax.buckets import places
from vivi_jax.errors import CheckpointError, DataError

_LOG = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"
SAVING = "SAVING"  # beside the checkpoints: the step that is being written
FORMAT = 2  # of the manifest; 1, up to 0.1.0, was the content of "files" alone
Directory = pathlib.Path | places.InBucket
_LIBRARIES = ("vivi_jax", "jax", "flax", "optax", "orbax-checkpoint")


def steps(directory: Directory) -> list[int]:
    """Steps that have a folder, newest last; no promise that they are whole. Folders of other names are not ours."""
    return sorted(int(n) for n in places.at(directory).folders() if re.fullmatch("0|[1-9][0-9]*", n, re.ASCII))


def written_steps(directory: Directory) -> list[int]:
    """Steps that were written to their end, as far as their manifests tell."""
    place = places.at(directory)
    return [step for step in steps(directory) if place.read(f"{step}/{MANIFEST}") is not None]


def newest_good_step(directory: Directory, *, unfit: Collection[int] = ()) -> int | None:
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
        if not _was_cut_off(directory, step):
            bad.append(f"{step} ({problem})")
    if bad:
        raise CheckpointError(
            f"none of the checkpoints in {directory} is good: {', '.join(bad)}. Restore one from a backup, with its "
            f"{MANIFEST}, or move the folder away to start from the beginning"
        )
    return None


def being_saved(directory: Directory) -> int | None:
    """The step whose writing has begun and not ended."""
    try:
        return int(places.at(directory).read(SAVING) or "")
    except ValueError:
        return None


def _was_cut_off(directory: Directory, step: int) -> bool:
    """Whether a checkpoint was not written to its end; and not only lost its manifest later."""
    return step == being_saved(directory) and places.at(directory).read(f"{step}/{MANIFEST}") is None


def begin(directory: Directory, step: int) -> None:
    """Says that the checkpoint of this step is being written."""
    places.at(directory).write(SAVING, f"{step}\n".encode())


def commit(directory: Directory, step: int, *, keep: int) -> None:
    """Makes the checkpoint of a step good; only then removes older ones, so that `keep` good ones are left."""
    place = places.at(directory)
    write_manifest(directory / str(step))
    place.remove(SAVING)
    for old in [s for s in steps(directory) if s < step][: -(keep - 1) or None]:
        place.remove(f"{old}/{MANIFEST}")  # first: a kill leaves no half of a good one
        place.remove_folder(str(old))


def set_aside(directory: Directory, step: int | None) -> None:
    """Moves the checkpoints newer than `step` (None: all) to checkpoints_rejected/, so that they can be written again.

    They are damaged or were cut off; nothing that might be of use is deleted. Where moving is copying, as in a bucket,
    one that was cut off is no use. Nor is what a kill has left of older ones that were being removed.
    """
    place = places.at(directory)
    for older in [s for s in steps(directory) if step is not None and s < step]:
        if place.read(f"{older}/{MANIFEST}") is None:
            place.remove_folder(str(older))
    for newer in [s for s in steps(directory) if step is None or s > step]:
        if _was_cut_off(directory, newer) and not place.MOVES:
            place.remove_folder(str(newer))
        else:
            place.move_folder(str(newer), "checkpoints_rejected")


def write_manifest(directory: Directory) -> None:
    """Writes MANIFEST.json of a checkpoint's folder, which is named by its step.

    {"format", "step", "versions": {library: version}, "files": {relative path: {"bytes", "sha256"}}}
    """
    place = places.at(directory)
    entries = {name: found for name, found in place.measured().items() if name.rpartition("/")[2] != MANIFEST}
    if not entries:
        raise FileNotFoundError(f"there is no checkpoint in {directory}")
    content = {"format": FORMAT, "step": int(place.name), "versions": versions(), "files": entries}
    place.write(MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


@functools.cache
def versions() -> dict[str, str]:
    """Of the libraries that decide what a checkpoint looks like, and a hash of this package's source."""
    root, digest = pathlib.Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    found = {library: importlib.metadata.version(library) for library in _LIBRARIES}
    return found | {"source": digest.hexdigest()[:12]}


def written_by(directory: Directory) -> str:
    """The versions in a manifest that differ from today's, in words; "" where it holds none, or all are the same."""
    then = json.loads(places.at(directory).read(MANIFEST) or "{}").get("versions", {})
    different = [
        f"{name} {then[name]} there, {now} here" for name, now in versions().items() if then.get(name, now) != now
    ]
    return f" (written with {', '.join(different)})" if different else ""


def verify(directory: Directory) -> str | None:
    """None if every file is as the manifest says; else what is wrong, in a few words.

    Raises:
      DataError: a bucket's server does not answer.
    """
    place = places.at(directory)
    try:
        manifest = place.read(MANIFEST)
        if manifest is None:
            return f"it has no {MANIFEST}: its writing was cut off, or the file was lost"
        content = json.loads(manifest)
        if "format" in content:
            if content["format"] > FORMAT:
                return f"it is of a later version of vivi_jax (format {content['format']}, here {FORMAT})"
            if str(content["step"]) != place.name:
                return f"it is the checkpoint of step {content['step']}, renamed or copied"
        found = place.measured()
        for name, expected in (entries := content["files"] if "format" in content else content).items():
            if name not in found:
                return f"{name} is missing"
            if found[name]["bytes"] != expected["bytes"]:
                return f"{name} has {found[name]['bytes']} bytes, not {expected['bytes']}"
            if found[name]["sha256"] != expected["sha256"]:
                return f"the content of {name} has changed (SHA-256 differs)"
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    except OSError as error:  # of a disk, say: older checkpoints may be readable
        return f"it cannot be read ({error})"
    return None if entries else f"{MANIFEST} is damaged"
