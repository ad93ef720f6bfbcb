"""Preparation on one machine: videos are decoded in parallel child processes and packed into the shards of a store."""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import logging
import os
import pathlib
import queue
import sys
from collections.abc import Callable, Iterator

import numpy as np
import tqdm

from input_pipeline import storage, store
from input_pipeline.preparation import steps
from input_pipeline.preparation.sandbox import Sandbox
from input_pipeline.preparation.steps import Plan, Settings, frame_file_path, row_path
from vivi_jax import files
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
DEFAULT = Settings()
_TRIES = 2  # alone
_IN_LEDGER = ("input", "bytes", "status", "reason", "retry", "frames", "fps", "height", "width", "notes")


def prepare(
    videos: str,
    out: str,
    settings: Settings = DEFAULT,
    *,
    labels: str = "",
    labelled_only: bool = False,
    only: str = "",
    workers: int | None = None,
    retry: bool = False,
    grow: bool = False,
) -> bool:
    """Makes the frame store `out` from `videos`; does nothing where it is complete.

    Args:
      videos: a directory, searched recursively, or a glob pattern.
      labels: "" for none, "folder" for the name of the folder each file is in, or a CSV file: see inputs.read_labels.
      labelled_only: files without a label are left out.
      only: "" for all files, or a list of those to use: see inputs.take_listed.
      workers: files decoded at a time; default: the cores this process may use.
      retry: of a complete store, decode the files that are for another try. If any is better now, the store becomes
        another one, with another id: runs begun with the former one do not go on with it.
      grow: decode the files that a complete store lacks, and add them behind what it has, which stays, also of files
        that are gone or changed. It can be read at every moment, and then is another one, with another id.

    Returns:
      False if the store was complete already, and stays as it is.

    Raises:
      DataError: no inputs; `out` was begun with other inputs or settings, is in use, or cannot be written.
    """
    for path in (videos, out):
        if storage.is_remote(path):
            raise DataError(f"{path} is in a bucket: use python -m input_pipeline.prepare_beam, with the same flags")
    plan = steps.make_plan(videos, out, settings, labels=labels, labelled_only=labelled_only, only=only, grow=grow)
    try:
        complete = steps.is_complete(out, plan, grow=grow)
        if grow:
            print("\n".join(steps.changes(plan)))
        if complete and not (retry and _try_again(pathlib.Path(out), plan)):
            steps.remove_left(out)
            return False
        if complete:
            plan = plan._replace(former=None)  # it is under way again
        with steps.begin(out, plan) as partial:
            stored = _stored(pathlib.Path(out), plan) if plan.former else []
            _decode_all(
                pathlib.Path(out), pathlib.Path(partial), plan, workers or len(os.sched_getaffinity(0)), len(stored)
            )
            new = (steps.read_packed(out, plan, shard) for shard in range(len(stored), len(plan.shards)))
            steps.finish(out, plan, itertools.chain(stored, new))
    except OSError as e:
        raise DataError(cannot_write(out, e)) from e
    return True


def _try_again(root: pathlib.Path, plan: Plan) -> bool:
    """Decodes what a complete store lacks through no fault of its own, one file at a time.

    Returns:
      Whether there is more now than before: the store is then one that is under way, with all but the shards of these
      files made.
    """
    if not worth_another_try(root, plan):
        return False
    partial = pathlib.Path(steps.partial_of(str(root)))
    partial.mkdir(exist_ok=True)
    with steps.locked(str(root), str(partial)), pool(1, plan.settings.limits) as submit:
        numbers = worth_another_try(root, plan)  # as the store is now, which nobody else changes
        with progress(len(numbers)) as done:
            rows = [submit(_decode_one, partial, i, plan, done, _TRIES).result() for i in numbers]
        better = [i for i, row in zip(numbers, rows, strict=True) if not row.get("retry")]
        if better:
            reopen(root, partial, plan, better)
        else:
            storage.remove_tree(str(partial))
    return bool(better)


def cannot_write(out: str, error: OSError) -> str:
    return (
        f"cannot write to {out}: {error.strerror or error}; what is done is kept: make room, or make it writable, "
        "and run the same command again"
    )


def _decode_all(root: pathlib.Path, partial: pathlib.Path, plan: Plan, workers: int, stored: int) -> None:
    """Makes all shards that are not made yet, behind the first ones, which the store has.

    A file whose decoder was killed, or was too slow without using its CPU time, waits until all else is done, and then
    is decoded alone.
    """
    shards, settings = plan.shards, plan.settings
    ahead = (
        4 + 2 * workers // settings.videos_per_shard
    )  # shards under way, so that one long video does not hold up the others
    waiting, later = collections.deque(), []
    with pool(workers, settings.limits) as submit, progress(sum(map(len, shards[stored:]))) as done:

        def pack(shard: int, rows: list[dict]) -> None:
            while True:
                try:
                    return _pack(root, partial, shard, plan, rows)
                except steps.FramesDamaged as damaged:  # between a kill and this start
                    number = damaged.args[0]
                    row_path(partial, shards[shard][number]).unlink()
                    rows[number] = submit(_decode_one, partial, shards[shard][number], plan, done, _TRIES).result()

        for shard in range(stored, len(shards) + ahead):
            if shard < len(shards):
                if steps.read_packed(str(root), plan, shard):  # by an earlier run
                    done(len(shards[shard]))
                    waiting.append(None)
                else:
                    waiting.append([submit(_decode_one, partial, i, plan, done) for i in shards[shard]])
            if shard >= stored + ahead and (futures := waiting.popleft()) is not None:
                rows = [future.result() for future in futures]
                if any(row.get("retry") for row in rows):
                    later.append((shard - ahead, rows))
                else:
                    pack(shard - ahead, rows)
        for shard, rows in later:
            for number, row in enumerate(rows):
                if row.get("retry"):
                    _LOG.info("%s: %s; once more, alone", row["input"], row["reason"])
                    rows[number] = submit(
                        _decode_one, partial, shards[shard][number], plan, lambda n: None, _TRIES
                    ).result()
            pack(shard, rows)


@contextlib.contextmanager
def pool(workers: int, limits: dict) -> Iterator[Callable]:
    """Yields submit(function, *args) -> future; the function gets a free sandbox as its first argument."""
    sandboxes = [Sandbox(**limits) for _ in range(workers)]
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
def progress(total: int, unit: str = "file") -> Iterator[Callable]:
    """Yields done(n); a bar on a terminal, a line a minute in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 60
    with tqdm.tqdm(
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
    ) as bar:
        yield bar.update


def _decode_one(
    sandbox: Sandbox, partial: pathlib.Path, index: int, plan: Plan, done: Callable, tries: int = 1
) -> dict:
    """Row of one file, and its frames in a frame file; the presence of the row's file says that both are complete.

    A row that another try may better is returned, and not kept.
    """
    path, frame_file = row_path(partial, index), frame_file_path(partial, index)
    row = steps.unsealed_part(path.read_bytes(), plan.id) if path.exists() else None
    if row is None or not _has_its_frames(row, frame_file):
        file = plan.inputs[index]
        row = steps.decode(sandbox, file, file.path, str(frame_file), plan.settings, tries=tries)
        if row.get("retry"):
            path.unlink(missing_ok=True)
        else:
            files.write_bytes(path, steps.sealed_part(row, plan.id))
    done(1)
    return row


def _has_its_frames(row: dict, frame_file: pathlib.Path) -> bool:
    """Whether there are as many bytes as the row says; what they are is compared when they are packed."""
    if row["status"] != "ok":
        return True
    return frame_file.is_file() and frame_file.stat().st_size == sum(row["jpeg_bytes"])


def _pack(root: pathlib.Path, partial: pathlib.Path, shard: int, plan: Plan, rows: list[dict]) -> None:
    """Moves the frames of consecutive inputs from their frame files to a shard."""
    members = plan.shards[shard]
    path = root / store.shard_name(shard, len(plan.shards))
    packed = steps.pack(
        str(path), ((row, str(frame_file_path(partial, i))) for i, row in zip(members, rows, strict=True))
    )
    files.write_bytes(_rows_path(partial, shard), steps.sealed_part(packed, plan.id))
    for i in members:
        frame_file_path(partial, i).unlink(missing_ok=True)
        row_path(partial, i).unlink(missing_ok=True)


def _rows_path(partial: pathlib.Path, shard: int) -> pathlib.Path:
    return pathlib.Path(steps.rows_path(str(partial), shard))


def worth_another_try(root: pathlib.Path, plan: Plan) -> list[int]:
    """Numbers of the inputs of a complete store that are; none where it was made with other software."""
    meta = store.read_meta(root)
    if meta["settings"].get("software") != plan.identity["software"]:
        return []
    rows = store.read_ledger(root, meta)
    return [i for i, row in enumerate(rows) if row.get("retry") and os.path.exists(plan.inputs[i].path)]


def reopen(root: pathlib.Path, partial: pathlib.Path, plan: Plan, better: list[int]) -> None:
    """Makes of a complete store one that is under way: all shards but those of some inputs count as made.

    The other inputs of these shards count as decoded, to the frames that the store has of them.

    Args:
      partial: holds what the inputs `better` were decoded to.
    """
    parts = _stored(root, plan)
    rows, checksums = [row for part in parts for row in part["rows"]], [crc for part in parts for crc in part["crc32"]]
    first = np.cumsum([0] + [row.get("frames", 0) for row in rows])  # record of each input
    frames_of_store = store.FrameStore(root) if first[-1] else None  # refuses a store without a video
    for shard, (members, part) in enumerate(zip(plan.shards, parts, strict=True)):
        if not set(members) & set(better):
            path = pathlib.Path(steps.rows_path(str(partial), shard))
            files.write_bytes(path, steps.sealed_part(part, plan.id))
            continue
        for i in members:
            if frames_of_store and rows[i]["status"] == "ok":
                frames = frames_of_store.read(np.arange(first[i], first[i + 1])).tolist()
                frame_file_path(partial, i).write_bytes(b"".join(frames))
                crc32 = checksums[first[i] : first[i + 1]]
                row = rows[i] | {"jpeg_bytes": [len(frame) for frame in frames], "jpeg_crc32": crc32}
                files.write_bytes(row_path(partial, i), steps.sealed_part(row, plan.id))
            elif not rows[i].get("retry"):
                files.write_bytes(row_path(partial, i), steps.sealed_part(rows[i], plan.id))
    files.write_bytes(steps.plan_path(str(partial)), steps.sealed(plan.identity))
    (root / store.META).unlink()


def _stored(root: pathlib.Path, plan: Plan) -> list[dict]:
    """What steps.read_packed returned of each shard of the complete store that is there, the first ones of a plan."""
    meta = store.read_meta(root)
    rows, parts = _rows_of(root, meta), []
    checksums = np.fromfile(store.located(root, meta, store.CHECKSUMS), "<u4")
    first = np.cumsum([0] + [row.get("frames", 0) for row in rows])  # record of each input
    for shard, members in zip(meta["shards"], plan.shards, strict=False):
        crc32 = checksums[first[members.start] : first[members.stop]].tolist()
        parts.append({"shard": shard, "rows": [rows[i] for i in members], "crc32": crc32})
    return parts


def _rows_of(root: pathlib.Path, meta: dict) -> list[dict]:
    """The rows of all inputs, as `decode` gave them."""
    rows, shots = [], iter(store.shots_of_videos(store.read_index(root, meta)))
    for line in store.read_ledger(root, meta):
        row = {key: line[key] for key in _IN_LEDGER if key in line}
        if row["status"] == "ok":
            row["shot_starts"] = next(shots).tolist()
        else:
            del row["frames"]
        rows.append(row)
    return rows


def how_to_retry(root: str, meta: dict) -> str:
    """For people: what decodes those files of a complete store that are for another try."""
    if storage.is_remote(root) or meta["settings"].get("software") != steps.software():
        return "prepare it anew, into another --out"
    return (
        "give input_pipeline.prepare the same flags and --retry; runs begun with this store need it as it is, "
        "so copy it first"
    )


def summary(root: str) -> str:
    """What a complete store holds and what was refused, for people."""
    ledger = storage.join(root, store.LEDGER)
    rows = [json.loads(line) for line in storage.read(ledger).splitlines()]
    ok = [row for row in rows if row["status"] == "ok"]
    reasons = collections.Counter(row["reason"].split(":")[0] for row in rows if row["status"] == "refused")
    seconds = sum(row["frames"] / row["fps"] for row in ok)
    lines = [f"{len(rows):>9,} inputs", f"{len(ok):>9,} ok"]
    lines += [f"{count:>9,} refused: {reason}" for reason, count in reasons.most_common()]
    if waiting := [row["input"] for row in rows if row.get("retry")]:
        meta = store.parse_meta(storage.read(storage.join(root, store.META)), root)
        remedy = how_to_retry(root, meta)
        lines.append(f"{len(waiting):>9,} of them for another try (such as {waiting[0]}): {remedy}")
    noted = collections.defaultdict(list)
    for row in ok:
        for note in row.get("notes", []):
            noted[note.split(":")[0]].append(row["input"])
    lines += [f"{len(names):>9,} noted: {kind} (such as {names[0]})" for kind, names in noted.items()]
    lines += [
        f"{sum(row['frames'] for row in ok):>9,} frames, {seconds:,.0f} s of video",
        f"{sum(row['shots'] for row in ok):>9,} shots",
    ]
    if any(row["label"] >= 0 for row in ok):
        lines.append(f"{sum(row['label'] >= 0 for row in ok):>9,} videos with a label")
    if reasons or noted:
        lines.append(f"why each file was refused or noted: {ledger}")
    return "\n".join(lines)
