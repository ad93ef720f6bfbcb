"""Another try for files of a complete store whose decoder was killed, or too slow on a busy machine.

The store stays as it is until one of them decodes. Then it becomes one that is under way: all but the shards of these
files count as made, and their other files as decoded, with the frames that the store has of them.
"""

import pathlib

import numpy as np

from input_pipeline import store
from input_pipeline.preparation import steps
from input_pipeline.preparation.steps import Plan, frame_file_path, row_path
from vivi_jax import files

_IN_LEDGER = ("input", "bytes", "status", "reason", "retry", "frames", "fps", "height", "width", "notes")


def worth_another_try(root: pathlib.Path, plan: Plan) -> list[int]:
    """Numbers of the inputs of a complete store that are; none where it was made with other software."""
    meta = store.read_meta(root)
    if meta["settings"].get("software") != plan.identity["software"]:
        return []
    rows = store.parse_ledger((root / store.LEDGER).read_bytes(), meta, str(root))
    return [i for i, row in enumerate(rows) if row.get("retry")]


def reopen(root: pathlib.Path, partial: pathlib.Path, plan: Plan, better: list[int]) -> None:
    """Makes of a complete store one that is under way.

    Args:
      partial: holds what the inputs `better` were decoded to.
    """
    meta = store.read_meta(root)
    rows, checksums = _rows_of(root, meta), np.fromfile(root / store.CHECKSUMS, "<u4")
    first = np.cumsum([0] + [row.get("frames", 0) for row in rows])  # record of each input
    for shard, members in enumerate(plan.shards):
        crc32 = checksums[first[members.start] : first[members.stop]].tolist()
        if not set(members) & set(better):
            part = {"shard": meta["shards"][shard], "rows": [rows[i] for i in members], "crc32": crc32}
            path = pathlib.Path(steps.rows_path(str(partial), shard))
            files.write_bytes(path, steps.sealed_part(part, plan.id))
            continue
        for i in members:
            if rows[i]["status"] == "ok":
                frames = store.FrameStore(root).read(np.arange(first[i], first[i + 1])).tolist()
                frame_file_path(partial, i).write_bytes(b"".join(frames))
                crc32 = checksums[first[i] : first[i + 1]].tolist()
                row = rows[i] | {"jpeg_bytes": [len(frame) for frame in frames], "jpeg_crc32": crc32}
                files.write_bytes(row_path(partial, i), steps.sealed_part(row, plan.id))
            elif not rows[i].get("retry"):
                files.write_bytes(row_path(partial, i), steps.sealed_part(rows[i], plan.id))
    files.write_bytes(steps.plan_path(str(partial)), steps.sealed(plan.identity))
    (root / store.META).unlink()


def _rows_of(root: pathlib.Path, meta: dict) -> list[dict]:
    """The rows of all inputs, as `decode` gave them."""
    rows, shots = [], iter(store.shots_of_videos(store.read_index(root, meta)))
    for line in store.parse_ledger((root / store.LEDGER).read_bytes(), meta, str(root)):
        row = {key: line[key] for key in _IN_LEDGER if key in line}
        if row["status"] == "ok":
            row["shot_starts"] = next(shots).tolist()
        else:
            del row["frames"]
        rows.append(row)
    return rows
