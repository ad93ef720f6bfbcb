"""R13, R17, R18, R21 to R24: full disks, NaN, flipped bits, compile caches, clocks, memory, two jobs."""

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

from benchmarks.faults import damage, kills, runs

SLOW = 0.2  # seconds


def full_disk(shared: runs.Shared, own: pathlib.Path) -> dict:
    """R13: the run directory lies on a disk of 6 MB; the run says so in one line, and goes on where there is room.

    Seen failing: without the filter of Orbax's log, by its tracebacks.
    """
    sha256 = shared.straight("vito").sha256
    disk = own / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True).returncode:
        return {"not measured": "needs the right to mount a small disk", "wrong": []}
    wrong, workdir = [], disk / "run"
    try:
        filler = disk / "filler"
        first = runs.start(runs.flags("vito", shared.store, workdir), own / "disk.log")
        runs.wait_for_step(first, workdir, runs.CHECKPOINT_EVERY + 2)
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(65536))
                file.flush()
        code = first.wait()
        lines = (own / "disk.log").read_text().splitlines()
        if code != 1 or not lines[-1].startswith("error: "):
            wrong.append(f"full: exit code {code}, last line {lines[-1][:200]!r}")
        if any("Traceback" in line for line in lines):
            wrong.append("full: a traceback")
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        code = runs.start(runs.flags("vito", shared.store, workdir), own / "disk.log").wait()
        wrong += runs.ended_well(workdir, sha256) if code == 0 else [f"with room again: exit code {code}"]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    return {"cases": 2, "wrong": wrong}


def slow_disk(shared: runs.Shared, own: pathlib.Path) -> dict:
    """R14: each rename and fsync of Python code takes SLOW seconds longer, as on storage far away.

    A save then takes longer than the steps between two of them. The steps go on meanwhile, no save overlaps the one
    before, SIGTERM while one is written ends with the state saved, and the bits are the same. TensorStore's own writes,
    in C++, are as fast as the disk.

    Seen failing: with saves that the loop waits for, no step was made during one.
    """
    sha256 = shared.straight("vito").sha256
    workdir, wrong, overlap, ahead = own / "run", [], 0, 0

    def slowly(call: Callable) -> Callable:
        @functools.wraps(call)
        def slow(*arguments, **options):
            time.sleep(SLOW)
            return call(*arguments, **options)

        return slow

    def run() -> None:
        for name in ("rename", "replace", "fsync"):
            setattr(os, name, slowly(getattr(os, name)))
        runs.main_command(runs.flags("vito", shared.store, workdir))

    def stop_in_a_save(process: runs.Process) -> bool:
        """SIGTERM while the third checkpoint is written; counts what is seen on the way."""
        nonlocal overlap, ahead
        while process.poll() is None:
            names = [path.name for path in (workdir / "checkpoints").glob("*")]
            tmp = [int(found[1]) for name in names if (found := re.match(r"(\d+)\..*tmp", name))]
            overlap = max(overlap, len(tmp))
            if tmp:
                ahead = max(ahead, max(runs.logged_steps(workdir)) - tmp[0])
            if tmp and runs.newest_good(workdir) >= 2 * runs.CHECKPOINT_EVERY and ahead > 0:
                process.signal(signal.SIGTERM)
                return True
            time.sleep(0.01)
        return False

    process = runs.fork(run, own / "run.log", runs.devices(1))
    if not stop_in_a_save(process):
        wrong.append(f"no step while a save was written: the run ended with {process.code}")
    elif (code := process.wait(60)) != 128 + signal.SIGTERM:
        wrong.append(f"exit code {code} after SIGTERM in a slow save")
    elif runs.newest_good(workdir) < max(runs.logged_steps(workdir)):
        wrong.append("steps are lost after SIGTERM in a slow save")
    if overlap > 1:
        wrong.append(f"{overlap} saves at a time")
    code = runs.start(runs.flags("vito", shared.store, workdir), own / "again.log").wait()
    wrong += runs.ended_well(workdir, sha256) if code == 0 else [f"started again: exit code {code}"]
    return {"cases": 2, "steps_during_a_save": ahead, "wrong": wrong}


def not_finite(shared: runs.Shared, own: pathlib.Path) -> dict:
    """R17: rates that end in NaN; the run stops in one line and every checkpoint that is left is finite.

    With the first rate a later step's loss is NaN; with the other one and its decay the second step's loss is finite,
    and its state is not, just before it is saved.

    Seen failing: without the look at the state before a save, the step after it was the first to be named.
    """
    wrong, left = [], 0
    rates = {
        "the loss is nan": ["--config.schedule.base_lr=1e30"],
        "the state after step 2 is not finite": [
            "--config.schedule.base_lr=1e10",
            "--config.optimizer.weight_decay=1e38",
        ],
    }
    for name, more in rates.items():
        workdir = own / name.replace(" ", "-")
        flags = [*runs.flags("vito", shared.store, workdir), "--config.run.checkpoint_every=1", *more]
        process = runs.start(flags, workdir.with_suffix(".log"))
        code, lines = process.wait(), process.log.read_text().splitlines()
        if code != 1 or not lines[-1].startswith(f"error: {name}"):
            wrong.append(f"{name}: exit code {code}, last line {lines[-1][:200]!r}")
        finite = runs.in_child(_finite_checkpoints, str(workdir))
        left += len(finite)
        if not all(finite.values()):
            wrong.append(f"{name}: checkpoints that are not finite: {finite}")
    return {"cases": 2, "checkpoints": left, "wrong": wrong}


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


def flipped_bits(count: int, shared: runs.Shared, own: pathlib.Path) -> dict:
    """R18: a bit of one array flips in the memory of one of two devices; the next save says so, and is none.

    Of any array of the state (parameters, statistics, target, momentum), any bit. Started again, the run goes on from
    the save before; bits flip `count` times, over as many runs as that takes, and each ends as a straight one does. The
    last bits of a number may be rounded away before the next save: the copies are then alike again, and the run ends.

    Seen failing: without the comparison of replicas the run went on to its end.
    """
    on_two = runs.devices(2)
    straight = own / "straight"
    if code := runs.start(runs.flags("vito", shared.store, straight), own / "straight.log", on_two).wait():
        return {"wrong": [f"the straight run: exit code {code}"]}
    sha256 = json.loads((straight / "summary.json").read_text())["state_sha256"]
    rng, flips, rounded_away, wrong, run = random.Random(0), 0, 0, [], 0
    while flips < count and not wrong:
        workdir = own / f"run{run}"
        start = functools.partial(runs.main_command, runs.flags("vito", shared.store, workdir))
        sound = True
        while flips < count and sound and not wrong:
            log, differed = own / f"run{run}-flip{flips}.log", own / f"differed{flips}"
            before = runs.newest_good(workdir)
            at = min(before + rng.randint(1, runs.CHECKPOINT_EVERY), runs.STEPS)
            code = runs.fork(
                functools.partial(_with_a_flipped_bit, start, at, rng.randrange(1 << 30), differed), log, on_two
            ).wait()
            last = log.read_text().splitlines()[-1]
            flips += 1
            if not differed.exists():
                rounded_away += 1
                sound = False
                wrong += [] if code == 0 else [f"rounded away: exit code {code}, last line {last[:200]!r}"]
            elif code != 1 or not re.match(r"error: .*(the copies of \S+ on the 2 devices|not finite|NaN)", last):
                wrong.append(f"a bit that flipped at step {at}: exit code {code}, last line {last[:200]!r}")
            elif runs.newest_good(workdir) != before:
                wrong.append(f"a bit that flipped at step {at} is in the save of step {runs.newest_good(workdir)}")
            if sound and before + runs.CHECKPOINT_EVERY >= runs.STEPS:
                break
        if sound and not wrong:
            code = runs.fork(start, own / f"run{run}-last.log", on_two).wait()
            wrong += runs.ended_well(workdir, sha256) if code == 0 else [f"exit code {code} without a fault"]
        run += 1
    return {"faults": flips, "rounded_away": rounded_away, "finished_runs": run, "wrong": wrong}


def _with_a_flipped_bit(start: Callable[[], None], at: int, seed: int, differed: pathlib.Path) -> None:
    """start(), a run in which a bit flips behind step `at`; makes the file `differed` if copies differ at its save."""
    import jax
    import numpy as np

    from vivi_jax import loop

    compile_step, rng = loop.compile_step, random.Random(seed)
    saved_at = -(-at // runs.CHECKPOINT_EVERY) * runs.CHECKPOINT_EVERY

    def flip(array):
        """One bit of one element, in the copy of one device."""
        shards = array.addressable_shards
        pieces = [np.array(shard.data) for shard in shards]
        bytes_of_one = rng.choice(pieces).reshape(-1).view(np.uint8)
        bytes_of_one[rng.randrange(len(bytes_of_one))] ^= 1 << rng.randrange(8)
        placed = [jax.device_put(piece, shard.device) for piece, shard in zip(pieces, shards, strict=True)]
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, placed)

    def compiled(*arguments, **options):
        step = compile_step(*arguments, **options)

        def then_flip(state, batch):
            state, metrics = step(state, batch)
            leaves, tree = jax.tree.flatten(state)
            if int(state.step) == at:
                number = rng.choice([i for i, leaf in enumerate(leaves) if leaf.ndim])
                leaves[number] = flip(leaves[number])
            if int(state.step) == saved_at and any(
                len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) > 1 for leaf in leaves
            ):
                differed.touch()
            return jax.tree.unflatten(tree, leaves), metrics

        return then_flip

    loop.compile_step = compiled
    start()


def compile_cache(count: int, shared: runs.Shared, own: pathlib.Path) -> dict:
    """R21: entries of the persistent compilation cache are damaged; the run's bits stay the same.

    The guard is JAX's own. Seen failing: with another order of the examples, so other bits are noticed.
    """
    sha256 = shared.straight("vito").sha256
    wrong, rng, damages = [], random.Random(0), 0
    for case in range(count):
        workdir, cache = own / f"run{case}", own / f"cache{case}"
        shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], cache)
        for path in cache.iterdir():
            if path.is_file() and path.stat().st_size > 4096:
                path.write_bytes(damage.changed(path.read_bytes(), rng.choice(("flip", "cut", "empty")), rng))
                damages += 1

        def run(workdir=workdir, cache=cache) -> None:
            import jax

            jax.config.update("jax_compilation_cache_dir", str(cache))
            runs.main_command(runs.flags("vito", shared.store, workdir))

        code = runs.fork(run, own / f"run{case}.log", runs.devices(1)).wait()
        wrong += runs.ended_well(workdir, sha256) if code == 0 else [f"exit code {code}"]
    return {"cases": count, "damaged_programs": damages, "wrong": wrong}


def clock(shared: runs.Shared, own: pathlib.Path) -> dict:
    """R22: the wall clock jumps by an hour forth and back every few calls; the run ends with the same bits.

    Seen failing: Orbax dropped a save at the jump (states.py:_manager); and with a watchdog by the wall clock, code 75.
    """
    sha256 = shared.straight("vito").sha256
    workdir, right = own / "clock", time.time

    def jumping() -> float:
        return right() + random.choice((-3600, 0, 3600))

    def run() -> None:
        time.time = jumping
        runs.main_command(runs.flags("vito", shared.store, workdir))

    code = runs.fork(run, own / "clock.log", runs.devices(1)).wait()
    return {"cases": 1, "wrong": runs.ended_well(workdir, sha256) if code == 0 else [f"exit code {code}"]}


def memory(steps: int, shared: runs.Shared, own: pathlib.Path) -> dict:
    """R23: what a run holds after a quarter of its steps and at its end; nothing is left when it has ended.

    The allocator does not give back all that a save's many small arrays took for a moment: some 0.2 MB a save, of which
    `malloc_trim` gets most. So a few percent of growth over hundreds of saves are no leak.

    Seen failing: with a file that is left open every ten steps.
    """
    workdir = own / "memory"
    before = set(os.listdir("/dev/shm"))
    process = runs.start(
        [
            *runs.flags("vito", shared.store, workdir),
            f"--config.schedule.epochs={steps}.0",
            f"--config.evaluation.dataset={shared.store}",
            "--config.evaluation.image_size=32",
            "--config.evaluation.batch_size=8",
            "--config.evaluation.k=5",
            f"--config.run.eval_every={max(steps // 50, 1)}",
            f"--config.run.checkpoint_every={max(steps // 200, 1)}",
        ],
        own / "memory.log",
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
    if growth > 0.05:
        wrong.append(f"memory grew by {growth:.1%}")
    if files > 0:
        wrong.append(f"{files} more files are open at the end")
    if left := set(os.listdir("/dev/shm")) - before:
        wrong.append(f"shared memory is left: {sorted(left)}")
    return {"steps": steps, "growth": round(growth, 4), "more_open_files": files, "wrong": wrong}


def two_jobs(shared: runs.Shared, own: pathlib.Path) -> dict:
    """R24: a second start in a run's directory is refused while the first is at work; after its death it goes on.

    Seen failing: without the lock the second wrote into the first's checkpoints.
    """
    sha256 = shared.straight("vito").sha256
    workdir, wrong = own / "two", []
    first = runs.start(runs.flags("vito", shared.store, workdir), own / "two.0.log")
    runs.wait_for_step(first, workdir)
    second = runs.start(runs.flags("vito", shared.store, workdir), own / "two.1.log")
    code = second.wait()
    line = (own / "two.1.log").read_text().splitlines()[-1]
    if code != 1 or not line.startswith("error: ") or str(first.pid) not in line:
        wrong.append(f"the second start: exit code {code}, {line[:200]!r}")
    first.signal(9)
    first.wait()
    code = runs.start(runs.flags("vito", shared.store, workdir), own / "two.2.log").wait()
    wrong += runs.ended_well(workdir, sha256) if code == 0 else [f"after the death of the first: exit code {code}"]
    return {"cases": 2, "wrong": wrong}


def soak(seconds: float, shared: runs.Shared, own: pathlib.Path) -> dict:
    """R25: a fault of any kind every few seconds for a long time; each run still ends with the right bits.

    Seen failing: as R1.
    """
    began, rng, done, starts, wrong, case = time.monotonic(), random.Random(1), 0, 0, [], 0
    while time.monotonic() - began < seconds and not wrong:
        fault = rng.choice((kills.kill, kills.kill_while_saving, kills.terminate))
        runs_of_case = own / f"case{case}"
        runs_of_case.mkdir()
        row = kills.survive("vito", fault, 3, shared, runs_of_case, seed=rng.randrange(1 << 30))
        done, starts, wrong, case = done + row["faults"], starts + row["starts"], wrong + row["wrong"], case + 1
    return {"faults": done, "starts": starts, "minutes": round((time.monotonic() - began) / 60, 1), "wrong": wrong}
