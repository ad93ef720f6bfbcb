"""R5 to R10, R19: several devices and several processes; one dies, hangs, comes late or is another program."""

import json
import os
import pathlib
import random
import signal
import socket
import time

from benchmarks.faults import runs

HEARTBEAT_SECONDS, WATCHDOG_SECONDS = 10, 20


def pair(store: pathlib.Path, workdir: pathlib.Path, *more: str, second: tuple[str, ...] | None = None) -> list:
    """Two processes of one run of VITO, on one device each; `second` are other flags of the second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = runs.flags("vito", store, workdir) + [f"--config.hosts.heartbeat_seconds={HEARTBEAT_SECONDS}", *more]
    return [_one(i, address, [*arguments, *(second if i and second else ())], workdir) for i in range(2)]


def _one(i: int, address: str, arguments: list[str], workdir: pathlib.Path) -> runs.Process:
    where = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
    return runs.start(arguments, pathlib.Path(f"{workdir}.{i}.log"), where)


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


def dead(count: int, which: int, seed: int, store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R7, R8: process 1, or the coordinator, is killed; the other ends by itself, and the run goes on bit for bit."""
    rng, wrong, seconds = random.Random(seed), [], []
    whole, workdir = folder / f"pair-straight-{which}", folder / f"pair-dead-{which}"
    for process in pair(store, whole):
        if process.wait() != 0:
            raise RuntimeError(f"two processes do not run: {process.log.read_text()[-3000:]}")
    sha256 = json.loads((whole / "summary.json").read_text())["state_sha256"]
    for _ in range(count):
        processes = pair(store, workdir)
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
    for process in pair(store, workdir):
        process.wait()
    wrong += runs.ended_well(workdir, sha256)
    if seconds and max(seconds) > HEARTBEAT_SECONDS + 5:
        wrong.append(f"the other took {max(seconds)} s to end")
    return {"killed": len(seconds), "seconds_to_end": seconds, "wrong": wrong}


def stuck(count: int, store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R9: one of two processes is stopped (SIGSTOP); the job ends with stacks and an exit code that is restarted."""
    wrong, seconds, codes = [], [], []
    for case in range(count):
        workdir = folder / f"pair-stuck-{case}"
        processes = pair(store, workdir, f"--config.run.watchdog_seconds={WATCHDOG_SECONDS}")
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
    return {"stopped": len(seconds), "seconds_to_end": seconds, "exit_codes": codes, "wrong": wrong}


def late(store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R10: the second process comes 15 s late, which works; then never, which is one line."""
    wrong = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    workdir = folder / "pair-late"
    arguments = runs.flags("vito", store, workdir)
    first = _one(0, address, arguments, workdir)
    time.sleep(15)
    second = _one(1, address, arguments, workdir)
    if (codes := (first.wait(), second.wait())) != (0, 0):
        wrong.append(f"fifteen seconds late: exit codes {codes}")
    workdir = folder / "pair-alone"
    began = time.monotonic()
    flags = [*runs.flags("vito", store, workdir), "--config.hosts.start_timeout_seconds=5"]
    alone = _one(0, address, flags, workdir)
    code, seconds = alone.wait(120), time.monotonic() - began
    if code != 1 or "error: process 0 of 2 has waited 5 s" not in alone.log.read_text():
        wrong.append(f"alone: exit code {code}, {alone.log.read_text().splitlines()[-1:]}")
    return {"seconds_alone": round(seconds, 1), "wrong": wrong}


def desync(store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R19: the second process was started with another seed, rate or size; both are refused, with the difference."""
    wrong, cases = [], ("seed=1", "optimizer.weight_decay=0.5", "data.min_crop_area=0.5")
    for i, other in enumerate(cases):
        workdir = folder / f"pair-other-{i}"
        processes = pair(store, workdir, second=(f"--config.{other}",))
        codes = [process.wait() for process in processes]
        said = [other.split("=")[0] in process.log.read_text() for process in processes]
        if codes != [1, 1] or not all(said):
            wrong.append(f"{other}: exit codes {codes}, named by {sum(said)} of 2")
        if workdir.exists():
            wrong.append(f"{other}: a refused start left {workdir.name}")
    return {"cases": len(cases), "wrong": wrong}


def devices(counts: tuple[int, ...], store: pathlib.Path, folder: pathlib.Path) -> dict:
    """R5: a run goes on on other numbers of devices; its next losses are those of the run that kept its devices."""
    simulated = "--xla_force_host_platform_device_count={}"
    wrong, differences = [], []
    workdir = folder / "devices"
    for i, (now, then) in enumerate(zip(counts, counts[1:], strict=False)):
        process = runs.start(
            runs.flags("vito", store, workdir), folder / "devices.log", {"XLA_FLAGS": simulated.format(now)}
        )
        if not runs.wait_for_step(process, workdir, 6):
            wrong.append(f"the run on {now} devices ended early")
            break
        process.signal(signal.SIGTERM)
        process.wait()
        losses = []
        for number in (now, then):
            copy = folder / f"devices-{i}-{number}"
            os.system(f"cp -r {workdir} {copy}")
            first = runs.logged_steps(copy)[-1] + 1
            trial = runs.start(
                runs.flags("vito", store, copy), folder / f"{copy.name}.log", {"XLA_FLAGS": simulated.format(number)}
            )
            runs.wait_for_step(trial, copy, 4)
            trial.signal(signal.SIGKILL)
            trial.wait()
            losses.append({line["step"]: line["loss"] for line in runs.logged(copy) if line["step"] >= first})
        shared = sorted(set(losses[0]) & set(losses[1]))[:3]
        difference = max(abs(losses[0][step] / losses[1][step] - 1) for step in shared)
        differences.append({"from": now, "to": then, "steps": len(shared), "largest_relative_difference": difference})
        if difference > 1e-5:
            wrong.append(f"from {now} to {then} devices the loss differs by {difference:.1e}")
    return {"changes": differences, "wrong": wrong}
