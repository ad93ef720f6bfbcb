"""R13, R17, R21 to R24: full disks, losses that are not numbers, compile caches, clocks, memory, two jobs."""

import contextlib
import os
import pathlib
import random
import shutil
import subprocess
import time

from benchmarks.faults import damage, runs


def full_disk(store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R13: the run directory lies on a disk of 6 MB; the run says so in one line, and goes on where there is room."""
    sha256, _ = runs.straight("vito", store, folder)
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True).returncode:
        return {"not measured": "needs the right to mount a small disk", "wrong": []}
    wrong, workdir = [], disk / "run"
    try:
        filler = disk / "filler"
        first = runs.start(runs.flags("vito", store, workdir), folder / "disk.log")
        runs.wait_for_step(first, workdir, runs.CHECKPOINT_EVERY + 2)
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(65536))
                file.flush()
        code = first.wait()
        lines = (folder / "disk.log").read_text().splitlines()
        if code != 1 or not lines[-1].startswith("error: "):
            wrong.append(f"full: exit code {code}, last line {lines[-1][:200]!r}")
        if any("Traceback" in line for line in lines):
            wrong.append("full: a traceback")
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        code = runs.start(runs.flags("vito", store, workdir), folder / "disk.log").wait()
        wrong += runs.ended_well(workdir, sha256) if code == 0 else [f"with room again: exit code {code}"]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    return {"cases": 2, "wrong": wrong}


def not_finite(store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R17: a learning rate that ends in NaN; the run stops in one line and every checkpoint that is left is finite."""
    workdir, log = folder / "nan", folder / "nan.log"
    process = runs.start([*runs.flags("vito", store, workdir), "--config.schedule.base_lr=1e30"], log)
    wrong, code = [], process.wait()
    lines = log.read_text().splitlines()
    if code != 1 or not lines[-1].startswith("error: "):
        wrong.append(f"exit code {code}, last line {lines[-1][:200]!r}")
    finite = runs.in_child(_finite_checkpoints, str(workdir))
    if not all(finite.values()):
        wrong.append(f"checkpoints that are not finite: {finite}")
    return {"checkpoints": len(finite), "wrong": wrong}


def _finite_checkpoints(workdir: str) -> dict[str, bool]:
    import jax
    import numpy as np

    from vivi_jax import checkpoint

    folder = pathlib.Path(workdir) / "checkpoints"
    if not folder.exists():
        return {}
    return {
        step.name: all(
            bool(np.isfinite(np.asarray(leaf)).all())
            for leaf in jax.tree.leaves(checkpoint.load_state(workdir, int(step.name)))
            if np.issubdtype(np.asarray(leaf).dtype, np.floating)
        )
        for step in folder.iterdir()
        if step.name.isdigit() and (step / "MANIFEST.json").exists()
    }


def compile_cache(count: int, seed: int, store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R21: entries of the persistent compilation cache are damaged; the run's bits stay the same."""
    sha256, _ = runs.straight("vito", store, folder)
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    whole, wrong, rng, codes = folder / "cache", [], random.Random(seed), []
    shutil.copytree(cache, whole)
    for case in range(count):
        for path in cache.iterdir():
            if path.is_file() and path.stat().st_size > 4096:
                path.write_bytes(damage.changed(path.read_bytes(), rng.choice(("flip", "cut", "empty")), rng))
        workdir = folder / f"cache-{case}"
        codes.append(runs.start(runs.flags("vito", store, workdir), folder / f"cache-{case}.log").wait())
        if codes[-1] == 0:
            wrong += runs.ended_well(workdir, sha256)
        shutil.rmtree(cache)
        shutil.copytree(whole, cache)
    wrong += [f"exit code {code}" for code in codes if code != 0]
    return {"cases": count, "wrong": wrong}


def clock(store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R22: the wall clock jumps by an hour forth and back every few calls; the run ends with the same bits."""
    sha256, _ = runs.straight("vito", store, folder)
    workdir, right = folder / "clock", time.time

    def jumping() -> float:
        return right() + random.choice((-3600, 0, 3600))

    def run() -> None:
        time.time = jumping
        runs.main_command(runs.flags("vito", store, workdir))

    code = runs.fork(run, folder / "clock.log").wait()
    return {"cases": 1, "wrong": runs.ended_well(workdir, sha256) if code == 0 else [f"exit code {code}"]}


def memory(steps: int, store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R23: what a run holds after a quarter of its steps and at its end; nothing is left when it has ended."""
    workdir = folder / "memory"
    before = set(os.listdir("/dev/shm"))
    process = runs.start(
        [
            *runs.flags("vito", store, workdir),
            f"--config.schedule.epochs={steps}.0",
            f"--config.evaluation.dataset={store}",
            "--config.evaluation.image_size=32",
            "--config.evaluation.batch_size=8",
            f"--config.run.eval_every={max(steps // 50, 1)}",
            f"--config.run.checkpoint_every={max(steps // 200, 1)}",
        ],
        folder / "memory.log",
    )
    held = {}
    while process.poll() is None:
        done = len(runs.logged_steps(workdir))
        with contextlib.suppress(OSError):
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            rss = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)
            held[done] = (rss / 1024, len(os.listdir(f"/proc/{process.pid}/fd")))
        time.sleep(0.5)
    early = [value for done, value in held.items() if steps * 0.25 <= done <= steps * 0.4]
    end = [value for done, value in held.items() if done >= steps * 0.85 and value[0] > 0]
    wrong = [f"exit code {process.code}"] if process.code else []
    if not early or not end:
        return {"steps": steps, "wrong": [*wrong, "too short to say"]}
    growth = max(mb for mb, _ in end) / max(mb for mb, _ in early) - 1
    files = max(n for _, n in end) - max(n for _, n in early)
    if growth > 0.01:
        wrong.append(f"memory grew by {growth:.1%}")
    if files > 0:
        wrong.append(f"{files} more files are open at the end")
    if left := set(os.listdir("/dev/shm")) - before:
        wrong.append(f"shared memory is left: {sorted(left)}")
    return {"steps": steps, "growth": round(growth, 4), "more_open_files": files, "wrong": wrong}


def two_jobs(store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R24: a second start in a run's directory is refused while the first is at work; after its death it goes on."""
    sha256, _ = runs.straight("vito", store, folder)
    workdir, wrong = folder / "two", []
    first = runs.start(runs.flags("vito", store, workdir), folder / "two.0.log")
    runs.wait_for_step(first, workdir)
    second = runs.start(runs.flags("vito", store, workdir), folder / "two.1.log")
    code = second.wait()
    line = (folder / "two.1.log").read_text().splitlines()[-1]
    if code != 1 or not line.startswith("error: ") or str(first.pid) not in line:
        wrong.append(f"the second start: exit code {code}, {line[:200]!r}")
    first.signal(9)
    first.wait()
    code = runs.start(runs.flags("vito", store, workdir), folder / "two.2.log").wait()
    wrong += runs.ended_well(workdir, sha256) if code == 0 else [f"after the death of the first: exit code {code}"]
    return {"cases": 2, "wrong": wrong}


def soak(seconds: float, seed: int, store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R25: a fault every few seconds for a long time; the share of steps that were not done twice."""
    from benchmarks.faults import kills

    began, rng, done, starts, wrong, case = time.monotonic(), random.Random(seed), 0, 0, [], 0
    while time.monotonic() - began < seconds:
        fault = rng.choice((kills.kill, kills.kill_while_saving, kills.terminate))
        row = kills.survive("vito", 10, rng.randrange(1 << 30), store, folder, f"soak{case}", fault)
        done, starts, wrong, case = done + row["faults"], starts + row["starts"], wrong + row["wrong"], case + 1
    return {"faults": done, "starts": starts, "minutes": round((time.monotonic() - began) / 60, 1), "wrong": wrong}
