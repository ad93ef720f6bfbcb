"""The frame store: what `input_pipeline.prepare` writes and training reads.

    DIR/frames-00000-of-00003.array_record   one JPEG frame per record; the frames of a video are consecutive
    DIR/index.npz                            per video: first record, frames, rate, size, label, shots
    DIR/checksums.crc32                      CRC-32 of each record, uint32, little-endian
    DIR/ledger.jsonl                         one line per input file: "ok", or "refused" and the reason
    DIR/meta.json                            settings, hashes of all files above, and an id, which is the hash of meta
                                             itself; written last, so its presence means complete
    DIR/.partial/                            only while a preparation is under way, and behind a kill

A store that grows (`prepare --grow`) keeps its shards, and gets new ones behind them: the numbers of its videos and
records stay what they were. One rename, of meta.json, makes it the larger one; the other files follow from .partial.

Records are numbered globally: record r is frame r - first_record[v] of the video v it belongs to. Reading is random
access, so a sampler that wants 3 frames of a video costs 3 reads.

Opening compares meta with its id, the index with its hash and the files' sizes; the first read of a shard compares its
checksums with meta, and every read the record with its checksum. So files that were damaged, swapped or replaced, also
under an open reader, are noticed before a wrong frame is used; `python -m input_pipeline.check` compares whole shards.
Stores of versions 1 and 2 have no hashes: only what their files say of themselves is checked.
"""

import functools
import hashlib
import io
import json
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  compiled

from input_pipeline.buckets.cache import Cache
from input_pipeline.buckets.records import Records
from input_pipeline.storage import is_remote
from vivi_jax import files
from vivi_jax.buckets.client import Folder, NotThere
from vivi_jax.errors import DataError

# 1: shots were looked for among the frames that are kept, and had eight of them or more; files are as in 2.
# 2: no id, hashes and checksums.
FORMAT_VERSION, READABLE_VERSIONS = 3, (1, 2, 3)
OLD_SHOTS = (
    "its shots are those of version 0.1.0, found among the frames that are kept: at few a second they hold cuts; "
    "for losses on shots prepare it again"
)
INDEX, META, LEDGER, PARTIAL, CHECKSUMS = "index.npz", "meta.json", "ledger.jsonl", ".partial", "checksums.crc32"
_COLUMNS = {  # of the index: kind of dtype, whether there is one value for each video
    "videos": ("U", True),
    "first_record": ("i", True),
    "num_frames": ("i", True),
    "fps": ("f", True),
    "height": ("i", True),
    "width": ("i", True),
    "label": ("i", True),
    "class_names": ("U", False),
    "shot_starts": ("i", False),
    "shot_offsets": ("i", False),
}
# JPEG does not compress further, and a group of one record is what makes a single read cheap.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER_BYTES = 32 * 1024
_MAX_OPEN_SHARDS = 256  # one file handle each; the usual limit of a process is 1024
_MAX_CHECKSUMS = 4096  # shards whose checksums are kept: some 64 kB each
# Examples that are begun before their turn where each read takes a trip to a bucket. At 50 ms and 3 frames each: 64 are
# some 4000 frames a second, more than the client has under way.
_AHEAD = 64


class FrameStore:
    """Random access to the frames of a prepared directory. Safe to share between threads.

    The directory may be in a bucket, gs://BUCKET/STORE or s3://BUCKET/STORE: then index and checksums are copied to
    this machine, and frames are read one by one, and kept there too (buckets/cache.py).

    Attributes:
      directory: str.
      meta: dict, the contents of meta.json ("settings" are those `prepare` ran with).
      id: str, what tells the store from any with other frames or settings; "" of stores of versions 1 and 2.
      videos: str[N], path of each video relative to the directory given to `prepare`, sorted; those that were added
        to a complete store follow behind, sorted.
      first_record: int64[N], global record number of frame 0.
      num_frames: int32[N], at least 1.
      fps: float32[N]; frame k of a video is the picture on display k / fps seconds after its first frame.
      height, width: int32[N], pixels.
      label: int32[N] index into class_names, -1 = unlabelled.
      class_names: list of str.
      shot_starts: int32[S], first frame of each shot; shot_offsets: int64[N+1], video v owns
        shot_starts[shot_offsets[v]:shot_offsets[v+1]].
      ahead: int, how many examples a stream does well to begin before their turn: 0 where reading needs no waiting.
      shots_may_hold_cuts: bool; True of stores by version 0.1.0, whose shots have eight frames or more whatever the
        rate, with what was shorter as a part of its neighbour.

    Raises:
      DataError: the directory is missing, not prepared, incomplete, or does not match its index.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = os.fspath(directory)
        if is_remote(self.directory):
            self.meta, arrays, self._root, self._bucket = _read_remote(self.directory)
        else:
            self._root, self._bucket = pathlib.Path(self.directory), None
            self.meta, arrays = _read(self._root)
        root, self.ahead = self._root, _AHEAD if self._bucket else 0
        self.id = self.meta.get("id", "")
        self.shots_may_hold_cuts = self.meta["version"] < 2
        self._shard_paths = [str(root / shard["file"]) for shard in self.meta["shards"]]
        self._shard_offsets = np.cumsum([0] + [shard["records"] for shard in self.meta["shards"]])
        if len(arrays["videos"]) == 0:
            here = self.directory
            raise DataError(f"{here} holds no video: none of the files could be used; {here}/{LEDGER} says why")
        self.videos = arrays["videos"]
        self.first_record, self.num_frames = arrays["first_record"], arrays["num_frames"]
        self.fps, self.height, self.width = arrays["fps"], arrays["height"], arrays["width"]
        self.label, self.class_names = arrays["label"], arrays["class_names"].tolist()
        self.shot_starts, self.shot_offsets = arrays["shot_starts"], arrays["shot_offsets"]
        self._checksums = functools.lru_cache(maxsize=_MAX_CHECKSUMS)(self._read_checksums)
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
          DataError: a record does not match its checksum: it was damaged, or the shard is another than it was.
        """
        records = np.asarray(records)
        flat = records.ravel()
        if flat.size and not (0 <= flat.min() and flat.max() < self._shard_offsets[-1]):
            raise IndexError(f"records {flat.min()}..{flat.max()} of a store of {self._shard_offsets[-1]} records")
        shards = np.searchsorted(self._shard_offsets, flat, side="right") - 1
        positions = flat - self._shard_offsets[shards]
        frames = np.empty(flat.shape, object)
        if self._bucket:  # all of them are under way before the first is waited for
            wanted = zip(shards.tolist(), positions.tolist(), strict=True)
            begun = [self._bucket.begin(shard, at, int(self._checksums(shard)[at])) for shard, at in wanted]
            for i, finish in enumerate(begun):
                frames[i] = finish()
            return frames.reshape(records.shape)
        # One by one: handing the reader a list costs a thread hand-over per record, 1.5 times the time.
        for i, (shard, position) in enumerate(zip(shards.tolist(), positions.tolist(), strict=True)):
            try:
                frames[i] = record = self._reader(shard).read([position])[0]
            except RuntimeError as e:
                raise DataError(self._damaged(shard, f"record {position} is damaged ({e})")) from e
            if self.id and zlib.crc32(record) != self._checksums(shard)[position]:
                raise DataError(self._damaged(shard, f"record {position} is not the one that was written"))
        return frames.reshape(records.shape)

    def _damaged(self, shard: int, what: str) -> str:
        return f"{self._shard_paths[shard]}: {what}; {_REMEDY.format(self.directory)}"

    def _read_checksums(self, shard: int) -> np.ndarray:
        """uint32[records of the shard]."""
        start, stop = self._shard_offsets[shard : shard + 2].tolist()
        path = self._root / CHECKSUMS  # of a store that has grown since it begins with the same
        try:
            found = np.fromfile(located(path.parent, self.meta, CHECKSUMS), "<u4", stop - start, offset=4 * start)
        except FileNotFoundError:  # it was moved to its place this moment
            found = np.fromfile(path, "<u4", stop - start, offset=4 * start)
        if zlib.crc32(found.tobytes()) != self.meta["shards"][shard]["checksums"]:
            raise DataError(f"{path} is damaged, or of another store; {_REMEDY.format(self.directory)}")
        return found

    def _open_shard(self, shard: int):
        return array_record_module.ArrayRecordReader(
            self._shard_paths[shard], _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER_BYTES
        )


# Of a file that is not as it was written: what to do.
_REMEDY = (
    "copy it again from where it came; python -m input_pipeline.check {0} looks at all of the store; or delete {0} and "
    "prepare it again"
)


def _read(root: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What meta.json and the index hold, of one state of a store that may be growing."""

    def read() -> tuple[dict, dict[str, np.ndarray]]:
        meta = read_meta(root)
        check_shards(root, meta["shards"])
        if "files" in meta:
            check_size(located(root, meta, CHECKSUMS), meta["files"][CHECKSUMS]["bytes"])
        return meta, read_index(root, meta)

    try:
        return read()
    except DataError:  # damaged; or it has grown between two of the files
        return read()


def remote_meta(folder: Folder) -> bytes:
    """The bytes of the meta.json of a store in a bucket.

    Raises:
      DataError: there is none, or it cannot be read.
    """
    try:
        return folder.read(META)
    except NotThere:
        there = folder.names()  # raises if there is no such bucket
        what = f"holds no frame store (it has no {META})" if there else "is empty, or not there"
        raise DataError(
            f"{folder.address} {what}; copy one there that was made from videos with: "
            "python -m input_pipeline.prepare --videos=VIDEOS --out=STORE"
        ) from None


def _read_remote(address: str) -> tuple[dict, dict[str, np.ndarray], pathlib.Path, Records]:
    """Of a store in a bucket: what meta.json and the index hold, where copies of its small files are, its records."""
    folder = Folder(address)
    meta = parse_meta(remote_meta(folder), folder.address)
    if "id" not in meta:
        raise DataError(
            f"{address} is of format version {meta['version']}, without checksums, and such stores are read from local "
            "disks only; prepare it again, or copy it"
        )
    there = folder.names()
    if missing := [shard["file"] for shard in meta["shards"] if shard["file"] not in there]:
        raise DataError(f"{address}: {missing[0]} is missing, one of {len(missing)} shards; copy the store there again")
    cache = Cache(meta["id"])
    for name in (INDEX, CHECKSUMS):
        path, wanted = cache.directory / name, meta["files"][name]["sha256"]
        if path.is_file() and files.sha256(path) == wanted:
            continue
        data = folder.read(name)
        if hashlib.sha256(data).hexdigest() != wanted:
            raise DataError(f"{address}/{name} is damaged, or of another store; copy the store there again")
        files.write_bytes(path, data)
    remedy = "copy the store there again"
    return meta, read_index(cache.directory, meta), cache.directory, Records(folder, cache, meta["shards"], remedy)


def located(root: pathlib.Path, meta: dict, name: str) -> pathlib.Path:
    """Where a file is that meta.json has a hash of: also where a growth was killed before it was in its place."""
    waiting = root / PARTIAL / name
    try:
        if waiting.stat().st_size == meta["files"][name]["bytes"]:
            return waiting if files.sha256(waiting) == meta["files"][name]["sha256"] else root / name
    except (OSError, KeyError):  # it is not there, or of a store without hashes
        pass
    return root / name


def identity_for_runs(meta: bytes) -> str:
    """SHA-256 of the description of a store, whose beginning a run keeps of it.

    Args:
      meta: the bytes of meta.json.
    """
    return hashlib.sha256(META.encode() + b"\0" + meta).hexdigest()


def parts_of(inputs: int, grown: Sequence[dict]) -> list[int]:
    """How many inputs a store was made of, and how many were added each time it grew.

    Args:
      inputs: all of them.
      grown: see write_index.
    """
    return np.diff([*(former["inputs"] for former in grown), inputs], prepend=0).tolist()


def read_meta(root: pathlib.Path) -> dict:
    """The contents of meta.json of a complete store, with the types of all that is used of it checked.

    Raises:
      DataError: no store there, an incomplete one, or one whose meta.json is damaged or of a later version.
    """
    prepare = f"python -m input_pipeline.prepare --videos=VIDEOS --out={root}"
    if not root.is_dir():
        raise DataError(f"no such directory: {root}; make it from videos with: {prepare}")
    if not (root / META).is_file():
        if (root / PARTIAL).is_dir():
            raise DataError(f"the preparation of {root} was not finished; run its command again, it goes on: {prepare}")
        prepare = prepare.replace(f"--out={root}", "--out=STORE") if any(root.iterdir()) else prepare
        raise DataError(f"{root} is not a frame store (it has no {META}); make one from videos with: {prepare}")
    return parse_meta((root / META).read_bytes(), str(root))


def parse_meta(data: bytes, root: str) -> dict:
    """read_meta, of the bytes of a meta.json."""
    path = f"{root.rstrip('/')}/{META}"
    try:
        meta = json.loads(data)
        version = meta["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise DataError(f"cannot read {path} ({e!r}); {_REMEDY.format(root)}") from e
    if version not in READABLE_VERSIONS:
        raise DataError(
            f"{root} has format version {version}, this code reads {', '.join(map(str, READABLE_VERSIONS))}; "
            f"prepare it again: python -m input_pipeline.prepare --videos=VIDEOS --out={root}"
        )
    has_id = isinstance(meta.get("id"), str)
    if has_id and meta["id"] != identity_of(meta) or not has_id and version > 2:
        raise DataError(f"{path} was damaged or changed: it does not fit its id; {_REMEDY.format(root)}")
    if wrong := _wrong_in_meta(meta, with_hashes=has_id):
        raise DataError(f"cannot read {path}: {wrong}; {_REMEDY.format(root)}")
    return meta


def identity_of(meta: dict) -> str:
    """What the "id" of the contents of a meta.json must be."""
    return files.digest({key: value for key, value in meta.items() if key != "id"})


def _wrong_in_meta(meta: dict, *, with_hashes: bool) -> str | None:
    """The first value without the type it must have."""
    wanted: dict[str, type] = {"settings": dict, "inputs": int, "videos": int, "frames": int, "shards": list}
    if with_hashes:
        wanted["files"] = dict
    for key, kind in wanted.items():
        if not isinstance(meta.get(key), kind):
            return f"it has no {key}" if key not in meta else f"its {key} are {meta[key]!r:.100}"
    columns = {"records": int, "bytes": int} | ({"sha256": str, "checksums": int} if with_hashes else {})
    for number, shard in enumerate(meta["shards"]):
        name, count = shard.get("file") if isinstance(shard, dict) else None, len(meta["shards"])
        found = SHARD_NAME.fullmatch(name) if isinstance(name, str) else None
        of = int(found["of"]) if found else 0  # in a grown store it may be the count when the shard was made
        former = bool(meta.get("grown")) and number + 1 < count and number < of < count
        if not found or name != shard_name(number, of) or not (of == count or former):
            return f"shard {number} is not named {shard_name(number, count)}"
        for key, kind in columns.items():
            if not isinstance(shard.get(key), kind) or (kind is int and shard[key] < 0):
                return f"{key} of shard {number} is {shard.get(key)!r:.100}"
    for name in (INDEX, LEDGER, CHECKSUMS) if with_hashes else ():
        entry = meta["files"].get(name)
        if not (
            isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)
        ):
            return f"it has no hash of {name}"
    inputs, grown = 0, meta.get("grown", [])
    for former in [*grown, {"inputs": meta["inputs"], "identity": ""}] if isinstance(grown, list) else [None]:
        if not (
            isinstance(former, dict)
            and isinstance(former.get("identity"), str)
            and isinstance(former.get("inputs"), int)
            and inputs <= former["inputs"]
        ):
            return f"it says {grown!r:.100} of how it has grown"
        inputs = former["inputs"]
    return None


def read_ledger(root: pathlib.Path, meta: dict) -> list[dict]:
    """parse_ledger, of a store on this machine."""
    return parse_ledger(located(root, meta, LEDGER).read_bytes(), meta, str(root))


def parse_ledger(data: bytes, meta: dict, root: str) -> list[dict]:
    """The lines of a complete store's ledger.jsonl.

    Raises:
      DataError: it was cut or changed.
    """
    path, rows = f"{root.rstrip('/')}/{LEDGER}", []
    remedy = f"training does not need it, but what it says of the inputs is not sure; {_REMEDY.format(root)}"
    if "files" in meta and hashlib.sha256(data).hexdigest() != meta["files"][LEDGER]["sha256"]:
        raise DataError(f"{path} was cut or changed since it was written; {remedy}")
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row["input"], str) or row["status"] not in ("ok", "refused"):
                raise ValueError("no line of a ledger")
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise DataError(f"{path}: line {number} is damaged ({e!r}); {remedy}") from None
        rows.append(row)
    if len(rows) != meta["inputs"]:
        raise DataError(f"{path} has {len(rows)} lines for {meta['inputs']} inputs: it was cut; {remedy}")
    return rows


def check_shards(root: pathlib.Path, shards: list[dict]) -> None:
    """Raises DataError unless all shards are there, with the sizes they must have."""
    for shard in shards:
        check_size(root / shard["file"], shard["bytes"])


def check_size(path: pathlib.Path, expected: int) -> None:
    """Raises DataError unless a file of a store is there and has the size it must have."""
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise DataError(f"{path} {found}, {expected} expected; {_REMEDY.format(path.parent)}")


def read_index(root: pathlib.Path, meta: dict) -> dict[str, np.ndarray]:
    """The columns of index.npz."""
    path = located(root, meta, INDEX)
    try:
        if "files" in meta:
            check_size(path, meta["files"][INDEX]["bytes"])
        data = path.read_bytes()
        if "files" in meta and hashlib.sha256(data).hexdigest() != meta["files"][INDEX]["sha256"]:
            raise DataError(f"{path} is damaged, or of another store; {_REMEDY.format(root)}")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # savez does not compress: what does may be of any size
            if any(entry.file_size > entry.compress_size for entry in archive.infolist()):
                raise ValueError("it is compressed, which prepare never does")
        with np.load(io.BytesIO(data), allow_pickle=False) as index:
            arrays = {name: index[name] for name in index.files}
        if wrong := _wrong_in_index(arrays, sum(shard["records"] for shard in meta["shards"])):
            raise ValueError(wrong)
    except DataError:
        raise
    except Exception as e:  # zipfile, zlib, NumPy and OS errors all mean the same to the user
        raise DataError(f"cannot read {path} ({e}); {_REMEDY.format(root)}") from e
    return arrays


def shots_of_videos(index: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The first frames of the shots of each video, of what read_index returned."""
    return np.split(index["shot_starts"], index["shot_offsets"][1:-1]) if len(index["videos"]) else []


def _wrong_in_index(arrays: dict[str, np.ndarray], records: int) -> str | None:
    """The first column that is not what it must be: values that fit are needed to find a frame at all."""
    for name, (kind, of_videos) in _COLUMNS.items():
        if name not in arrays:
            return f"it has no column {name}"
        found = arrays[name]
        if found.dtype.kind != kind or found.ndim != 1 or (of_videos and len(found) != len(arrays["videos"])):
            return f"its column {name} is {found.dtype}{list(found.shape)}"
    frames, offsets, starts = arrays["num_frames"].astype(np.int64), arrays["shot_offsets"], arrays["shot_starts"]
    if len(frames) and frames.min() < 1 or not np.array_equal(arrays["first_record"], np.cumsum(frames) - frames):
        return "its videos do not follow one another"
    if frames.sum() != records:
        return f"it has {frames.sum()} frames, the shards {records}: it is of another store"
    if not (np.isfinite(arrays["fps"]).all() and (arrays["fps"] > 0).all()):
        return "a rate is not above 0"
    if len(frames) and not (-1 <= arrays["label"].min() and arrays["label"].max() < len(arrays["class_names"])):
        return "a label has no class"
    if len(offsets) != len(frames) + 1 or offsets[0] != 0 or offsets[-1] != len(starts) or (np.diff(offsets) < 1).any():
        return "its shots do not follow one another"
    ends = np.append(starts[1:], 0)
    ends[offsets[1:] - 1] = frames  # of the last shot of each video
    if (starts[offsets[:-1]] != 0).any() or (ends <= starts).any():
        return "a shot has no frames"
    return None


def shard_name(shard: int, num_shards: int) -> str:
    return f"frames-{shard:05d}-of-{num_shards:05d}.array_record"


SHARD_NAME = re.compile(r"frames-\d{5,}-of-(?P<of>\d{5,})\.array_record")


def write_shard(path: str | os.PathLike, records: Iterable[bytes]) -> tuple[dict, list[int]]:
    """Writes one shard so that `path` is either absent or complete.

    Returns:
      Its line in the table of shards, and the CRC-32 of each record; both are what write_index wants.

    Raises:
      OSError: the disk is full or not writable.
    """
    checksums = []
    with files.atomic(path, unfinished=_unfinished(path)) as unfinished:
        try:
            writer = array_record_module.ArrayRecordWriter(str(unfinished), _WRITER_OPTIONS)
            for record in records:
                writer.write(record)
                checksums.append(zlib.crc32(record))
            writer.close()
        except RuntimeError as e:  # the writer's only error; its first line holds the system's reason
            raise OSError(f"cannot write {path}: {e}".splitlines()[0]) from e
    shard = {
        "file": os.path.basename(path),
        "records": len(checksums),
        "bytes": os.path.getsize(path),
        "sha256": files.sha256(path),
        "checksums": zlib.crc32(np.array(checksums, "<u4").tobytes()),
    }
    return shard, checksums


def _unfinished(path: str | os.PathLike) -> str:
    """Always the same name, so that what a kill leaves behind is written over by the next run."""
    return f"{os.fspath(path)}.partial"


def write_index(
    directory: str | os.PathLike,
    *,
    settings: dict,
    shards: list[dict],
    checksums: list[Sequence[int] | np.ndarray],
    rows: list[dict],
    class_names: list[str],
    grown: Sequence[dict] = (),
) -> None:
    """Writes ledger, index, checksums and meta, in this order: the presence of meta.json means that all is there.

    Args:
      settings: JSON values `prepare` ran with; kept in meta.json.
      shards, checksums: what write_shard returned for each, in record order.
      rows: one per input file, in record order: {"input": str, "status": "ok" | "refused", "reason": str}, optionally
        "bytes" int, the size of the file, "retry" True where another try may go well, and, if ok, "frames" int, "fps"
        float, "height", "width" int, "shot_starts"
        list of int (first 0), "label" int (-1 = unlabelled), and, if any, "notes" list of str, what is unusual.
      class_names: names of the labels.
      grown: for each time that the store grew {"inputs": int, how many it had before, "identity": str, its
        identity_for_runs then}.
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
    crcs = b"".join(np.asarray(part, "<u4").tobytes() for part in checksums)
    files.write_bytes(root / CHECKSUMS, crcs, unfinished=_unfinished(root / CHECKSUMS))
    meta = {
        "version": FORMAT_VERSION,
        "settings": settings,
        "inputs": len(rows),
        "videos": len(ok),
        "refused": len(rows) - len(ok),
        "frames": int(frames.sum()),
        "shots": sum(len(row["shot_starts"]) for row in ok),
        "shards": shards,
        "files": {
            name: {"bytes": (root / name).stat().st_size, "sha256": files.sha256(root / name)}
            for name in (LEDGER, INDEX, CHECKSUMS)
        },
    }
    if grown:
        meta["grown"] = list(grown)
    meta["id"] = identity_of(meta)
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
    line |= {key: row[key] for key in ("bytes", "retry", "fps", "height", "width", "label") if key in row}
    return line | ({"notes": row["notes"]} if row.get("notes") else {})
