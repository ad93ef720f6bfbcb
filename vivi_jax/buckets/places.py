"""A folder on a disk or in a bucket, by the few verbs that checkpoints need."""

import concurrent.futures
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from vivi_jax import files
from vivi_jax.buckets.client import Folder, NotThere
from vivi_jax.errors import DataError

_AT_A_TIME = 4  # objects that are read whole


class OnDisk:
    """A folder of a disk; it need not be there. `name` is its own; those of its files have "/" between folders."""

    MOVES = True  # and does not copy

    def __init__(self, path: str | os.PathLike[str]):
        self._path = pathlib.Path(path)
        self.name = self._path.name

    def folders(self) -> list[str]:
        """Names of the folders in it."""
        return [path.name for path in self._path.iterdir()] if self._path.is_dir() else []

    def measured(self) -> dict[str, dict]:
        """Of each file below it: {name: {"bytes", "sha256"}}."""
        return {
            str(path.relative_to(self._path)): {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
            for path in sorted(self._path.rglob("*"))
            if path.is_file()
        }

    def read(self, name: str) -> bytes | None:
        """A file's content; None: it is not there."""
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Writes a file whole."""
        # The same name always, of the one process that writes here: the next write takes away what a kill left.
        files.write_bytes(self._path / name, data, unfinished=self._path / f".{name}.tmp")

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        (self._path / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        shutil.rmtree(self._path / name)

    def move_folder(self, name: str, to: str) -> None:
        """Moves a folder to ../TO/NAME, in place of what is there."""
        aside = self._path.parent / to / name
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        shutil.move(self._path / name, aside)


class InBucket:
    """As OnDisk, of a bucket's; whatever fails is a DataError."""

    MOVES = False

    def __init__(self, folder: Folder):
        self._folder = folder
        self.name = folder.address.rpartition("/")[2]

    def __str__(self) -> str:
        return self._folder.address

    def __truediv__(self, name: str) -> "InBucket":
        return InBucket(self._folder.below(name))

    def folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self._folder.names() if "/" in name})

    def measured(self) -> dict[str, dict]:
        def of(name: str, data: bytes) -> dict:
            return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        return self._each(of)

    def copy(self, to: pathlib.Path) -> None:
        """Copies all that is below it into a folder of a disk, which is made."""

        def write(name: str, data: bytes) -> None:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(data)

        self._each(write)

    def _each(self, function: Callable[[str, bytes], Any]) -> dict[str, Any]:
        """What a function makes of each name and its content."""
        names = sorted(self._folder.names())
        with concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
            return dict(zip(names, pool.map(lambda n: function(n, self._folder.read(n)), names), strict=True))

    def read(self, name: str) -> bytes | None:
        try:
            return self._folder.read(name)
        except NotThere:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Writes an object that nobody else writes meanwhile."""
        _, generation = self._folder.look(name)
        if self._folder.replace(name, data, generation) is None:
            raise DataError(f"{self}/{name} was written by another command meanwhile; only one may use a run's folder")

    def remove(self, name: str) -> None:
        self._folder.remove(name)

    def remove_folder(self, name: str) -> None:
        self._folder.remove(f"{name}/")

    def move_folder(self, name: str, to: str) -> None:
        """Copies what is in a folder to ../TO/NAME, and then removes it: a bucket can move nothing."""
        here, parent = self._folder.below(name), self._folder.address.rpartition("/")[0]
        aside = Folder(parent).below(to).below(name)
        aside.remove()
        for object_name in sorted(here.names()):
            aside.write(object_name, here.read(object_name))
        here.remove()


Place = OnDisk | InBucket


def at(folder: pathlib.Path | Place) -> Place:
    return OnDisk(folder) if isinstance(folder, pathlib.Path) else folder
