"""Does to small runs, stores, exports and videos what happens to real ones, and counts what was not survived.

    python -m benchmarks.faults [--quick|--full] [--only=R1,R11] [--out=FOLDER]

--quick (the default) takes minutes, --full two hours, on two cores: two rows are measured at a time. Exit code 1 if
anything went wrong. Each row is kept as soon as it is measured: docs/results/reliability.json with --full,
FOLDER/reliability.json with --quick. What was cut off goes on where it was: rows that this commit has measured already,
in the same size and with nothing wrong, are left out. The functions that measure the rows say what they do.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

ROWS = {
    "R1 vito": "SIGKILL at any moment of a VITO run",
    "R1 vivi": "the same of VIVI",
    "R1 vdim": "the same of VDIM",
    "R2 vito": "SIGKILL inside a save of a VITO run",
    "R2 vivi": "the same of VIVI",
    "R2 vdim": "the same of VDIM",
    "R3 vito": "SIGTERM, SIGINT or SIGHUP at any moment of a VITO run",
    "R3 vivi": "the same of VIVI",
    "R3 vdim": "the same of VDIM",
    "R4": "signals while it restores, compiles, evaluates, saves; two of them",
    "R5": "other numbers of devices",
    "R5 reproducible": "other numbers of devices and processes, with config.reproducible",
    "R6": "other numbers of processes",
    "R7": "a process of two is killed",
    "R8": "the coordinator is killed",
    "R9": "a process of two is stopped",
    "R10": "a process comes late, or never",
    "R11": "damaged checkpoints",
    "R12 exports": "damaged exports",
    "R12 stores": "damaged stores",
    "R12 ledgers": "a damaged preparation that goes on",
    "R13": "a full disk",
    "R14": "a slow disk",
    "R15": "damaged videos",
    "R16": "damaged records of a store",
    "R17": "a loss that is no number",
    "R18": "a bit that flips in one device",
    "R19": "processes that differ",
    "R20": "pickles under other names",
    "R21": "a damaged compilation cache",
    "R22": "a clock that jumps",
    "R23": "memory and open files",
    "R24": "two jobs in one directory",
    "R25": "a fault every few seconds",
    "R26": "runs and exports of earlier versions",
}
AT_A_TIME = 2
# First: what takes longest in --full, so that neither core waits long for the other at the end.
FIRST = ("R1 vivi", "R1 vdim", "R1 vito", "R25", "R15")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few cases of each row; the default")
    size.add_argument("--full", action="store_true", help="the cases that docs/results/reliability.json reports")
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join(ROWS)}")
    parser.add_argument("--out", default="", help="folder for runs and stores; a temporary one by default")
    options = parser.parse_args()
    try:
        wanted = rows_named(options.only)
    except ValueError as error:
        parser.error(str(error))
    folder = pathlib.Path(options.out or tempfile.mkdtemp(prefix="vivi_jax_faults_")).absolute()
    folder.mkdir(parents=True, exist_ok=True)

    # Before the first import of JAX: all runs share one cache of compiled programs, on one device.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XLA_FLAGS": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    from benchmarks.results import RESULTS, commit

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the rows under way as well
    size = "--full" if options.full else "--quick"
    results = (RESULTS if options.full else folder) / "reliability.json"
    rows = json.loads(results.read_text())["values"]["rows"] if results.exists() else {}
    now = commit()
    known = [name for name in wanted if measured(rows.get(name, {}), now, size)]
    if known:
        print(f"measured at this commit already: {', '.join(known)}", flush=True)
    measures = rows_of(folder, full=options.full)
    left = sorted((name for name in wanted if name not in known), key=lambda name: [*FIRST, name].index(name))
    for name, row in side_by_side({name: measures[name] for name in left}, folder):
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        rows[name] = {"what": ROWS[name], "size": size, "commit": now, "date": today, **row}
        said = "; ".join(sorted(set(row["wrong"]))[:3]) or "nothing went wrong"
        print(f"{name:12} {ROWS[name]}: {said} ({row['seconds']} s)", flush=True)
        keep({name: rows[name] for name in ROWS if name in rows}, size, results.parent)
    if not options.out:
        shutil.rmtree(folder)
    return int(any(rows[name]["wrong"] for name in wanted))


def measured(row: dict, commit: str, size: str) -> bool:
    """Whether a row is already known, of this very code: one that went wrong is measured again."""
    return row.get("commit") == commit and row["size"] == size and not row["wrong"] and not commit.endswith("+dirty")


def side_by_side(
    measures: dict[str, Callable[[pathlib.Path], dict]], folder: pathlib.Path
) -> Iterator[tuple[str, dict]]:
    """Yields (row, what it found and its seconds), AT_A_TIME rows at once, in the order in which they end.

    Each row is a process with a folder of its own, which is empty at its begin. One that ends without an answer went
    wrong.
    """
    from benchmarks.faults import runs

    waiting, under_way = list(measures), {}
    try:
        while waiting or under_way:
            while waiting and len(under_way) < AT_A_TIME:
                name = waiting.pop(0)
                own = folder / name.replace(" ", "-")
                clear(own)
                own.mkdir()
                log, began = folder / f"{own.name}.log", time.monotonic()
                log.unlink(missing_ok=True)
                under_way[name] = runs.fork(functools.partial(answer, measures[name], own), log), own, began
            for name, (process, own, began) in list(under_way.items()):
                if (code := process.poll()) is None:
                    continue
                del under_way[name]
                found = own / "row.json"
                if code == 0 and found.exists():
                    row = json.loads(found.read_text())
                else:
                    row = {"wrong": [f"the row ended with {code}: {process.log.read_text()[-2000:]}"]}
                if not row["wrong"]:
                    clear(own)  # else its logs may say why
                yield name, row | {"seconds": round(time.monotonic() - began)}
            time.sleep(0.1)
    finally:
        for process, own, _ in under_way.values():
            with contextlib.suppress(ProcessLookupError):  # it has no group yet: it has just been forked
                os.killpg(process.pid, signal.SIGKILL)
            process.signal(signal.SIGKILL)
            process.wait()
            clear(own)


def answer(measure: Callable[[pathlib.Path], dict], own: pathlib.Path) -> None:
    """In the row's process: measures it, with all that it starts in one group of processes."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    row = measure(own)
    (own / "row.json").write_text(json.dumps(row))


def clear(own: pathlib.Path) -> None:
    """Removes a row's folder, and the small disk that R13 may have mounted in it."""
    if os.path.ismount(own / "disk"):
        subprocess.run(["umount", "-l", own / "disk"], check=True)
    shutil.rmtree(own, ignore_errors=True)


def keep(rows: dict, size: str, directory: pathlib.Path) -> None:
    """Writes reliability.json, in a process of its own: what it says of the machine starts a backend of JAX."""
    from benchmarks.faults import runs
    from benchmarks.results import record

    def write() -> bool:
        command = f"python -m benchmarks.faults {size}"
        return bool(record("reliability", {"rows": rows}, command=command, seeds=[0], directory=directory))

    runs.in_child(write)


def rows_named(only: str) -> list[str]:
    """Names of the rows that --only names, which may leave out what follows the number: "" is all of them.

    Raises:
      ValueError: there is none of a name.
    """
    names = only.split(",") if only else list(ROWS)
    if unknown := [name for name in names if not any(name in (row, row.split()[0]) for row in ROWS)]:
        raise ValueError(f"--only: no row {unknown[0]}; there are {', '.join(ROWS)}")
    return [row for row in ROWS if row in names or row.split()[0] in names]


def rows_of(folder: pathlib.Path, *, full: bool) -> dict[str, Callable[[pathlib.Path], dict]]:
    """Row -> what measures it, given a folder of its own; what several rows need lies in `folder`."""
    from benchmarks.faults import damage, kills, peers, rest, runs, videos

    store = folder / "store"
    if not (store / "meta.json").exists():
        runs.in_child(lambda: str(runs.make_store(folder)))
    shared = runs.Shared(folder, store)

    def of(count: int, quick: int) -> int:
        return count if full else quick

    def survive(system: str, fault: Callable, count: int) -> Callable[[pathlib.Path], dict]:
        quick = 2 if system == "vito" else 1
        return lambda own: kills.survive(system, fault, of(count, quick), shared, own)

    def finished_run() -> str:
        return str(shared.straight("vito").workdir)

    in_child = runs.in_child
    return {
        **{f"R1 {system}": survive(system, kills.kill, 130) for system in runs.SYSTEMS},
        **{f"R2 {system}": survive(system, kills.kill_while_saving, 30) for system in runs.SYSTEMS},
        **{f"R3 {system}": survive(system, kills.terminate, 50) for system in runs.SYSTEMS},
        "R4": lambda own: kills.at_moments(of(10, 1), shared, own),
        "R5": lambda own: peers.device_counts((8, 2, 1, 4) if full else (2, 1), shared, own),
        "R5 reproducible": lambda own: peers.same_bits(
            ((1, 4), (2, 1), (1, 2), (2, 2), (4, 1)) if full else ((1, 2), (2, 1)), shared, own
        ),
        "R6": lambda own: peers.process_counts(of(4, 1), shared, own),
        "R7": lambda own: peers.dead(of(10, 1), 1, shared, own),
        "R8": lambda own: peers.dead(of(5, 1), 0, shared, own),
        "R9": lambda own: peers.stuck(of(3, 1), shared, own),
        "R10": lambda own: peers.late(shared, own),
        "R11": lambda own: in_child(damage.checkpoints, of(800, 40), finished_run(), str(own)),
        "R12 exports": lambda own: in_child(damage.exports, of(400, 30), finished_run(), str(own)),
        "R12 stores": lambda own: in_child(damage.stores, of(500, 40), str(store), str(own)),
        "R12 ledgers": lambda own: damage.ledgers(of(40, 3), str(store), str(folder / "videos"), str(own)),
        "R13": lambda own: rest.full_disk(shared, own),
        "R14": lambda own: rest.slow_disk(shared, own),
        "R15": lambda own: videos.hostile(of(10_000, 300), own),
        "R16": lambda own: damage.records(of(100, 5), shared, own),
        "R17": lambda own: rest.not_finite(shared, own),
        "R18": lambda own: rest.flipped_bits(of(30, 3), shared, own),
        "R19": lambda own: peers.desync(shared, own),
        "R20": lambda own: in_child(damage.pickles, str(store), str(own)),
        "R21": lambda own: rest.compile_cache(of(10, 1), shared, own),
        "R22": lambda own: rest.clock(shared, own),
        "R23": lambda own: rest.memory(of(2000, 200), shared, own),
        "R24": lambda own: rest.two_jobs(shared, own),
        "R25": lambda own: rest.soak(of(600, 20), shared, own),
        "R26": lambda own: in_child(damage.earlier_versions, str(own)),
    }


if __name__ == "__main__":
    sys.exit(main())
