"""Reading a frame store from a bucket, in ratios of one run: the first pass, and the passes that the cache serves.

    python -m benchmarks.bucket [--latency_ms=50] [--frames=20000] [--quick]

A server in a process of its own speaks S3 on the loopback and waits before each answer. From it, the same frames in the
same order:
    bare ranges         the client alone, its most requests under way: the limit
    obstore             the same by obstore, the fastest of other clients; left out, by name, where it is not installed
    vivi_jax, cold      store, checksums and cache, begun ahead in the order of a training; the cache is empty
    vivi_jax, warm      the same again, from the cache
and at a given pace, as of an accelerator, the share of the time that a training would wait for its next example, cold
and warm. Frames are read and checked, and not decoded, which benchmarks.input measures.
"""

import argparse
import asyncio
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import results
from input_pipeline import store
from input_pipeline.streams import sampling
from vivi_jax.buckets import client
from vivi_jax.errors import DataError

SEED, VIEWS, PER_VIDEO, FRAME_BYTES, VIDEOS_PER_SHARD = 0, 3, 250, 8000, 16
PACE = 500  # frames per second


def make_store(directory: pathlib.Path, frames: int) -> None:
    """Videos of 250 frames, which are noise of the size that JPEGs of small videos have."""
    rng, videos = np.random.default_rng(SEED), max(frames // PER_VIDEO, 2)
    rows, shards, checksums = [], [], []
    count = -(-videos // VIDEOS_PER_SHARD)
    for shard in range(count):
        here = range(shard * VIDEOS_PER_SHARD, min((shard + 1) * VIDEOS_PER_SHARD, videos))
        path = directory / store.shard_name(shard, count)
        entry, crcs = store.write_shard(path, (rng.bytes(FRAME_BYTES) for _ in range(len(here) * PER_VIDEO)))
        shards.append(entry)
        checksums.append(crcs)
    for video in range(videos):
        row = {"input": f"{video:06d}.mp4", "status": "ok", "reason": "", "shot_starts": [0], "label": -1}
        rows.append(row | {"frames": PER_VIDEO, "fps": 25.0, "height": 128, "width": 170})
    store.write_index(directory, settings={}, shards=shards, checksums=checksums, rows=rows, class_names=[])


def serve(root: str, latency: float) -> None:
    """Answers S3's requests for objects, their ranges, and lists below a folder, each after `latency` seconds."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            arrived = time.perf_counter()
            path, _, query = head.split()[1].decode().partition("?")
            file = pathlib.Path(root, urllib.parse.unquote(path).lstrip("/").partition("/")[2])
            wanted = re.search(rb"(?i)\r\nrange: bytes=(\d+)-(\d+)", head)
            status, headers, body = b"200 OK", b"", b""
            if "list-type=2" in query:
                folder = urllib.parse.parse_qs(query)["prefix"][0]
                names = sorted(f"{folder}{name}" for name in os.listdir(pathlib.Path(root, folder)))
                keys = "".join(f"<Contents><Key>{name}</Key><Size>1</Size></Contents>" for name in names)
                count = f"<KeyCount>{len(names)}</KeyCount><IsTruncated>false</IsTruncated>"
                body = f"<ListBucketResult>{count}{keys}</ListBucketResult>".encode()
            elif not file.is_file():
                status = b"404 Not Found"
            elif wanted:
                first, last, size = int(wanted[1]), int(wanted[2]), file.stat().st_size
                with open(file, "rb") as shard:
                    body = os.pread(shard.fileno(), last - first + 1, first)
                status, headers = b"206 Partial Content", b"Content-Range: bytes %d-%d/%d\r\n" % (first, last, size)
            else:
                body = file.read_bytes()
            await asyncio.sleep(latency - (time.perf_counter() - arrived))
            length = b'ETag: "1"\r\nContent-Length: %d\r\n\r\n' % len(body)
            writer.write(b"HTTP/1.1 " + status + b"\r\n" + headers + length + body)
            await writer.drain()

    async def run() -> None:
        server = await asyncio.start_server(_until_gone(answer), "127.0.0.1", 0, backlog=512)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(run())


def _until_gone(answer: Callable) -> Callable:
    async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    return answer_all


def read_ahead(frames: store.FrameStore, count: int) -> Any:
    """What reads example i, as a stream does: three frames of a video, every video once before any comes again."""
    from input_pipeline.streams.decode import Example, ReadAhead, from_store  # TensorFlow, which the server needs not

    def example(i: int) -> Example:
        video = sampling.pick(SEED, i, len(frames), 1)
        wanted = sampling.example_rng(SEED, i).integers(0, PER_VIDEO, VIEWS)
        plan = sampling.ViewPlan(
            wanted, np.zeros((VIEWS, 4), np.int32), np.zeros(VIEWS, bool), np.zeros(VIEWS, np.int64)
        )
        return from_store(frames, video, plan)

    return ReadAhead(example, 0, count, frames.ahead)


def bare_ranges(frames: store.FrameStore, address: str, count: int) -> float:
    """Ranges per second of the client alone: random places of FRAME_BYTES."""
    folder, rng, under_way = client.Folder(address), np.random.default_rng(SEED), collections.deque()
    shards = frames.meta["shards"]
    start = time.perf_counter()
    for _ in range(count):
        shard = shards[rng.integers(len(shards))]
        place = int(rng.integers(shard["bytes"] - FRAME_BYTES))
        under_way.append(folder.begin(shard["file"], place, place + FRAME_BYTES))
        if len(under_way) >= client.IN_FLIGHT:
            under_way.popleft()()
    while under_way:
        under_way.popleft()()
    return count / (time.perf_counter() - start)


def obstore_ranges(frames: store.FrameStore, count: int) -> float | None:
    """The same by obstore; None where it is not installed. Its S3Store takes AWS's variables."""
    try:
        import obstore.store  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("obstore: left out, it is not installed", flush=True)
        return None
    shards, rng = frames.meta["shards"], np.random.default_rng(SEED)
    bucket = obstore.store.S3Store("bucket", region="us-east-1", client_options={"allow_http": True})

    async def read(some: int) -> None:
        for _ in range(some):
            shard = shards[rng.integers(len(shards))]
            place = int(rng.integers(shard["bytes"] - FRAME_BYTES))
            await obstore.get_range_async(bucket, f"store/{shard['file']}", start=place, length=FRAME_BYTES)

    async def all_at_once() -> None:
        await asyncio.gather(*(read(count // readers) for _ in range(readers)))

    start, readers = time.perf_counter(), min(client.IN_FLIGHT, count)
    asyncio.run(all_at_once())
    return count // readers * readers / (time.perf_counter() - start)


def in_turn(frames: store.FrameStore, count: int, pace: float | None) -> tuple[float, float]:
    """(frames per second, share of the time waited) of `count` examples, one after another, no faster than the pace."""
    reader = read_ahead(frames, count)
    start, waited = time.perf_counter(), 0.0
    for n in range(count):
        if pace:
            time.sleep(max(0.0, start + waited + n * VIEWS / pace - time.perf_counter()))
        asked = time.perf_counter()
        reader(n)
        waited += time.perf_counter() - asked
    seconds = time.perf_counter() - start
    reader.close()
    return count * VIEWS / seconds, waited / seconds


def measure(address: str, directory: str, count: int, cache: pathlib.Path) -> Iterator[tuple[str, float]]:
    def opened() -> store.FrameStore:
        return store.FrameStore(address)

    local = store.FrameStore(directory)
    assert all(np.array_equal(opened().read(np.array([r])), local.read(np.array([r]))) for r in (0, PER_VIDEO))
    yield "bare_ranges_per_second", bare_ranges(local, address, count * VIEWS)
    if (rate := obstore_ranges(local, count * VIEWS)) is not None:
        yield "obstore_ranges_per_second", rate
    for pace, what in ((None, "frames_per_second"), (PACE, "share_waited_at_the_pace")):
        shutil.rmtree(cache)
        for pass_ in ("cold", "warm"):
            yield f"{pass_}_{what}", in_turn(opened(), count, pace)[1 if pace else 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency_ms", type=float, default=50.0, help="of each request")
    parser.add_argument("--frames", type=int, default=200_000, help="in the store; a third as many examples are read")
    parser.add_argument("--quick", action="store_true", help="the smallest: writes no result")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.latency_ms / 1000)
        return
    latency, frames = (1.0, 1000) if options.quick else (options.latency_ms, options.frames)
    with tempfile.TemporaryDirectory() as scratch:
        directory, cache = pathlib.Path(scratch, "bucket", "store"), pathlib.Path(scratch, "cache")
        directory.mkdir(parents=True)
        make_store(directory, frames)
        words = [sys.executable, "-m", "benchmarks.bucket", f"--serve={directory.parent}", f"--latency_ms={latency}"]
        with subprocess.Popen(words, cwd=results.ROOT, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout
                os.environ |= {
                    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}",
                    "AWS_ACCESS_KEY_ID": "someone",
                    "AWS_SECRET_ACCESS_KEY": "secret",
                    "VIVI_JAX_CACHE": str(cache),
                }
                count = 20 if options.quick else frames // PER_VIDEO * 8
                values = {}
                for name, value in measure("s3://bucket/store", str(directory), count, cache):
                    values[name] = round(value, 4)
                    print(f"vivi_jax from a bucket, {latency:g} ms a request: {name} {value:.4g}", flush=True)
            except DataError as error:
                sys.exit(f"error: {error}")
            finally:
                server.kill()
    best = max(values["bare_ranges_per_second"], values.get("obstore_ranges_per_second", 0.0))
    values |= {
        "cold_ratio_to_best_ranges": round(values["cold_frames_per_second"] / best, 3),
        "target_cold_ratio": 0.8,
        "target_share_waited_warm": 0.05,
        "pace_frames_per_second": PACE,
        "latency_ms": latency,
        "frame_bytes": FRAME_BYTES,
    }
    print(json.dumps(values))
    if not options.quick:
        command = f"python -m benchmarks.bucket --latency_ms={latency:g} --frames={frames}"
        print(f"wrote {results.record('bucket', values, command=command, seeds=[SEED])}")


if __name__ == "__main__":
    main()
