"""Stores in buckets: what is read is what a local store gives, from the cache or not, and every failure is one line.

Against real servers of gs:// and s3:// on this machine, behind a proxy that injects faults.
"""

import gc
import importlib.util
import os
import pathlib
import random
import re
import shutil
import threading

import numpy as np
import pytest
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  compiled

from benchmarks.faults import buckets
from helpers.frame_stores import jpeg, write_store
from input_pipeline import images, store
from input_pipeline.buckets import cache, layout
from input_pipeline.streams import sources
from input_pipeline.streams.order import Order
from vivi_jax.buckets import client
from vivi_jax.errors import ConfigError, DataError

SERVERS = all(importlib.util.find_spec(name) for name in ("moto", "flask_cors", "gcp_storage_emulator"))
VIDEOS, FRAMES = 5, 8
DATA = dict(
    source="video",
    views=3,
    sampler="marginal",
    clip_seconds=0.3,
    delay_seconds=0.0,
    image_size=16,
    min_crop_area=0.4,
)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> store.FrameStore:
    """Videos of 48x64 pixels, the records of one shard."""
    rng = np.random.default_rng(0)
    videos = [{"frames": FRAMES, "fps": 25.0, "height": 48, "width": 64, "label": v % 2} for v in range(VIDEOS)]
    frames = [jpeg(rng.integers(0, 256, (48, 64, 3), np.uint8)) for _ in range(VIDEOS * FRAMES)]
    return write_store(tmp_path_factory.mktemp("local") / "store", videos, frames, class_names=("a", "b"))


@pytest.fixture(scope="module", params=client.SCHEMES)
def server(request):
    if not SERVERS:
        pytest.skip("servers")
    with pytest.MonkeyPatch.context() as patch, buckets.serving(request.param) as proxy:
        for name, value in buckets.environment(proxy.scheme, proxy.url).items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def copied(server, local) -> str:
    return buckets.upload(server, pathlib.Path(local.directory), "store")


@pytest.fixture(autouse=True)
def _clean(request, tmp_path, monkeypatch):
    """A cache of each test's own, few and quick tries, and no faults left behind."""
    monkeypatch.setenv("VIVI_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "TRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"})
    if "server" in request.fixturenames:
        proxy = request.getfixturevalue("server")
        proxy.fault = lambda method, path: None
        proxy.seen.clear()


def ranges(server) -> int:
    """Requests for parts of shards so far."""
    return sum("array_record" in path for _, path, _ in server.seen)


def everything(s: store.FrameStore) -> list:
    fields = ("videos", "first_record", "num_frames", "fps", "height", "width", "label", "shot_starts", "shot_offsets")
    records = np.random.default_rng(1).permutation(s.meta["frames"])
    return [*(getattr(s, name).tolist() for name in fields), s.class_names, s.meta, s.read(records).tolist()]


# ---- Where records lie ----------------------------------------------------------------------------------------------

_EDGE = (1 << 16) - 24 - 64 - 46  # of the first record, so that it ends with the first block
LENGTHS = {
    "none": [],
    "empty": [0],
    "one": [5],
    "blocks": [0, *range(0, 200_000, 7001), *[1] * 3000],
    "edges": [length for edge in range(-50, 50, 7) for length in (_EDGE + edge, 3)],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_record_is_where_its_place_says(tmp_path, lengths):
    rng = np.random.default_rng(0)
    records = [rng.bytes(length) for length in lengths]
    path = tmp_path / "x.array_record"
    store.write_shard(path, records)
    data = path.read_bytes()
    tail = data[layout.tail_of(len(data), len(records)) :]
    places = layout.places(tail, len(data), len(records)).tolist()
    found = [layout.record(data[a:b], a) for a, b in zip(places, places[1:], strict=False)]
    reader = array_record_module.ArrayRecordReader(str(path))
    assert found == records == (reader.read_all() if records else [])


def test_a_damaged_index_is_refused_and_nothing_else(tmp_path):
    """Flips and cuts of the end of a shard: ValueError, or places with which no record passes for another."""
    rng, path = random.Random(0), tmp_path / "x.array_record"
    store.write_shard(path, [bytes([k]) * 5000 for k in range(40)])
    data = path.read_bytes()
    tail = data[layout.tail_of(len(data), 40) :]
    good, refused = layout.places(tail, len(data), 40).tolist(), 0
    used = [at for at, byte in enumerate(tail) if byte and at > len(tail) - (len(data) - good[-1])]
    damages = [tail[:cut] for cut in (0, 1, 30, 1 << 16, len(tail) - 1)] + [bytes(len(tail))]
    for at in rng.choices(used, k=200):
        damages.append(tail[:at] + bytes([tail[at] ^ 1 << rng.randrange(8)]) + tail[at + 1 :])
    for damage in damages:
        try:
            places = layout.places(damage, len(data), 40).tolist()
        except ValueError:
            refused += 1
            continue
        for k, (a, b) in enumerate(zip(places, places[1:], strict=False)):
            if (a, b) != (good[k], good[k + 1]):
                with pytest.raises(ValueError):
                    assert layout.record(data[a:b], a) == bytes([k]) * 5000
                    raise ValueError
    assert refused > 50


# ---- Reading --------------------------------------------------------------------------------------------------------


def test_a_store_in_a_bucket_reads_as_the_local_one(server, copied, local):
    remote = store.FrameStore(copied)
    assert everything(remote) == everything(local)
    assert ranges(server) == VIDEOS * FRAMES + 1  # and where they lie
    assert everything(remote) == everything(store.FrameStore(f"{copied}/")) == everything(local)
    assert ranges(server) == VIDEOS * FRAMES + 1, "the cache was not used"
    for bad in ([VIDEOS * FRAMES], [0, -1]):
        with pytest.raises(IndexError):
            remote.read(np.array(bad))
    local_identity = sources.identities({"path": local.directory})[f"config.data.path={local.directory}"]
    assert sources.identities({"path": copied}) == {f"config.data.path={copied}": local_identity}


@pytest.mark.parametrize("process", [0, 1])
def test_batches_are_the_local_ones_from_any_step(server, copied, local, process):
    order = Order(seed=3, batch_size=4, process_index=process, process_count=2)
    streams = [sources.open_stream(DATA | {"path": path}, order) for path in (copied, local.directory)]
    remote, found = ([batch["views"] for batch in stream(0, 5)] for stream in streams)
    np.testing.assert_array_equal(remote, found)
    np.testing.assert_array_equal([batch["views"] for batch in streams[0](3, 2)], found[3:])
    assert remote[0].shape == (2, 3, 16, 16, 3)


def test_later_examples_are_begun_before_the_first_is_there(server, copied):
    """No record is given out until 25 are asked for: more than a batch has."""
    enough, asked = threading.Event(), []

    def hold(method, path):
        if "array_record" in path and "tail" in asked:
            asked.append(path)
            if len(asked) > 25:
                enough.set()
            enough.wait(20)
        elif "array_record" in path:
            asked.append("tail")  # the first request: where records lie

    server.fault = hold
    batches = sources.open_stream(DATA | {"path": copied}, Order(0, 2))
    next(batches(threads=1))
    assert enough.is_set(), f"only {len(asked) - 1} records were asked for"


def test_labelled_images_are_the_local_ones(server, copied, local, tmp_path):
    def shown(source: str, split: str):
        found = images.load_labelled(source, split)
        return found.labels.tolist(), found.class_names, [found.read(i) for i in range(len(found))]

    for part in ("train", "validation"):
        shutil.copytree(local.directory, tmp_path / "both" / part)
        buckets.upload(server, tmp_path / "both" / part, f"both/{part}")
    both = f"{server.scheme}://{buckets.BUCKET}/both"
    for split in ("train", "test"):
        assert shown(both, split) == shown(str(tmp_path / "both"), split)
    assert len(shown(both, "test")[0]) == VIDEOS
    assert shown(copied, "train") == shown(local.directory, "train")
    assert images.load_labelled(both, "train").take(np.arange(2)).ahead > 0
    identities = [sources.identities({"labelled_path": path}) for path in (both, str(tmp_path / "both"))]
    assert len({value for found in identities for value in found.values()}) == 1
    buckets.upload(server, tmp_path / "both" / "train", "alone/train")
    with pytest.raises(DataError, match="has train/ but none of test/"):
        images.load_labelled(f"{server.scheme}://films/alone/", "test")


# ---- The cache ------------------------------------------------------------------------------------------------------


def shard_of(local) -> str:
    return local.meta["shards"][0]["file"]


@pytest.mark.parametrize("server", ["gs"], indirect=True)  # the cache knows no schemes
def test_what_was_damaged_in_the_cache_is_read_again(server, copied, local):
    everything(store.FrameStore(copied))
    folder = pathlib.Path(os.environ["VIVI_JAX_CACHE"], "stores", local.id)
    names = {"index.npz", "checksums.crc32", "IN_USE", shard_of(local), f"{shard_of(local)}.places"}
    assert {path.name for path in folder.iterdir()} == names
    for name in sorted(names - {"IN_USE"}):
        data = bytearray((folder / name).read_bytes())
        for at in range(5, len(data), 1500):
            data[at] ^= 0x10
        for damaged in (data, b""):
            (folder / name).write_bytes(damaged)
            assert everything(store.FrameStore(copied)) == everything(local), name


@pytest.mark.parametrize("server", ["gs"], indirect=True)  # the cache knows no schemes
def test_a_full_cache_takes_no_more_and_loses_nothing(server, copied, local, monkeypatch, caplog):
    size = pathlib.Path(local.directory, shard_of(local)).stat().st_size
    monkeypatch.setenv("VIVI_JAX_CACHE_GB", str(size / 2 / 1e9))
    assert everything(store.FrameStore(copied)) == everything(local)
    first = ranges(server)
    assert everything(store.FrameStore(copied)) == everything(local)
    assert first > ranges(server) - first > 10
    assert cache._used(pathlib.Path(os.environ["VIVI_JAX_CACHE"], "stores")) < size / 2 + 3 * 8192
    assert "is full" in caplog.text
    monkeypatch.setenv("VIVI_JAX_CACHE_GB", "0")
    assert everything(store.FrameStore(copied)) == everything(local)
    assert not pathlib.Path(os.environ["VIVI_JAX_CACHE"], "stores", local.id, shard_of(local)).stat().st_blocks


def test_other_stores_make_room_unless_they_are_open(tmp_path, monkeypatch):
    monkeypatch.setenv("VIVI_JAX_CACHE_GB", "0.0033")
    data = {name: random.Random(name).randbytes(1_000_000) for name in "abcd"}
    opened = {}
    for age, name in enumerate("abc"):
        opened[name] = cache.Cache(name)
        opened[name].put("x.array_record", 0, data[name])
        os.utime(opened[name].directory / "IN_USE", (age, age))
    del opened["b"], opened["c"]
    gc.collect()
    opened["d"] = cache.Cache("d")
    opened["d"].put("x.array_record", 0, data["d"])
    assert {path.name for path in (tmp_path / "cache/stores").iterdir()} == {"a", "c", "d"}
    for name in "ad":
        assert opened[name].get("x.array_record", 0, 1_000_000) == data[name]


def test_settings_of_the_cache_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setenv("VIVI_JAX_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="VIVI_JAX_CACHE_GB=much: it is a size in GB"):
        cache.Cache("a")
    monkeypatch.delenv("VIVI_JAX_CACHE_GB")
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIVI_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot keep what is read .*set VIVI_JAX_CACHE"):
        cache.Cache("a")


# ---- Other paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, path",
    [
        ("video", "hdfs://h/store"),
        ("video", "gs:/films/store"),
        ("images", "hdfs://h/images"),
        ("windows", "file:///x"),
    ],
)
def test_what_is_not_read_from_buckets_is_refused(source, path):
    with pytest.raises(ConfigError, match=f"--config.data.path={path}: this command reads and writes local files only"):
        sources.open_stream({"source": source, "path": path}, Order(0, 2))


# ---- What goes wrong ------------------------------------------------------------------------------------------------

FAULTS = {  # what the server does, to every request -> the line
    "login expired": (buckets.Fault(status=401), "401 Unauthorized.* log in again"),
    "no right": (buckets.Fault(status=403), r"403 Forbidden: give the account .* right .*\(roles/"),
    "busy": (buckets.Fault(status=503), r"503 Service Unavailable, at each of 3 tries in \d+ s; .*it goes on"),
    "too many": (buckets.Fault(status=429), "429 Too Many Requests, at each of 3 tries"),
    "cut": (buckets.Fault(keep=7), "Transferred a partial file.*bytes missing, at each of 3 tries"),
    "bad request": (buckets.Fault(status=400), "400 Bad Request"),
}


@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS)
def test_every_fault_is_one_line_and_is_over_when_it_is(server, copied, local, fault, message):
    server.fault = lambda method, path: fault
    with pytest.raises(DataError, match=message) as refused:
        store.FrameStore(copied)
    assert str(refused.value).startswith(f"cannot read {copied}/meta.json: ") and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    server.fault = lambda method, path: None
    opened = store.FrameStore(copied)
    server.fault = lambda method, path: fault
    with pytest.raises(DataError, match=message):
        opened.read(np.array([3]))
    server.fault = lambda method, path: None
    assert opened.read(np.array([3])).tolist() == local.read(np.array([3])).tolist()


def test_what_passes_is_waited_for(server, copied, local):
    """Every request fails twice, in turn by 503, by a body that is cut and by 500."""
    seen, lock = {}, threading.Lock()
    faults = [buckets.Fault(status=503), buckets.Fault(keep=9), buckets.Fault(status=500)]

    def fail(method, path):
        with lock:
            key = (path.split("tensorstore=")[0], server.seen[-1][2])
            seen[key] = seen.get(key, -1) + 1
            return faults[(seen[key] + len(seen)) % 3] if seen[key] < 2 else None

    server.fault = fail
    opened = store.FrameStore(copied)
    for record in range(8):  # one at a time, so that the last request is the one that fails
        assert opened.read(np.array([record])).tolist() == local.read(np.array([record])).tolist()
    assert max(seen.values()) == 2


def test_a_server_that_says_nothing_is_given_up(server, copied, caplog, monkeypatch):
    monkeypatch.setattr(client, "SAY_SECONDS", 0.05)
    server.fault = lambda method, path: buckets.Fault(wait=0.3)
    store.FrameStore(copied)
    assert re.search(rf"no answer from {copied}/meta.json for \d+ s; still trying", caplog.text)
    assert os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] == "30"


def test_what_is_not_a_whole_store_in_a_bucket(server, local, tmp_path):
    good = pathlib.Path(local.directory)
    scheme = server.scheme
    with pytest.raises(DataError, match=f"{scheme}://films/nothing is empty, or not there; copy one there"):
        store.FrameStore(f"{scheme}://films/nothing")
    with pytest.raises(DataError, match="(no such bucket|there is no .*bucket|cannot read .*no-such-bucket)"):
        store.FrameStore(f"{scheme}://no-such-bucket/store")
    with pytest.raises(DataError, match="Bad_Name"):
        store.FrameStore(f"{scheme}://Bad_Name../store")
    with pytest.raises(DataError, match="a folder in a bucket is gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"):
        store.FrameStore("hdfs://films/store")
    buckets.put(server, "videos/a.mp4", b"film")
    with pytest.raises(DataError, match=r"holds no frame store \(it has no meta.json\)"):
        store.FrameStore(f"{scheme}://films/videos")

    def copy(name: str, change) -> str:
        shutil.copytree(good, tmp_path / name)
        change(tmp_path / name)
        return buckets.upload(server, tmp_path / name, name)

    shard = shard_of(local)
    with pytest.raises(DataError, match=f"{shard} is missing, one of 1 shards; copy the store there again"):
        store.FrameStore(copy("missing", lambda folder: (folder / shard).unlink()))
    with pytest.raises(DataError, match="index.npz is damaged, or of another store; copy the store there again"):
        store.FrameStore(copy("index", lambda folder: (folder / "index.npz").write_bytes(b"x")))
    for name, length in (("cut", 100_000), ("short", 1)):
        half = store.FrameStore(copy(name, lambda folder: os.truncate(folder / shard, length)))  # noqa: B023
        with pytest.raises(DataError, match=f"{shard} is shorter than it must be: it was cut, or .*; copy it there"):
            half.read(np.array([0]))

    def swapped(folder):
        data = bytearray((folder / shard).read_bytes())
        data[2000] ^= 1
        (folder / shard).write_bytes(bytes(data))

    damaged = store.FrameStore(copy("flipped", swapped))
    with pytest.raises(DataError, match=f"{shard}: record 0 is not the one that was written; copy the store there"):
        damaged.read(np.arange(5))
    assert damaged.read(np.arange(3, 5)).tolist() == local.read(np.arange(3, 5)).tolist()
