"""The one training loop. It knows no method, no dataset and no evaluation: main.py hands those in."""
import concurrent.futures
import logging
import math
from collections.abc import Callable, Iterator

import jax
from clu import parameter_overview

from vivi_jax import metrics as metrics_lib
from vivi_jax import preemption, sharding
from vivi_jax.build import Parts
from vivi_jax.checkpoint import Checkpoints
from vivi_jax.feed import Feed
from vivi_jax.train_step import TrainState, create

_LOG = logging.getLogger(__name__)
Hook = Callable[[int, TrainState], dict[str, float]]


class NotFinite(RuntimeError):
    """The loss became NaN or infinite. The checkpoints written before are good."""


def train(parts: Parts, batches: Callable[[int], Iterator[dict]], workdir: str, *, seed: int, batch_size: int,
          micro_batches: int, hooks: list[Hook], hook_every: int, log_every: int, checkpoint_every: int,
          keep_checkpoints: int, watchdog_seconds: float) -> TrainState:
    """Trains to parts.total_steps, from the newest good checkpoint in `workdir` if there is one.

    Args:
      batches: first step -> iterator of NumPy batches (this process's share), beginning at that step.
      hooks: called before the first step, every `hook_every` steps (0: not) and at the end, for scalars that go to
        the metrics.
      watchdog_seconds: a step that takes longer ends the process, with all stacks on stderr (0: never).

    Returns:
      The state after the last step; it is on disk by then.

    Raises:
      preemption.Preempted: after SIGTERM, with the state saved.
      NotFinite: the loss is NaN or infinite; nothing of that step is saved.
    """
    mesh = sharding.make_mesh()
    sharding.check_batch_size(batch_size, micro_batches, mesh)
    replicated, over_batch = sharding.replicated(mesh), sharding.over_batch(mesh)
    stop = preemption.Preemption()

    # ---- State: the newest good checkpoint, or step 0 -----------------------------------------------------------
    checkpoints = Checkpoints(workdir, keep=keep_checkpoints)
    init = jax.jit(lambda: create(parts.method, parts.optimizer, parts.batch_spec, seed), out_shardings=replicated)
    with stop.interruptible():
        restored = checkpoints.restore(jax.eval_shape(init), mesh)
        first_step, state = restored if restored else (0, in_thread(init))
    if first_step:
        _LOG.info("going on from step %d of %s", first_step, checkpoints.directory)
    else:
        _LOG.info("parameters of the online network:\n%s", parameter_overview.get_parameter_overview(
            state.params, include_stats=False))
    if first_step >= parts.total_steps:
        _LOG.info("nothing to do: %s is at step %d of %d", workdir, first_step, parts.total_steps)
        checkpoints.close()
        stop.close()
        return state

    # ---- Data, and the step -------------------------------------------------------------------------------------
    feed = Feed(batches(first_step), mesh)
    step_fn = jax.jit(parts.train_step, donate_argnums=0, in_shardings=(replicated, over_batch),
                      out_shardings=(replicated, replicated))
    writer = metrics_lib.MetricWriter(workdir, first_step)
    progress = metrics_lib.Progress(first_step, parts.total_steps, batch_size)
    pending = None  # (step, metrics) not yet fetched: read one step late, so that the accelerator never waits for us

    def check_and_log(step: int, metrics: dict[str, jax.Array]) -> None:
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise NotFinite(f"the loss is {loss} at step {step}; the run stops and saves nothing of it. The last good "
                            f"checkpoint is in {checkpoints.directory}. Try a lower config.schedule.base_lr, a longer "
                            "warm-up, or float32 (config.encoder.dtype)")
        if step % log_every == 0 or step == parts.total_steps:
            scalars = {name: float(value) for name, value in metrics.items()}
            scalars |= progress.rates(step, feed.wait_seconds)
            writer.write(step, scalars)
            progress.show(step, scalars)

    def flush() -> None:
        nonlocal pending
        if pending:
            check_and_log(*pending)
        pending = None

    # ---- Loop ---------------------------------------------------------------------------------------------------
    saved = first_step
    try:
        with stop.interruptible():
            compiled = in_thread(lambda: step_fn.lower(state, parts.batch_spec).compile())
        if hooks and first_step == 0:  # the untrained network, to compare with
            with stop.interruptible():
                writer.write(0, call_hooks(hooks, 0, state))
        for step in range(first_step + 1, parts.total_steps + 1):
            preemption.rearm_watchdog(watchdog_seconds)
            with stop.interruptible():
                batch = next(feed)
            state, metrics = compiled(state, batch)
            flush()
            pending = step, metrics

            last = step == parts.total_steps
            if step % checkpoint_every == 0 or last:
                flush()  # a state whose loss is not finite must not be saved
                checkpoints.save(step, state)
                saved = step
            if hooks and (last or (hook_every and step % hook_every == 0)):
                flush()
                preemption.stop_watchdog()
                with stop.interruptible():
                    writer.write(step, call_hooks(hooks, step, state))
            if stop.requested and not last:
                raise preemption.Preempted
    except preemption.Preempted:
        flush()
        step = int(state.step)
        if step > saved:
            checkpoints.save(step, state)
        _LOG.warning("SIGTERM: stopping at step %d of %d; the same command goes on from there", step,
                        parts.total_steps)
        raise
    finally:
        preemption.stop_watchdog()
        feed.close()
        checkpoints.close()
        writer.close()
        stop.close()
    return state


def call_hooks(hooks: list[Hook], step: int, state: TrainState) -> dict[str, float]:
    scalars = {name: value for hook in hooks for name, value in hook(step, state).items()}
    _LOG.info("step %d: %s", step, "  ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
    return scalars


def in_thread(function: Callable):
    """Runs what compiles in a thread and waits: a signal cannot interrupt the compiler, only this waiting."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        return pool.submit(function).result()
    finally:
        pool.shutdown(wait=False)
