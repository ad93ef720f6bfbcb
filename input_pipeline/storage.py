"""Files by path: local ones by the operating system, those in a bucket (gs://, s3://, hdfs://) by Apache Beam.

Writes are atomic: readers see a complete file or none, even if a writer is killed or several write the same at once.
This is how stores are prepared; training reads those in gs:// and s3:// by input_pipeline/buckets.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator

from vivi_jax import files
from vivi_jax.errors import DataError


def is_remote(path: str) -> bool:
    """Whether a path names something in a bucket."""
    return "://" in path


def absolute(path: str) -> str:
    """A path that means the same to a worker with another current folder."""
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def join(root: str, *names: str) -> str:
    return "/".join([root.rstrip("/"), *names]) if is_remote(root) else os.path.join(root, *names)


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    with _explained("look for", path):
        return _beam().exists(path)


def read(path: str) -> bytes:
    """Contents of a file.

    Raises:
      OSError: a local file that cannot be read.
      DataError: one in a bucket that cannot.
    """
    if not is_remote(path):
        with open(path, "rb") as f:
            return f.read()
    with _explained("read", path), _open(path) as f:
        return f.read()


def fetch(path: str, local: str) -> None:
    """Copies a file of a bucket to a local path.

    Raises:
      Unreadable: it is not there, or may not be read: trying again does not help.
      DataError: it could not be read this time.
    """
    with _explained("read", path), _open(path) as source, open(local, "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)


def put(local: str, path: str) -> None:
    """Moves a local file to a path, in a bucket or on the same disk.

    Raises:
      DataError: the bucket does not take it.
    """
    if not is_remote(path):
        os.replace(local, path)
        return
    unfinished = f"{path}.{uuid.uuid4().hex}.partial"  # a stream to a bucket may be published half on an error
    with _explained("write", path):
        with open(local, "rb") as source, _beam().create(unfinished, compression_type=_as_it_is()) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        if _beam().exists(path):  # not every file system replaces
            _beam().delete([path])
        _beam().rename([unfinished], [path])
    os.unlink(local)


def write(path: str, data: bytes) -> None:
    """Writes a file whole.

    Raises:
      OSError: a local file that cannot be written.
      DataError: the bucket does not take it.
    """
    if not is_remote(path):
        files.write_bytes(path, data)
        return
    with tempfile.TemporaryDirectory() as scratch:
        files.write_bytes(os.path.join(scratch, "data"), data)
        put(os.path.join(scratch, "data"), path)


def listing(root: str) -> list[tuple[str, int]]:
    """(path, bytes) of all files below a folder of a bucket, at any depth."""
    with _explained("list", root):
        result = _beam().match([join(root, "**")])[0]
        return [(found.path, found.size_in_bytes) for found in result.metadata_list]


def names(root: str) -> set[str]:
    """What a folder holds; nothing where there is none."""
    if not is_remote(root):
        return set(os.listdir(root)) if os.path.exists(root) else set()
    return {path[len(root.rstrip("/")) + 1 :].split("/")[0] for path, _ in listing(root)}


def make_folder(path: str) -> None:
    if not is_remote(path):  # buckets have no folders, only names
        os.makedirs(path, exist_ok=True)


def remove_tree(root: str) -> None:
    """Removes a folder and all below it; a missing one is fine."""
    if not is_remote(root):
        shutil.rmtree(root, ignore_errors=True)
        return
    found = [path for path, _ in listing(root)]
    with _explained("delete", root):
        for start in range(0, len(found), 1000):
            _beam().delete(found[start : start + 1000])


class Unreadable(DataError):
    """A file that is not there, or that this account may not read."""


def _beam():
    """Beam's file systems; only paths into buckets need them."""
    try:
        from apache_beam.io.filesystems import FileSystems
    except ImportError as e:
        raise DataError(
            "paths into buckets need Apache Beam: pip install -c constraints.txt -e '.[beam]', and "
            "'.[dataflow]' for gs://"
        ) from e
    return FileSystems


def _as_it_is() -> str:
    from apache_beam.io.filesystem import CompressionTypes

    return CompressionTypes.UNCOMPRESSED  # otherwise a name that ends in .gz would be unpacked


def _open(path: str):
    return _beam().open(path, compression_type=_as_it_is())


@contextlib.contextmanager
def _explained(verb: str, path: str) -> Iterator[None]:
    """Turns what the clients of buckets raise, each its own kind, into one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):  # of the local disk
            raise
        cause = e
        while details := getattr(cause, "exception_details", None):  # Beam's lists of paths, one in the other
            cause = next(iter(details.values()))
        reason = " ".join(str(cause).split())[:300] or repr(cause)
        status = _status(cause)
        if status in (401, 403):
            account = "give the account this runs as the right to list, read and write there"
            raise Unreadable(
                f"cannot {verb} {path}: {reason}; {account} (on Google Cloud: roles/storage.objectAdmin)"
            ) from e
        if status == 404:
            raise Unreadable(f"cannot {verb} {path}: {reason}; check the name") from e
        raise DataError(f"cannot {verb} {path}: {reason}; run the same command again, it goes on") from e


def _status(error: Exception) -> int | None:
    """The HTTP status in an error of a bucket's client, or what it would be."""
    if isinstance(error, PermissionError):
        return 403
    if isinstance(error, FileNotFoundError):
        return 404
    code = getattr(error, "code", None)
    return int(code) if isinstance(code, int) else None
