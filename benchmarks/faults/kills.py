"""R1 to R4: a run that is killed and stopped again and again ends with the bits of one that nothing happened to."""

import pathlib
import random
import signal
import time
from collections.abc import Callable

from benchmarks.faults import runs

STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP}


def survive(
    system: str, count: int, seed: int, store: pathlib.Path, folder: pathlib.Path, name: str, fault: Callable
) -> dict:
    """Does `fault` to `count` starts of a run, over as many runs as that takes, and lets each run end.

    Args:
      fault: (process, workdir, times of the straight run, random.Random) -> (whether it struck, what is wrong with how
        the process ended, or "").
    """
    sha256, times = runs.straight(system, store, folder)
    rng, struck, starts, finished, wrong = random.Random(seed), 0, 0, 0, []
    while struck < count:
        workdir = folder / f"{system}-{name}-{finished}"
        log, over = pathlib.Path(f"{workdir}.log"), False
        while not over:
            process = runs.start(runs.flags(system, store, workdir), log)
            starts += 1
            if struck < count:
                hit, problem = fault(process, workdir, times, rng)
                struck += hit
                wrong += [problem] if problem else []
            code = process.wait()
            if code == 0:
                wrong += runs.ended_well(workdir, sha256)
                over = True
            elif code is None:
                wrong.append("it hung")
                over = True
            elif code == 1:  # a start that was refused, or a traceback
                wrong.append(f"a start ended with code 1: {log.read_text().splitlines()[-1]}")
                over = True
        if "Traceback" in log.read_text():
            wrong.append("a traceback in the log")
        finished += 1
    return {"system": system, "faults": struck, "starts": starts, "runs": finished, "wrong": wrong}


def kill(process: runs.Process, workdir: pathlib.Path, times: dict, rng: random.Random) -> tuple[bool, str]:
    """SIGKILL at any moment from the start to well into the loop."""
    time.sleep(rng.uniform(0, times["first_step"] + 0.25 * (times["all"] - times["first_step"])))
    if process.poll() is not None:
        return False, ""
    process.signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL, ""


def kill_while_saving(
    process: runs.Process, workdir: pathlib.Path, times: dict, rng: random.Random
) -> tuple[bool, str]:
    """SIGKILL as soon as the checkpoint folder is in one of the states that only a save makes."""
    moment, saves = rng.choice(("writing", "renamed", "removing")), rng.randrange(4)
    folder, seen = workdir / "checkpoints", 0
    before: set[str] = set()
    while process.poll() is None:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if moment == "writing":
            now = any("tmp" in name for name in names)
        elif moment == "renamed":  # the arrays are there, the manifest is not
            now = any(name.isdigit() and not (folder / name / "MANIFEST.json").exists() for name in names)
        else:
            now = bool({name for name in before if name.isdigit()} - names)
        before = names
        if now:
            seen += 1
            if seen > saves:
                process.signal(signal.SIGKILL)
                return process.wait() == -signal.SIGKILL, ""
        time.sleep(0.0005)
    return False, ""


def terminate(process: runs.Process, workdir: pathlib.Path, times: dict, rng: random.Random) -> tuple[bool, str]:
    """SIGTERM, SIGINT or SIGHUP at any moment; sometimes a second SIGTERM while it saves."""
    number = rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    time.sleep(rng.uniform(0, times["first_step"] + 0.25 * (times["all"] - times["first_step"])))
    if process.poll() is not None:
        return False, ""
    sent = time.monotonic()
    process.signal(number)
    code = process.wait(30)
    seconds = time.monotonic() - sent
    if code == 0:  # it was at its end
        return False, ""
    if code is None or seconds > 10:
        return True, f"it took {seconds:.0f} s to stop after {signal.Signals(number).name}"
    if code not in STOPPED and code != -number:  # the latter before the handlers are there
        return True, f"exit code {code} after {signal.Signals(number).name}"
    return True, ""
