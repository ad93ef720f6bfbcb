"""Measures one training step, ours against the same step in PyTorch, and what it takes to get there.

    python -m benchmarks.step [--row=vito|vivi|supervised|vtab|moco_v3] [--quick]

The paper's network (benchmarks.gpu has the rows) in float32 and small images on the CPU. Each framework runs in its own
process, one at a time, in turns (A B C A ...), so that whatever else the machine does meets all; the figure is the
median over rounds of the ratio within a round, to the better of PyTorch's two forms: eager in channels_last, and
compiled. Our step includes the colour augmentation, PyTorch's does not. Before anything is timed, the two are checked
to be the same work (same_work.py). --quick runs a small network and writes nothing: does it run?
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import gpu, same_work

CORE_IMPORT = "import vivi_jax.loop"
BASELINE_IMPORT = "import jax, jax.numpy, flax.linen, optax"
RESULT = {row: "step" if row == "vito" else f"step_{row}" for row in gpu.ROWS}  # files in docs/results


class Worker:
    """A child process that holds one framework's step and runs it on request."""

    def __init__(self, framework: str, row: str, batch: int, size: int, quick: bool, kept: str = ""):
        """`kept`: where JAX keeps compiled programs, and finds those of an earlier worker; "": nowhere."""
        start = time.perf_counter()
        command = worker_command(framework, row, batch, size, quick)
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
        """Ends the process; returns its peak memory in MB."""
        self._process.stdin.close()
        last = self._read()
        self._process.wait()
        return last


def worker_command(name: str, row: str, batch: int, size: int, quick: bool) -> list[str]:
    options = [f"--worker={name}", f"--row={row}", f"--batch={batch}", f"--size={size}", *["--quick"] * quick]
    return [sys.executable, "-m", "benchmarks.step", *options]


def serve(step, setup: dict) -> None:
    """The worker's side: one line out when ready, one per step, and the peak memory at the end."""
    print(json.dumps(setup), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - start), flush=True)
    print(json.dumps({"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)


def config_of(row: str, batch: int, size: int, quick: bool):
    """Of benchmarks.gpu's row, with `batch` examples of `size` pixels in float32."""
    config = gpu.ROWS[row].config(quick)
    if row == "vtab":
        config.batch_size, config.image_size, config.network.dtype = batch, size, "float32"
        return config
    config.encoder.dtype, config.data.image_size = "float32", size
    if row == "supervised":
        config.data.labelled_batch_size = batch
    else:
        config.batch_size = batch
    if row == "vivi":
        config.method.triplet_groups = math.ceil(batch * config.data.shots / 16)
    return config


def ours_of(row: str, config) -> same_work.OurStep:
    return gpu.our_vtab_step(config) if row == "vtab" else same_work.our_method_step(config)[0]


def jax_worker(row: str, batch: int, size: int, quick: bool) -> None:
    import jax

    from vivi_jax.build import build
    from vivi_jax.train_step import create

    config = config_of(row, batch, size, quick)
    ours = ours_of(row, config)
    images = gpu.synthetic({name: (spec.shape, spec.dtype) for name, spec in ours.batch.items()})
    times = [time.perf_counter()]
    if row == "vtab":  # fine-tuning starts from weights that are there
        state = jax.device_put(gpu.weights_like(ours.state))
    else:
        made = build(config)
        init = jax.jit(lambda: create(made.method, made.optimizer, made.batch_spec, config.seed))
        state = jax.block_until_ready(init())
    times.append(time.perf_counter())
    compiled = jax.jit(ours.step, donate_argnums=0).lower(state, images).compile()
    times.append(time.perf_counter())

    def step():
        nonlocal state
        state, metrics = compiled(state, images)
        jax.block_until_ready((state, metrics))

    step()
    serve(step, {"init_seconds": times[1] - times[0], "compile_seconds": times[2] - times[1]})


def torch_step(row: str, batch: int, size: int, quick: bool) -> tuple:
    """The peer's step and what it takes."""
    import torch

    torch.manual_seed(0)
    config = config_of(row, batch, size, quick)
    step, prepare = gpu.ROWS[row].peer(config, "cpu")
    shapes = {name: (spec.shape, spec.dtype) for name, spec in gpu.batch_spec(row, config).items()}
    with torch.no_grad():
        return step, prepare({name: torch.from_numpy(array) for name, array in gpu.synthetic(shapes).items()})


def torch_worker(*options, compiled: bool = False) -> None:
    step, inputs = torch_step(*options)
    if compiled:
        step.compile()
    step(*inputs)
    serve(lambda: step(*inputs), {})


def check_worker(row: str, batch: int, size: int, quick: bool) -> None:
    """Ends with one line if the peer does other work."""
    ours = ours_of(row, config_of(row, batch, size, quick))
    theirs = same_work.of_peer(*torch_step(row, batch, size, quick))
    same_work.check(same_work.of_ours(ours), theirs, quick)


WORKERS = {
    "jax": jax_worker,
    "torch": torch_worker,
    "torch_compiled": functools.partial(torch_worker, compiled=True),
    "check": check_worker,
}


def import_seconds(statement: str, repeats: int) -> float:
    """Median wall time of a Python process that only imports, less that of one that does nothing."""

    def run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    run(statement)  # once for the file cache
    return statistics.median(run(statement) - run("pass") for _ in range(repeats))


def measure(row: str, batch: int, size: int, rounds: int, quick: bool) -> dict:
    """All values of the result; without torch, ours alone."""
    options = row, batch, size, quick
    peers = ["torch", *["torch_compiled"] * (not quick)] if importlib.util.find_spec("torch") else []
    if peers and subprocess.run(worker_command("check", *options)).returncode:
        sys.exit("error: the peer does not do the same work as ours, so nothing was timed")
    repeats = 1 if quick else 5
    values = {
        "row": row,
        "batch": batch,
        "image_size": size,
        "rounds": rounds,
        "core_import_seconds": import_seconds(CORE_IMPORT, repeats),
        "jax_flax_optax_import_seconds": import_seconds(BASELINE_IMPORT, repeats),
    }
    with tempfile.TemporaryDirectory() as kept:
        ours = Worker("jax", *options, kept)
        theirs = {name: Worker(name, *options) for name in peers}
        times = [(ours.step(), {name: peer.step() for name, peer in theirs.items()}) for _ in range(rounds)]
        values |= {
            "jax_step_seconds": statistics.median(t for t, _ in times),
            "jax_first_step_seconds": ours.first_step_seconds,
            **{f"jax_{name}": value for name, value in {**ours.setup, **ours.close()}.items()},
        }
        again = Worker("jax", *options, kept)
        values["jax_first_step_of_second_start_seconds"] = again.first_step_seconds
        again.close()
    for name, peer in theirs.items():
        values |= {
            f"{name}_step_seconds": statistics.median(t[name] for _, t in times),
            f"{name}_first_step_seconds": peer.first_step_seconds,
            f"{name}_peak_memory_mb": peer.close()["peak_memory_mb"],
        }
    if theirs:
        best = min(theirs, key=lambda name: values[f"{name}_step_seconds"])
        ratios = [t[best] / a for a, t in times]
        values |= {
            "best_peer": best,
            "rate_ratio_jax_over_torch": statistics.median(ratios),
            "least_ratio": min(ratios),
            "largest_ratio": max(ratios),
            "memory_ratio_jax_over_torch": values["jax_peak_memory_mb"] / values[f"{best}_peak_memory_mb"],
        }
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--row", choices=[row for row in gpu.ROWS if row != "vdim"], default="vito")
    parser.add_argument("--batch", type=int, default=8, help="examples a step: clips, videos or images")
    parser.add_argument("--size", type=int, default=112, help="pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small network; writes nothing")
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return WORKERS[args.worker](args.row, args.batch, args.size, args.quick)
    from benchmarks.results import record

    values = measure(args.row, args.batch, args.size, args.rounds, args.quick)
    for name, value in values.items():
        print(f"{name:38s} {value}")
    if args.quick:
        return
    command = (
        f"python -m benchmarks.step --row={args.row} --batch={args.batch} --size={args.size} --rounds={args.rounds}"
    )
    print(f"written: {record(RESULT[args.row], values, command=command, seeds=[0])}")


if __name__ == "__main__":
    main()
