"""Does to small runs, stores, exports and videos what happens to real ones, and counts what was not survived.

    python -m benchmarks.faults [--quick|--full] [--only=R1,R11] [--out=FOLDER]

--quick (the default) takes minutes, --full two hours on two cores. Exit code 1 if anything went wrong. Each row is kept
as soon as it is measured: docs/results/reliability.json with --full, FOLDER/reliability.json with --quick; a row that
is measured again replaces the one before. The functions that measure the rows say what they do.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable

ROWS = {
    "R1": "SIGKILL at any moment",
    "R2": "SIGKILL inside a save",
    "R3": "SIGTERM, SIGINT or SIGHUP at any moment",
    "R5": "other numbers of devices",
    "R7": "a process of two is killed",
    "R8": "the coordinator is killed",
    "R9": "a process of two is stopped",
    "R10": "a process comes late, or never",
    "R11": "damaged checkpoints",
    "R12 exports": "damaged exports",
    "R12 stores": "damaged stores, their index and records",
    "R12 ledgers": "a damaged preparation that goes on",
    "R13": "a full disk",
    "R15": "damaged videos",
    "R17": "a loss that is no number",
    "R19": "processes that differ",
    "R20": "pickles under other names",
    "R21": "a damaged compilation cache",
    "R22": "a clock that jumps",
    "R23": "memory and open files",
    "R24": "two jobs in one directory",
    "R25": "a fault every few seconds",
}


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
    folder = pathlib.Path(options.out or tempfile.mkdtemp(prefix="vivi_jax_faults_"))
    folder.mkdir(parents=True, exist_ok=True)

    # Before the first import of JAX: all runs share one cache of compiled programs, on one device.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XLA_FLAGS": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    from benchmarks.results import RESULTS, record

    results = (RESULTS if options.full else folder) / "reliability.json"
    rows = json.loads(results.read_text())["values"]["rows"] if results.exists() else {}
    battery = rows_of(folder, 40 if options.full else 1)
    for name in wanted:
        began = time.monotonic()
        row = battery[name]()
        rows[name] = {"what": ROWS[name], **row, "seconds": round(time.monotonic() - began)}
        said = "; ".join(sorted(set(row["wrong"]))[:3]) or "nothing went wrong"
        print(f"{name:12} {ROWS[name]}: {said} ({rows[name]['seconds']} s)", flush=True)
        size_flag = "--full" if options.full else "--quick"
        record(
            "reliability",
            {"rows": {name: rows[name] for name in ROWS if name in rows}},
            command=f"python -m benchmarks.faults {size_flag}",
            seeds=[0],
            directory=results.parent,
        )
    if not options.out:
        shutil.rmtree(folder)
    return int(any(rows[name]["wrong"] for name in wanted))


def rows_named(only: str) -> list[str]:
    """Names of the rows that --only names, which may leave out what follows the number: "" is all of them.

    Raises:
      ValueError: there is none of a name.
    """
    names = only.split(",") if only else list(ROWS)
    if unknown := [name for name in names if not any(name in (row, row.split()[0]) for row in ROWS)]:
        raise ValueError(f"--only: no row {unknown[0]}; there are {', '.join(ROWS)}")
    return [row for row in ROWS if row in names or row.split()[0] in names]


def rows_of(folder: pathlib.Path, scale: int) -> dict[str, Callable[[], dict]]:
    """Row -> what measures it; `scale` is how many times the cases of --quick."""
    from benchmarks.faults import damage, kills, peers, rest, runs, videos

    store = folder / "store"
    if not (store / "meta.json").exists():
        store = runs.in_child(lambda: str(runs.make_store(folder)))
        store = pathlib.Path(store)

    def all_systems(name: str, fault: Callable, count: int) -> dict:
        parts = [kills.survive(system, count, 0, store, folder, name, fault) for system in runs.SYSTEMS]
        return {
            "faults": sum(part["faults"] for part in parts),
            "by_system": {part["system"]: part["faults"] for part in parts},
            "starts": sum(part["starts"] for part in parts),
            "finished_runs": sum(part["runs"] for part in parts),
            "wrong": [f"{part['system']}: {problem}" for part in parts for problem in part["wrong"]],
        }

    def run_directory() -> str:
        runs.straight("vito", store, folder)
        return str(folder / "vito-straight")

    full = scale > 1
    return {
        "R1": lambda: all_systems("kill", kills.kill, 130 if full else 3),
        "R2": lambda: all_systems("save", kills.kill_while_saving, 30 if full else 2),
        "R3": lambda: all_systems("signal", kills.terminate, 50 if full else 3),
        "R5": lambda: peers.devices((8, 2, 1, 4) if full else (2, 1), store, folder),
        "R7": lambda: peers.dead(10 if full else 1, 1, 0, store, folder),
        "R8": lambda: peers.dead(5 if full else 1, 0, 0, store, folder),
        "R9": lambda: peers.stuck(3 if full else 1, store, folder),
        "R10": lambda: peers.late(store, folder),
        "R11": lambda: runs.in_child(damage.checkpoints, 800 if full else 40, 0, run_directory()),
        "R12 exports": lambda: runs.in_child(
            damage.exports, 400 if full else 30, 0, run_directory(), str(folder / "ex")
        ),
        "R12 stores": lambda: runs.in_child(damage.stores, 500 if full else 40, 0, str(store), str(folder / "copy")),
        "R12 ledgers": lambda: damage.ledgers(40 if full else 3, 0, str(store), str(folder / "videos"), str(folder)),
        "R13": lambda: rest.full_disk(store, folder),
        "R15": lambda: videos.hostile(10_000 if full else 300, 0, folder / "hostile"),
        "R17": lambda: rest.not_finite(store, folder),
        "R19": lambda: peers.desync(store, folder),
        "R20": lambda: runs.in_child(damage.pickles, str(store), str(_made(folder / "pickles"))),
        "R21": lambda: rest.compile_cache(10 if full else 1, 0, store, folder),
        "R22": lambda: rest.clock(store, folder),
        "R23": lambda: rest.memory(2000 if full else 200, store, folder),
        "R24": lambda: rest.two_jobs(store, folder),
        "R25": lambda: rest.soak(600 if full else 20, 1, store, folder),
    }


def _made(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
