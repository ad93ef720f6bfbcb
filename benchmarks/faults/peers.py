"""R5 to R10, R19: several devices and several processes; one dies, hangs, comes late or is another program."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import statistics
import time

from benchmarks.faults import runs
from vivi_jax.distributed import watchdog

HEARTBEAT_SECONDS, WATCHDOG_SECONDS = 10, 20


def job(
    count: int,
    devices: int,
    store: str | pathlib.Path,
    workdir: str | pathlib.Path,
    *more: str,
    second: tuple[str, ...] = (),
    logs: str = "",
) -> list[runs.Process]:
    """`count` processes of one run of VITO, on so many devices each.

    Args:
      second: other flags of the second process.
      logs: how the paths of the logs begin; as the workdir's by default.
    """
    address = _free_address()
    arguments = [*runs.flags("vito", store, workdir), f"--config.hosts.heartbeat_seconds={HEARTBEAT_SECONDS}", *more]
    flags = runs.devices(devices)
    logs = logs or str(workdir)
    if count == 1:
        return [runs.start(arguments, pathlib.Path(f"{logs}.log"), flags)]
    return [_one(i, count, address, [*arguments, *(second if i == 1 else ())], logs, flags) for i in range(count)]


def pair(store: pathlib.Path, workdir: pathlib.Path, *more: str, second: tuple[str, ...] = ()) -> list[runs.Process]:
    """Two processes of one run of VITO, on one device each."""
    return job(2, 1, store, workdir, *more, second=second)


def _free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _one(
    i: int, count: int, address: str, arguments: list[str], logs: str, environment: dict[str, str]
) -> runs.Process:
    where = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
    return runs.start(arguments, pathlib.Path(f"{logs}.{i}.log"), where | environment)


def wait_for_steps(processes: list[runs.Process], workdir: pathlib.Path, more: int) -> bool:
    """Waits until the run has done `more` new steps with both alive."""
    known, deadline = set(runs.logged_steps(workdir)), time.monotonic() + runs.PATIENCE
    while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
        steps = set(runs.logged_steps(workdir))
        known &= steps
        if len(steps - known) >= more:
            return True
        time.sleep(0.02)
    return False


def dead(count: int, which: int, shared: runs.Shared, own: pathlib.Path) -> dict:
    """R7, R8: process 1, or the coordinator, is killed; the other ends by itself, and the run goes on bit for bit.

    Seen failing: R7 with a heartbeat of 100 s, the other still waited after 72. That a coordinator is gone is seen by
    JAX's own connection at once.
    """
    rng, wrong, seconds = random.Random(0), [], []
    workdir = own / "run"
    sha256 = straight_job(2, 1, shared.store, own / "straight")
    for _ in range(count):
        processes = pair(shared.store, workdir)
        if not wait_for_steps(processes, workdir, rng.randrange(1, 12)):
            wrong.append("the run ended before a process was killed")
            break
        processes[which].signal(signal.SIGKILL)
        processes[which].wait()
        began = time.monotonic()
        code = processes[1 - which].wait(HEARTBEAT_SECONDS + 60)
        seconds.append(round(time.monotonic() - began, 1))
        if code is None or code == 0:
            wrong.append(f"the other ended with {code}")
    for process in pair(shared.store, workdir):
        process.wait()
    wrong += runs.ended_well(workdir, sha256)
    if seconds and max(seconds) > HEARTBEAT_SECONDS + 5:
        wrong.append(f"the other took {max(seconds)} s to end")
    return {"killed": len(seconds), "seconds_to_end": seconds, "wrong": wrong}


def straight_job(count: int, devices: int, store: pathlib.Path, workdir: pathlib.Path, *more: str) -> str:
    """SHA-256 of the last state of a run on so many processes and devices that nothing happened to."""
    for process in job(count, devices, store, workdir, *more):
        if (code := process.wait()) != 0:
            raise RuntimeError(f"{count} processes end with {code}: {process.log.read_text()[-3000:]}")
    return json.loads((workdir / "summary.json").read_text())["state_sha256"]


def process_counts(rounds: int, shared: runs.Shared, own: pathlib.Path) -> dict:
    """R6: a run goes on on other numbers of processes with as many devices in all, and ends with the same bits.

    Seen failing: with an order of the examples that depends on the number of processes.
    """
    wrong, changes = [], 0
    for devices in (2,) if rounds == 1 else (2, 4):
        sha256 = straight_job(1, devices, shared.store, own / f"straight{devices}")
        counts = [count for count in (devices, 1, devices // 2) if count]
        workdir = own / f"run{devices}"
        for count in (counts * rounds)[: 2 * rounds]:
            alive = job(count, devices // count, shared.store, workdir)
            if not wait_for_steps(alive, workdir, 3):
                wrong.append(f"{count} processes: ended with {[process.wait() for process in alive]}")
                break
            for process in alive:
                process.signal(signal.SIGTERM)
            if any((code := process.wait()) != 128 + signal.SIGTERM for process in alive):
                wrong.append(f"{count} processes: exit code {code} after SIGTERM")
            changes += 1
        last = [process.wait() for process in job(1, devices, shared.store, workdir)]
        wrong += runs.ended_well(workdir, sha256) if last == [0] else [f"the last start ended with {last}"]
    return {"changes": changes, "wrong": wrong}


def stuck(count: int, shared: runs.Shared, own: pathlib.Path) -> dict:
    """R9: a process of two is stopped (SIGSTOP); the end of a run hangs. Both end with stacks and are restarted.

    Seen failing: without the watchdog's look at the summary the run hung there.
    """
    wrong, seconds, codes = [], [], []
    for case in range(count):
        workdir = own / f"run{case}"
        processes = pair(shared.store, workdir, f"--config.run.watchdog_seconds={WATCHDOG_SECONDS}")
        if not wait_for_steps(processes, workdir, 3):
            wrong.append("the run ended before a process was stopped")
            continue
        processes[1].signal(signal.SIGSTOP)
        began = time.monotonic()
        code = processes[0].wait(WATCHDOG_SECONDS + HEARTBEAT_SECONDS + 60)
        seconds.append(round(time.monotonic() - began, 1))
        codes.append(code)
        processes[1].signal(signal.SIGCONT)
        if processes[1].wait(WATCHDOG_SECONDS + HEARTBEAT_SECONDS + 30) in (None, 0):
            wrong.append("the stopped one went on alone")
        if code in (None, 0):
            wrong.append(f"the other ended with {code}")
        if "most recent call first" not in processes[0].log.read_text():
            wrong.append("no stacks in the log")
    wrong += _stuck_at_the_end(shared, own / "end")
    return {"stopped": len(seconds), "seconds_to_end": seconds, "exit_codes": codes, "wrong": wrong}


def _stuck_at_the_end(shared: runs.Shared, workdir: pathlib.Path) -> list[str]:
    """A finished run, started again, on a disk that does not answer when its summary is put in place."""
    shutil.copytree(shared.straight("vito").workdir, workdir)
    replace = os.replace

    def run() -> None:
        os.replace = lambda source, to: time.sleep(3600) if "summary" in str(to) else replace(source, to)
        runs.main_command([*runs.flags("vito", shared.store, workdir), "--config.run.watchdog_seconds=5"])

    process = runs.fork(run, workdir.with_suffix(".log"), runs.devices(1))
    code = process.wait(120)
    said = "no end of the summary within" in process.log.read_text()
    return [] if code == watchdog.EXIT_CODE and said else [f"stuck in the summary: exit code {code}"]


def late(shared: runs.Shared, own: pathlib.Path) -> dict:
    """R10: the second process comes 15 s late, which works; then never, which is one line.

    Seen failing: without the timer of the start, the stacks of JAX's own give-up instead of the line.
    """
    wrong = []
    address, one_device = _free_address(), runs.devices(1)
    workdir = own / "late"
    arguments = runs.flags("vito", shared.store, workdir)
    first = _one(0, 2, address, arguments, workdir, one_device)
    time.sleep(15)
    second = _one(1, 2, address, arguments, workdir, one_device)
    if (codes := (first.wait(), second.wait())) != (0, 0):
        wrong.append(f"fifteen seconds late: exit codes {codes}")
    workdir = own / "alone"
    began = time.monotonic()
    flags = [*runs.flags("vito", shared.store, workdir), "--config.hosts.start_timeout_seconds=5"]
    alone = _one(0, 2, _free_address(), flags, workdir, one_device)
    code, seconds = alone.wait(120), time.monotonic() - began
    if code != 1 or "error: process 0 of 2 has waited 5 s" not in alone.log.read_text():
        wrong.append(f"alone: exit code {code}, {alone.log.read_text().splitlines()[-1:]}")
    return {"cases": 2, "seconds_alone": round(seconds, 1), "wrong": wrong}


def desync(shared: runs.Shared, own: pathlib.Path) -> dict:
    """R19: the second process was started with another seed, rate or size; both are refused, with the difference.

    Seen failing: without the comparison of configs, by starts that ended with no word of it and left their folder.
    """
    wrong, cases = [], ("seed=1", "optimizer.weight_decay=0.5", "data.min_crop_area=0.5")
    for i, other in enumerate(cases):
        workdir = own / f"run{i}"
        processes = pair(shared.store, workdir, second=(f"--config.{other}",))
        codes = [process.wait() for process in processes]
        said = [other.split("=")[0] in process.log.read_text() for process in processes]
        if codes != [1, 1] or not all(said):
            wrong.append(f"{other}: exit codes {codes}, named by {sum(said)} of 2")
        if workdir.exists():
            wrong.append(f"{other}: a refused start left {workdir.name}")
    return {"cases": len(cases), "wrong": wrong}


def device_counts(counts: tuple[int, ...], shared: runs.Shared, own: pathlib.Path) -> dict:
    """R5: a run goes on on other numbers of devices; its next losses are those of the run that kept its devices.

    Seen failing: with an order of the examples that depends on the number of devices, by 29 %.
    """
    wrong, differences = [], []
    workdir = own / "run"
    for i, (now, then) in enumerate(zip(counts, counts[1:], strict=False)):
        process = runs.start(runs.flags("vito", shared.store, workdir), own / "run.log", runs.devices(now))
        if not runs.wait_for_step(process, workdir, 6):
            wrong.append(f"the run on {now} devices ended early")
            break
        process.signal(signal.SIGTERM)
        process.wait()
        losses = []
        for number in (now, then):
            copy = own / f"change{i}-{number}"
            shutil.copytree(workdir, copy)
            first = runs.logged_steps(copy)[-1] + 1
            trial = runs.start(runs.flags("vito", shared.store, copy), copy.with_suffix(".log"), runs.devices(number))
            runs.wait_for_step(trial, copy, 4)
            trial.signal(signal.SIGKILL)
            trial.wait()
            losses.append({line["step"]: line["loss"] for line in runs.logged(copy) if line["step"] >= first})
        both = sorted(set(losses[0]) & set(losses[1]))[:3]
        difference = max(abs(losses[0][step] / losses[1][step] - 1) for step in both)
        differences.append(
            {"from": now, "to": then, "compared_steps": len(both), "largest_relative_difference": difference}
        )
        if difference > 1e-5:
            wrong.append(f"from {now} to {then} devices the loss differs by {difference:.1e}")
    return {"changes": len(differences), "differences": differences, "wrong": wrong}


PARTS = "--config.reproducible=4"


def same_bits(layouts: tuple[tuple[int, int], ...], shared: runs.Shared, own: pathlib.Path) -> dict:
    """R5: with config.reproducible a run goes on on other numbers of processes and devices, to the same bits.

    `layouts` are (processes, devices of each). What it costs is told from straight runs on one device.
    """
    wrong, workdir = [], own / "run"
    sha256 = straight_job(1, 1, shared.store, own / "straight", PARTS)
    straight_job(1, 1, shared.store, own / "usual")
    for count, each in layouts:
        alive = job(count, each, shared.store, workdir, PARTS)
        if not wait_for_steps(alive, workdir, 3):
            wrong.append(f"{count} x {each}: ended with {[process.wait() for process in alive]}")
            break
        for process in alive:
            process.signal(signal.SIGTERM)
        for process in alive:
            process.wait()
    last = [process.wait() for process in job(1, 1, shared.store, workdir, PARTS)]
    wrong += runs.ended_well(workdir, sha256) if last == [0] else [f"the last start ended with {last}"]
    seconds = {name: _seconds_per_step(own / name) for name in ("straight", "usual")}
    return {
        "layouts": [f"{count} x {each}" for count, each in layouts],
        "times_as_long_as_the_usual_step": round(seconds["straight"] / seconds["usual"], 2),
        "wrong": wrong,
    }


def _seconds_per_step(workdir: pathlib.Path) -> float:
    """Median, without waiting for data."""
    lines = [line for line in runs.logged(workdir) if "loss" in line][5:]
    return statistics.median((1 - line["data_wait_share"]) / line["examples_per_second"] for line in lines)
