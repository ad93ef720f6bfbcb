"""The one training loop. It knows no method, no dataset and no evaluation: main.py hands those in."""

import concurrent.futures
import contextlib
import logging
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh

from vivi_jax import metrics as metrics_lib
from vivi_jax.build import Experiment
from vivi_jax.checkpoint import Checkpoints
from vivi_jax.config import Count, NonNegative, Whole
from vivi_jax.distributed import preemption, processes, sharding
from vivi_jax.distributed.prefetch import Prefetcher
from vivi_jax.errors import NotFinite
from vivi_jax.methods.base import Metrics
from vivi_jax.train_step import GPU_OPTIONS, TrainState, create

_LOG = logging.getLogger(__name__)
Evaluator = Callable[[int, TrainState], dict[str, float]]


def train(
    experiment: Experiment,
    batches: Callable[[int], Iterator[dict]],
    workdir: str,
    *,
    seed: int,
    micro_batches: int,
    evaluators: list[Evaluator],
    eval_every: Whole,
    log_every: Count,
    checkpoint_every: Count,
    keep_checkpoints: Count,
    watchdog_seconds: NonNegative,
    fsdp: Count,
) -> TrainState:
    """Trains to experiment.total_steps, from the newest good checkpoint in `workdir` if there is one.

    With several processes all call it alike, with a `workdir` they share.

    Args:
      batches: first step -> iterator of NumPy batches (this process's share), beginning at that step.
      evaluators: called before the first step, every `eval_every` steps (0: not) and at the end, for scalars that go to
        the metrics.
      watchdog_seconds: a step that takes longer ends the process, with all stacks on stderr (0: never).
      fsdp: devices that hold one copy of the state between them (1: each has all of it).

    Returns:
      The state after the last step; it is on disk by then.

    Raises:
      preemption.Preempted: after SIGTERM, with the state saved.
      NotFinite: the loss is NaN or infinite; nothing of that step is saved.
    """
    mesh = sharding.make_mesh(fsdp=fsdp)
    sharding.check_batch_sizes(experiment.batch_spec, micro_batches, mesh)
    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(contextlib.closing(preemption.Preemption(alone=jax.process_count() == 1)))
        anyone_asks = processes.StopConsensus(mesh)
        checkpoints = cleanup.enter_context(contextlib.closing(Checkpoints(workdir, keep=keep_checkpoints)))
        with stop.interruptible():
            first_step, state = restore_or_init(experiment, checkpoints, mesh, seed)
        if first_step >= experiment.total_steps:
            _LOG.info("nothing to do: %s is at step %d of %d", workdir, first_step, experiment.total_steps)
            return state

        feed = cleanup.enter_context(contextlib.closing(Prefetcher(batches(first_step), mesh)))
        log = cleanup.enter_context(
            contextlib.closing(StepLog(workdir, experiment, first_step, log_every, feed, checkpoints.directory))
        )
        cleanup.callback(preemption.stop_watchdog)

        # ---- Loop ---------------------------------------------------------------------------------------------------
        with stop.interruptible():
            train_step = compile_step(experiment, state, mesh)
        if first_step == 0:  # the untrained network, to compare with
            with stop.interruptible():
                log.scalars(0, call_evaluators(evaluators, 0, state))
        saved = first_step
        log.start()
        for step in range(first_step + 1, experiment.total_steps + 1):
            preemption.rearm_watchdog(watchdog_seconds)
            try:
                with stop.interruptible(in_loop=True):
                    batch = next(feed)
                state, metrics = train_step(state, batch)
                log.step(step, metrics)

                last = step == experiment.total_steps
                if step % checkpoint_every == 0 or last:
                    log.flush()  # a state whose loss is not finite must not be saved
                    checkpoints.save(step, state)
                    saved = step
                if last or (eval_every and step % eval_every == 0):
                    log.flush()
                    preemption.stop_watchdog()
                    with stop.interruptible(in_loop=True):
                        log.scalars(step, call_evaluators(evaluators, step, state))
                if anyone_asks(stop.requested) and not last:
                    raise preemption.Preempted
            except preemption.Preempted:
                log.flush()
                save_before_leaving(checkpoints, state, saved, experiment.total_steps)
                raise
        return state


def save_before_leaving(checkpoints: Checkpoints, state: TrainState, saved: int, total_steps: int) -> None:
    """After SIGTERM: saves the state unless that of its step is there, and says how to go on."""
    done = int(state.step)  # the loop's step, or the one before if that was waiting for its batch
    if done > saved:
        checkpoints.save(done, state)
    _LOG.warning("SIGTERM: stopping at step %d of %d; the same command goes on from there", done, total_steps)


def restore_or_init(experiment: Experiment, checkpoints: Checkpoints, mesh: Mesh, seed: int) -> tuple[int, TrainState]:
    """Returns (steps done, state): the newest good checkpoint, or step 0."""

    def init() -> TrainState:
        return create(experiment.method, experiment.optimizer, experiment.batch_spec, seed)

    like = jax.eval_shape(init)
    restored: Any = checkpoints.restore(like, mesh)
    if restored:
        _LOG.info("going on from step %d of %s", restored[0], checkpoints.directory)
        return restored
    state = in_thread(jax.jit(init, out_shardings=sharding.state_sharding(like, mesh)))
    _LOG.info(
        "parameters of the online network:\n%s",
        parameter_overview.get_parameter_overview(state.params, include_stats=False),
    )
    return 0, state


def compile_step(experiment: Experiment, state: TrainState, mesh: Mesh):
    """The step as one program over the mesh: batch split, state (or its shapes) on every device and donated."""
    of_state = sharding.state_sharding(state, mesh)
    step = jax.jit(
        experiment.train_step,
        donate_argnums=0,
        in_shardings=(of_state, sharding.batch_sharding(mesh)),
        out_shardings=(of_state, sharding.replicated(mesh)),
    )

    options = GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None

    def compile_on_mesh():
        with jax.set_mesh(mesh):  # for sharding.replicate_params; of the thread that traces
            return step.lower(state, experiment.batch_spec).compile(options)

    _LOG.info("compiling the step: minutes for large networks, and nothing is printed meanwhile")
    return in_thread(compile_on_mesh)


class StepLog:
    """The metrics of a run; each step's are read one step late, so that the accelerator never waits for us."""

    def __init__(
        self,
        workdir: str,
        experiment: Experiment,
        first_step: int,
        log_every: int,
        feed: Prefetcher,
        checkpoints: pathlib.Path,
    ):
        self._writer = metrics_lib.MetricWriter(workdir, first_step)
        batch_size = next(iter(experiment.batch_spec.values())).shape[0]
        self._progress = metrics_lib.Progress(first_step, experiment.total_steps, batch_size)
        self._total_steps, self._log_every, self._feed, self._checkpoints = (
            experiment.total_steps,
            log_every,
            feed,
            checkpoints,
        )
        self._pending: tuple[int, Metrics] | None = None

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        if scalars:
            self._writer.write(step, scalars)

    def start(self) -> None:
        """The steps begin now: the first rate, and the time left that follows from it, are theirs alone."""
        self._progress.start(self._feed.wait_seconds)

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Checks and logs the step before this one."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the newest step; raises NotFinite if its loss is not finite."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise NotFinite(
                f"the loss is {loss} at step {step}; the run stops and saves nothing of it. The last good "
                f"checkpoint is in {self._checkpoints}. Try a lower learning rate or a longer warm-up "
                "(config.schedule), or float32 (config.encoder.dtype)"
            )
        if step % self._log_every == 0 or step == self._total_steps:
            scalars = {name: float(value) for name, value in metrics.items()}
            scalars |= self._progress.rates(step, self._feed.wait_seconds)
            self.scalars(step, scalars)
            self._progress.show(step, scalars)

    def close(self) -> None:
        self._writer.close()


def call_evaluators(evaluators: list[Evaluator], step: int, state: TrainState) -> dict[str, float]:
    scalars = {name: value for evaluate in evaluators for name, value in evaluate(step, state).items()}
    if scalars:
        _LOG.info("step %d: %s", step, "  ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
    return scalars


def in_thread(function: Callable):
    """Runs what compiles in a thread and waits: a signal cannot interrupt the compiler, only this waiting."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        return pool.submit(function).result()
    finally:
        pool.shutdown(wait=False)
