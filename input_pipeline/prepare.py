"""Prepares videos for training: decodes them once, finds their shots, writes a frame store.

    python -m input_pipeline.prepare --videos=DIR_OR_GLOB --out=DIR [--labels=CSV] [--workers=N] [--contact_sheet]

Every file under DIR (hidden ones apart) is an input, and every input has one line in OUT/ledger.jsonl: ok, or refused
and why. Started again after a kill, a crash or a full disk, the same command goes on where it was. The files written
do not depend on the number of workers or of interruptions (a file near its time limit may).

    inputs -> sandbox.Sandbox: frames of one video in OUT/.partial/I.jpegs, then its row in I.json
           -> a shard for each `videos_per_shard` inputs, in sorted order, then its rows in .partial/rows-S.json
           -> ledger, index and meta; .partial goes
"""
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import pathlib
import queue
import shutil
import sys
import time
from collections.abc import Callable, Iterator

import av
import cv2
import tqdm
from absl import app, flags

from input_pipeline import inputs, shots, store
from input_pipeline.sandbox import Sandbox
from input_pipeline.store import DataError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the bytes of a store, next to its inputs. Kept in meta.json."""
    fps: float = 25.0
    short_side: int = 256
    jpeg_quality: int = 95
    shot_rule: str = "auto"
    min_shot_frames: int = shots.MIN_SHOT_FRAMES
    videos_per_shard: int = 64
    memory_mb: int = 2048
    cpu_s: int = 1800
    wall_s: float = 3600.0

    def __post_init__(self):
        rules = ["auto", *shots.RULES]
        if self.shot_rule not in rules:
            raise DataError(f"shot_rule={self.shot_rule}: choose one of {', '.join(rules)}")
        if not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"jpeg_quality={self.jpeg_quality}: give 1 to 100")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not 0 < value < math.inf:
                raise DataError(f"{field.name}={value}: give a positive number")

    @property
    def decoding(self) -> dict:
        """Arguments of video.decode_file."""
        return {name: getattr(self, name)
                for name in ("fps", "short_side", "jpeg_quality", "shot_rule", "min_shot_frames")}

    @property
    def limits(self) -> dict:
        """Arguments of sandbox.Sandbox."""
        return {name: getattr(self, name) for name in ("memory_mb", "cpu_s", "wall_s")}


def prepare(videos: str, out: str, settings: Settings = Settings(), *, labels: str = "",
            workers: int | None = None) -> bool:
    """Makes the frame store `out` from `videos`; does nothing where it is complete.

    Args:
      videos: a directory, searched recursively, or a glob pattern.
      labels: "" for none, "folder" for the name of the folder each file is in, or a CSV file: see inputs.read_labels.
      workers: files decoded at a time; default: the cores this process may use.

    Returns:
      False if the store was complete already.

    Raises:
      DataError: no inputs; `out` was begun with other inputs or settings, is in use, or cannot be written.
    """
    files = inputs.find(videos, out)
    label_of, class_names, digest = inputs.read_labels(labels, [file.name for file in files])
    plan = {"settings": dataclasses.asdict(settings) | {"labels": digest}, "software": _software(),
            "inputs": [[file.name, file.bytes] for file in files]}
    root = pathlib.Path(out)
    if (root / store.META).is_file():
        _check_complete(root, plan)
        shutil.rmtree(root / store.PARTIAL, ignore_errors=True)  # killed between the last two steps
        return False
    try:
        with _begin(root, plan) as partial:
            shards, rows = _decode_all(root, partial, files, settings, workers or len(os.sched_getaffinity(0)))
            rows = [row | ({"label": label_of[i]} if row["status"] == "ok" else {}) for i, row in enumerate(rows)]
            store.write_index(root, settings=plan["settings"] | {"software": plan["software"]}, shards=shards,
                              rows=rows, class_names=class_names)
            shutil.rmtree(partial)
    except OSError as e:
        raise DataError(f"cannot write to {out}: {e.strerror or e}; what is done is kept: make room, or make it "
                        "writable, and run the same command again") from e
    return True


def _software() -> dict:
    """Versions that the bytes depend on."""
    return {"av": av.__version__, "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
            "opencv": cv2.__version__}


@contextlib.contextmanager
def _begin(root: pathlib.Path, plan: dict) -> Iterator[pathlib.Path]:
    """Yields the directory of work in progress, locked, after a check that it is of the same plan."""
    partial = root / store.PARTIAL
    if root.exists() and not partial.exists() and any(root.iterdir()):
        raise DataError(f"{root} is neither empty nor a frame store; give a new directory as --out")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise DataError(f"another preparation is writing to {root}; wait for it, or end it") from e
        path = partial / "plan.json"
        if path.exists():
            begun = json.loads(path.read_text())
            _check_same(root, begun["settings"] | begun["software"], plan["settings"] | plan["software"])
            _check_inputs(root, begun["inputs"], plan["inputs"])
        else:
            store.write_file(path, json.dumps(plan).encode())
        yield partial


def _check_complete(root: pathlib.Path, plan: dict) -> None:
    settings = store.FrameStore(root).meta["settings"]
    _check_same(root, {key: value for key, value in settings.items() if key != "software"}, plan["settings"])
    lines = (root / store.LEDGER).read_text().splitlines()
    _check_inputs(root, [[row["input"], row["bytes"]] for row in map(json.loads, lines)], plan["inputs"])


def _check_same(root: pathlib.Path, begun: dict, now: dict) -> None:
    for key in sorted(begun | now):
        if begun.get(key) != now.get(key):
            raise DataError(f"{root} was begun with {key}={begun.get(key)}, this run has {key}={now.get(key)}; "
                            "give another --out, or delete the old one")


def _check_inputs(root: pathlib.Path, begun: list, now: list) -> None:
    begun, now = dict(begun), dict(now)
    new, gone = sorted(now.keys() - begun.keys()), sorted(begun.keys() - now.keys())
    changed = sorted(name for name in now.keys() & begun.keys() if now[name] != begun[name])
    if new or gone or changed:
        raise DataError(f"the input files are not those {root} was begun with: {len(new)} new, {len(gone)} gone, "
                        f"{len(changed)} of another size (such as {(new + gone + changed)[0]}); give another --out, "
                        "or delete the old one")


def _decode_all(root: pathlib.Path, partial: pathlib.Path, files: list[inputs.Input], settings: Settings,
                workers: int) -> tuple[list[dict], list[dict]]:
    """(shard table, one row per file), both for store.write_index."""
    starts = range(0, len(files), settings.videos_per_shard)
    ahead = 4 + 2 * workers // settings.videos_per_shard  # shards in work, so that one long video stops nobody
    shards, rows, waiting = [], [], collections.deque()
    with _pool(workers, settings) as submit, _progress(len(files)) as done:
        for shard in range(len(starts) + ahead):
            if shard < len(starts):
                members = range(starts[shard], min(starts[shard] + settings.videos_per_shard, len(files)))
                if _rows_path(partial, shard).exists():  # by an earlier run
                    done(len(members))
                    waiting.append(None)
                else:
                    waiting.append([submit(_decode_one, partial, i, files[i], settings, done) for i in members])
            if shard >= ahead:
                futures = waiting.popleft()
                if futures is not None:
                    _pack(root, partial, shard - ahead, len(starts), starts[shard - ahead],
                          [future.result() for future in futures])
                packed = json.loads(_rows_path(partial, shard - ahead).read_text())
                shards.append(packed["shard"])
                rows.extend(packed["rows"])
    return shards, rows


@contextlib.contextmanager
def _pool(workers: int, settings: Settings) -> Iterator[Callable]:
    """Yields submit(function, *args) -> future; the function gets a free sandbox as its first argument."""
    sandboxes = [Sandbox(**settings.limits) for _ in range(workers)]
    free = queue.SimpleQueue()
    for sandbox in sandboxes:
        free.put(sandbox)

    def call(function, *args):
        sandbox = free.get()
        try:
            return function(sandbox, *args)
        finally:
            free.put(sandbox)

    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        yield lambda function, *args: pool.submit(call, function, *args)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for sandbox in sandboxes:  # on an error or Ctrl-C this also ends what is being decoded
            sandbox.close()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable]:
    """Yields done(n); a bar on a terminal, a line a minute in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 60
    with tqdm.tqdm(total=total, unit="file", mininterval=interval, maxinterval=interval, dynamic_ncols=True) as bar:
        yield bar.update


def _decode_one(sandbox: Sandbox, partial: pathlib.Path, index: int, file: inputs.Input, settings: Settings,
                done: Callable) -> dict:
    """Row of one file, with its frames in the spool; the presence of the row's file says that both are complete."""
    path = _row_path(partial, index)
    if path.exists():
        row = json.loads(path.read_text())
    else:
        spool = _spool_path(partial, index)
        row = {"input": file.name, "bytes": file.bytes} | sandbox.decode(file.path, str(spool), **settings.decoding)
        if row["status"] == "refused":
            spool.unlink(missing_ok=True)
        store.write_file(path, json.dumps(row).encode())
    done(1)
    return row


def _pack(root: pathlib.Path, partial: pathlib.Path, shard: int, num_shards: int, start: int, rows: list[dict]) -> None:
    """Moves the frames of consecutive files, the first of which is number `start`, from their spools to a shard."""
    path = root / store.shard_name(shard, num_shards)
    spools = (_read_spool(_spool_path(partial, start + i), row["jpeg_bytes"])
              for i, row in enumerate(rows) if row["status"] == "ok")
    records = store.write_shard(path, itertools.chain.from_iterable(spools))
    packed = {"shard": {"file": path.name, "records": records, "bytes": path.stat().st_size},
              "rows": [{key: value for key, value in row.items() if key != "jpeg_bytes"} for row in rows]}
    store.write_file(_rows_path(partial, shard), json.dumps(packed).encode())
    for i in range(start, start + len(rows)):
        _spool_path(partial, i).unlink(missing_ok=True)
        _row_path(partial, i).unlink(missing_ok=True)


def _read_spool(path: pathlib.Path, lengths: list[int]) -> Iterator[bytes]:
    with open(path, "rb") as f:
        for length in lengths:
            yield f.read(length)


def _spool_path(partial: pathlib.Path, index: int) -> pathlib.Path:
    return partial / f"{index:08d}.jpegs"


def _row_path(partial: pathlib.Path, index: int) -> pathlib.Path:
    return partial / f"{index:08d}.json"


def _rows_path(partial: pathlib.Path, shard: int) -> pathlib.Path:
    return partial / f"rows-{shard:05d}.json"


def summary(root: pathlib.Path) -> str:
    """What a complete store holds and what was refused, for people."""
    rows = [json.loads(line) for line in (root / store.LEDGER).read_text().splitlines()]
    ok = [row for row in rows if row["status"] == "ok"]
    reasons = collections.Counter(row["reason"].split(":")[0] for row in rows if row["status"] == "refused")
    seconds = sum(row["frames"] / row["fps"] for row in ok)
    lines = [f"{len(rows):>9,} inputs", f"{len(ok):>9,} ok"]
    lines += [f"{count:>9,} refused: {reason}" for reason, count in reasons.most_common()]
    lines += [f"{sum(row['frames'] for row in ok):>9,} frames, {seconds:,.0f} s of video",
              f"{sum(row['shots'] for row in ok):>9,} shots"]
    if any(row["label"] >= 0 for row in ok):
        lines.append(f"{sum(row['label'] >= 0 for row in ok):>9,} videos with a label")
    if reasons:
        lines.append(f"why each file was refused: {root / store.LEDGER}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    started = time.monotonic()
    try:
        if len(argv) > 1:
            raise DataError(f"unexpected argument {argv[1]}; quote the pattern: --videos='DIR/*.mp4'")
        settings = Settings(**{field.name: values[field.name].value for field in dataclasses.fields(Settings)})
        made = prepare(values.videos, values.out, settings, labels=values.labels, workers=values.workers)
        print(summary(pathlib.Path(values.out)))
        if values.contact_sheet:
            from input_pipeline import contact_sheet  # fonts and drawing: only where asked for
            print(f"contact sheet: {contact_sheet.write(values.out)}")
        print(f"{values.out}: " + (f"written in {time.monotonic() - started:.0f} s" if made else
                                   "was complete already; nothing to do"))
        store.FrameStore(values.out)  # refuses a store without a single video
    except DataError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again, it goes on")


def _define_flags() -> None:
    """Only when run as a program: other programs have flags of the same names."""
    default = Settings()
    flags.DEFINE_string("videos", None, "directory, searched recursively, or quoted glob pattern", required=True)
    flags.DEFINE_string("out", None, "directory to write the frame store to", required=True)
    flags.DEFINE_string("labels", "", "CSV file with columns video,label; or the word: folder")
    flags.DEFINE_integer("workers", None, "files decoded at a time; default: one per core", lower_bound=1)
    flags.DEFINE_bool("contact_sheet", False, "also write OUT/contact_sheet.png, a picture of the shots found")
    flags.DEFINE_float("fps", default.fps, "frames per second kept; never more than the video has")
    flags.DEFINE_integer("short_side", default.short_side, "pixels of the short side; smaller videos keep their size")
    flags.DEFINE_integer("jpeg_quality", default.jpeg_quality, "1 to 100")
    flags.DEFINE_enum("shot_rule", default.shot_rule, ["auto", *shots.RULES], "how cuts are found, see shots.py")
    flags.DEFINE_integer("min_shot_frames", default.min_shot_frames, "shortest shot, frames")
    flags.DEFINE_integer("videos_per_shard", default.videos_per_shard, "input files per shard of the store")
    flags.DEFINE_integer("memory_mb", default.memory_mb, "limit per file: address space, MiB")
    flags.DEFINE_integer("cpu_s", default.cpu_s, "limit per file: CPU time, seconds")
    flags.DEFINE_float("wall_s", default.wall_s, "limit per file: wall time, seconds")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
