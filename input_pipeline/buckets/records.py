"""The records of a store's shards in a bucket: from the cache, or one range of the shard each."""

import functools
import threading
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from input_pipeline.buckets import layout
from input_pipeline.buckets.cache import Cache
from vivi_jax import files
from vivi_jax.buckets.client import Folder
from vivi_jax.errors import DataError

_MAX_PLACES = 4096  # shards whose records' places are kept: some 128 kB each


class Records:
    """Random access to records. Safe to share between threads.

    Args:
      folder: of the store.
      cache: of the store.
      shards: meta.json's: {"file", "records", "bytes"}.
      remedy: what to do about a shard that is not as it was written, for messages.
    """

    def __init__(self, folder: Folder, cache: Cache, shards: Sequence[dict], remedy: str):
        self._folder, self._cache, self._shards, self._remedy = folder, cache, shards, remedy
        self._places = functools.lru_cache(maxsize=_MAX_PLACES)(lambda shard: _Once(lambda: self._read_places(shard)))

    def begin(self, shard: int, position: int, checksum: int) -> Callable[[], bytes]:
        """Begins to read a record, if it is not in the cache.

        Returns:
          What waits for it. It raises DataError if what is there is not what was written, or cannot be read.
        """
        name, places = self._shards[shard]["file"], self._places(shard)()
        start, stop = places[position : position + 2].tolist()
        kept = _record(self._cache.get(name, start, stop), start, checksum)
        if kept is not None:
            return lambda: kept
        read = self._folder.begin(name, start, stop)

        def finish() -> bytes:
            chunk = read()
            record = _record(chunk, start, checksum)
            if record is None:
                raise self._damaged(name, f"record {position} is not the one that was written")
            self._cache.put(name, start, chunk)
            return record

        return finish

    def _read_places(self, shard: int) -> np.ndarray:
        """int64[records + 1], see layout.places."""
        name, records, size = (self._shards[shard][key] for key in ("file", "records", "bytes"))
        kept = self._cache.directory / f"{name}.places"
        data = kept.read_bytes() if kept.is_file() else b""
        if len(data) == 8 * records + 12 and zlib.crc32(data[4:]) == int.from_bytes(data[:4], "little"):
            return np.frombuffer(data[4:], "<i8")
        tail = self._folder.begin(name, layout.tail_of(size, records), size)()
        try:
            places = layout.places(tail, size, records)
        except ValueError as error:
            raise self._damaged(name, f"it is not the one that was written ({error})") from None
        data = places.astype("<i8").tobytes()
        try:
            files.write_bytes(kept, zlib.crc32(data).to_bytes(4, "little") + data)
        except OSError:  # no room: it is read again next time
            pass
        return places

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(f"{self._folder.address}/{name}: {what}; {self._remedy}")


def _record(chunk: bytes, place: int, checksum: int) -> bytes | None:
    """The record of a chunk; None: it is not there, or not the one with this CRC-32."""
    try:
        found = layout.record(chunk, place)
    except (ValueError, IndexError):
        return None
    return found if zlib.crc32(found) == checksum else None


class _Once:
    """Calls a function once, for all threads; again if it has raised."""

    def __init__(self, function: Callable[[], np.ndarray]):
        self._function, self._lock, self._value = function, threading.Lock(), None

    def __call__(self) -> np.ndarray:
        with self._lock:
            if self._value is None:
                self._value = self._function()
            return self._value
