"""The frame store: what `input_pipeline.prepare` writes and training reads.

    DIR/frames-00000-of-00003.array_record   one JPEG frame per record; the frames of a video are consecutive
    DIR/index.npz                            per video: first record, frames, rate, size, label, shots
    DIR/ledger.jsonl                         one line per input file: "ok", or "refused" and the reason
    DIR/meta.json                            settings and shard table; written last, so its presence means complete
    DIR/.partial/                            only while a preparation is under way

Records are numbered globally: record r is frame r - first_record[v] of the video v it belongs to. Reading is random
access, so a sampler that wants 3 frames of a video costs 3 reads.
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  compiled

from vivi_jax import files
from vivi_jax.errors import DataError

# 1: shots were looked for among the frames that are kept, and had eight of them or more; files are as in 2.
FORMAT_VERSION, READABLE_VERSIONS = 2, (1, 2)
OLD_SHOTS = (
    "its shots are those of version 0.1.0, found among the frames that are kept: at few a second they hold cuts; "
    "for losses on shots prepare it again"
)
INDEX, META, LEDGER, PARTIAL = "index.npz", "meta.json", "ledger.jsonl", ".partial"
# JPEG does not compress further, and a group of one record is what makes a single read cheap.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER_BYTES = 32 * 1024
_MAX_OPEN_SHARDS = 256  # one file handle each; the usual limit of a process is 1024


class FrameStore:
    """Random access to the frames of a prepared directory. Safe to share between threads.

    Attributes:
      directory: str.
      meta: dict, the contents of meta.json ("settings" are those `prepare` ran with).
      videos: str[N], path of each video relative to the directory given to `prepare`, sorted.
      first_record: int64[N], global record number of frame 0.
      num_frames: int32[N], at least 1.
      fps: float32[N]; frame k of a video is the picture on display k / fps seconds after its first frame.
      height, width: int32[N], pixels.
      label: int32[N] index into class_names, -1 = unlabelled.
      class_names: list of str.
      shot_starts: int32[S], first frame of each shot; shot_offsets: int64[N+1], video v owns
        shot_starts[shot_offsets[v]:shot_offsets[v+1]].
      shots_may_hold_cuts: bool; True of stores by version 0.1.0, whose shots have eight frames or more whatever the
        rate, with what was shorter as a part of its neighbour.

    Raises:
      DataError: the directory is missing, not prepared, incomplete, or does not match its index.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = os.fspath(directory)
        root = pathlib.Path(self.directory)
        self.meta = _read_meta(root)
        self.shots_may_hold_cuts = self.meta["version"] < 2
        self._shard_paths = [str(root / shard["file"]) for shard in self.meta["shards"]]
        _check_shards(root, self.meta["shards"])
        self._shard_offsets = np.cumsum([0] + [shard["records"] for shard in self.meta["shards"]])
        try:
            with np.load(root / INDEX, allow_pickle=False) as index:
                arrays = {name: index[name] for name in index.files}
        except Exception as e:  # zipfile, zlib, NumPy and OS errors all mean the same to the user
            raise DataError(f"cannot read {root / INDEX} ({e}); delete {root} and prepare it again") from e
        if len(arrays["videos"]) == 0:
            raise DataError(f"{root} holds no video: none of the files could be used; {root / LEDGER} says why")
        self.videos = arrays["videos"]
        self.first_record, self.num_frames = arrays["first_record"], arrays["num_frames"]
        self.fps, self.height, self.width = arrays["fps"], arrays["height"], arrays["width"]
        self.label, self.class_names = arrays["label"], arrays["class_names"].tolist()
        self.shot_starts, self.shot_offsets = arrays["shot_starts"], arrays["shot_offsets"]
        # An evicted reader is closed when the last thread that uses it lets go of it.
        self._reader = functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return len(self.videos)

    def shots(self, video: int) -> np.ndarray:
        """int32[K, 2]: (start, stop) frames of each shot of the video; they tile [0, num_frames)."""
        starts = self.shot_starts[self.shot_offsets[video] : self.shot_offsets[video + 1]]
        stops = np.append(starts[1:], self.num_frames[video])
        return np.stack([starts, stops], axis=1).astype(np.int32)

    def frame_name(self, video: int, frame: int) -> str:
        """What to call a frame in a message."""
        return f"{self.directory}: frame {frame} of {self.videos[video]}"

    def read_frames(self, video: int, frames: np.ndarray) -> np.ndarray:
        """JPEG bytes of frames int64[F] of a video: object[F]. One that is asked for more than once is read once."""
        wanted, place = np.unique(frames, return_inverse=True)
        return self.read(self.first_record[video] + wanted)[place]

    def read(self, records: np.ndarray) -> np.ndarray:
        """JPEG bytes of the given records, and nothing else is read.

        Args:
          records: integer array of any shape, global record numbers.

        Returns:
          Object array of bytes, same shape.

        Raises:
          IndexError: a record number outside the store.
          DataError: a record does not match its checksum.
        """
        records = np.asarray(records)
        flat = records.ravel()
        if flat.size and not (0 <= flat.min() and flat.max() < self._shard_offsets[-1]):
            raise IndexError(f"records {flat.min()}..{flat.max()} of a store of {self._shard_offsets[-1]} records")
        shards = np.searchsorted(self._shard_offsets, flat, side="right") - 1
        positions = flat - self._shard_offsets[shards]
        frames = np.empty(flat.shape, object)
        # One by one: handing the reader a list costs a thread hand-over per record, 1.5 times the time.
        for i, (shard, position) in enumerate(zip(shards.tolist(), positions.tolist(), strict=True)):
            try:
                frames[i] = self._reader(shard).read([position])[0]
            except RuntimeError as e:
                raise DataError(
                    f"{self._shard_paths[shard]}: record {position} is damaged ({e}); "
                    f"delete {self.directory} and prepare it again"
                ) from e
        return frames.reshape(records.shape)

    def _open_shard(self, shard: int):
        return array_record_module.ArrayRecordReader(
            self._shard_paths[shard], _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER_BYTES
        )


def _read_meta(root: pathlib.Path) -> dict:
    prepare = f"python -m input_pipeline.prepare --videos=VIDEOS --out={root}"
    if not root.is_dir():
        raise DataError(f"no such directory: {root}; make it from videos with: {prepare}")
    if not (root / META).is_file():
        if (root / PARTIAL).is_dir():
            raise DataError(f"the preparation of {root} was not finished; run its command again, it goes on: {prepare}")
        prepare = prepare.replace(f"--out={root}", "--out=STORE") if any(root.iterdir()) else prepare
        raise DataError(f"{root} is not a frame store (it has no {META}); make one from videos with: {prepare}")
    try:
        meta = json.loads((root / META).read_text())
        version = meta["version"]
    except (ValueError, TypeError, KeyError) as e:
        raise DataError(f"cannot read {root / META} ({e!r}); delete {root} and prepare it again") from e
    if version not in READABLE_VERSIONS:
        raise DataError(
            f"{root} has format version {version}, this code reads {' and '.join(map(str, READABLE_VERSIONS))}; "
            f"prepare it again: {prepare}"
        )
    return meta


def _check_shards(root: pathlib.Path, shards: list[dict]) -> None:
    for shard in shards:
        path = root / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DataError(
                f"{path} {found}, {shard['bytes']} expected; copy it again or delete {root} and prepare it again"
            )


def shard_name(shard: int, num_shards: int) -> str:
    return f"frames-{shard:05d}-of-{num_shards:05d}.array_record"


def write_shard(path: str | os.PathLike, records: Iterable[bytes]) -> int:
    """Writes one shard so that `path` is either absent or complete; returns the number of records.

    Raises:
      OSError: the disk is full or not writable.
    """
    count = 0
    with files.atomic(path, unfinished=_unfinished(path)) as unfinished:
        try:
            writer = array_record_module.ArrayRecordWriter(str(unfinished), _WRITER_OPTIONS)
            for record in records:
                writer.write(record)
                count += 1
            writer.close()
        except RuntimeError as e:  # the writer's only error; its first line holds the system's reason
            raise OSError(f"cannot write {path}: {e}".splitlines()[0]) from e
    return count


def _unfinished(path: str | os.PathLike) -> str:
    """Always the same name, so that what a kill leaves behind is written over by the next run."""
    return f"{os.fspath(path)}.partial"


def write_index(
    directory: str | os.PathLike, *, settings: dict, shards: list[dict], rows: list[dict], class_names: list[str]
) -> None:
    """Writes ledger, index and meta, in this order: the presence of meta.json means that all is there.

    Args:
      settings: JSON values `prepare` ran with; kept in meta.json.
      shards: per shard {"file": name, "records": int, "bytes": int}, in record order.
      rows: one per input file, in record order: {"input": str, "status": "ok" | "refused", "reason": str}, optionally
        "bytes" int, the size of the file, and, if ok, "frames" int, "fps" float, "height", "width" int, "shot_starts"
        list of int (first 0), "label" int (-1 = unlabelled), and, if any, "notes" list of str, what is unusual.
      class_names: names of the labels.
    """
    root = pathlib.Path(directory)
    ok = [row for row in rows if row["status"] == "ok"]
    frames = np.array([row["frames"] for row in ok], np.int64)
    records = sum(shard["records"] for shard in shards)
    if frames.sum() != records:
        raise AssertionError(f"{frames.sum()} frames in the rows, {records} in the shards")
    ledger = "".join(json.dumps(_ledger_line(row)) + "\n" for row in rows)
    files.write_bytes(root / LEDGER, ledger.encode(), unfinished=_unfinished(root / LEDGER))
    with files.atomic(root / INDEX, unfinished=_unfinished(root / INDEX)) as unfinished, open(unfinished, "wb") as file:
        np.savez(  # stamps every entry of the zip with 1980: same bytes
            file,
            videos=np.array([row["input"] for row in ok], np.str_),
            first_record=np.cumsum(frames) - frames,
            num_frames=frames.astype(np.int32),
            fps=np.array([row["fps"] for row in ok], np.float32),
            height=np.array([row["height"] for row in ok], np.int32),
            width=np.array([row["width"] for row in ok], np.int32),
            label=np.array([row["label"] for row in ok], np.int32),
            class_names=np.array(class_names, np.str_),
            shot_starts=np.array([start for row in ok for start in row["shot_starts"]], np.int32),
            shot_offsets=np.cumsum([0] + [len(row["shot_starts"]) for row in ok], dtype=np.int64),
        )
    meta = {
        "version": FORMAT_VERSION,
        "settings": settings,
        "inputs": len(rows),
        "videos": len(ok),
        "refused": len(rows) - len(ok),
        "frames": int(frames.sum()),
        "shots": sum(len(row["shot_starts"]) for row in ok),
        "shards": shards,
    }
    text = json.dumps(meta, indent=1, sort_keys=True) + "\n"
    files.write_bytes(root / META, text.encode(), unfinished=_unfinished(root / META))


def _ledger_line(row: dict) -> dict:
    line = {
        "input": row["input"],
        "status": row["status"],
        "reason": row["reason"],
        "frames": row.get("frames", 0),
        "shots": len(row.get("shot_starts", [])),
    }
    line |= {key: row[key] for key in ("bytes", "fps", "height", "width", "label") if key in row}
    return line | ({"notes": row["notes"]} if row.get("notes") else {})
