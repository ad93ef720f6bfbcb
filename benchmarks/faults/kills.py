"""R1 to R4: a run that is killed and stopped again and again ends with the bits of one that nothing happened to."""

import pathlib
import random
import re
import signal
import time
from collections.abc import Callable

from benchmarks.faults import runs

STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP}
STOP_SECONDS = 10  # within which a run has to be gone after a signal
EVAL_EVERY = 20
# (process, workdir, straight run, random numbers) -> (whether it struck, what is wrong with how it ended, or "")
Fault = Callable[[runs.Process, pathlib.Path, runs.Straight, random.Random], tuple[bool, str]]


def survive(
    system: str, fault: Fault, count: int, shared: runs.Shared, own: pathlib.Path, *more: str, seed: int = 0
) -> dict:
    """Does `fault` to `count` starts of a run, over as many runs as that takes, and lets each run end.

    Args:
      more: further flags of the run, which do not change its state.
    """
    straight = shared.straight(system)
    rng, struck, starts, finished, wrong = random.Random(seed), 0, 0, 0, []
    while struck < count:
        workdir = own / f"run{finished}"
        over = False
        while not over:
            log = own / f"run{finished}-start{starts}.log"
            process = runs.start([*runs.flags(system, shared.store, workdir), *more], log)
            starts += 1
            if struck < count:
                hit, problem = fault(process, workdir, straight, rng)
                struck += hit
                wrong += [problem] if problem else []
            code = process.wait()
            if code == 0:
                wrong += runs.ended_well(workdir, straight.sha256)
                over = True
            elif code is None:
                wrong.append("it hung")
                over = True
            elif code == 1:  # a start that was refused, or a traceback
                wrong.append(f"a start ended with code 1: {log.read_text().splitlines()[-1]}")
                over = True
            if "Traceback" in log.read_text():
                wrong.append(f"a traceback in {log.name}")
        finished += 1
        if len(wrong) > 20:
            break  # it is broken: hundreds more tell nothing
    return {"faults": struck, "starts": starts, "finished_runs": finished, "wrong": wrong}


# ---- Faults ---------------------------------------------------------------------------------------------------------


def kill(process: runs.Process, workdir: pathlib.Path, straight: runs.Straight, rng: random.Random) -> tuple[bool, str]:
    """R1: SIGKILL at any moment from the start to well into the loop."""
    _any_moment(process, straight, rng)
    if process.poll() is not None:
        return False, ""
    process.signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL, ""


def kill_while_saving(
    process: runs.Process, workdir: pathlib.Path, straight: runs.Straight, rng: random.Random
) -> tuple[bool, str]:
    """R2: SIGKILL as soon as the checkpoint folder is in one of the states that only a save makes.

    Seen failing: a kill left half of the file that says what is being saved, as its name was another each time.
    """
    if not _wait_for_save(process, workdir, rng.choice(("writing", "renamed", "removing")), rng.randrange(4)):
        return False, ""
    process.signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL, ""


def terminate(
    process: runs.Process, workdir: pathlib.Path, straight: runs.Straight, rng: random.Random
) -> tuple[bool, str]:
    """R3: SIGTERM, SIGINT or SIGHUP at any moment."""
    number = rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    _any_moment(process, straight, rng)
    return _stopped(process, workdir, number)


def at_moments(count: int, shared: runs.Shared, own: pathlib.Path) -> dict:
    """R4: signals at each of the MOMENTS, `count` times; the VITO run is evaluated between its steps.

    Seen failing: without handlers of the signals, by exit code -15.
    """
    struck = dict.fromkeys(MOMENTS, 0)

    def fault(process, workdir, straight, rng) -> tuple[bool, str]:
        name = min(struck, key=lambda name: struck[name])
        hit, problem = MOMENTS[name](process, workdir, rng)
        struck[name] += hit
        return hit, problem and f"{name}: {problem}"

    evaluated = [
        f"--config.evaluation.dataset={shared.store}",
        "--config.evaluation.image_size=32",
        "--config.evaluation.batch_size=8",
        "--config.evaluation.k=5",
        f"--config.run.eval_every={EVAL_EVERY}",
    ]
    row = survive("vito", fault, count * len(MOMENTS), shared, own, *evaluated)
    return row | {"by_moment": struck}


def while_compiling(process: runs.Process, workdir: pathlib.Path, rng: random.Random) -> tuple[bool, str]:
    if not wait_for_text(process, "compiling the step"):
        return False, ""
    time.sleep(rng.uniform(0, 0.5))
    return _stopped(process, workdir, rng.choice((signal.SIGTERM, signal.SIGINT)))


def while_evaluating(process: runs.Process, workdir: pathlib.Path, rng: random.Random) -> tuple[bool, str]:
    """The line of a step that is evaluated is written when its evaluation begins."""
    if not wait_for_text(process, f"step ({'|'.join(str(s) for s in range(EVAL_EVERY, runs.STEPS, EVAL_EVERY))})/"):
        return False, ""
    time.sleep(rng.uniform(0, 0.2))
    return _stopped(process, workdir, signal.SIGTERM)


def while_saving(process: runs.Process, workdir: pathlib.Path, rng: random.Random) -> tuple[bool, str]:
    if not _wait_for_save(process, workdir, rng.choice(("writing", "renamed")), 0):
        return False, ""
    return _stopped(process, workdir, signal.SIGTERM)


def twice(process: runs.Process, workdir: pathlib.Path, rng: random.Random) -> tuple[bool, str]:
    """Launchers send several; the second may come while the state is saved because of the first."""
    if not wait_for_text(process, r"step \d+/"):
        return False, ""
    second = rng.choice((signal.SIGTERM, signal.SIGHUP)), rng.uniform(0, 0.3)
    return _stopped(process, workdir, signal.SIGTERM, second)


def while_restoring(process: runs.Process, workdir: pathlib.Path, rng: random.Random) -> tuple[bool, str]:
    if not (workdir / "checkpoints").exists() or not wait_for_text(process, "passes over the"):
        return False, ""
    time.sleep(rng.uniform(0, 0.3))
    return _stopped(process, workdir, signal.SIGTERM)


# In this order, so that there is a checkpoint to restore when that is next.
MOMENTS = {
    "saving": while_saving,
    "twice": twice,
    "compiling": while_compiling,
    "restoring": while_restoring,
    "evaluating": while_evaluating,
}


# ---- Moments --------------------------------------------------------------------------------------------------------


def _any_moment(process: runs.Process, straight: runs.Straight, rng: random.Random) -> None:
    """Half of the moments are before the first step, half behind it, on a busy machine as on a quiet one."""
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, straight.first_step))
    elif wait_for_text(process, r"step \d+/"):
        time.sleep(rng.uniform(0, 0.5 * (straight.seconds - straight.first_step)))


def wait_for_text(process: runs.Process, pattern: str) -> bool:
    """Waits until the log of this start has a text; False if it ended before."""
    while process.poll() is None:
        if process.log.exists() and re.search(pattern, process.log.read_text()):
            return True
        time.sleep(0.01)
    return False


def _wait_for_save(process: runs.Process, workdir: pathlib.Path, moment: str, saves: int) -> bool:
    """Waits for a state of the checkpoint folder, after `saves` saves that had it; False if the run ended before."""
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
        seen += now
        if seen > saves:
            return True
        time.sleep(0.0005)
    return False


def _stopped(
    process: runs.Process, workdir: pathlib.Path, number: int, second: tuple[int, float] | None = None
) -> tuple[bool, str]:
    """Sends a signal, and another one so many seconds later; judges the exit, and what is left of the steps."""
    if process.poll() is not None:
        return False, ""
    name, sent = signal.Signals(number).name, time.monotonic()
    process.signal(number)
    if second:
        time.sleep(second[1])
        process.signal(second[0])
    code = process.wait(3 * STOP_SECONDS)
    seconds = time.monotonic() - sent
    if code == 0:  # it was at its end
        return False, ""
    if code is None or seconds > STOP_SECONDS:
        return True, f"it took {seconds:.0f} s to stop after {name}"
    stepped = re.search(r"step \d+/", process.log.read_text())
    if code not in STOPPED and (stepped or code != -number):  # the latter before the handlers are there
        return True, f"exit code {code} after {name}"
    if stepped and runs.newest_good(workdir) < max(runs.logged_steps(workdir)):
        return True, f"steps are lost after {name}"
    return True, ""
