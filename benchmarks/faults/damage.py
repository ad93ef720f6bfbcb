"""R11, R12, R16, R20, R26: what lies on a disk is damaged, or old, and must be noticed or make no difference."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import pickle
import random
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from benchmarks.faults import runs
from benchmarks.results import ROOT
from vivi_jax.errors import CheckpointError, ConfigError, DataError

KINDS = ("flip", "flip", "flip", "cut", "zero", "grow", "empty", "delete", "swap")


@contextlib.contextmanager
def damaged(files: list[pathlib.Path], kind: str, rng: random.Random) -> Iterator[str]:
    """Damages one of the files (two with "swap") and puts it back; yields what was done."""
    path = rng.choice(files)
    data = path.read_bytes()
    others = [other for other in files if other != path and other.suffix == path.suffix] if kind == "swap" else []
    other = rng.choice(others) if others else None
    other_data = other.read_bytes() if other else b""
    if kind == "delete":
        path.unlink()
    elif kind == "swap":
        if other:
            path.write_bytes(other_data)
            other.write_bytes(data)
    else:
        path.write_bytes(changed(data, kind, rng))
    try:
        yield f"{kind} {path.name}"
    finally:
        path.write_bytes(data)
        if other:
            other.write_bytes(other_data)


def changed(data: bytes, kind: str, rng: random.Random) -> bytes:
    """The bytes with one bit flipped, a part cut off, set to zero, grown, or none left."""
    if not data or kind == "empty":
        return b""
    place = rng.randrange(len(data))
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "zero":
        length = min(len(data) - place, rng.randrange(1, 4096))
        return data[:place] + bytes(length) + data[place + length :]
    return data + rng.randbytes(rng.randrange(1, 64))


def judge(count: int, files: list[pathlib.Path], read: Callable[[], str], right: Mapping[str, str]) -> dict:
    """Damages `files` `count` times; each time `read` gives a digest that is right, or raises an error of ours.

    Args:
      right: digest -> what it is called in the row.
    """
    rng, counts, wrong = random.Random(0), dict.fromkeys(["noticed", *right.values()], 0), []
    logging.disable(logging.WARNING)  # of a fall back to the checkpoint before, a thousand times
    try:
        for _ in range(count):
            with damaged(files, rng.choice(KINDS), rng) as what:
                try:
                    found = right.get(read())
                    if found:
                        counts[found] += 1
                    else:
                        wrong.append(f"silent: {what}")
                except (CheckpointError, ConfigError, DataError):
                    counts["noticed"] += 1
                except Exception as error:
                    wrong.append(f"{type(error).__name__} of no line of ours: {what}")
    finally:
        logging.disable(logging.NOTSET)
    return {"damages": count, **counts, "wrong": wrong}


# ---- What is read ---------------------------------------------------------------------------------------------------


def of_tree(tree) -> str:
    """Digest of a tree of arrays and values."""
    import jax

    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(value)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def checkpoints(count: int, run: str, own: str) -> dict:
    """R11: all files of a run's checkpoints; a fall back to an older good step is right.

    Seen failing: without the hashes of the manifest, by errors that are no line of ours.
    """
    from vivi_jax import checkpoint

    workdir = pathlib.Path(own, "run")
    shutil.copytree(run, workdir)
    folder = workdir / "checkpoints"
    files = [path for path in folder.rglob("*") if path.is_file()]
    *older, newest = (of_tree(checkpoint.load_state(run, step)) for step in checkpoint.steps(folder))
    right = dict.fromkeys(older, "noticed, and an older step read") | {newest: "no difference"}
    return judge(count, files, lambda: of_tree(checkpoint.load_state(str(workdir))), right)


def exports(count: int, run: str, own: str) -> dict:
    """R12: an exported encoder with what lies beside it.

    Seen failing: without the two SHA-256, by flipped and zeroed weights that were read.
    """
    from vivi_jax import checkpoint, export
    from vivi_jax.models import build_encoder

    out = pathlib.Path(own, "export", "encoder.safetensors")
    out.parent.mkdir()
    config, variables = checkpoint.load_encoder(run)
    export.export_encoder("torchvision", build_encoder(**config), variables, str(out))

    def read() -> str:
        config, variables = export.load_encoder(str(out))
        return of_tree({"config": json.dumps(config, sort_keys=True), "variables": variables})

    right = {read(): "no difference"}
    return judge(count, [path for path in out.parent.iterdir() if path.is_file()], read, right)


def stores(count: int, source: str, own: str) -> dict:
    """R12: all files of a frame store, which is then opened and read whole.

    Seen failing: without records' checksums and files' sizes it reported "silent: swap frames-00001-of-00003...".
    """
    from input_pipeline.store import FrameStore

    copy = pathlib.Path(own, "store")
    shutil.copytree(source, copy)

    def read() -> str:
        store = FrameStore(copy)
        digest = hashlib.sha256(repr((store.videos.tolist(), store.class_names)).encode())
        for name in ("first_record", "num_frames", "fps", "height", "width", "label", "shot_starts", "shot_offsets"):
            digest.update(getattr(store, name).tobytes())
        for jpeg in store.read(np.arange(store.num_frames.sum())):
            digest.update(jpeg)
        return digest.hexdigest()

    right = {read(): "no difference"}
    return judge(count, [path for path in copy.iterdir() if path.is_file()], read, right)


def ledgers(count: int, source: str, videos: str, own: str) -> dict:
    """R12: the files of a preparation that was cut off; started again it ends with the same store, or says a line.

    Seen failing: without the digest in a unit's result, by a traceback.
    """
    wrong, counts, rng = [], {"noticed": 0, "no difference": 0}, random.Random(0)
    whole = {path.name: path.read_bytes() for path in pathlib.Path(source).iterdir() if path.is_file()}
    for case in range(count):
        out = pathlib.Path(own) / f"store{case}"
        half = runs.fork(lambda out=out: runs.prepare_store(videos, out), out.with_suffix(".log"))
        enough = 4 + rng.randrange(10)
        while half.poll() is None and len(list((out / ".partial").glob("*.json"))) < enough:
            time.sleep(0.002)
        half.signal(9)
        half.wait()
        files = [path for path in out.rglob("*") if path.is_file() and path.stat().st_size and "lock" not in path.name]
        path = rng.choice(files)
        kind = rng.choice(("flip", "cut", "zero", "grow", "empty"))
        path.write_bytes(changed(path.read_bytes(), kind, rng))
        again = runs.fork(lambda out=out: _prepare(videos, out), out.with_suffix(".log"))
        code = again.wait()
        said = again.log.read_text().splitlines()[-1:]
        if code == NOTICED:
            counts["noticed"] += 1
        elif code != 0:
            wrong.append(f"exit code {code} after {kind} {path.name}: {said}")
        elif {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == whole:
            counts["no difference"] += 1
        else:
            wrong.append(f"silent: {kind} {path.name}")
        shutil.rmtree(out)
    return {"damages": count, **counts, "wrong": wrong}


NOTICED = 3  # exit code


def _prepare(videos: str, out: pathlib.Path) -> None:
    try:
        runs.prepare_store(videos, out)
    except DataError as error:
        print(error)
        raise SystemExit(NOTICED) from None


def records(count: int, shared: runs.Shared, own: pathlib.Path) -> dict:
    """R16: records of a store are damaged. All are noticed, named by their video, and the good ones are as they were.

    At the end a training on the store says in one line what is damaged, and does not go on without it.

    Seen failing: with a reader that takes damaged records for empty ones.
    """
    row = runs.in_child(_records, count, str(shared.store), str(own / "store"))
    damaged_store, workdir = own / "store", own / "run"
    process = runs.start(runs.flags("vito", damaged_store, workdir), own / "run.log")
    code, lines = process.wait(), process.log.read_text().splitlines()
    if code != 1 or not lines[-1].startswith("error: ") or "frames-0" not in lines[-1]:
        row["wrong"].append(f"a training on it: exit code {code}, {lines[-1][:200]!r}")
    return row


def _records(count: int, source: str, copy: str) -> dict:
    from input_pipeline import check
    from input_pipeline.store import FrameStore

    root, rng, wrong, damages = pathlib.Path(copy), random.Random(0), [], 0
    shutil.copytree(source, root)
    store = FrameStore(root)
    whole = list(store.read(np.arange(store.num_frames.sum())))
    contents = {path: path.read_bytes() for path in sorted(root.glob("frames-*"))}
    places = _places(whole, contents)
    for case in range(count):
        # A few records; in the last case all, so that every batch of a training meets some.
        hurt = list(places) if case == count - 1 else rng.sample(list(places), rng.randrange(1, 5))
        damages += len(hurt)
        changing = {path: bytearray(content) for path, content in contents.items()}
        for record in hurt:
            path, place = places[record]
            changing[path][place + rng.randrange(len(whole[record]))] ^= 1 << rng.randrange(8)
        for path, content in changing.items():
            path.write_bytes(content)
        said = [line for line in check.problems_of(root) if "damaged frames" in line]
        should = {str(store.videos[np.searchsorted(store.first_record, record, "right") - 1]) for record in hurt}
        if {name for name in store.videos if any(f": {name} has" in line for line in said)} != should:
            wrong.append(f"damaged are frames of {sorted(should)}, but: {said}")
        if _readable(FrameStore(root), len(whole)) != [None if i in hurt else whole[i] for i in range(len(whole))]:
            wrong.append(f"records {hurt} are damaged, and others are read")
    return {"damages": count, "damaged_records": damages, "wrong": wrong}


def _places(records: list[bytes], contents: dict[pathlib.Path, bytes]) -> dict[int, tuple[pathlib.Path, int]]:
    """Number of a record -> where its bytes begin in a shard; without those that a block of the file's ends within."""
    return {
        number: (path, content.index(record))
        for number, record in enumerate(records)
        for path, content in contents.items()
        if record in content
    }


def _readable(store, count: int) -> list[bytes | None]:
    found: list[bytes | None] = []
    for record in range(count):
        try:
            found.append(store.read(np.array([record]))[0])
        except DataError:
            found.append(None)
    return found


def earlier_versions(own: str) -> dict:
    """R26: runs and exports of all earlier releases: every weight is the same, bit for bit.

    Seen failing: without manifests of format 1 the row ended with "none of the checkpoints ... is good".
    """
    from evaluation import encoders
    from vivi_jax import checkpoint

    wrong, read = [], 0
    for archive in sorted((ROOT / "tests" / "testdata").glob("version_*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(own, filter="data")
        root = pathlib.Path(own, archive.name.removesuffix(".tar.xz"))
        recorded = np.load(root / "features.npz")
        for path in (path for path in root.iterdir() if path.is_dir() or path.suffix == ".safetensors"):
            _, variables, _ = encoders.load_encoder(str(path))
            read += 1
            if checkpoint.state_sha256(variables) != str(recorded[f"{path.name.replace('.', '_')}_sha"]):
                wrong.append(f"{archive.name}: the weights of {path.name} are others")
    return {"cases": read, "wrong": wrong if read else ["there is no earlier version"]}


class _Canary:
    """A pickle of this makes a file where it is loaded."""

    def __init__(self, path: str):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (self._path,)


def pickles(source: str, own: str) -> dict:
    """R20: files that run code when a careless reader opens them, under every name that a reader here takes.

    Seen failing: with np.load(allow_pickle=True) the row ended with a TypeError, of a pickle that had been loaded.
    """
    from input_pipeline.store import INDEX, META, FrameStore, identity_of
    from vivi_jax import export, files

    root = pathlib.Path(own)
    canary = root / "canary"
    wrong, tried = [], 0
    for suffix in (".safetensors", ".pth", ".pt", ".npz", ".npy", ".pkl", ".bin", ".msgpack"):
        path = root / f"weights{suffix}"
        path.write_bytes(pickle.dumps({"model": _Canary(str(canary))}))
        tried += 1
        try:
            export.load_encoder(str(path))
            wrong.append(f"{path.name} was loaded")
        except (CheckpointError, ConfigError):
            pass
    store = root / "store"
    shutil.copytree(source, store)
    index = dict(np.load(store / "index.npz"))
    index["videos"] = np.array([_Canary(str(canary))], object)
    np.savez(store / "index.npz", **index)
    meta = json.loads((store / META).read_text())  # with hashes that fit: whoever sends a store can write them
    meta["files"][INDEX] = {"bytes": (store / INDEX).stat().st_size, "sha256": files.sha256(store / INDEX)}
    files.write_json(store / META, meta | {"id": identity_of(meta)})
    tried += 1
    try:
        FrameStore(store)
        wrong.append("a store's index of pickles was read")
    except DataError:
        pass
    if canary.exists():
        wrong.append("code in a file was run")
    return {"damages": tried, "wrong": wrong}
