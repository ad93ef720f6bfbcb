"""Where the records of an ArrayRecord file lie, as store.write_shard writes it: each in a chunk of its own, as it is.

ArrayRecord's reader has no places to ask for, so they are taken from the file's own index. The format is Riegeli's
(github.com/google/riegeli, doc/riegeli_records_file_format.md), with an index at the end of the file
(github.com/google/array_record, cpp/layout.proto):

    at every 64 KiB     a block header of 24 bytes, in the middle of whatever is there
    a chunk             header of 40 bytes: hash, size of the data, their hash, kind, number of records, size decoded;
                        data: compression (0: none), bytes of the list of sizes, that list, the records
    the last chunk      a record for the file, and one for each chunk with its place
    the last 64 KiB     a chunk whose records say where that one is

No hash of it is looked at: whoever reads a record compares it with the store's checksums.
"""

import numpy as np

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_RECORDS = ord("r")  # the kind of chunk
_ONE_RECORD = bytes([_RECORDS, 1, 0, 0, 0, 0, 0, 0])
# Of a record in the index: its size (1), and three numbers with a byte before each: place, size, how many (1).
_MOST_PER_RECORD = 1 + 3 + 6 + 5 + 1  # of shards below 4 TiB


def tail_of(size: int, records: int) -> int:
    """Where the part of a file of `size` bytes begins, at the latest, that `places` wants."""
    return max(0, size - 3 * _BLOCK - (_MOST_PER_RECORD + 1) * records)


def places(tail: bytes, size: int, records: int) -> np.ndarray:
    """Where the chunk of each record begins, and behind them where the last one ends.

    Args:
      tail: the file from tail_of(size, records) on.

    Returns:
      int64[records + 1].

    Raises:
      ValueError: it is no such file.
    """
    begin = size - len(tail)
    copies, sizes = _records(_without_headers(tail[-_BLOCK:], size - min(_BLOCK, len(tail))))
    tags, _ = _varints(copies[: int(sizes[0])] if len(sizes) else b"")
    if len(tags) < 2 or tags[0] != 8 or not begin <= tags[1] < size:
        raise ValueError("it has no index")
    index = int(tags[1])
    entries, sizes = _records(_without_headers(tail[index - begin :], index))
    if len(sizes) != records + 1:
        raise ValueError(f"its index has {len(sizes) - 1} records and not {records}")
    if not records:
        return np.array([index], np.int64)
    values, starts = _varints(entries[int(sizes[0]) :])
    first = np.searchsorted(starts, np.cumsum(sizes[1:]) - sizes[1:])  # value of each entry
    if len(values) < first[-1] + 2 or (values[first] != 8).any():
        raise ValueError("its index cannot be read")
    found = np.append(values[first + 1], index)
    if (np.diff(found) < _CHUNK_HEADER).any() or found[0] < 0:
        raise ValueError("the records of its index do not follow one another")
    return found


def record(chunk: bytes, place: int) -> bytes:
    """The only record of a chunk.

    Args:
      chunk: bytes of the file, from the chunk's place to that of the next one.
      place: where they begin.

    Raises:
      ValueError: it is no such chunk.
    """
    data = _without_headers(chunk, place)
    size = int.from_bytes(data[8:16], "little")
    if data[24:32] != _ONE_RECORD or len(data) != _CHUNK_HEADER + size or size < 3 or data[_CHUNK_HEADER] != 0:
        raise ValueError("it is not one record as it is")
    return data[_CHUNK_HEADER + 2 + data[_CHUNK_HEADER + 1] :]  # the list, of one size, takes less than 128 bytes


def _without_headers(data: bytes, place: int) -> bytes:
    """Bytes of a file from `place` on, without the block headers among them."""
    first = -place % _BLOCK
    if first >= len(data):
        return data
    blocks = (data[at + _BLOCK_HEADER : at + _BLOCK] for at in range(first, len(data), _BLOCK))
    return b"".join([data[:first], *blocks])


def _records(chunk: bytes) -> tuple[bytes, np.ndarray]:
    """The records of a chunk, joined, and the size of each."""
    size, count = int.from_bytes(chunk[8:16], "little"), int.from_bytes(chunk[25:32], "little")
    data = chunk[_CHUNK_HEADER : _CHUNK_HEADER + size]
    if len(data) != size or not size or chunk[24] != _RECORDS or data[0] != 0:
        raise ValueError("it holds no records that can be read as they are")
    head, starts = _varints(data[1:12])
    listed = int(head[0]) if len(head) else size
    begin = 1 + (int(starts[1]) if len(starts) > 1 else len(data) - 1)
    sizes, _ = _varints(data[begin : begin + listed])
    values = data[begin + listed :]
    if len(sizes) != count or sizes.sum() != len(values):
        raise ValueError("its sizes do not fit")
    return values, sizes


def _varints(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of seven bits a byte, the lowest first, the last byte below 128: int64[n], and where each begins."""
    found = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(found < 128)
    if not len(ends):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    starts = np.append(0, ends[:-1] + 1)
    digit = np.arange(ends[-1] + 1) - np.repeat(starts, ends - starts + 1)
    parts = (found[: ends[-1] + 1] & 127).astype(np.int64) << np.minimum(7 * digit, 63)
    return np.add.reduceat(parts, starts), starts
