"""VITO's :demo in gs://, killed at random, also inside saves, on 1 and 2 processes: it must end as a local run.

    python -m benchmarks.bucket_kills [--kills=20] [--processes=1,2]

Data and run are in a bucket of gcp-storage-emulator on this machine, behind the proxy of the tests, which adds what
that lacks (the extra `buckets`). Each start is killed with all its processes at a moment that is drawn from the length
of a start that was not; one more is told to leave (SIGTERM). In the end the SHA-256 of the whole state must be that of
a local run of as many processes, the metrics must have each step once, and every object must be accounted for.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

from benchmarks import results
from benchmarks.faults import peers, runs
from vivi_jax import command_line, main

sys.path.append(str(results.ROOT / "tests"))
from helpers import buckets  # pyright: ignore[reportMissingImports]  of the tests

SEED, STOP_SECONDS = 0, 30.0
ADDRESS = f"gs://{buckets.BUCKET}"
FEWER_SAVES = "--config.run.checkpoint_every=15"


def serve(url: pathlib.Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with buckets.serving("gs") as proxy:
        url.write_text(proxy.url)
        signal.pause()


def start(processes: int, store: str, workdir: str, log: pathlib.Path) -> list[runs.Process]:
    """The processes of one start of a run."""
    words = [*runs.flags("vito", pathlib.Path("store"), pathlib.Path("run")), FEWER_SAVES]
    words += [f"--config.data.path={store}", f"--workdir={workdir}", "--config.hosts.heartbeat_seconds=10"]

    def command() -> None:
        sys.argv = ["vivi_jax.main", *words]
        command_line.run(main.main, main.FLAGS, optional=["workdir"], remote=("workdir", *main.IN_BUCKETS))

    meeting = peers._free_address()
    found = []
    for i in range(processes):
        where = {"JAX_COORDINATOR_ADDRESS": meeting, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(i)}
        found.append(runs.fork(command, log, runs.devices(1) | (where if processes > 1 else {})))
    return found


def upload(store: str) -> str:
    from vivi_jax.buckets.client import Folder

    folder = Folder(f"{ADDRESS}/store")
    for path in pathlib.Path(store).iterdir():
        if path.is_file():
            folder.write(path.name, path.read_bytes())
    return folder.address


def state_of(address: str) -> dict:
    """What a run in the bucket says of itself."""
    from vivi_jax.buckets.client import Folder

    folder, names = Folder(address), sorted(Folder(address).names())
    texts = {name: folder.read(name).decode() for name in names if name.endswith(("MANIFEST.json", ".jsonl"))}
    known = {f"{name.removesuffix('MANIFEST.json')}{file}" for name in texts if name.endswith("MANIFEST.json")
             for file in json.loads(texts[name])["files"]} | set(texts)  # fmt: skip
    records = ("config.json", "data.json", "summary.json", "events.out.tfevents.")
    return {
        "sha256": json.loads(folder.read("summary.json"))["state_sha256"] if "summary.json" in names else "",
        "steps": [json.loads(line)["step"] for line in texts.get("metrics.jsonl", "").splitlines()],
        "saving": "checkpoints/SAVING" in names,
        "unknown": [name for name in names if name not in known and not name.startswith(records)],
    }


def survive(count: int, processes: int, store: str, remote: str, own: pathlib.Path) -> dict:
    """Kills starts of runs until `count` were hit, and lets each run end."""
    rng, wrong = random.Random(SEED), []
    local = own / f"local{processes}"
    codes = [process.wait() for process in start(processes, store, str(local), own / "local.log")]
    if any(codes):
        raise RuntimeError((own / "local.log").read_text()[-3000:])
    sha256 = json.loads((local / "summary.json").read_text())["state_sha256"]
    struck, inside, stopped, starts, number, length = 0, 0, None, 0, 0, 0.0
    while struck < count or number < 2:
        address = f"{ADDRESS}/run{processes}-{number}"
        while True:
            log = own / f"run{processes}-{number}-start{starts}.log"
            began, members = time.monotonic(), start(processes, remote, address, log)
            starts += 1
            hit = None
            if length and (struck < count or stopped is None):
                moment = began + rng.uniform(0.1, 1.0) * length
                while time.monotonic() < moment and all(member.poll() is None for member in members):
                    time.sleep(0.05)
                if all(member.poll() is None for member in members):
                    hit = signal.SIGKILL if struck < count else signal.SIGTERM
                    told = time.monotonic()
                    for member in members if hit == signal.SIGKILL else members[:1]:
                        member.signal(hit)
            codes = [member.wait() for member in members]
            if hit == signal.SIGKILL:
                struck += 1
                inside += runs.in_child(state_of, address)["saving"]
            elif hit == signal.SIGTERM and set(codes) == {128 + signal.SIGTERM}:
                stopped = round(time.monotonic() - told, 1)
                wrong += [f"it took {stopped} s to stop"] if stopped > STOP_SECONDS else []
            elif any(codes) and not (hit == signal.SIGTERM and set(codes) == {-signal.SIGTERM}):
                wrong.append(f"a start ended with {codes}: {log.read_text().splitlines()[-1]}")
            if "Traceback" in log.read_text():
                wrong.append(f"a traceback in {log.name}")
            if not any(codes) or len(wrong) > 5:
                break
        length = length or time.monotonic() - began
        end = runs.in_child(state_of, address)
        wrong += ["its state differs from the local run's"] if end["sha256"] != sha256 else []
        wrong += ["its metrics lack steps or have some twice"] if end["steps"] != [*range(1, runs.STEPS + 1)] else []
        wrong += [f"left there: {end['unknown']}"] if end["unknown"] or end["saving"] else []
        print(f"{processes} processes, run {number}: {struck} kills, {inside} in saves; wrong: {wrong}", flush=True)
        number += 1
        if len(wrong) > 5:
            break
    return {
        "kills": struck,
        "of_them_in_saves": inside,
        "starts": starts,
        "runs": number,
        "seconds_of_a_start": round(length, 1),
        "seconds_to_stop_after_sigterm": stopped,
        "wrong": wrong,
    }


def run_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each number of processes")
    parser.add_argument("--processes", default="1,2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bucket_kills") as scratch:
        own = pathlib.Path(scratch)
        store = runs.make_store(own)
        server = runs.fork(lambda: serve(own / "url"), own / "server.log")
        try:
            while not (own / "url").exists():
                time.sleep(0.1)
            os.environ |= buckets.environment("gs", (own / "url").read_text()) | {"VIVI_JAX_CACHE": str(own / "cache")}
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(own / "compiled")
            remote = runs.in_child(upload, str(store))
            values = {
                f"{count}_processes": survive(options.kills, int(count), str(store), remote, own)
                for count in options.processes.split(",")
            }
        finally:
            server.signal(signal.SIGTERM)
            server.wait()
    print(json.dumps(values, indent=1))
    command = f"python -m benchmarks.bucket_kills --kills={options.kills} --processes={options.processes}"
    print(f"wrote {results.record('bucket_kills', values, command=command, seeds=[SEED])}")
    if any(found["wrong"] for found in values.values()):
        sys.exit("error: not all went well, see above")


if __name__ == "__main__":
    run_all()
