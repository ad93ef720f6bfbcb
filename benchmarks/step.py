"""Measures one VITO training step, ours against the same step in PyTorch, and what it takes to get there.

    python -m benchmarks.step [--quick]

The paper's model (ResNet-50, two-scale attention, three views, online and target, LARS, moving average) in float32 at
112 px on the CPU. Each framework runs in its own process, one at a time, in turns (A B A B ...), so that whatever else
the machine does meets both; the figure is the median over rounds of the ratio within a round. Our step includes the
colour augmentation, PyTorch's does not; its share is measured beside it. Before anything is timed, the two are checked
to be the same work (same_work.py). --quick runs a small network and writes nothing: does it run?
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import same_work

CORE_IMPORT = "import vivi_jax.train"
BASELINE_IMPORT = "import jax, jax.numpy, flax.linen, optax"
VIEWS = 3


class Worker:
    """A child process that holds one framework's step and runs it on request."""

    def __init__(self, framework: str, batch: int, size: int, quick: bool, kept: str = ""):
        """`kept`: where JAX keeps compiled programs, and finds those of an earlier worker; "": nowhere."""
        start = time.perf_counter()
        command = worker_command(framework, batch, size, quick)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": kept}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.setup = self._read()  # after the first step
        self.first_step_seconds = time.perf_counter() - start

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker ended with status {self._process.wait()} before its answer")
        return json.loads(line)

    def step(self) -> float:
        """Runs one step; returns its seconds."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> dict[str, float]:
        """Ends the process; returns its peak memory in MB and what else it says."""
        self._process.stdin.close()
        last = self._read()
        self._process.wait()
        return last


def worker_command(name: str, batch: int, size: int, quick: bool) -> list[str]:
    options = [f"--worker={name}", f"--batch={batch}", f"--size={size}", *["--quick"] * quick]
    return [sys.executable, "-m", "benchmarks.step", *options]


def serve(step, setup: dict, more=lambda: {}) -> None:
    """The worker's side: one line out when ready, one per step, and the peak memory at the end with `more` figures."""
    print(json.dumps(setup), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - start), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_memory_mb": peak, **more()}), flush=True)


def config_of(batch: int, size: int, quick: bool):
    from configs import vito

    config = vito.get_config()
    config.batch_size = batch
    config.encoder.dtype = "float32"
    config.data.image_size = size
    if quick:
        config.encoder.update(dict(depth=18, width=0.125))
    return config


def jax_worker(batch: int, size: int, quick: bool) -> None:
    import jax
    import numpy as np

    from vivi_jax import train_step
    from vivi_jax.augment import byol
    from vivi_jax.build import build

    config = config_of(batch, size, quick)
    experiment = build(config)
    views = np.random.default_rng(0).integers(256, size=(batch, VIEWS, size, size, 3), dtype=np.uint8)

    times = [time.perf_counter()]
    state = jax.block_until_ready(
        jax.jit(
            lambda: train_step.create(experiment.method, experiment.optimizer, experiment.batch_spec, config.seed)
        )()
    )
    times.append(time.perf_counter())
    compiled = jax.jit(experiment.train_step, donate_argnums=0).lower(state, {"views": views}).compile()
    times.append(time.perf_counter())

    def step():
        nonlocal state
        state, metrics = compiled(state, {"views": views})
        jax.block_until_ready((state, metrics))

    def colours() -> dict[str, float]:
        keys = train_step.example_keys(0, 0, {"views": views})
        byol_views = jax.jit(lambda views, keys: byol.byol_views(views, keys["views"]))
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(byol_views(views, keys))
            seconds.append(time.perf_counter() - start)
        return {"augmentation_seconds": min(seconds)}

    step()
    serve(step, {"init_seconds": times[1] - times[0], "compile_seconds": times[2] - times[1]}, colours)


def torch_step(batch: int, size: int, quick: bool) -> tuple:
    """The peer's step and what it takes."""
    import torch

    from benchmarks.torch_vito import VitoStep

    torch.manual_seed(0)
    encoder = config_of(batch, size, quick).encoder
    return VitoStep(encoder.depth, encoder.width), (torch.rand(VIEWS, batch, 3, size, size),)


def torch_worker(batch: int, size: int, quick: bool) -> None:
    step, inputs = torch_step(batch, size, quick)
    step(*inputs)
    serve(lambda: step(*inputs), {})


def check_worker(batch: int, size: int, quick: bool) -> None:
    """Ends with one line if the peer does other work."""
    ours, _ = same_work.our_method_step(config_of(batch, size, quick))
    theirs = same_work.of_peer(*torch_step(batch, size, quick))
    same_work.check(same_work.of_ours(ours), theirs, quick)


WORKERS = {"jax": jax_worker, "torch": torch_worker, "check": check_worker}


def import_seconds(statement: str, repeats: int) -> float:
    """Median wall time of a Python process that only imports, less that of one that does nothing."""

    def run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    run(statement)  # once for the file cache
    return statistics.median(run(statement) - run("pass") for _ in range(repeats))


def measure(batch: int, size: int, rounds: int, quick: bool) -> dict:
    """All values of the result; without torch, ours alone."""
    peer = importlib.util.find_spec("torch")
    if peer and subprocess.run(worker_command("check", batch, size, quick)).returncode:
        sys.exit("error: the peer does not do the same work as ours, so nothing was timed")
    repeats = 1 if quick else 5
    values = {
        "batch": batch,
        "image_size": size,
        "views": VIEWS,
        "rounds": rounds,
        "core_import_seconds": import_seconds(CORE_IMPORT, repeats),
        "jax_flax_optax_import_seconds": import_seconds(BASELINE_IMPORT, repeats),
    }
    with tempfile.TemporaryDirectory() as kept:
        ours = Worker("jax", batch, size, quick, kept)
        theirs = Worker("torch", batch, size, quick) if peer else None
        times = [(ours.step(), theirs.step() if theirs else None) for _ in range(rounds)]
        values |= {
            "jax_step_seconds": statistics.median(t for t, _ in times),
            "jax_first_step_seconds": ours.first_step_seconds,
            **{f"jax_{name}": value for name, value in {**ours.setup, **ours.close()}.items()},
        }
        again = Worker("jax", batch, size, quick, kept)
        values["jax_first_step_of_second_start_seconds"] = again.first_step_seconds
        again.close()
    if theirs:
        values |= {
            "torch_step_seconds": statistics.median(t for _, t in times),
            "torch_first_step_seconds": theirs.first_step_seconds,
            "torch_peak_memory_mb": theirs.close()["peak_memory_mb"],
            "rate_ratio_jax_over_torch": statistics.median(b / a for a, b in times),
        }
    return {name: round(value, 3) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="clips per step, three views each")
    parser.add_argument("--size", type=int, default=112, help="pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small network; writes nothing")
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return WORKERS[args.worker](args.batch, args.size, args.quick)
    from benchmarks.results import record

    values = measure(args.batch, args.size, args.rounds, args.quick)
    for name, value in values.items():
        print(f"{name:32s} {value}")
    if args.quick:
        return
    command = f"python -m benchmarks.step --batch={args.batch} --size={args.size} --rounds={args.rounds}"
    print(f"written: {record('step', values, command=command, seeds=[0])}")


if __name__ == "__main__":
    main()
