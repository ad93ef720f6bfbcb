"""Real processes on one machine: they meet, see the same data, agree on what they do, and stop together."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers.runs import logged_steps, small_vito
from input_pipeline.preparation.local import prepare
from input_pipeline.rendered.shapes import write_videos
from vivi_jax import checkpoint, files
from vivi_jax.distributed import processes
from vivi_jax.errors import ConfigError

LAYOUTS = {"1x4": (1, 4), "2x2": (2, 2), "4x1": (4, 1)}  # processes, devices of each
SYSTEMS = ("vito", "vivi", "vdim")
# Every host compiles every program, so that the most hosts run one system only: what they do differently from two is
# the same in all.
SYSTEMS_OF = {"1x4": SYSTEMS, "2x2": SYSTEMS, "4x1": ("vito",)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> pathlib.Path:
    """Sixteen rendered videos of two shots, with labels: enough for all three systems."""
    root = tmp_path_factory.mktemp("data")
    write_videos(root / "videos", videos=16, seed=0, size=48, seconds=3.0, classes=("disc", "star"), shots=2)
    prepare(str(root / "videos"), str(root / "store"), labels="folder", workers=2)
    return root / "store"


def start(
    count: int,
    devices: int,
    log: pathlib.Path,
    arguments: list[str],
    *,
    only: int | None = None,
    of_rank=lambda rank: [],
) -> list[subprocess.Popen]:
    """Starts `count` processes of `devices` simulated devices each (of them rank `only` alone, if given)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(count):
        if only in (None, rank):
            # Without optimisation the compiler is faster, and these programs are tiny.
            environment = {
                **os.environ,
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "PYTHONPATH": os.path.dirname(__file__),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
            }
            if count > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(rank),
                }
            with open(f"{log}.{rank}.log", "a") as file:
                started.append(
                    subprocess.Popen(
                        [sys.executable, *arguments, *of_rank(rank)], env=environment, stdout=file, stderr=file
                    )
                )
    return started


def output(log: pathlib.Path, rank: int) -> str:
    return pathlib.Path(f"{log}.{rank}.log").read_text()


def vito(store, workdir) -> list[str]:
    return ["-m", "vivi_jax.main", *small_vito(store, workdir)]


# --- the same run on 1, 2 and 4 hosts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory) -> dict[str, pathlib.Path]:
    """Layout -> folder with the runs of its systems, ten steps on four devices each."""
    root = tmp_path_factory.mktemp("runs")
    for name, (count, devices) in LAYOUTS.items():
        (root / name).mkdir()
        only = [] if "vivi" in SYSTEMS_OF[name] else list(SYSTEMS_OF[name])
        hosts = start(count, devices, root / name, ["-m", "helpers.host", str(store), str(root / name), *only])
        for rank, host in enumerate(hosts):
            assert host.wait(timeout=1500) == 0, output(root / name, rank)
    return {name: root / name for name in LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, system", [(layout, system) for layout in ("2x2", "4x1") for system in SYSTEMS_OF[layout]]
)
def test_hosts_see_the_same_examples_in_the_same_order_and_get_the_same_losses(runs, system, layout):
    order = {}
    for name in ("1x4", layout):
        order[name] = {}
        for path in runs[name].glob(f"{system}.order.*.json"):
            order[name] |= json.loads(path.read_text())
    assert order[layout] == order["1x4"] and len(order["1x4"]) >= 3 * 8  # steps x rows x arrays

    losses, accuracies = {}, {}
    for name in ("1x4", layout):
        lines = [json.loads(line) for line in (runs[name] / system / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, 11))  # by one process, and nothing twice
        losses[name] = [line["loss"] for line in steps]
        accuracies[name] = [line["knn_top1"] for line in lines if "knn_top1" in line]
    # Not bit for bit: the order in which four devices add up differs inside a process and between processes, and what
    # that changes grows from step to step. One other example in a batch changes a loss by a hundredth and more.
    np.testing.assert_allclose(losses[layout][:3], losses["1x4"][:3], rtol=1e-5)
    np.testing.assert_allclose(losses[layout], losses["1x4"], rtol=5e-4)
    assert len(accuracies["1x4"]) == (2 if system == "vito" else 0)  # evaluated before the first step and at the end
    np.testing.assert_allclose(accuracies[layout], accuracies["1x4"])


@pytest.mark.slow
def test_one_host_saves_what_all_hosts_have(runs):
    for name, (count, _) in LAYOUTS.items():
        for system in SYSTEMS_OF[name]:
            assert checkpoint.newest_good_step(runs[name] / system / "checkpoints") == 10
            assert json.loads((runs[name] / system / "summary.json").read_text())["processes"] == count


@pytest.mark.slow
def test_a_run_saved_on_eight_devices_goes_on_on_one_with_the_same_examples_and_losses(store, tmp_path):
    def command(folder: str) -> list[str]:
        return ["-m", "helpers.host", str(store), str(tmp_path / folder), "vito", "150"]

    (host,) = start(1, 8, tmp_path / "8", command("8"))
    deadline = time.monotonic() + 900
    while len(logged_steps(tmp_path / "8" / "vito")) < 3:
        assert time.monotonic() < deadline and host.poll() is None, output(tmp_path / "8", 0)
        time.sleep(0.05)
    host.send_signal(signal.SIGTERM)
    assert host.wait(timeout=100) == 128 + signal.SIGTERM, output(tmp_path / "8", 0)
    saved = checkpoint.newest_good_step(tmp_path / "8" / "vito" / "checkpoints")
    shutil.copytree(tmp_path / "8", tmp_path / "1")

    losses, orders = {}, {}
    for devices in (8, 1):  # on two: test_sharding.py
        workdir = tmp_path / str(devices)
        (host,) = start(1, devices, workdir, command(str(devices)))
        assert host.wait(timeout=900) == 0, output(workdir, 0)
        assert f"going on from step {saved}" in output(workdir, 0)
        lines = map(json.loads, (workdir / "vito" / "metrics.jsonl").read_text().splitlines())
        losses[devices] = [line["loss"] for line in lines if "loss" in line][saved : saved + 20]
        orders[devices] = json.loads((workdir / "vito.order.0.json").read_text())
    assert orders[8] == orders[1] and len(orders[8]) == 3 * 8
    assert len(losses[8]) == 20
    # Rounding that differs between layouts grows from step to step, so the first steps are held closest.
    np.testing.assert_allclose(losses[1][:3], losses[8][:3], rtol=1e-5)
    np.testing.assert_allclose(losses[1], losses[8], rtol=5e-4)


# --- agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both_at_the_same_step_and_the_run_goes_on(store, tmp_path):
    command = ["-m", "helpers.host", str(store), str(tmp_path), "vito", "150"]
    workdir, log = tmp_path / "vito", tmp_path / "a"
    hosts = start(2, 1, log, command)
    deadline = time.monotonic() + 900
    while len(logged_steps(workdir)) < 3:
        assert time.monotonic() < deadline and hosts[0].poll() is None, output(log, 0)
        time.sleep(0.05)
    hosts[1].send_signal(signal.SIGTERM)
    assert [host.wait(timeout=100) for host in hosts] == [128 + signal.SIGTERM] * 2, output(log, 0)
    saved = checkpoint.newest_good_step(workdir / "checkpoints")
    assert saved == logged_steps(workdir)[-1] < 150

    log = tmp_path / "b"
    (host,) = start(1, 2, log, command)  # on one host
    assert host.wait(timeout=900) == 0, output(log, 0)
    assert f"going on from step {saved}" in output(log, 0)
    assert sorted(set(logged_steps(workdir))) == list(range(151))  # step 0: the evaluation of the untrained network


@pytest.mark.slow
def test_a_host_that_is_stopped_ends_the_others_with_all_stacks_and_the_run_goes_on(store, tmp_path):
    workdir = tmp_path / "run"
    command = [*vito(store, workdir), "--config.hosts.heartbeat_seconds=10"]
    hosts = start(2, 1, tmp_path / "a", command)
    deadline = time.monotonic() + 900
    while not list(workdir.glob("checkpoints/*/MANIFEST.json")):  # what the run can go on from
        assert time.monotonic() < deadline and hosts[0].poll() is None, output(tmp_path / "a", 0)
        time.sleep(0.05)
    hosts[1].send_signal(signal.SIGSTOP)
    try:
        assert hosts[0].wait(timeout=60) == -signal.SIGABRT, output(tmp_path / "a", 0)
    finally:
        hosts[1].kill()
        hosts[1].wait()
    assert "Thread 0x" in output(tmp_path / "a", 0) and "vivi_jax/loop.py" in output(tmp_path / "a", 0)
    for rank, host in enumerate(start(2, 1, tmp_path / "b", command)):
        assert host.wait(timeout=900) == 0, output(tmp_path / "b", rank)
    assert "which held it, is gone" in output(tmp_path / "b", 0) and "going on from step" in output(tmp_path / "b", 0)
    assert sorted(set(logged_steps(workdir))) == list(range(1, 121))


@pytest.mark.slow
def test_hosts_that_differ_are_refused_with_the_difference(store, tmp_path):
    workdir = tmp_path / "run"
    hosts = start(2, 1, workdir, vito(store, workdir), of_rank=lambda rank: [f"--config.seed={rank}"])
    for rank, host in enumerate(hosts):
        assert host.wait(timeout=200) == 1
        errors = [line for line in output(workdir, rank).splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "process 1" in errors[0] and "config.seed: 0 there, 1 here" in errors[0]
    assert not workdir.exists()  # a refused start leaves nothing


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_never_comes_ends_the_wait_with_one_line(store, tmp_path, rank):
    log = tmp_path / "run"
    (host,) = start(2, 1, log, [*vito(store, tmp_path / "run"), "--config.hosts.start_timeout_seconds=3"], only=rank)
    assert host.wait(timeout=100) == 1
    errors = [line for line in output(log, rank).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"process {rank} of 2 has waited 3 s for the others" in errors[0]
    assert "config.hosts.start_timeout_seconds" in errors[0]


@pytest.mark.slow
def test_all_go_back_to_what_process_0_sees(tmp_path):
    """Files that another host does not see yet (here: never) are no reason to decide otherwise there."""
    (tmp_path / "0" / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "0" / "checkpoints" / "7" / "MANIFEST.json").touch()
    (tmp_path / "0" / "metrics.jsonl").write_text('{"step": 7, "score": 1.0}\n')
    (tmp_path / "0" / "bad_steps.jsonl").write_text('{"step": 9, "action": "roll_back", "back_to": 7}\n')
    code = """if True:
        import sys, jax
        from vivi_jax import checkpoint, metrics
        from vivi_jax.distributed import processes
        processes.start(start_timeout_seconds=60, heartbeat_seconds=60)
        workdir = f"{sys.argv[1]}/{jax.process_index()}"
        found = checkpoint.Checkpoints(workdir, keep=1).newest(), metrics.evaluated(workdir, 7)
        print(*found, metrics.BadSteps(workdir, 4).skipped_batches())
    """
    hosts = start(2, 1, tmp_path / "run", ["-c", code, str(tmp_path)])
    for rank, host in enumerate(hosts):
        assert host.wait(timeout=100) == 0, output(tmp_path / "run", rank)
        assert output(tmp_path / "run", rank).splitlines()[-1] == "7 True 2"


def test_a_difference_has_its_dotted_key_and_both_values():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert files.config_diff(old, new) == [("a.c", 2, 4), ("d", 3, None), ("e", None, 5)]


def test_processes_that_cannot_meet_are_an_error_and_one_alone_is_none(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    processes.start(start_timeout_seconds=5, heartbeat_seconds=10)
    monkeypatch.delenv("JAX_NUM_PROCESSES")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        processes.start(start_timeout_seconds=5, heartbeat_seconds=10)
