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
import pathlib
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import av
import cv2
import numpy as np

from input_pipeline import storage, store
from input_pipeline.preparation import inputs, pixels, shots
from input_pipeline.preparation.sandbox import Sandbox
from vivi_jax import files
from vivi_jax.errors import DataError

# Of the rules here that decide the bytes; a store that was begun with other rules is not gone on with.
# 4: fades and dissolves end shots.
PREPARATION_VERSION = 4
_FREE_BYTES = 2**26  # that any file may become, however small it is
_KILLED = "killed from outside"


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
    max_frames: int = 2_000_000
    max_mb: int = 32768
    max_expansion: float = 1000.0

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
        names = ("fps", "short_side", "jpeg_quality", "shot_rule", "untagged_matrix", "max_frames")
        return {name: getattr(self, name) for name in names}

    def max_bytes(self, file_bytes: int) -> int:
        """Of the frames of a file of that size."""
        return min(self.max_mb << 20, max(_FREE_BYTES, int(self.max_expansion * file_bytes)))

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
    identity: dict  # what must not change between two starts: JSON values "settings", "software", "inputs", "grown"
    former: "Former | None" = None  # the complete store that is there

    @property
    def grown(self) -> list[dict]:
        """See store.write_index."""
        return self.identity.get("grown", [])

    @property
    def added(self) -> int:
        """How many inputs the complete store lacks."""
        return len(self.inputs) - len(self.former.rows) if self.former else 0

    @property
    def id(self) -> str:
        """What all that is made by the plan is marked with while it is under way."""
        return files.digest(self.identity)

    @property
    def shards(self) -> list[range]:
        """Numbers of the inputs in each shard."""
        return shards_of(store.parts_of(len(self.inputs), self.grown), self.settings.videos_per_shard)


class Former(NamedTuple):
    """What a complete store holds."""

    description: bytes  # of meta.json
    meta: dict
    rows: list[dict]  # of the ledger


def shards_of(parts: Sequence[int], videos_per_shard: int) -> list[range]:
    """Numbers of the inputs in each shard; inputs that came at different times are never in one."""
    shards, begin = [], 0
    for part in parts:
        starts = range(begin, begin + part, videos_per_shard)
        begin += part
        shards += [range(start, min(start + videos_per_shard, begin)) for start in starts]
    return shards


def make_plan(
    videos: str,
    out: str,
    settings: Settings,
    *,
    labels: str,
    labelled_only: bool,
    only: str = "",
    grow: bool = False,
) -> Plan:
    """Finds the inputs.

    Args:
      videos, labels: see inputs.find and inputs.read_labels.
      out: where a complete store is, its inputs come first, as it has them.
      labelled_only: files without a label are no inputs.
      only: a list of the files that are, see inputs.take_listed; "" for all.
      grow: what the store has of files that are gone or changed stays; without it only is_complete says so.

    Raises:
      DataError: there are none.
    """
    found = inputs.find(videos, out)
    if only:
        found = inputs.take_listed(found, only)
    former = read_former(out)
    begun, grown = _begun(out, former)
    now = {file.name: file for file in found}
    if grow or not former:
        root = inputs.root_of(videos)
        first = [
            inputs.Input(name, now[name].path if name in now else storage.join(root, name), size)
            for name, size in begun.items()
        ]
    else:
        first = [now[name] for name in begun if name in now]
    found = [*first, *(file for file in found if file.name not in begun)]
    kept = former_labels(out, former) if former and labels else {}
    gone = {name: label for name, label in kept.items() if name not in now}
    label_of, class_names = inputs.read_labels(labels, [file.name for file in found], gone)
    if labelled_only:
        stay = [i for i, label in enumerate(label_of) if label >= 0 or (grow and i < len(first))]
        if not stay:
            raise DataError("--labelled_only without a labelled file: give --labels")
        found, label_of = [found[i] for i in stay], [label_of[i] for i in stay]
    if former and len(found) > len(begun):
        grown = [*grown, {"inputs": len(begun), "identity": store.identity_for_runs(former.description)}]
    identity = {
        "settings": dataclasses.asdict(settings)
        | {"labels": inputs.labels_digest(label_of, class_names) if labels else ""},
        "software": software(),
        "inputs": [[file.name, file.bytes] for file in found],
    }
    identity |= {"grown": grown} if grown else {}
    return Plan(found, settings, label_of, class_names, identity, former)


def read_former(root: str) -> Former | None:
    """The complete store that is there; None: there is none."""
    path = storage.join(root, store.META)
    if not storage.exists(path):
        return None
    description = storage.read(path)
    meta = store.parse_meta(description, root)
    if storage.is_remote(root):
        rows = store.parse_ledger(storage.read(storage.join(root, store.LEDGER)), meta, root)
    else:
        rows = store.read_ledger(pathlib.Path(root), meta)
    return Former(description, meta, rows)


def _begun(root: str, former: Former | None) -> tuple[dict[str, int], list[dict]]:
    """Name and bytes of the inputs that a complete store has, or a grown one that is tried again; how it has grown."""
    if former:
        return {row["input"]: row["bytes"] for row in former.rows}, former.meta.get("grown", [])
    path = plan_path(partial_of(root))
    plan = unsealed(storage.read(path)) if storage.exists(path) else None
    return (dict(plan["inputs"]), plan["grown"]) if plan and "grown" in plan else ({}, [])


def former_labels(root: str, former: Former) -> dict[str, str]:
    """Name of an input -> its class, of those of a complete store that have one; {} of a store in a bucket."""
    if storage.is_remote(root):
        return {}
    names = store.read_index(pathlib.Path(root), former.meta)["class_names"].tolist()
    return {row["input"]: names[row["label"]] for row in former.rows if row.get("label", -1) >= 0}


def software() -> dict:
    """Versions that the bytes depend on."""
    return {
        "preparation": PREPARATION_VERSION,
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "opencv": cv2.__version__,
    }


def is_complete(root: str, plan: Plan, *, grow: bool = False) -> bool:
    """Whether the store is there already, with all inputs.

    Args:
      grow: it may lack some, and have others than there are now.

    Raises:
      DataError: it is there, but of another plan.
    """
    if plan.former is None:
        return False
    meta = plan.former.meta
    if not storage.is_remote(root):
        store.check_shards(pathlib.Path(root), meta["shards"])
    # A setting that came later than the store had what is now its default.
    settings = dataclasses.asdict(Settings()) | {
        key: value for key, value in meta["settings"].items() if key != "software"
    }
    if meta["version"] == 1:
        settings.pop("min_shot_frames", None)  # a setting of that version: its shots stay as they are
    now = dict(plan.identity["settings"])
    labels = bool(settings["labels"] and now["labels"]) and not storage.is_remote(root)
    if labels:
        del settings["labels"], now["labels"]  # a digest, also of those of files that are new, gone or refused
    _check_same(root, settings, now)
    if not grow:
        _check_inputs(
            root,
            [[row["input"], row["bytes"]] for row in plan.former.rows],
            plan.identity["inputs"],
            remedy="--grow adds what is new, and keeps what the store has of the others; or give another --out",
        )
    if labels:
        _check_labels(root, plan)
    if plan.added:
        _check_same(root, meta["settings"].get("software", {}), plan.identity["software"])
    return plan.added == 0


def _check_labels(root: str, plan: Plan) -> None:
    """Raises DataError unless the videos of a complete store have the labels that they had."""
    assert plan.former
    then = former_labels(root, plan.former)
    now = {file.name: plan.class_names[n] for file, n in zip(plan.inputs, plan.label_of, strict=True) if n >= 0}
    names = [row["input"] for row in plan.former.rows if row["status"] == "ok"]
    if changed := [name for name in names if then.get(name) != now.get(name)]:
        name = changed[0]
        raise DataError(
            f"{root} was made with other labels: of {len(changed)} of its videos (such as {name}, "
            f"{then.get(name, 'none')} then, {now.get(name, 'none')} now); put the former ones back, or give another "
            "--out"
        )


def changes(plan: Plan) -> list[str]:
    """For people: what has become of the files of a complete store that is to grow."""
    if plan.former is None:
        return []
    size_of = {file.name: inputs.size_of(file.path) for file in plan.inputs if os.path.exists(file.path)}
    gone = [row["input"] for row in plan.former.rows if row["input"] not in size_of]
    changed = [row["input"] for row in plan.former.rows if size_of.get(row["input"], row["bytes"]) != row["bytes"]]
    lines = [f"grow: {plan.added:,} new files beside {len(plan.former.rows):,}"]
    if gone:
        lines.append(f"grow: {len(gone):,} files are gone (such as {gone[0]}); the store keeps what it has of them")
    if changed:
        lines.append(
            f"grow: {len(changed):,} files have another size than then (such as {changed[0]}); the store keeps what it "
            "has of them; under another name they are new"
        )
    return lines


def settle(root: pathlib.Path) -> None:
    """Moves to their places the files of a growth that was killed behind its last step."""
    if (root / store.META).is_file():
        meta = store.read_meta(root)
        for name in (store.LEDGER, store.INDEX, store.CHECKSUMS):
            if (found := store.located(root, meta, name)) != root / name:
                os.replace(found, root / name)


def _remove_strays(root: pathlib.Path) -> None:
    """Removes shards that are not of the complete store: of a growth that was given up, or replaced ones."""
    named = {shard["file"] for shard in store.read_meta(root)["shards"]}
    for path in root.iterdir():
        name = path.name.removesuffix(".partial")
        if store.SHARD_NAME.fullmatch(name) and path.name not in named:
            path.unlink()


def remove_left(root: str) -> None:
    """Removes the work in progress of a complete store, which a kill between the last two steps left.

    It does no harm: it stays where another command is at work in it, or where nothing can be written.
    """
    partial = partial_of(root)
    if storage.is_remote(root):
        storage.remove_tree(partial)
    elif os.path.isdir(partial):
        with contextlib.suppress(DataError, OSError), locked(root, partial):
            _remove_strays(pathlib.Path(root))
            storage.remove_tree(partial)


def partial_of(root: str) -> str:
    return storage.join(root, store.PARTIAL)


def plan_path(partial: str) -> str:
    return storage.join(partial, "plan.json")


def rows_path(partial: str, shard: int) -> str:
    return storage.join(partial, f"rows-{shard:05d}.json")


def frame_file_path(partial: pathlib.Path, index: int) -> pathlib.Path:
    return partial / f"{index:08d}.jpegs"


def row_path(partial: pathlib.Path, index: int) -> pathlib.Path:
    return partial / f"{index:08d}.json"


@contextlib.contextmanager
def begin(root: str, plan: Plan) -> Iterator[str]:
    """Yields the folder of work in progress, after a check that it is of the same plan; a local one is locked.

    Raises:
      DataError: `root` was begun with another plan, is in use, or holds something else.
    """
    partial, path = partial_of(root), plan_path(partial_of(root))
    begun = storage.exists(path)
    if not begun and not plan.former and storage.names(root) - {store.PARTIAL}:
        raise DataError(f"{root} is neither empty nor a frame store; give a new directory as --out")
    storage.make_folder(partial)
    with locked(root, partial):
        earlier = unsealed(storage.read(path)) if storage.exists(path) else None
        if plan.former:
            if storage.read(storage.join(root, store.META)) != plan.former.description:
                raise DataError(f"another preparation has changed {root} meanwhile; run the same command again")
            if earlier != plan.identity:  # of a growth by other files, which was given up
                for name in storage.names(partial) - {"lock"}:
                    os.unlink(storage.join(partial, name))
                storage.write(path, sealed(plan.identity))
        elif earlier is not None:
            _check_same(
                root, earlier["settings"] | earlier["software"], plan.identity["settings"] | plan.identity["software"]
            )
            _check_inputs(
                root, earlier["inputs"], plan.identity["inputs"], remedy="give another --out, or delete the old one"
            )
        else:  # or it was damaged: what was made by this plan is marked with its id
            storage.write(path, sealed(plan.identity))
        yield partial


def sealed(value: dict) -> bytes:
    """The bytes of a JSON file that says whether it is whole."""
    return json.dumps({"value": value, "sha256": files.digest(value)}).encode()


def unsealed(data: bytes) -> Any:
    """What was sealed; None if the file was cut or changed since, or is of an earlier version."""
    try:
        found = json.loads(data)
        return found["value"] if files.digest(found["value"]) == found["sha256"] else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def sealed_part(part: dict, plan_id: str) -> bytes:
    """Of something that a plan has made."""
    return sealed({"plan": plan_id, "part": part})


def unsealed_part(data: bytes, plan_id: str) -> dict | None:
    """The part; None if it is damaged, or of another plan."""
    found = unsealed(data)
    return found["part"] if isinstance(found, dict) and found.get("plan") == plan_id else None


@contextlib.contextmanager
def locked(root: str, partial: str) -> Iterator[None]:
    if storage.is_remote(root):  # buckets have no locks; two commands at once would write the same bytes
        yield
        return
    with open(os.path.join(partial, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise DataError(f"another preparation is writing to {root}; wait for it, or end it") from e
        if not os.fstat(lock.fileno()).st_nlink:  # it was removed between the two lines above, by the one that held it
            raise DataError(f"another preparation was writing to {root} until now; run the same command again")
        settle(pathlib.Path(root))
        yield


def _check_same(root: str, begun: dict, now: dict) -> None:
    for key in sorted(begun | now):
        if begun.get(key) != now.get(key):
            raise DataError(
                f"{root} was begun with {key}={begun.get(key)}, this run has {key}={now.get(key)}; "
                "give another --out, or delete the old one"
            )


def _check_inputs(root: str, begun: list, now: list, *, remedy: str) -> None:
    then, size_of = dict(begun), dict(now)
    new, gone = sorted(size_of.keys() - then.keys()), sorted(then.keys() - size_of.keys())
    changed = sorted(name for name in size_of.keys() & then.keys() if size_of[name] != then[name])
    if new or gone or changed:
        raise DataError(
            f"the input files are not those {root} was begun with: {len(new)} new, {len(gone)} gone, "
            f"{len(changed)} of another size (such as {(new + gone + changed)[0]}); {remedy}"
        )


def decode(
    sandbox: Sandbox, file: inputs.Input, path: str, frame_file: str, settings: Settings, *, tries: int = 1
) -> dict:
    """Row of one input; writes its frames.

    Args:
      tries: as long as the decoder is killed from outside.
      path: where the file is on this machine.
      frame_file: of the frames, one after the other; there is none if the input is refused.
    """
    options: dict[str, Any] = settings.decoding | {"max_bytes": settings.max_bytes(file.bytes)}
    found = {"reason": _KILLED}
    for _ in range(tries):
        found = sandbox.decode(path, frame_file, **options)
        if not found["reason"].startswith(_KILLED):
            break
    row = {"input": file.name, "bytes": file.bytes} | found
    if row["status"] == "refused":
        with contextlib.suppress(FileNotFoundError):
            os.unlink(frame_file)
    return row


def wrong_with_frames(row: dict | None, frame_file: pathlib.Path) -> str | None:
    """What is wrong with the kept row of an input, None if it is damaged, or with its frames."""
    if row is None:
        return "its row is damaged, or of another plan"
    if row["status"] != "ok":
        return None
    if not frame_file.is_file():
        return "its frames are missing"
    with open(frame_file, "rb") as f:
        for length, checksum in zip(row["jpeg_bytes"], row["jpeg_crc32"], strict=True):
            if zlib.crc32(f.read(length)) != checksum:
                return "its frames are damaged"
        return "its frames are damaged" if f.read(1) else None


class FramesDamaged(Exception):
    """A frame file that is not as it was written; the argument is the number of its input among those of the shard."""


def pack(path: str, decoded: Iterable[tuple[dict, str]]) -> dict:
    """Writes a shard.

    Args:
      path: local.
      decoded: (row, its frame file) of consecutive inputs, drawn one by one as the shard grows.

    Returns:
      {"shard": its line in the table of shards, "rows": of its inputs, "crc32": of its records}: of rows-S.json.

    Raises:
      FramesDamaged: nothing is written.
    """
    rows = []

    def frames() -> Iterator[bytes]:
        for row, frame_file in decoded:
            rows.append({key: value for key, value in row.items() if key not in ("jpeg_bytes", "jpeg_crc32")})
            if row["status"] == "ok":
                with open(frame_file, "rb") as f:
                    for length, checksum in zip(row["jpeg_bytes"], row["jpeg_crc32"], strict=True):
                        jpeg = f.read(length)
                        if len(jpeg) != length or zlib.crc32(jpeg) != checksum:
                            raise FramesDamaged(len(rows) - 1)
                        yield jpeg

    shard, checksums = store.write_shard(path, frames())
    return {"shard": shard, "rows": rows, "crc32": checksums}


def read_packed(root: str, plan: Plan, shard: int) -> dict | None:
    """What `pack` returned for a shard that is made; None: it is not, or not as it was."""
    path = rows_path(partial_of(root), shard)
    packed = unsealed_part(storage.read(path), plan.id) if storage.exists(path) else None
    if packed is not None and not storage.is_remote(root):
        made = os.path.join(root, packed["shard"]["file"])
        if not os.path.isfile(made) or os.path.getsize(made) != packed["shard"]["bytes"]:
            return None
    return packed


def finish(root: str, plan: Plan, packed: Iterable[dict | None]) -> None:
    """Writes ledger, index and meta of what `read_packed` found of all shards, in order; removes the work in progress.

    Raises:
      DataError: a shard is not made.
    """
    shards, rows, checksums = [], [], []
    for number, part in enumerate(packed):
        if part is None:
            path = storage.join(root, store.shard_name(number, len(plan.shards)))
            raise DataError(f"{path} was changed while the preparation ran; run the same command again, it goes on")
        shards.append(part["shard"])
        rows.extend(part["rows"])
        checksums.append(np.array(part["crc32"], "<u4"))
    rows = [row | ({"label": plan.label_of[i]} if row["status"] == "ok" else {}) for i, row in enumerate(rows)]
    index = {
        "settings": plan.identity["settings"] | {"software": plan.identity["software"]},
        "shards": shards,
        "checksums": checksums,
        "rows": rows,
        "class_names": plan.class_names,
        "grown": plan.grown,
    }
    if not storage.is_remote(root):
        partial = partial_of(root)
        if storage.exists(storage.join(root, store.META)):  # it grows: it is whole at every moment
            store.write_index(partial, **index)
            os.replace(storage.join(partial, store.META), storage.join(root, store.META))
            settle(pathlib.Path(root))
        else:
            store.write_index(root, **index)
        _remove_strays(pathlib.Path(root))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            store.write_index(scratch, **index)
            for name in (store.LEDGER, store.INDEX, store.CHECKSUMS, store.META):  # the last one means complete
                storage.put(os.path.join(scratch, name), storage.join(root, name))
    storage.remove_tree(partial_of(root))
