"""The frame store: what is written is what is read, in any order and from any thread, and damage is named."""

import hashlib
import threading
import time

import numpy as np
import pytest

from input_pipeline import store
from vivi_jax.errors import DataError

FRAMES = [5, 3, 0, 4]  # of four inputs; the third one is refused


def frame(video: int, k: int) -> bytes:
    return f"video {video} frame {k} ".encode() * 50


def write(directory, per_shard: int = 2) -> list[dict]:
    directory.mkdir(exist_ok=True)
    rows, shards = [], []
    for v, n in enumerate(FRAMES):
        row = {"input": f"v{v}.mp4", "status": "ok" if n else "refused", "reason": "" if n else "no video stream"}
        if n:
            row |= {
                "frames": n,
                "fps": 25.0,
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
        count = store.write_shard(path, (frame(v, k) for v in videos for k in range(FRAMES[v])))
        shards.append({"file": path.name, "records": count, "bytes": path.stat().st_size})
    store.write_index(directory, settings={"fps": 25}, shards=shards, rows=rows, class_names=["cat", "dög", "eel"])
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
    assert a == b and len(a) == 5


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
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        store.FrameStore(tmp_path)


@pytest.mark.parametrize("name", [store.INDEX, store.META])
def test_damaged_index_is_one_clear_error(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        store.FrameStore(tmp_path)
