"""Preparation on one machine: videos are decoded in parallel child processes and packed into the shards of a store."""

import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import queue
import sys
from collections.abc import Callable, Iterator

import tqdm

from input_pipeline import storage, store
from input_pipeline.preparation import inputs, steps
from input_pipeline.preparation.sandbox import Sandbox
from input_pipeline.preparation.steps import Plan, Settings
from vivi_jax import files
from vivi_jax.errors import DataError

DEFAULT = Settings()


def prepare(
    videos: str,
    out: str,
    settings: Settings = DEFAULT,
    *,
    labels: str = "",
    labelled_only: bool = False,
    only: str = "",
    workers: int | None = None,
) -> bool:
    """Makes the frame store `out` from `videos`; does nothing where it is complete.

    Args:
      videos: a directory, searched recursively, or a glob pattern.
      labels: "" for none, "folder" for the name of the folder each file is in, or a CSV file: see inputs.read_labels.
      labelled_only: files without a label are left out.
      only: "" for all files, or a list of those to use: see inputs.take_listed.
      workers: files decoded at a time; default: the cores this process may use.

    Returns:
      False if the store was complete already.

    Raises:
      DataError: no inputs; `out` was begun with other inputs or settings, is in use, or cannot be written.
    """
    for path in (videos, out):
        if storage.is_remote(path):
            raise DataError(f"{path} is in a bucket: use python -m input_pipeline.prepare_beam, with the same flags")
    plan = steps.make_plan(videos, out, settings, labels=labels, labelled_only=labelled_only, only=only)
    try:
        if steps.is_complete(out, plan):
            return False
        with steps.begin(out, plan) as partial:
            packed = _decode_all(
                pathlib.Path(out), pathlib.Path(partial), plan, workers or len(os.sched_getaffinity(0))
            )
            steps.finish(out, plan, packed)
    except OSError as e:
        raise DataError(cannot_write(out, e)) from e
    return True


def cannot_write(out: str, error: OSError) -> str:
    return (
        f"cannot write to {out}: {error.strerror or error}; what is done is kept: make room, or make it writable, "
        "and run the same command again"
    )


def _decode_all(root: pathlib.Path, partial: pathlib.Path, plan: Plan, workers: int) -> Iterator[dict]:
    """What steps.pack returned for every shard, in order."""
    shards, settings = plan.shards, plan.settings
    ahead = (
        4 + 2 * workers // settings.videos_per_shard
    )  # shards under way, so that one long video does not hold up the others
    waiting = collections.deque()
    with pool(workers, settings.limits) as submit, progress(len(plan.inputs)) as done:
        for shard in range(len(shards) + ahead):
            if shard < len(shards):
                if _rows_path(partial, shard).exists():  # by an earlier run
                    done(len(shards[shard]))
                    waiting.append(None)
                else:
                    waiting.append(
                        [submit(_decode_one, partial, i, plan.inputs[i], settings, done) for i in shards[shard]]
                    )
            if shard >= ahead:
                futures = waiting.popleft()
                if futures is not None:
                    _pack(
                        root,
                        partial,
                        shard - ahead,
                        len(shards),
                        shards[shard - ahead],
                        [future.result() for future in futures],
                    )
                yield json.loads(_rows_path(partial, shard - ahead).read_text())


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
def progress(total: int) -> Iterator[Callable]:
    """Yields done(n); a bar on a terminal, a line a minute in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 60
    with tqdm.tqdm(total=total, unit="file", mininterval=interval, maxinterval=interval, dynamic_ncols=True) as bar:
        yield bar.update


def _decode_one(
    sandbox: Sandbox, partial: pathlib.Path, index: int, file: inputs.Input, settings: Settings, done: Callable
) -> dict:
    """Row of one file, and its frames in a frame file; the presence of the row's file says that both are complete."""
    path = _row_path(partial, index)
    if path.exists():
        row = json.loads(path.read_text())
    else:
        row = steps.decode(sandbox, file, file.path, str(_frame_file(partial, index)), settings)
        files.write_json(path, row, indent=None)
    done(1)
    return row


def _pack(
    root: pathlib.Path, partial: pathlib.Path, shard: int, num_shards: int, members: range, rows: list[dict]
) -> None:
    """Moves the frames of consecutive inputs from their frame files to a shard."""
    path = root / store.shard_name(shard, num_shards)
    packed = steps.pack(str(path), ((row, str(_frame_file(partial, i))) for i, row in zip(members, rows, strict=True)))
    files.write_json(_rows_path(partial, shard), packed, indent=None)
    for i in members:
        _frame_file(partial, i).unlink(missing_ok=True)
        _row_path(partial, i).unlink(missing_ok=True)


def _frame_file(partial: pathlib.Path, index: int) -> pathlib.Path:
    return partial / f"{index:08d}.jpegs"


def _row_path(partial: pathlib.Path, index: int) -> pathlib.Path:
    return partial / f"{index:08d}.json"


def _rows_path(partial: pathlib.Path, shard: int) -> pathlib.Path:
    return pathlib.Path(steps.rows_path(str(partial), shard))


def summary(root: str) -> str:
    """What a complete store holds and what was refused, for people."""
    ledger = storage.join(root, store.LEDGER)
    rows = [json.loads(line) for line in storage.read(ledger).splitlines()]
    ok = [row for row in rows if row["status"] == "ok"]
    reasons = collections.Counter(row["reason"].split(":")[0] for row in rows if row["status"] == "refused")
    seconds = sum(row["frames"] / row["fps"] for row in ok)
    lines = [f"{len(rows):>9,} inputs", f"{len(ok):>9,} ok"]
    lines += [f"{count:>9,} refused: {reason}" for reason, count in reasons.most_common()]
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
