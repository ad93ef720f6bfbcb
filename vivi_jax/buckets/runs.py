"""The folder of a run, on a disk or in gs://.

What a run keeps beside its checkpoints are small files: config and data, metrics, TensorBoard's events, the summary.
Objects of a bucket cannot be appended to, and libraries write files. So of a run in a bucket these files are in a
temporary folder too, and go to the bucket whole whenever they have changed: before a checkpoint becomes a good one, as
the run goes on from there and makes again what comes after; every PUBLISH_SECONDS, for those who watch; and at the end.
Needs no JAX.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator

from vivi_jax import files
from vivi_jax.buckets.client import MISSING, Folder
from vivi_jax.errors import CheckpointError, ConfigError, DataError, NotFinite

_LOG = logging.getLogger(__name__)
PUBLISH_SECONDS = 60.0


class RunFolder:
    """The folder of one run.

    Attributes:
      address: the folder, as the user names it.
      path: where its small files are read and written; of a run on a disk that is the folder itself.

    Raises:
      ConfigError: a run cannot be there.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self.address = os.fspath(workdir)
        self._bucket: Folder | None = None
        if self.address.startswith("s3://"):
            raise ConfigError(
                f"--workdir={self.address}: runs are kept on disks and in gs://, as Orbax, which writes checkpoints, "
                "has no s3://; mount the bucket (s3fs), or give a folder of a disk and copy it (aws s3 sync)"
            )
        if not self.address.startswith("gs://"):
            files.refuse_remote("--workdir", self.address)
            self.path = pathlib.Path(self.address)
            return
        if not importlib.util.find_spec("gcsfs"):
            raise ConfigError(
                f"--workdir={self.address}: runs in gs:// need gcsfs: pip install -c constraints.txt -e .[gcs]"
            )
        # etils.epath, by which Orbax reads and writes, would take TensorFlow where that is installed, which knows other
        # accounts and servers than all else here. It looks once, at the first path of whatever kind.
        os.environ["EPATH_USE_TF"] = "0"
        self._bucket = Folder(self.address)
        self.address = self._bucket.address
        self._files = tempfile.TemporaryDirectory(prefix="vivi_jax_run_")
        self.path = pathlib.Path(self._files.name)
        self._generations: dict[str, bytes] = {}
        self._published: dict[str, tuple[int, int]] = {}
        self._publishing = threading.Lock()

    def fetch(self) -> None:
        """Brings the records of the starts before to `path`, where nothing was written yet.

        Raises:
          DataError: the bucket is not there, or cannot be read.
        """
        if self._bucket is None:
            return
        for name in self._published:
            (self.path / name).unlink()
        self._generations, self._published = {}, {}
        for name in self._bucket.names():
            if "/" not in name and name.endswith((".json", ".jsonl")):
                data, self._generations[name] = self._bucket.look(name)
                files.write_bytes(self.path / name, data or b"")
                self._published[name] = _state(self.path / name)

    def publish(self) -> None:
        """Takes what has changed in `path` to the bucket.

        Raises:
          ConfigError: another command has written there.
          DataError: it cannot be written.
        """
        if self._bucket is None:
            return
        with self._publishing:
            for path in sorted(self.path.rglob("*")):
                name = path.relative_to(self.path).as_posix()
                if name.startswith(".") or "/." in name or path.is_symlink() or not path.is_file():
                    continue
                state = _state(path)  # before it is read: what is added meanwhile goes next time
                if self._published.get(name) == state:
                    continue
                data, generation = path.read_bytes(), self._generations.get(name, MISSING)
                if "/" in name:  # of libraries, such as the profiler of each host
                    self._bucket.write(name, data)
                elif generation := self._bucket.replace(name, data, generation):
                    self._generations[name] = generation
                else:
                    raise ConfigError(
                        f"{self.address}/{name} was written by another command meanwhile, and only one may use a run's "
                        "folder; see that no other does, and start the same command again"
                    )
                self._published[name] = state

    @contextlib.contextmanager
    def published(self) -> Iterator[None]:
        """Publishes what is written in the block, now and then and at its end, also if that is an error."""
        if self._bucket is None:
            yield
            return
        ended = threading.Event()

        def now_and_then() -> None:
            while not ended.wait(PUBLISH_SECONDS):
                self._try_to_publish()

        thread = threading.Thread(target=now_and_then, name="publish", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            ended.set()
            thread.join()
            self._try_to_publish()
            raise
        ended.set()
        thread.join()
        self.publish()

    def _try_to_publish(self) -> None:
        try:
            self.publish()
        except (ConfigError, DataError, OSError) as error:
            _LOG.warning("the records of the run are not up to date there: %s", error)

    @contextlib.contextmanager
    def in_its_words(self) -> Iterator[None]:
        """Around what names files of `path` in its errors: they name those of the bucket."""
        try:
            yield
        except (ConfigError, DataError, CheckpointError, NotFinite) as error:
            if self._bucket is not None:
                error.args = (str(error.args[0]).replace(str(self.path), self.address), *error.args[1:])
            raise

    def close(self) -> None:
        """Removes the temporary folder."""
        if self._bucket is not None:
            self._files.cleanup()


def _state(path: pathlib.Path) -> tuple[int, int]:
    """What changes when a file is written."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
