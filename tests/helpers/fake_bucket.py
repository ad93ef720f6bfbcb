"""A bucket for tests, as one of Apache Beam's file systems: shelf://BUCKET/NAME."""

import os
import pathlib

from apache_beam.io.filesystem import BeamIOError, CompressionTypes, FileMetadata, FileSystem


class FakeBucket(FileSystem):
    """Objects by name in one flat folder, and those it says no to. Beam finds the class by its scheme."""

    root: pathlib.Path
    forbidden: tuple[str, ...] = ()  # beginnings of paths

    @classmethod
    def scheme(cls):
        return "shelf"

    def _file(self, path):
        if path.startswith(self.forbidden):
            denied = PermissionError(f"403 the caller does not have storage.objects access to {path}")
            raise BeamIOError("operation failed", {path: denied})
        return self.root / path.removeprefix("shelf://").replace("/", "%")

    def _list(self, prefix):
        self._file(prefix)
        for file in sorted(self.root.iterdir()):
            yield FileMetadata("shelf://" + file.name.replace("%", "/"), file.stat().st_size)

    def has_dirs(self):
        return False

    def join(self, basepath, *paths):
        return "/".join([basepath, *paths])

    def split(self, path):
        return tuple(path.rsplit("/", 1))

    def mkdirs(self, path):
        raise AssertionError("buckets have no folders")

    def create(self, path, mime_type="", compression_type=CompressionTypes.AUTO):
        assert compression_type == CompressionTypes.UNCOMPRESSED
        return open(self._file(path), "wb")

    def open(self, path, mime_type="", compression_type=CompressionTypes.AUTO):
        assert compression_type == CompressionTypes.UNCOMPRESSED
        return open(self._file(path), "rb")

    def copy(self, source_file_names, destination_file_names):
        raise NotImplementedError

    def rename(self, source_file_names, destination_file_names):
        for source, destination in zip(source_file_names, destination_file_names, strict=True):
            assert not self._file(destination).exists()
            os.rename(self._file(source), self._file(destination))

    def exists(self, path):
        return self._file(path).exists()

    def size(self, path):
        return self._file(path).stat().st_size

    def last_updated(self, path):
        return self._file(path).stat().st_mtime

    def checksum(self, path):
        return ""

    def metadata(self, path):
        return FileMetadata(path, self.size(path))

    def delete(self, paths):
        for path in paths:
            self._file(path).unlink()
