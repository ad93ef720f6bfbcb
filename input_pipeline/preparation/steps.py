"""The steps of a preparation, which the local command (prepare.py) and Beam's workers (prepare_beam.py) share.

A plan determines every byte of a store. It is cut into shards of consecutive inputs, and a shard depends on its inputs
and the settings only. So any process may make it, in any order, and more than once.

    OUT/.partial/plan.json      written first; another plan is refused
    OUT/frames-S-of-N           a shard, then its rows in OUT/.partial/rows-S.json: present means complete
    ledger, index and meta      made of all rows, written last; .partial goes
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import av
import cv2

from input_pipeline import storage, store
from input_pipeline.preparation import inputs, pixels, shots
from input_pipeline.preparation.sandbox import Sandbox
from vivi_jax.errors import DataError

# Of the rules here that decide the bytes; a store that was begun with other rules is not gone on with.
PREPARATION_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines the bytes of a store, together with its inputs. Kept in meta.json."""

    fps: float = 25.0
    short_side: int = 256
    jpeg_quality: int = 95
    shot_rule: str = "auto"
    untagged_matrix: str = "bt601"
    videos_per_shard: int = 64
    memory_mb: int = 2048
    cpu_s: int = 1800
    wall_s: float = 3600.0

    def __post_init__(self):
        rules = ["auto", *shots.RULES]
        if self.shot_rule not in rules:
            raise DataError(f"shot_rule={self.shot_rule}: choose one of {', '.join(rules)}")
        if self.untagged_matrix not in pixels.MATRICES:
            raise DataError(f"untagged_matrix={self.untagged_matrix}: choose one of {', '.join(pixels.MATRICES)}")
        if not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"jpeg_quality={self.jpeg_quality}: give 1 to 100")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not 0 < value < math.inf:
                raise DataError(f"{field.name}={value}: give a positive number")

    @property
    def decoding(self) -> dict:
        """Arguments of video.decode_file."""
        names = ("fps", "short_side", "jpeg_quality", "shot_rule", "untagged_matrix")
        return {name: getattr(self, name) for name in names}

    @property
    def limits(self) -> dict:
        """Arguments of sandbox.Sandbox."""
        return {name: getattr(self, name) for name in ("memory_mb", "cpu_s", "wall_s")}


class Plan(NamedTuple):
    """What determines a store."""

    inputs: list[inputs.Input]
    settings: Settings
    label_of: list[int]  # of each input, -1: none
    class_names: list[str]
    identity: dict  # what must not change between two starts: JSON values "settings", "software", "inputs"

    @property
    def shards(self) -> list[range]:
        """Numbers of the inputs in each shard."""
        return shards_of(len(self.inputs), self.settings.videos_per_shard)


def shards_of(num_inputs: int, videos_per_shard: int) -> list[range]:
    return [range(start, min(start + videos_per_shard, num_inputs)) for start in range(0, num_inputs, videos_per_shard)]


def make_plan(videos: str, out: str, settings: Settings, *, labels: str, labelled_only: bool, only: str = "") -> Plan:
    """Finds the inputs.

    Args:
      videos, labels: see inputs.find and inputs.read_labels.
      labelled_only: files without a label are no inputs.
      only: a list of the files that are, see inputs.take_listed; "" for all.

    Raises:
      DataError: there are none.
    """
    found = inputs.find(videos, out)
    if only:
        found = inputs.take_listed(found, only)
    label_of, class_names, digest = inputs.read_labels(labels, [file.name for file in found])
    if labelled_only:
        kept = [i for i, label in enumerate(label_of) if label >= 0]
        if not kept:
            raise DataError("--labelled_only without a labelled file: give --labels")
        found, label_of = [found[i] for i in kept], [label_of[i] for i in kept]
    identity = {
        "settings": dataclasses.asdict(settings) | {"labels": digest},
        "software": software(),
        "inputs": [[file.name, file.bytes] for file in found],
    }
    return Plan(found, settings, label_of, class_names, identity)


def software() -> dict:
    """Versions that the bytes depend on."""
    return {
        "preparation": PREPARATION_VERSION,
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "opencv": cv2.__version__,
    }


def is_complete(root: str, plan: Plan) -> bool:
    """Whether the store is there already.

    Raises:
      DataError: it is, but of another plan.
    """
    path = storage.join(root, store.META)
    if not storage.exists(path):
        return False
    meta = json.loads(storage.read(path)) if storage.is_remote(root) else store.FrameStore(root).meta
    # A setting that came later than the store had what is now its default.
    settings = dataclasses.asdict(Settings()) | {
        key: value for key, value in meta["settings"].items() if key != "software"
    }
    if meta["version"] == 1:
        settings.pop("min_shot_frames", None)  # a setting of that version: its shots stay as they are
    _check_same(root, settings, plan.identity["settings"])
    lines = storage.read(storage.join(root, store.LEDGER)).splitlines()
    _check_inputs(root, [[row["input"], row["bytes"]] for row in map(json.loads, lines)], plan.identity["inputs"])
    storage.remove_tree(partial_of(root))  # killed between the last two steps
    return True


def partial_of(root: str) -> str:
    return storage.join(root, store.PARTIAL)


def plan_path(partial: str) -> str:
    return storage.join(partial, "plan.json")


def rows_path(partial: str, shard: int) -> str:
    return storage.join(partial, f"rows-{shard:05d}.json")


@contextlib.contextmanager
def begin(root: str, plan: Plan) -> Iterator[str]:
    """Yields the folder of work in progress, after a check that it is of the same plan; a local one is locked.

    Raises:
      DataError: `root` was begun with another plan, is in use, or holds something else.
    """
    partial, path = partial_of(root), plan_path(partial_of(root))
    begun = storage.exists(path)
    if not begun and storage.names(root) - {store.PARTIAL}:
        raise DataError(f"{root} is neither empty nor a frame store; give a new directory as --out")
    storage.make_folder(partial)
    with _locked(root, partial):
        if storage.exists(path):
            earlier = json.loads(storage.read(path))
            _check_same(
                root, earlier["settings"] | earlier["software"], plan.identity["settings"] | plan.identity["software"]
            )
            _check_inputs(root, earlier["inputs"], plan.identity["inputs"])
        else:
            storage.write(path, json.dumps(plan.identity).encode())
        yield partial


@contextlib.contextmanager
def _locked(root: str, partial: str) -> Iterator[None]:
    if storage.is_remote(root):  # buckets have no locks; two commands at once would write the same bytes
        yield
        return
    with open(os.path.join(partial, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise DataError(f"another preparation is writing to {root}; wait for it, or end it") from e
        yield


def _check_same(root: str, begun: dict, now: dict) -> None:
    for key in sorted(begun | now):
        if begun.get(key) != now.get(key):
            raise DataError(
                f"{root} was begun with {key}={begun.get(key)}, this run has {key}={now.get(key)}; "
                "give another --out, or delete the old one"
            )


def _check_inputs(root: str, begun: list, now: list) -> None:
    then, size_of = dict(begun), dict(now)
    new, gone = sorted(size_of.keys() - then.keys()), sorted(then.keys() - size_of.keys())
    changed = sorted(name for name in size_of.keys() & then.keys() if size_of[name] != then[name])
    if new or gone or changed:
        raise DataError(
            f"the input files are not those {root} was begun with: {len(new)} new, {len(gone)} gone, "
            f"{len(changed)} of another size (such as {(new + gone + changed)[0]}); give another --out, "
            "or delete the old one"
        )


def decode(sandbox: Sandbox, file: inputs.Input, path: str, frame_file: str, settings: Settings) -> dict:
    """Row of one input; writes its frames.

    Args:
      path: where the file is on this machine.
      frame_file: of the frames, one after the other; there is none if the input is refused.
    """
    row = {"input": file.name, "bytes": file.bytes} | sandbox.decode(path, frame_file, **settings.decoding)
    if row["status"] == "refused":
        with contextlib.suppress(FileNotFoundError):
            os.unlink(frame_file)
    return row


def pack(path: str, decoded: Iterable[tuple[dict, str]]) -> dict:
    """Writes a shard.

    Args:
      path: local.
      decoded: (row, its frame file) of consecutive inputs, drawn one by one as the shard grows.

    Returns:
      {"shard": its line in the table of shards, "rows": of its inputs}, the contents of rows-S.json.
    """
    rows = []

    def frames() -> Iterator[bytes]:
        for row, frame_file in decoded:
            rows.append({key: value for key, value in row.items() if key != "jpeg_bytes"})
            if row["status"] == "ok":
                with open(frame_file, "rb") as f:
                    yield from (f.read(length) for length in row["jpeg_bytes"])

    records = store.write_shard(path, frames())
    shard = {"file": os.path.basename(path), "records": records, "bytes": os.path.getsize(path)}
    return {"shard": shard, "rows": rows}


def finish(root: str, plan: Plan, packed: Iterable[dict]) -> None:
    """Writes ledger, index and meta of what `pack` returned for all shards, in order; removes the work in progress."""
    shards, rows = [], []
    for part in packed:
        shards.append(part["shard"])
        rows.extend(part["rows"])
    rows = [row | ({"label": plan.label_of[i]} if row["status"] == "ok" else {}) for i, row in enumerate(rows)]
    index = {
        "settings": plan.identity["settings"] | {"software": plan.identity["software"]},
        "shards": shards,
        "rows": rows,
        "class_names": plan.class_names,
    }
    if not storage.is_remote(root):
        store.write_index(root, **index)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            store.write_index(scratch, **index)
            for name in (store.LEDGER, store.INDEX, store.META):  # the last one means complete
                storage.put(os.path.join(scratch, name), storage.join(root, name))
    storage.remove_tree(partial_of(root))
