"""Measures what the guards of a run cost: in a step, in a restore, and what looking for NaN costs a save.

    python -m benchmarks.guards [--quick]

The paper's VITO (ResNet-50) in float32 on the CPU, in one process, in alternating rounds:
- steps of the training loop (metrics read and checked each step, watchdog, signals, the log), against the same compiled
  step called bare;
- a restore with its manifest verified and its values looked at, against Orbax's alone.
The figures are medians over rounds of the ratio within a round. --quick: a small network, and nothing is written.
"""

import argparse
import contextlib
import itertools
import pathlib
import statistics
import tempfile
import time

VIEWS = 3


def config_of(batch: int, size: int, quick: bool):
    from configs import vito

    config = vito.get_config()
    config.batch_size, config.encoder.dtype, config.data.image_size = batch, "float32", size
    if quick:
        config.encoder.update(dict(depth=18, width=0.125))
    return config


class Loop:
    """The state of a training, and steps of it in the loop or bare."""

    def __init__(self, batch: int, size: int, quick: bool, workdir: pathlib.Path):
        import jax
        import numpy as np

        from vivi_jax import loop as train_loop
        from vivi_jax import train_step
        from vivi_jax.build import build
        from vivi_jax.checkpoint import Checkpoints
        from vivi_jax.distributed import sharding

        config = config_of(batch, size, quick)
        self.workdir, self.experiment = workdir, build(config)
        self.mesh = sharding.make_mesh(fsdp=1)
        self.batch = {
            "views": np.random.default_rng(0).integers(256, size=(batch, VIEWS, size, size, 3), dtype=np.uint8)
        }
        self.like = jax.eval_shape(
            lambda: train_step.create(
                self.experiment.method, self.experiment.optimizer, self.experiment.batch_spec, config.seed
            )
        )
        self.checkpoints = Checkpoints(workdir, keep=1)
        self.step, self.state = train_loop.restore_or_init(self.experiment, self.checkpoints, self.mesh, config.seed)
        self.compiled = train_loop.compile_step(self.experiment, self.state, self.mesh)

    def bare(self, steps: int) -> float:
        """Seconds of a step, of so many behind one that is not timed."""
        import jax

        from vivi_jax.distributed.prefetch import Prefetcher

        with contextlib.closing(Prefetcher(itertools.repeat(self.batch), self.mesh)) as feed:
            self.state, metrics = self.compiled(self.state, next(feed))
            jax.block_until_ready((self.state, metrics))
            start = time.perf_counter()
            for _ in range(steps):
                self.state, metrics = self.compiled(self.state, next(feed))
            jax.block_until_ready((self.state, metrics))
            seconds = time.perf_counter() - start
        self.step += steps + 1
        return seconds / steps

    def guarded(self, steps: int) -> float:
        """The same in the loop, which saves a checkpoint at its end, behind the timed steps."""
        from vivi_jax import loop as train_loop
        from vivi_jax import metrics
        from vivi_jax.distributed import preemption, processes
        from vivi_jax.distributed.prefetch import Prefetcher
        from vivi_jax.distributed.watchdog import Watchdog

        began = []

        def timed(state, batch):
            began.append(time.perf_counter())  # the loop waits for step k - 1 between the calls k and k + 1
            return self.compiled(state, batch)

        total = self.step + steps + 3
        with contextlib.ExitStack() as stack:
            watchdog = stack.enter_context(contextlib.closing(Watchdog(1800)))
            stop = stack.enter_context(contextlib.closing(preemption.Preemption()))
            feed = stack.enter_context(contextlib.closing(Prefetcher(itertools.repeat(self.batch), self.mesh)))
            bad_steps = metrics.BadSteps(self.workdir, len(self.batch["views"]))
            writer = metrics.MetricWriter(self.workdir, self.step)
            log = train_loop.StepLog(self.workdir, writer, self.experiment, self.step, 1, feed, bad_steps)
            stack.enter_context(contextlib.closing(log))
            self.state = train_loop.run_steps(
                self.step,
                self.state,
                timed,
                feed,
                total_steps=total,
                evaluators=[],
                eval_every=0,
                checkpoint_every=total,
                checkpoints=self.checkpoints,
                log=log,
                trace=train_loop.Trace(self.workdir, self.step, total, 0),
                watchdog=watchdog,
                stop=stop,
                anyone_asks=processes.StopConsensus(self.mesh),
            )
            self.checkpoints.wait()
        self.step = total
        return (began[2 + steps] - began[2]) / steps

    def look(self) -> float:
        """Seconds of looking at all values of the state, as before a save."""
        from vivi_jax.checkpoint import all_finite

        start = time.perf_counter()
        assert all_finite(self.state)
        return time.perf_counter() - start

    def restore(self) -> float:
        """Seconds of the restore of a run."""
        import jax

        start = time.perf_counter()
        restored = self.checkpoints.restore(self.like, self.mesh)
        assert restored
        jax.block_until_ready(restored[1])
        return time.perf_counter() - start

    def restore_bare(self) -> float:
        """Seconds of Orbax's restore of the same checkpoint, and of opening its folder."""
        import jax
        import orbax.checkpoint as ocp

        from vivi_jax.distributed import sharding

        target = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            self.like,
            sharding.state_sharding(self.like, self.mesh),
        )
        handler = ocp.StandardCheckpointHandler()
        start = time.perf_counter()
        with ocp.CheckpointManager(self.checkpoints.directory, item_handlers=handler) as manager:
            jax.block_until_ready(manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(target)))
        return time.perf_counter() - start


def measure(batch: int, size: int, rounds: int, steps: int, quick: bool) -> dict:
    """All values of the result."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        loop = Loop(batch, size, quick, workdir)
        loop.guarded(1)
        loop.look()
        pairs = [(loop.guarded(steps), loop.bare(steps)) for _ in range(rounds)]
        looks = [loop.look() for _ in range(rounds)]
        loop.restore()
        restores = [(loop.restore(), loop.restore_bare()) for _ in range(rounds)]
        loop.checkpoints.close()
        files = [path for path in (workdir / "checkpoints").rglob("*") if path.is_file()]
        megabytes = sum(path.stat().st_size for path in files) / 1e6
    median = statistics.median
    values = {
        "batch": batch,
        "image_size": size,
        "rounds": rounds,
        "steps_per_round": steps,
        "step_seconds": median(guarded for guarded, _ in pairs),
        "bare_step_seconds": median(bare for _, bare in pairs),
        "step_ratio": median(guarded / bare for guarded, bare in pairs),
        "finite_check_seconds": median(looks),
        "checkpoint_mb": megabytes,
        "restore_seconds": median(verified for verified, _ in restores),
        "bare_restore_seconds": median(bare for _, bare in restores),
        "restore_ratio": median(verified / bare for verified, bare in restores),
    }
    return {name: round(value, 4) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guards", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="clips per step, three views each")
    parser.add_argument("--size", type=int, default=112, help="pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="timed in each round")
    parser.add_argument("--quick", action="store_true", help="a small network; writes nothing")
    args = parser.parse_args()
    values = measure(args.batch, args.size, args.rounds, args.steps, args.quick)
    for name, value in values.items():
        print(f"{name:32s} {value}")
    if args.quick:
        return
    from benchmarks.results import record

    command = f"python -m benchmarks.guards --batch={args.batch} --size={args.size} --rounds={args.rounds}"
    print(f"written: {record('guards', values, command=f'{command} --steps={args.steps}', seeds=[0])}")


if __name__ == "__main__":
    main()
