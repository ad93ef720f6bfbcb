"""The frame store: what is written is what is read, in any order and from any thread, and damage is named."""

import collections
import hashlib
import json
import random
import shutil
import threading
import time

import numpy as np
import pytest

from input_pipeline import store
from input_pipeline.streams import sources
from vivi_jax.errors import DataError

FRAMES = [5, 3, 0, 4]  # of four inputs; the third one is refused


def frame(video: int, k: int) -> bytes:
    return f"video {video} frame {k} ".encode() * 50


def write(directory, per_shard: int = 2, salt: bytes = b"") -> list[dict]:
    directory.mkdir(exist_ok=True)
    rows, shards, checksums = [], [], []
    for v, n in enumerate(FRAMES):
        row = {"input": f"v{v}.mp4", "status": "ok" if n else "refused", "reason": "" if n else "no video stream"}
        if n:
            row |= {
                "frames": n,
                "fps": 25.0 + len(salt),
                "height": 256,
                "width": 300 + v,
                "shot_starts": [0, 2] if n > 3 else [0],
                "label": v - 1,
            }
        rows.append(row)
    num_shards = len(FRAMES) // per_shard
    for s in range(num_shards):
        path = directory / store.shard_name(s, num_shards)
        videos = range(s * per_shard, (s + 1) * per_shard)
        shard, crcs = store.write_shard(path, (salt + frame(v, k) for v in videos for k in range(FRAMES[v])))
        shards.append(shard)
        checksums.append(crcs)
    settings, class_names = {"fps": 25}, ["cat", "dög", "eel"]
    store.write_index(
        directory, settings=settings, shards=shards, checksums=checksums, rows=rows, class_names=class_names
    )
    return rows


@pytest.mark.parametrize("per_shard", [1, 2, 4])  # 1: the shard of the refused input has no record
def test_every_frame_comes_back_by_number(tmp_path, per_shard):
    write(tmp_path / "d", per_shard)
    s = store.FrameStore(tmp_path / "d")
    assert len(s) == 3 and s.videos.tolist() == ["v0.mp4", "v1.mp4", "v3.mp4"]
    assert s.num_frames.tolist() == [5, 3, 4] and s.first_record.tolist() == [0, 5, 8]
    expected = [frame(v, k) for v in range(4) for k in range(FRAMES[v])]
    order = np.random.default_rng(0).permutation(12).reshape(2, 3, 2)
    frames = s.read(order)
    assert frames.shape == (2, 3, 2) and frames.dtype == object
    assert frames.ravel().tolist() == [expected[i] for i in order.ravel()]
    assert s.read(np.zeros((0, 3), np.int64)).shape == (0, 3)
    for bad in ([12], [0, -1]):
        with pytest.raises(IndexError):
            s.read(np.array(bad))


def test_index_fields(tmp_path):
    write(tmp_path)
    s = store.FrameStore(tmp_path)
    dtypes = {
        "first_record": "int64",
        "num_frames": "int32",
        "fps": "float32",
        "height": "int32",
        "width": "int32",
        "label": "int32",
        "shot_starts": "int32",
        "shot_offsets": "int64",
    }
    assert {name: str(getattr(s, name).dtype) for name in dtypes} == dtypes
    assert s.label.tolist() == [-1, 0, 2] and s.class_names == ["cat", "dög", "eel"]
    assert s.width.tolist() == [300, 301, 303] and s.meta["settings"] == {"fps": 25}
    assert [s.shots(v).tolist() for v in range(3)] == [[[0, 2], [2, 5]], [[0, 3]], [[0, 2], [2, 4]]]
    assert s.meta["inputs"] == s.meta["videos"] + s.meta["refused"] == 4
    assert len((tmp_path / store.LEDGER).read_text().splitlines()) == 4


def test_same_bytes_at_another_time(tmp_path):
    write(tmp_path / "a")
    time.sleep(2.1)  # zip time stamps have a resolution of two seconds
    write(tmp_path / "b")
    a, b = ({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / d).iterdir()} for d in "ab")
    assert a == b and len(a) == 6


def test_threads_share_one_store(tmp_path):
    write(tmp_path)
    s = store.FrameStore(tmp_path)
    expected = s.read(np.arange(12)).tolist()
    wrong = []

    def work(seed):
        for i in np.random.default_rng(seed).integers(0, 12, 2000):
            if s.read(np.array([i]))[0] != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_unusable_directories_are_named_with_the_command(tmp_path):
    with pytest.raises(DataError, match="no such directory.*python -m input_pipeline.prepare"):
        store.FrameStore(tmp_path / "none")
    with pytest.raises(DataError, match="not a frame store.*python -m input_pipeline.prepare"):
        store.FrameStore(tmp_path)
    (tmp_path / "holiday.mp4").touch()
    with pytest.raises(DataError, match="not a frame store.*--out=STORE$"):  # prepare would not write beside it
        store.FrameStore(tmp_path)
    (tmp_path / store.PARTIAL).mkdir()
    with pytest.raises(DataError, match="not finished.*python -m input_pipeline.prepare"):
        store.FrameStore(tmp_path)


def test_damage_is_found(tmp_path):
    write(tmp_path)
    shard = tmp_path / store.shard_name(0, 2)
    good = shard.read_bytes()
    shard.write_bytes(good[:-1])
    with pytest.raises(DataError, match="bytes"):
        store.FrameStore(tmp_path)
    flipped = bytearray(good)
    flipped[good.index(b"video 0 frame 3") + 100] ^= 1  # one bit inside a frame
    shard.write_bytes(bytes(flipped))
    s = store.FrameStore(tmp_path)
    assert s.read(np.array([2]))[0] == frame(0, 2)
    with pytest.raises(DataError, match="record 3 is damaged"):
        s.read(np.array([3]))
    assert s.read(np.array([2]))[0] == frame(0, 2)  # what is good is still read
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        store.FrameStore(tmp_path)


def as_version_2(directory) -> None:
    """Makes it a store as the version before wrote it: without id, hashes and checksums."""
    meta = json.loads((directory / store.META).read_text())
    del meta["id"], meta["files"]
    for shard in meta["shards"]:
        del shard["sha256"], shard["checksums"]
    (directory / store.META).write_text(json.dumps(meta | {"version": 2}))
    (directory / store.CHECKSUMS).unlink()


def everything(directory) -> list:
    """All that a reader of a store may ask it for."""
    s = store.FrameStore(directory)
    fields = ("videos", "first_record", "num_frames", "fps", "height", "width", "label", "shot_starts", "shot_offsets")
    values = [getattr(s, name).tolist() for name in fields]
    return [*values, s.class_names, s.shots_may_hold_cuts, s.meta, s.read(np.arange(12)).tolist()]


def test_no_damage_is_silent(tmp_path):
    """Every file of a store x flips, cuts, zeros, growth, loss, and exchange for a file of the same kind."""
    write(tmp_path / "good")
    write(tmp_path / "other", salt=b"x")  # same sizes throughout: ArrayRecord pads its files
    good, rng, refused = everything(tmp_path / "good"), random.Random(0), collections.Counter()
    names = [path.name for path in sorted((tmp_path / "good").iterdir()) if path.name != store.LEDGER]
    shards = [name for name in names if name.startswith("frames")]
    for name in names:
        data = (tmp_path / "good" / name).read_bytes()
        full = len(data.rstrip(b"\0"))
        damages = [None, b"", data[: full // 2], data[:-1], data + b"x", bytes(len(data))]
        damages.append((tmp_path / "other" / name).read_bytes())
        damages += [(tmp_path / "good" / other).read_bytes() for other in shards if name in shards and other != name]
        for position in (rng.randrange(8 * full) for _ in range(60)):
            flipped = bytearray(data)
            flipped[position // 8] ^= 1 << position % 8
            damages.append(bytes(flipped))
        for damage in damages:
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            (tmp_path / "bad" / name).unlink()
            if damage is not None:
                (tmp_path / "bad" / name).write_bytes(damage)
            try:
                assert everything(tmp_path / "bad") == good, (name, damage)
            except DataError as error:
                assert str(tmp_path / "bad") in str(error) and "\n" not in str(error)
                refused[name] += 1
            shutil.rmtree(tmp_path / "bad")
    assert sum(refused.values()) >= 200 and min(refused[name] for name in names) >= 6, refused


@pytest.mark.parametrize("names", [("frames",), ("frames", "checksums", "index", "meta")])
def test_a_store_replaced_under_an_open_reader_is_noticed(tmp_path, names):
    """In place, as cp does it; frames that were read before do not come back as other ones."""
    write(tmp_path / "a")
    write(tmp_path / "b", salt=b"x")
    good = store.FrameStore(tmp_path / "a").read(np.arange(12)).tolist()
    reader = store.FrameStore(tmp_path / "a")
    assert reader.read(np.array([0]))[0] == good[0]  # the first shard is open, the second is not
    for path in (tmp_path / "b").iterdir():
        if path.name.startswith(names):
            (tmp_path / "a" / path.name).write_bytes(path.read_bytes())
    for record in range(12):
        with pytest.raises(DataError, match=str(tmp_path / "a")):
            reader.read(np.array([record]))


@pytest.mark.parametrize("column", store._COLUMNS)
def test_an_index_without_a_column_or_with_one_of_another_kind(tmp_path, column):
    """As stores without hashes may have it."""
    write(tmp_path)
    as_version_2(tmp_path)
    with np.load(tmp_path / store.INDEX) as index:
        arrays = dict(index)
    for bad in (None, np.zeros(len(arrays[column]), "S9"), arrays[column][:-1], arrays[column][None]):
        np.savez(tmp_path / store.INDEX, **{k: v for k, v in (arrays | {column: bad}).items() if v is not None})
        message = "its (column|videos|shots|rates)|no column|has [0-9]+ frames|a label has no class"
        with pytest.raises(DataError, match=f"cannot read .*index.npz .*({message})"):
            store.FrameStore(tmp_path)


def test_an_index_that_unpacks_to_more_than_it_is(tmp_path):
    write(tmp_path)
    as_version_2(tmp_path)
    with np.load(tmp_path / store.INDEX) as index:
        np.savez_compressed(tmp_path / store.INDEX, **index, zeros=np.zeros(10**6))
    with pytest.raises(DataError, match="it is compressed, which prepare never does"):
        store.FrameStore(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: [],
        lambda meta: None,
        lambda meta: {"version": 2},
        lambda meta: meta | {"shards": {}},
        lambda meta: meta | {"shards": [{}]},
        lambda meta: meta | {"shards": [None]},
        lambda meta: meta | {"shards": meta["shards"][:1]},
        lambda meta: meta | {"shards": [meta["shards"][0] | {"file": "../../etc/passwd"}]},
        lambda meta: meta | {"shards": [shard | {"bytes": "many"} for shard in meta["shards"]]},
        lambda meta: meta | {"shards": [shard | {"records": -1} for shard in meta["shards"]]},
        lambda meta: meta | {"settings": None},
        lambda meta: meta | {"grown": 5},
        lambda meta: meta | {"grown": [None]},
        lambda meta: meta | {"grown": [{"inputs": "2", "identity": ""}]},
        lambda meta: meta | {"grown": [{"inputs": 99, "identity": ""}]},
        lambda meta: {key: value for key, value in meta.items() if key != "frames"},
    ],
)
def test_a_meta_of_wrong_types_is_one_line(tmp_path, change):
    write(tmp_path)
    as_version_2(tmp_path)
    path = tmp_path / store.META
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=f"cannot read {path}"):
        store.FrameStore(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=f"cannot read {path}"):
        store.FrameStore(tmp_path)


def test_a_store_of_the_version_before_reads_the_same(tmp_path):
    write(tmp_path)
    frames, new = store.FrameStore(tmp_path).read(np.arange(12)).tolist(), sources.identities({"path": str(tmp_path)})
    as_version_2(tmp_path)
    old = store.FrameStore(tmp_path)
    assert old.id == "" and not old.shots_may_hold_cuts and old.read(np.arange(12)).tolist() == frames
    assert sources.identities({"path": str(tmp_path)}) == sources.identities({"path": str(tmp_path)}) != new


def test_the_id_is_of_the_content(tmp_path):
    for name, salt in (("a", b""), ("b", b""), ("c", b"x")):
        write(tmp_path / name, salt=salt)
    a, b, c = (store.FrameStore(tmp_path / name).id for name in "abc")
    assert a == b != c and len(a) == 64
