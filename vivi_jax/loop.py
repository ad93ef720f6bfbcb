"""The one training loop. It knows no method, no dataset and no evaluation: main.py hands those in."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import logging
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vivi_jax import files
from vivi_jax import metrics as metrics_lib
from vivi_jax.buckets.runs import RunFolder
from vivi_jax.build import Experiment
from vivi_jax.checkpoint import Checkpoints
from vivi_jax.config import Count, NonNegative, Whole
from vivi_jax.distributed import preemption, processes, sharding
from vivi_jax.distributed.in_parts import StepInParts
from vivi_jax.distributed.prefetch import Prefetcher
from vivi_jax.distributed.watchdog import Watchdog
from vivi_jax.errors import ConfigError, NotFinite, lookup
from vivi_jax.methods.base import Metrics
from vivi_jax.train_step import GPU_OPTIONS, TrainState, create

_LOG = logging.getLogger(__name__)
Evaluator = Callable[[int, TrainState], dict[str, float]]
SKIPPED = "skipped"  # a metric of the step with on_nan="skip"
MOST_SKIPPED_IN_A_ROW = 10  # then the cause is no single batch
MOST_ROLL_BACKS = 3  # to one checkpoint, likewise
UNTRACED = 10  # steps of a start before those of its trace, as the first ones wait for what is only then made


def train(
    experiment: Experiment,
    batches: Callable[[int], Iterator[dict]],
    workdir: str | RunFolder,
    *,
    seed: int,
    micro_batches: int,
    evaluators: list[Evaluator],
    eval_every: Whole,
    log_every: Count,
    checkpoint_every: Count,
    keep_checkpoints: Count,
    watchdog_seconds: NonNegative,
    on_nan: Literal["stop", "skip", "roll_back"],
    fsdp: Count,
    compilation_cache: str,
    profile: Whole,
    wandb: str,
    claim: Callable[[], None] = lambda: None,
    initial: Callable[[], TrainState] | None = None,
) -> TrainState:
    """Trains to experiment.total_steps, from the newest good checkpoint in `workdir` if there is one.

    With several processes all call it alike, with a `workdir` they share. What is kept of a run, and when, is in
    docs/running.md.

    Args:
      workdir: a folder of a disk, or what main.run has opened.
      batches: first step -> iterator of NumPy batches (this process's share), beginning at that step.
      evaluators: called before the first step, every `eval_every` steps (0: not) and at the end, for scalars that go to
        the metrics.
      watchdog_seconds: a step that takes longer ends the process, with all stacks on stderr and exit code 75; 0: never.
        Restoring, compiling, an evaluation and the last save may take watchdog.PHASE times as long.
      on_nan: what to do where the loss, the gradient or the state of a step is not finite. "stop": raise NotFinite.
        "skip": leave the state as it was before the step. "roll_back": go back to the newest good checkpoint, and on
        with the batches behind this step's. Each such step is noted in WORKDIR/bad_steps.jsonl.
      fsdp: devices that hold one copy of the state between them (1: each has all of it).
      compilation_cache: folder that keeps compiled programs for later starts, see keep_compiled; "": none.
      profile: steps of this start that JAX's profiler traces into WORKDIR/profile; 0: none.
      wandb: project of Weights & Biases that gets the metrics too, see metrics.WeightsAndBiases; "": none.
      claim: called by all processes when the first step is about to run. Before, nothing is written to `workdir`. What
        it raises ends the run.
      initial: makes the state at step 0, on one device, where that is not the method's own.

    Returns:
      The state after the last step; it is on disk by then.

    Raises:
      preemption.Preempted: after SIGTERM, SIGINT or SIGHUP, with the state saved.
      NotFinite: see `on_nan`; nothing of that step is saved.
      ConfigError: an unknown `on_nan`; devices that the batch does not divide over; a run beyond its last step.
      CheckpointError: the checkpoints are not good, do not fit, or cannot be written.
    """
    lookup("config.run.on_nan", on_nan, dict.fromkeys(("stop", "skip", "roll_back")))
    metrics_lib.check_wandb(wandb)
    keep_compiled(compilation_cache)
    mesh = sharding.make_mesh(fsdp=fsdp)
    sharding.check_batch_sizes(experiment.batch_spec, micro_batches, mesh)
    if isinstance(workdir, str):
        files.refuse_remote("workdir", workdir)
    folder = workdir if isinstance(workdir, RunFolder) else RunFolder(workdir)
    with files.said_where_there_is_no_room(folder.path), contextlib.ExitStack() as cleanup:
        watchdog = cleanup.enter_context(contextlib.closing(Watchdog(watchdog_seconds)))
        stop = cleanup.enter_context(contextlib.closing(preemption.Preemption(alone=jax.process_count() == 1)))
        anyone_asks = processes.StopConsensus(mesh)
        checkpoints = cleanup.enter_context(
            contextlib.closing(Checkpoints(folder.address, keep=keep_checkpoints, before_commit=folder.publish))
        )
        bad_steps = metrics_lib.BadSteps(folder.path, next(iter(experiment.batch_spec.values())).shape[0])
        train_step = None

        while True:  # once; with on_nan="roll_back" again from each checkpoint that the run goes back to
            with watchdog.phase("restoring"), stop.interruptible():
                first_step, state = restore_or_init(experiment, checkpoints, mesh, seed, initial)
            bad_steps.go_on_from(first_step)
            if first_step > experiment.total_steps:
                raise ConfigError(
                    f"{folder.address} is at step {first_step}, beyond the config's {experiment.total_steps}; give it "
                    "more steps, or use another --workdir"
                )
            if first_step == experiment.total_steps:
                if evaluators and not metrics_lib.evaluated(folder.path, first_step):
                    with watchdog.phase("the last evaluation"), stop.interruptible():
                        scalars = call_evaluators(evaluators, first_step, state)
                    with contextlib.closing(
                        metrics_lib.MetricWriter(folder.path, first_step, wandb, name=folder.address)
                    ) as writer:
                        writer.write(first_step, scalars)
                _LOG.info(
                    "nothing to do: %s is at step %d of %d; docs/running.md says how to train it longer",
                    folder.address,
                    first_step,
                    experiment.total_steps,
                )
                return state
            with contextlib.ExitStack() as cleanup_of_steps:
                feed = Prefetcher(batches(first_step + bad_steps.skipped_batches()), mesh)
                cleanup_of_steps.enter_context(contextlib.closing(feed))
                if train_step is None:
                    with watchdog.phase("compiling"), stop.interruptible():
                        train_step = compile_step(experiment, state, mesh, skip_not_finite=on_nan == "skip")
                        processes.run_on_all(lambda feed=feed: (feed.wait_for_first(), {}))
                    claim()
                writer = metrics_lib.MetricWriter(folder.path, first_step, wandb, name=folder.address)
                log = StepLog(folder.path, writer, experiment, first_step, log_every, feed, bad_steps)
                cleanup_of_steps.enter_context(contextlib.closing(log))
                trace = Trace(folder.path, first_step, experiment.total_steps, profile)
                cleanup_of_steps.enter_context(contextlib.closing(trace))
                try:
                    state = run_steps(
                        first_step,
                        state,
                        train_step,
                        feed,
                        total_steps=experiment.total_steps,
                        evaluators=evaluators,
                        eval_every=eval_every,
                        checkpoint_every=checkpoint_every,
                        checkpoints=checkpoints,
                        log=log,
                        trace=trace,
                        watchdog=watchdog,
                        stop=stop,
                        anyone_asks=anyone_asks,
                    )
                except NotFinite as error:
                    with watchdog.phase("the save before"):
                        checkpoints.wait()
                        go_back_or_stop(error, on_nan, checkpoints, bad_steps)
                    continue
            with watchdog.phase("the last save"):
                checkpoints.wait()
            return state


def run_steps(
    first_step: int,
    state: TrainState,
    train_step: Callable,
    feed: Prefetcher,
    *,
    total_steps: int,
    evaluators: list[Evaluator],
    eval_every: int,
    checkpoint_every: int,
    checkpoints: Checkpoints,
    log: "StepLog",
    trace: "Trace",
    watchdog: Watchdog,
    stop: preemption.Preemption,
    anyone_asks: processes.StopConsensus,
) -> TrainState:
    """The loop: steps, metrics, checkpoints, evaluations, and signals between them."""

    def evaluation_is_due(step: int) -> bool:  # at 0 of the untrained network, to compare with
        return step in (0, total_steps) or (eval_every > 0 and step % eval_every == 0)

    # A run that ended during the evaluation makes it now, as the state is saved before; and none twice.
    if evaluators and evaluation_is_due(first_step) and not log.has_evaluation(first_step):
        with watchdog.phase("the first evaluation"), stop.interruptible():
            log.scalars(first_step, call_evaluators(evaluators, first_step, state))
    saved = first_step
    log.start()
    for step in range(first_step + 1, total_steps + 1):
        watchdog.expect(f"step {step}")
        try:
            with stop.interruptible(in_loop=True):
                batch = next(feed)
            with trace.step(step):
                state, metrics = train_step(state, batch)
                log.step(step, metrics)

            last = step == total_steps
            if step % checkpoint_every == 0 or last:
                log.flush()  # says which step it was, if the state is not finite
                checkpoints.save(step, state)
                saved = step
            if evaluation_is_due(step):
                log.flush()
                with watchdog.phase(f"the evaluation at step {step}"), stop.interruptible(in_loop=True):
                    log.scalars(step, call_evaluators(evaluators, step, state))
            if (signum := anyone_asks(stop.requested)) and not last:
                raise preemption.Preempted(signum)
        except preemption.Preempted as preempted:
            with watchdog.phase("the save before leaving"):
                log.flush()
                save_before_leaving(checkpoints, state, saved, total_steps, str(preempted))
            raise
    return state


def save_before_leaving(checkpoints: Checkpoints, state: TrainState, saved: int, total_steps: int, why: str) -> None:
    """After a signal: saves the state unless that of its step is there, and says how to go on."""
    done = int(state.step)  # the loop's step, or the one before if that was waiting for its batch
    if done > saved:
        checkpoints.save(done, state)
    checkpoints.wait()
    _LOG.warning("%s: saved, stopping at step %d of %d; the same command goes on from there", why, done, total_steps)


def go_back_or_stop(error: NotFinite, on_nan: str, checkpoints: Checkpoints, bad_steps: metrics_lib.BadSteps) -> None:
    """Notes a step that is not finite; returns if the run is to go on from its newest checkpoint.

    Raises:
      NotFinite: it is to stop; the message says how to go on.
    """
    newest = checkpoints.newest()
    back_to = newest or 0
    tried = [line for line in bad_steps.lines if line.get("back_to") == back_to]
    if on_nan == "roll_back" and len(tried) < MOST_ROLL_BACKS:
        bad_steps.add(error.step, str(error), "roll_back", back_to=back_to)
        _LOG.warning("%s; back to step %d, leaving out the batches up to this step's", error, back_to)
        return
    bad_steps.add(error.step, str(error), "stop")
    raise NotFinite(
        f"{error}; nothing of it is saved"
        + (f", also after going back to step {back_to} {len(tried)} times. " if tried else ". ")
        + (f"The newest checkpoint is that of step {newest}. " if newest is not None else "There is no checkpoint. ")
        + f"Its examples are named in {bad_steps.path}. The same command comes to the same step again: let it leave it "
        "out, by --config.run.on_nan=skip or roll_back, or go on with other values, such as (vivi_jax.main) "
        "--may_change=schedule --config.schedule.base_lr=...",
        error.step,
    ) from error


def restore_or_init(
    experiment: Experiment,
    checkpoints: Checkpoints,
    mesh: Mesh,
    seed: int,
    initial: Callable[[], TrainState] | None = None,
) -> tuple[int, TrainState]:
    """Returns (steps done, state): the newest good checkpoint, or step 0."""

    def init() -> TrainState:
        return create(experiment.method, experiment.optimizer, experiment.batch_spec, seed)

    like = jax.eval_shape(init)
    restored: Any = checkpoints.restore(like, mesh)
    if restored:
        _LOG.info("going on from step %d of %s", restored[0], checkpoints.directory)
        return restored
    placed = sharding.state_sharding(like, mesh)
    if initial:
        state = jax.device_put(in_thread(initial), placed)
    elif isinstance(experiment.train_step, StepInParts):  # by a program of one device, as all of its steps
        state = jax.device_put(in_thread(jax.jit(init)), placed)
    else:
        state = in_thread(jax.jit(init, out_shardings=placed))
    _LOG.info("parameters of the online network:\n%s", parameter_table(state.params))
    return 0, state


def compile_step(experiment: Experiment, state: TrainState, mesh: Mesh, *, skip_not_finite: bool = False):
    """The step over the mesh: batch split, state (or its shapes) on every device, and donated if it is one program."""
    options = GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None
    step = experiment.train_step
    _LOG.info("compiling the step: minutes for large networks, and nothing is printed meanwhile")
    if isinstance(step, StepInParts):
        in_parts = in_thread(lambda: step.on(mesh, state, experiment.batch_spec, options))
        keep = jax.jit(kept_if_finite)
        return (lambda state, batch: keep(state, *in_parts(state, batch))) if skip_not_finite else in_parts
    of_state = sharding.state_sharding(state, mesh)
    program = jax.jit(
        (lambda state, batch: kept_if_finite(state, *step(state, batch))) if skip_not_finite else step,
        donate_argnums=0,
        in_shardings=(of_state, sharding.batch_sharding(mesh)),
        out_shardings=(of_state, sharding.replicated(mesh)),
    )

    def compile_on_mesh():
        with jax.set_mesh(mesh):  # for sharding.replicate_params; of the thread that traces
            return program.lower(state, experiment.batch_spec).compile(options)

    return in_thread(compile_on_mesh)


def keep_compiled(directory: str) -> None:
    """Has JAX keep what it compiles in `directory` for later starts; "": not.

    JAX's own setting (JAX_COMPILATION_CACHE_DIR) comes first. A program for CPUs uses all that the processor has which
    it was compiled on: machines that share a home directory share programs only where their processors are of a kind.
    """
    if not directory or jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    cpu = pathlib.Path("/proc/cpuinfo")
    features = {line for line in cpu.read_text().splitlines() if line.startswith("flags")} if cpu.exists() else ()
    kind = hashlib.sha256("".join(sorted(features)).encode()).hexdigest()[:8]
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(directory).expanduser() / kind))


def kept_if_finite(state: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """The new state, or the old one where loss, gradient or new state are not finite; with one metric more, SKIPPED.

    A skipped step counts, also in the optimizer, which counts for its schedule; all else stays as it was.
    """

    def is_float(leaf: jax.Array) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.inexact)

    floats = [*filter(is_float, jax.tree.leaves(new)), metrics["loss"], metrics["gradient_norm"]]
    good = jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()
    opt_state = jax.tree.map(lambda was, now: was if is_float(now) else now, state.opt_state, new.opt_state)
    kept = dataclasses.replace(state, step=new.step, opt_state=opt_state)
    return jax.tree.map(lambda was, now: jnp.where(good, now, was), kept, new), metrics | {SKIPPED: 1.0 - good}


class StepLog:
    """The metrics of a run; each step's are read one step late, so that the accelerator never waits for us."""

    def __init__(
        self,
        workdir: pathlib.Path,
        writer: metrics_lib.MetricWriter,
        experiment: Experiment,
        first_step: int,
        log_every: int,
        feed: Prefetcher,
        bad_steps: metrics_lib.BadSteps,
    ):
        self._workdir = workdir
        self._writer = writer
        batch_size = next(iter(experiment.batch_spec.values())).shape[0]
        self._progress = metrics_lib.Progress(first_step, experiment.total_steps, batch_size)
        self._total_steps, self._log_every, self._feed, self._bad_steps = (
            experiment.total_steps,
            log_every,
            feed,
            bad_steps,
        )
        self._pending: tuple[int, Metrics] | None = None
        self._skipped_in_a_row = 0

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        if scalars:
            self._writer.write(step, scalars)

    def has_evaluation(self, step: int) -> bool:
        return metrics_lib.evaluated(self._workdir, step)

    def start(self) -> None:
        """The steps begin now: the first rate, and the time left that follows from it, are theirs alone."""
        self._progress.start(self._feed.wait_seconds)

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Checks and logs the step before this one."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the newest step; raises NotFinite if its loss or gradient is not, unless the step was skipped."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        log = step % self._log_every == 0 or step == self._total_steps
        names = metrics if log else metrics.keys() & {"loss", "gradient_norm", SKIPPED}
        scalars = {name: float(value) for name, value in jax.device_get({n: metrics[n] for n in names}).items()}
        bad = [
            f"the {name.replace('_', ' ')} is {scalars[name]}"
            for name in ("loss", "gradient_norm")
            if not math.isfinite(scalars[name])
        ]
        found = f"{' and '.join(bad) or 'the state is not finite'} at step {step}"
        if SKIPPED in scalars:
            self._count_skipped(step, found, skipped=scalars.pop(SKIPPED) > 0)
            scalars["skipped_steps"] = float(self._bad_steps.count("skip"))
        elif bad:
            raise NotFinite(found, step)
        if log:
            scalars |= self._progress.rates(step, self._feed.wait_seconds)
            self.scalars(step, {name: value for name, value in scalars.items() if math.isfinite(value)})
            self._progress.show(step, scalars)

    def _count_skipped(self, step: int, found: str, *, skipped: bool) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row > MOST_SKIPPED_IN_A_ROW:
            raise NotFinite(f"{found}, as {MOST_SKIPPED_IN_A_ROW} steps before it, which were skipped", step)
        if skipped:
            self._bad_steps.add(step, found, "skip")
            _LOG.warning("%s; skipped", found)

    def close(self) -> None:
        self._writer.close()


class Trace:
    """JAX's profiler over `steps` steps of this start, behind its first UNTRACED where there are as many.

    TensorBoard's and Perfetto's trace, in WORKDIR/profile/plugins/profile. Each step is an event "train" of its number.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int, total_steps: int, steps: int):
        self._folder = workdir / "profile"
        begin = first_step + 1 + max(0, min(UNTRACED, total_steps - first_step - steps))
        self._steps, self._on = range(begin, begin + steps), False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a step and the wait for the one before it."""
        if step not in self._steps:
            yield
            self.close()  # only now: this step waited for the last of the trace
            return
        if not self._on:
            jax.profiler.start_trace(self._folder)
            self._on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def close(self) -> None:
        """Writes the trace, if it has begun."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            _LOG.info("the profiler's trace is in %s", self._folder)


def call_evaluators(evaluators: list[Evaluator], step: int, state: TrainState) -> dict[str, float]:
    scalars = {name: value for evaluate in evaluators for name, value in evaluate(step, state).items()}
    if scalars:
        _LOG.info("step %d: %s", step, "  ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
    return scalars


def parameter_table(params: Any) -> str:
    """A line for each array of a tree, with shape, dtype and number of values; and their sum.

    >>> print(parameter_table({"stem": {"kernel": jnp.ones((30, 40)), "bias": jnp.ones(40)}}))
    stem/bias    (40,) float32        40
    stem/kernel  (30, 40) float32  1,200
    in all                         1,240, 4,960 bytes
    """
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    total, size = sum(leaf.size for _, leaf in leaves), sum(leaf.nbytes for _, leaf in leaves)
    rows = [(name, f"{leaf.shape} {leaf.dtype}", f"{leaf.size:,}") for name, leaf in leaves]
    rows.append(("in all", "", f"{total:,}"))
    name, kind, number = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"{a:{name}}  {b:{kind}}  {c:>{number}}" for a, b, c in rows]
    return "\n".join([*lines[:-1], f"{lines[-1]}, {size:,} bytes"])


def in_thread(function: Callable):
    """Runs what compiles in a thread and waits: a signal cannot interrupt the compiler, only this waiting."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        return pool.submit(function).result()
    finally:
        pool.shutdown(wait=False)
