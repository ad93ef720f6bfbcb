"""Files of all packages: written whole, hashed, and claimed for one purpose.

Writes are atomic: readers see a complete file or none, even if a writer is killed or several write at once.
Imports neither JAX nor TensorFlow.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import uuid
import zipfile
from collections.abc import Iterator
from typing import Any

from vivi_jax.errors import CheckpointError, ConfigError, DataError

Path = str | os.PathLike[str]
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # "gs://" is "gs:/" once a path is normalised


@contextlib.contextmanager
def atomic(path: Path, *, unfinished: Path | None = None) -> Iterator[pathlib.Path]:
    """Yields where to write; the file is moved to `path` when the block ends, and removed if the block raises.

    Args:
      path: the file, in a folder that exists.
      unfinished: where it is written, on the same disk; None: under a hidden name beside it, of this writer alone.
    """
    path = pathlib.Path(path)
    unfinished = pathlib.Path(unfinished or path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"))
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave an empty file under the name
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes, *, unfinished: Path | None = None) -> None:
    """Writes a file whole."""
    with atomic(path, unfinished=unfinished) as file:
        file.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole, as UTF-8; what no encoding fits, as in some file names, is written as "\\udcff"."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes a JSON file whole, ending with a newline."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json_lines(path: Path, *, keys: tuple[str, ...] = (), cut: bool = True, remedy: str = "") -> list[dict]:
    """The JSON objects in the lines of a file, [] without the file.

    Args:
      keys: each line must have them, as whole numbers or text.
      cut: a last line without its end is left out, as of a process that is writing it, or was killed there.
      remedy: for the message: what else than taking the line out; or what follows from it.

    Raises:
      DataError: a line is damaged.
    """
    path = pathlib.Path(path)
    *lines, last = path.read_bytes().decode(errors="replace").split("\n") if path.exists() else [""]
    found = []
    for number, line in enumerate([*lines, last] if last and not cut else lines, 1):
        try:
            value = json.loads(line)
            if not all(type(value[key]) in (int, str) for key in keys) or not isinstance(value, dict):
                raise ValueError(f"no object with {', '.join(keys) or 'names'}")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: line {number} is damaged ({error!r}); take it out{remedy}") from None
        found.append(value)
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def said_where_there_is_no_room(directory: Path) -> Iterator[None]:
    """A block that writes into a directory: a full or read-only disk is a CheckpointError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        raise CheckpointError(
            f"cannot write to {directory}: {error.strerror}; mend that, and start the same command again: it goes on "
            "from the newest checkpoint"
        ) from error


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def inside(folder: Path, name: str) -> pathlib.Path:
    """The path of a name that a list, an archive or a command line gives, in the folder that it belongs in.

    Only the name is looked at: links are followed, as data sets are often made of them.

    Raises:
      DataError: it is no name of something below the folder: absolute, with "..", or not a name at all.
    """
    parts = name.replace("\\", "/").split("/")  # lists are written on Windows too
    too_long = any(len(os.fsencode(part)) > 255 for part in parts)
    if not name.strip("./\\ ") or "\0" in name or not parts[0] or ".." in parts or too_long:
        raise DataError(f"{name[:100]!r} is no name of anything in {folder}: names must not lead out of their folder")
    return pathlib.Path(folder, name)


def check_unpacked(path: Path, limit: int) -> None:
    """Refuses a zip (as .npz is) that says it unpacks to more than `limit` bytes; nothing of it is unpacked.

    Raises:
      DataError: it says so, or is no zip.
      OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if size > limit:
        raise DataError(f"{path} unpacks to {size:,} bytes, more than the {limit:,} that are taken")


def config_diff(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested dicts differ; None where a key is absent.

    >>> config_diff({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    [('a.b', 1, 3)]
    """
    found = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += config_diff(was, now, f"{prefix}{key}.")
        elif was != now:
            found.append((f"{prefix}{key}", was, now))
    return found


def claim(
    path: Path,
    identity: dict,
    *,
    free: tuple[str, ...] = (),
    changing: tuple[str, ...] = (),
    change_option: str = "",
    option: str = "--workdir",
    write: bool = True,
) -> list[tuple[str, Any, Any]]:
    """Writes what a folder is for into `path`, a file in it; refuses a folder that was begun for something else.

    Args:
      path: a JSON file; its folder is made.
      identity: JSON values.
      free: prefixes of dotted keys whose values may change from start to start.
      changing: prefixes of keys whose values change with this start: the file then holds the new ones.
      change_option: the command line's option that gives `changing`, for the message.
      option: that which names the folder.
      write: False: checks only.

    Returns:
      The differences that `changing` allows, as of config_diff.

    Raises:
      ConfigError: the other differences, with both values.
    """
    path = pathlib.Path(path)
    identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    if not path.exists():
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, identity)
        return []
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); use another {option}") from None
    different = [change for change in config_diff(there, identity) if not _among(change[0], free)]
    refused = [f"{key}: {was!r} there, {now!r} here" for key, was, now in different if not _among(key, changing)]
    if refused:
        sections = sorted({key.partition(".")[0] for key, _, _ in different})
        change = f"; or go on with these from here, by {change_option}={','.join(sections)}" if change_option else ""
        raise ConfigError(
            f"{path.parent} was begun with other values ({'; '.join(refused)}); use another {option}, or the values "
            f"it was begun with{change}"
        )
    if different and write:
        write_json(path, identity)
    return different


def _among(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix.rstrip('.')}.") for prefix in prefixes)


def refuse_remote(option: str, value: Any, remedy: str = "") -> None:
    """Raises ConfigError if a value is a path with a scheme: `open` would take gs://BUCKET for a folder named "gs:"."""
    if isinstance(value, str) and _REMOTE.match(value):
        remedy = remedy or "mount the bucket (gcsfuse, s3fs), or copy the files, and give that folder"
        raise ConfigError(f"{option}={value}: this command reads and writes local files only; {remedy}")
