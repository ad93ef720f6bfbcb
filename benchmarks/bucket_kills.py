"""Kills and stops runs of VITO whose store and folder are in gs://, and compares their ends with those of local ones.

    python -m benchmarks.bucket_kills [--kills=20] [--stops=6] [--latency_ms=10] [--only=ROW,...] [--out=FOLDER]

A server of gs:// on the loopback, in a process of its own, waits before each answer. Runs of one and of two processes
are killed by SIGKILL before their first step, at any moment behind it, and inside saves: after so many of the requests
that write checkpoints. Others are stopped by SIGTERM. Each is started again until it ends. Then its state and losses
are those of a local run that nothing happened to, to the last bit, and every object in its folder is accounted for.
What a kill left of a save is gone at the first step of the next start.

Each row is kept as soon as it is measured, in docs/results/bucket_kills.json; what was cut off goes on where it was:
rows that this commit has measured already, with nothing wrong, are left out. Exit code 1 if anything went wrong.
"""

import argparse
import collections
import dataclasses
import datetime
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from typing import NamedTuple

from benchmarks.results import ROOT

STORE = "gs://films/store"
EARLY, LATER, SAVING = "before the first step", "behind it", "behind a request of a save"
MOMENTS = {"kill": (EARLY, LATER, SAVING, SAVING), "stop": (LATER, SAVING)}
EARLY_SECONDS, LATER_SECONDS = 10, 5
ALONE_SECONDS = 90  # within which a process ends whose peer was killed; its heartbeat is 10
ROWS = {  # -> processes, what is done to them
    "1 process, SIGKILL": (1, "kill"),
    "2 processes, SIGKILL of one or both": (2, "kill"),
    "1 process, SIGTERM": (1, "stop"),
    "2 processes, SIGTERM to one": (2, "stop"),
}
STOP_SECONDS = 30  # within which all processes are gone after SIGTERM
WRITES = 60  # requests that write checkpoints, among which a kill chooses: more than one save
OF_TIME = {"examples_per_second", "data_wait_share"}
RECORDS = {"config.json", "data.json", "metrics.jsonl", "summary.json"}


class Server(NamedTuple):
    """The server's address, and the file with a line for each request that writes a checkpoint."""

    url: str
    writes: pathlib.Path

    def written(self) -> int:
        return self.writes.read_text().count("\n")

    def objects(self, folder: str) -> dict[str, str]:
        """Generation of each object below a folder of the bucket, by its name there."""
        query = urllib.parse.urlencode({"prefix": f"{folder}/"})
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/films/o?{query}", timeout=60) as answer:
            items = json.loads(answer.read()).get("items", [])
        return {item["name"].removeprefix(f"{folder}/"): item["generation"] for item in items}

    def read(self, name: str) -> bytes:
        path = f"/storage/v1/b/films/o/{urllib.parse.quote(name, safe='')}?alt=media"
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return answer.read()


def serve(folder: pathlib.Path, latency: float) -> None:
    """Serves gs://films, with FOLDER/store in it, until SIGTERM."""
    from benchmarks.faults import buckets

    file = os.open(folder / "writes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(method: str, path: str) -> buckets.Fault:
        if method != "GET" and "/checkpoints/" in path:
            os.write(file, f"{method} {path}\n".encode())
        return buckets.Fault(wait=latency)

    with buckets.serving("gs") as proxy:
        buckets.upload(proxy, folder / "store", "store")
        proxy.fault = note
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
        print(proxy.url, flush=True)
        signal.pause()


def half_saves(server: Server, folder: str) -> dict[str, str]:
    """Generation of each object of checkpoints without a manifest."""
    found = server.objects(f"{folder}/checkpoints")
    whole = {name.partition("/")[0] for name in found if name.endswith("/MANIFEST.json")}
    return {name: generation for name, generation in found.items() if "/" in name and name.split("/")[0] not in whole}


def metrics(text: str) -> list[dict]:
    """The lines of metrics.jsonl, without how fast the steps were."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_TIME} for line in lines]


def ended_well(server: Server, folder: str, straight: pathlib.Path) -> list[str]:
    """What is wrong with a run in the bucket that has ended, against a local one; [] if nothing is."""
    wrong, found = [], set(server.objects(folder))
    summaries = server.read(f"{folder}/summary.json"), (straight / "summary.json").read_bytes()
    if len({json.loads(summary)["state_sha256"] for summary in summaries}) > 1:
        wrong.append("its state differs from the local run's")
    if metrics(server.read(f"{folder}/metrics.jsonl").decode()) != metrics((straight / "metrics.jsonl").read_text()):
        wrong.append("its metrics differ from the local run's")
    manifests = {name for name in found if name.endswith("/MANIFEST.json")}
    kept = {
        f"{name.rpartition('/')[0]}/{file}"
        for name in manifests
        for file in json.loads(server.read(f"{folder}/{name}"))["files"]
    }
    others = {name for name in found - manifests - kept - RECORDS if not name.startswith("events.out.tfevents.")}
    if missing := (kept | RECORDS) - found:
        wrong.append(f"objects are missing: {sorted(missing)[:5]}")
    if others:
        wrong.append(f"objects that nobody accounts for: {sorted(others)[:5]}")
    return wrong


@dataclasses.dataclass
class Row:
    """Runs that one kind of fault is done to, and what came of it.

    Attributes:
      straight: the local run that nothing happened to.
      own: a folder for logs; its name is that of the runs' folder in the bucket.
      left: what half saves there have been seen after strikes, since the last start that made a step.
    """

    server: Server
    straight: pathlib.Path
    own: pathlib.Path
    processes: int
    fault: str
    rng: random.Random
    struck: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    amid_saves: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    starts: int = 0
    ended: int = 0
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{self.own.name}/run{self.ended}"

    def measure(self, count: int) -> dict:
        """Strikes `count` starts, over as many runs as that takes, and lets each run end."""
        while self.struck.total() < count and len(self.wrong) < 10:
            self.left = {}
            while not self.start(strike=self.struck.total() < count):
                pass
            self.ended += 1
        found = {"strikes": self.struck.total(), "moments": dict(self.struck), "amid_saves": self.amid_saves}
        found |= {"starts": self.starts, "runs": self.ended}
        return found | ({"seconds_to_end": self.seconds} if self.seconds else {}) | {"wrong": self.wrong}

    def start(self, *, strike: bool) -> bool:
        """One start of the run; whether the run is over."""
        from benchmarks.faults import kills, peers

        moment = self.rng.choice(MOMENTS[self.fault]) if strike else ""
        logs, written = self.own / f"run{self.ended}-start{self.starts}", self.server.written()
        job = peers.job(self.processes, 1, STORE, f"gs://films/{self.folder}", logs=str(logs))
        self.starts += 1
        try:
            if moment == EARLY:
                time.sleep(self.rng.uniform(0, EARLY_SECONDS))
            elif kills.wait_for_text(job[0], r"step \d+/"):
                if still := sorted(self.left.items() & half_saves(self.server, self.folder).items()):
                    self.wrong.append(f"half a save is left: {still[:3]}")
                self.left = {}
                if moment == LATER:
                    time.sleep(self.rng.uniform(0, LATER_SECONDS))
                elif moment:
                    wait_for_writes(self.server, written + self.rng.randrange(1, WRITES), job[0])
            if hit := bool(moment) and all(process.poll() is None for process in job):
                self.strike(job, moment)
            codes = [process.wait() for process in job]
        finally:
            for process in job:
                if process.code is None:
                    process.signal(signal.SIGKILL)
        # One whose peer was killed may end with whatever its collective said.
        if (not hit or len(job) == 1) and any("Traceback" in process.log.read_text() for process in job):
            self.wrong.append(f"a traceback in {logs.name}")
        if not any(codes):
            self.wrong += ended_well(self.server, self.folder, self.straight)
            return True
        if not hit:
            said = job[0].log.read_text().splitlines()[-1:]
            self.wrong.append(f"a start that was let alone ended with {codes}: {said}")
        return not hit

    def strike(self, job: list, moment: str) -> None:
        """Sends the signal to one process, or SIGKILL to both, and waits for the end of all."""
        last = len(job) - 1
        kill = self.fault == "kill"
        which = self.rng.choice([[0], [last], [*range(len(job))]] if kill else [[0], [last]])
        sent = time.monotonic()
        for i in which:
            job[i].signal(signal.SIGKILL if kill else signal.SIGTERM)
        codes = [process.wait(ALONE_SECONDS) for process in job]
        self.struck[moment] += 1
        self.left |= half_saves(self.server, self.folder)
        self.amid_saves += bool(self.left)
        print(f"{self.own.name} {self.struck.total()}: {moment}, processes {which}, exit codes {codes}", flush=True)
        if None in codes:
            self.wrong.append(f"a process was still there {ALONE_SECONDS} s after the other was killed")
        if not kill:
            self.seconds.append(round(time.monotonic() - sent, 1))
            self.wrong += stopped_badly(self.server, self.folder, codes, self.seconds[-1])


def stopped_badly(server: Server, folder: str, codes: list[int | None], seconds: float) -> list[str]:
    """What is wrong with a run that was stopped by SIGTERM, and has ended."""
    wrong = [] if seconds <= STOP_SECONDS else [f"it took {seconds} s to stop"]
    if set(codes) != {128 + signal.SIGTERM} and any(codes):  # 0: it was at its end
        wrong.append(f"exit codes {codes} after SIGTERM")
    found = server.objects(folder)
    good = max((int(name.split("/")[1]) for name in found if name.endswith("/MANIFEST.json")), default=0)
    if good < max(line["step"] for line in metrics(server.read(f"{folder}/metrics.jsonl").decode())):
        wrong.append("steps are lost after SIGTERM")
    if left := {"LOCK", "checkpoints/SAVING"} & found.keys() or half_saves(server, folder):
        wrong.append(f"{sorted(left)[:3]} is left after SIGTERM")
    return wrong


def wait_for_writes(server: Server, wanted: int, process) -> None:
    """Waits until so many requests have written checkpoints, or the run has ended."""
    while process.poll() is None and server.written() < wanted:
        time.sleep(0.002)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in each row of SIGKILL")
    parser.add_argument("--stops", type=int, default=6, help="in each row of SIGTERM")
    parser.add_argument("--latency_ms", type=float, default=10.0, help="of each request")
    parser.add_argument("--only", default="", help=f"comma-separated numbers, from 1, of the rows {', '.join(ROWS)}")
    parser.add_argument("--out", default="", help="folder for stores, logs and local runs; a temporary one by default")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(pathlib.Path(options.serve), options.latency_ms / 1000)
        return 0
    folder = pathlib.Path(options.out or tempfile.mkdtemp(prefix="vivi_jax_bucket_kills_")).absolute()
    for name in ("tmp", "compiled"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # Before the first import of JAX, and of what makes temporary folders: killed runs leave theirs behind.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "XLA_FLAGS": ""}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    os.environ |= {"VIVI_JAX_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
    tempfile.tempdir = str(folder / "tmp")
    from benchmarks.faults import buckets, runs

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if not (folder / "store" / "meta.json").exists():
        runs.in_child(lambda: str(runs.make_store(folder)))
    words = [sys.executable, "-m", "benchmarks.bucket_kills", f"--serve={folder}", f"--latency_ms={options.latency_ms}"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            os.environ |= buckets.environment("gs", url)
            rows = measure_rows(options, Server(url, folder / "writes"), folder)
        finally:
            process.terminate()  # it ends its own server, and itself
    if not options.out:
        shutil.rmtree(folder)
    return int(any(row["wrong"] for row in rows.values()))


def keep(values: dict, command: str) -> str:
    from benchmarks.results import record

    return str(record("bucket_kills", values, command=command, seeds=[0]))


def measure_rows(options: argparse.Namespace, server: Server, folder: pathlib.Path) -> dict[str, dict]:
    """The rows asked for; each goes to the results when it is measured."""
    from benchmarks.faults import __main__ as battery
    from benchmarks.faults import peers, runs
    from benchmarks.results import RESULTS, commit

    command = f"python -m benchmarks.bucket_kills --kills={options.kills} --stops={options.stops}"
    command += f" --latency_ms={options.latency_ms:g}"
    results, now = RESULTS / "bucket_kills.json", commit()

    def known() -> dict[str, dict]:
        return json.loads(results.read_text())["values"]["rows"] if results.exists() else {}

    rows = known()
    wanted = [row for n, row in enumerate(ROWS, 1) if not options.only or str(n) in options.only.split(",")]
    for row in wanted:
        if battery.measured(rows.get(row, {}), now, command):
            continue
        number, fault = ROWS[row]
        straight, own = folder / f"straight{number}", folder / row.translate({ord(" "): "-", ord(","): ""})
        if not (straight / "summary.json").exists():
            shutil.rmtree(straight, ignore_errors=True)
            peers.straight_job(number, 1, folder / "store", straight)
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        began = time.monotonic()
        count = options.kills if fault == "kill" else options.stops
        found = Row(server, straight, own, number, fault, random.Random(row)).measure(count)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        what = {"size": command, "commit": now, "date": today, "seconds": round(time.monotonic() - began)}
        rows[row] = what | found
        print(f"{row}: {'; '.join(found['wrong']) or 'nothing went wrong'} ({rows[row]['seconds']} s)", flush=True)
        there = known() | {row: rows[row]}  # another command may measure other rows meanwhile
        kept = {name: there[name] for name in ROWS if name in there}
        values = {"steps": runs.STEPS, "steps_between_saves": runs.CHECKPOINT_EVERY, "rows": kept}
        runs.in_child(keep, values, command)  # what it says of the machine starts a backend of JAX
    return {row: rows[row] for row in wanted}


if __name__ == "__main__":
    sys.exit(main())
