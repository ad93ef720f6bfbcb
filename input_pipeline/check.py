"""Verifies a frame store, finished or under way: every byte of it against the hashes that were written with it.

    python -m input_pipeline.check STORE

Prints a line for each problem, and ends with exit code 1 if there is any. It also says what the command that made the
store would do again: what is damaged in a preparation under way; with --retry, files whose decoder was killed. Stores
of versions 1 and 2 have no hashes: all their records are read, and compared with the checksums that they carry.
"""

import argparse
import pathlib
from collections.abc import Iterator

import numpy as np
import tqdm

from input_pipeline import store
from input_pipeline.preparation import steps
from input_pipeline.preparation.local import how_to_retry, progress
from vivi_jax import command_line, files
from vivi_jax.errors import DataError

_READ_AT_A_TIME = 256  # records


def problems_of(root: pathlib.Path) -> Iterator[str]:
    """A line for everything that is wrong with a finished store.

    Raises:
      DataError: it is none, or its meta.json is damaged, so that nothing can be compared with it.
    """
    meta = store.read_meta(root)
    remedy = f"copy it again, or delete {root} and prepare it again"
    unusable, damaged = False, []
    for name in (store.INDEX, store.CHECKSUMS, store.LEDGER) if "files" in meta else ():
        path = store.located(root, meta, name)
        if not path.is_file() or files.sha256(path) != meta["files"][name]["sha256"]:
            unusable = True
            what = "is damaged, or of another store" if path.is_file() else "is missing"
            yield f"{root / name} {what}; {remedy}"
    with progress(sum(shard["bytes"] for shard in meta["shards"]), unit="B") as done:
        for number, shard in enumerate(meta["shards"]):
            try:
                store.check_size(root / shard["file"], shard["bytes"])
                if "sha256" in shard and files.sha256(root / shard["file"]) != shard["sha256"]:
                    damaged.append(number)
                    yield f"{root / shard['file']} is damaged, or of another store; {remedy}"
            except DataError as error:
                unusable = True
                yield str(error)
            done(shard["bytes"])
    if unusable:
        return
    try:
        frames = store.FrameStore(root)
        store.read_ledger(root, meta)
    except (DataError, OSError) as error:
        yield str(error)
        return
    yield from _damaged_videos(frames, damaged if frames.id else range(len(meta["shards"])))


def _damaged_videos(frames: store.FrameStore, shards: list[int] | range) -> Iterator[str]:
    """The videos that have frames which cannot be read, in some shards."""
    ends = np.cumsum([0] + [shard["records"] for shard in frames.meta["shards"]])
    of_shard = np.searchsorted(ends, frames.first_record, side="right") - 1
    for video in tqdm.tqdm(np.flatnonzero(np.isin(of_shard, shards)), unit="video", disable=None):
        first, count = frames.first_record[video], frames.num_frames[video]
        try:
            for start in range(0, count, _READ_AT_A_TIME):
                frames.read(first + np.arange(start, min(start + _READ_AT_A_TIME, count)))
        except DataError as error:
            yield f"{frames.directory}: {frames.videos[video]} has damaged frames ({str(error).split(';')[0]})"


def under_way(root: pathlib.Path) -> tuple[list[str], list[str]]:
    """Of a preparation that is not finished: (what its command would do again, what it would go on with)."""
    partial = root / store.PARTIAL
    again, kept = [], []
    plan = steps.unsealed((partial / "plan.json").read_bytes()) if (partial / "plan.json").is_file() else None
    if plan is None:
        return [f"{partial / 'plan.json'} is missing or damaged: what is marked with the id of its plan is kept"], []
    named, plan_id = [name for name, _ in plan["inputs"]], files.digest(plan)
    parts = store.parts_of(len(named), plan.get("grown", []))
    shards = steps.shards_of(parts, plan["settings"]["videos_per_shard"])
    for number, members in enumerate(shards):
        path = pathlib.Path(steps.rows_path(str(partial), number))
        if path.is_file():
            packed = steps.unsealed_part(path.read_bytes(), plan_id)
            shard = root / packed["shard"]["file"] if packed else None
            if packed and shard and shard.is_file() and files.sha256(shard) == packed["shard"]["sha256"]:
                kept.append(f"shard {number}")
            else:
                again.append(f"shard {number}: {shard or path} is missing or damaged")
            continue
        for i in members:
            if (row_path := steps.row_path(partial, i)).is_file():
                wrong = steps.wrong_with_frames(
                    steps.unsealed_part(row_path.read_bytes(), plan_id), steps.frame_file_path(partial, i)
                )
                if wrong:
                    again.append(f"{named[i]}: {wrong}")
                else:
                    kept.append(named[i])
    return again, kept


def check(directory: str) -> None:
    """Prints what is wrong with a store.

    Raises:
      DataError: how much it is; or there is no store.
    """
    root = pathlib.Path(directory)
    if root.is_dir() and not (root / store.META).is_file() and (root / store.PARTIAL).is_dir():
        again, kept = under_way(root)
        for line in again:
            print(f"to be done again: {line}")
        print(f"{root}: not finished; its command goes on with {len(kept)} shards and files that are done")
        if again:
            raise DataError(f"{len(again)} parts of {root} are damaged: the command that made it does them again")
        return
    count = 0
    for line in problems_of(root):
        count += 1
        print(line)
    if count:
        raise DataError(f"{count} problems in {root}")
    frames = store.FrameStore(root)
    for row in store.read_ledger(root, frames.meta):
        if row.get("retry"):
            print(f"for another try: {row['input']}, {row['reason']}; {how_to_retry(directory, frames.meta)}")
    print(
        f"{root}: all is as it was written: {len(frames)} videos, {frames.meta['frames']} frames, "
        + (
            f"id {frames.id}"
            if frames.id
            else f"version {frames.meta['version']}, without hashes: all records were read"
        )
    )


def run(options: argparse.Namespace) -> None:
    check(options.store)


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("input_pipeline.check", __doc__)
    parser.add_argument("store", help="directory that input_pipeline.prepare wrote")
    command_line.run_parser(run, parser, argv, copied=["store"])


if __name__ == "__main__":
    main()
