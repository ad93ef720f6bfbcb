"""The loop: what it does with steps that are not finite, with signals, and before it may write."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from configs import vito
from helpers.commands import ROOT, one_device
from vivi_jax import checkpoint, main, metrics
from vivi_jax.buckets.runs import RunFolder
from vivi_jax.build import Experiment
from vivi_jax.distributed import preemption, watchdog
from vivi_jax.errors import CheckpointError, ConfigError, DataError, NotFinite
from vivi_jax.loop import MOST_ROLL_BACKS, MOST_SKIPPED_IN_A_ROW, train
from vivi_jax.methods.base import MethodState
from vivi_jax.train_step import make_train_step

BATCH, TOTAL = 16, 12


class Linear:
    """The mean square of x w, whose batches may hold NaN: the loop's view of a method, compiled at once."""

    def init(self, key, batch):
        return MethodState({"w": jnp.ones((4, 3)), "encoder": {"b": jnp.zeros(3)}}, {})

    def embed(self, params, model_state, target, batch, keys):
        return batch["x"] @ params["w"] + params["encoder"]["b"][None], model_state, target

    def loss(self, embeddings, batch, loss_state, step):
        return jnp.mean((embeddings - 1) ** 2), loss_state, {}


def experiment(total: int = TOTAL, nan_rate_at: int | None = None) -> Experiment:
    """Plain gradient descent; the rate of one step (from 0) may be NaN: a finite loss whose update is not."""

    def rate(step):
        return 0.1 if nan_rate_at is None else jnp.where(step == nan_rate_at, jnp.nan, 0.1)

    method, optimizer = Linear(), optax.sgd(rate)
    step = make_train_step(method, optimizer, rate, None, seed=0, micro_batches=1)
    return Experiment(method, optimizer, step, {"x": jax.ShapeDtypeStruct((BATCH, 4), jnp.float32)}, total)


def batch(i: int) -> np.ndarray:
    return np.random.default_rng(i).normal(size=(BATCH, 4)).astype(np.float32)


def batches(poisoned=(), at=lambda i: None):
    """Batches by their number; `at` is called with it."""

    def from_(first: int):
        i = first
        while True:
            at(i)
            x = batch(i)
            if i in poisoned:
                x[3, 1] = np.nan
            yield {"x": x}
            i += 1

    return from_


def run(workdir, made=None, data=None, **changes):
    options = dict(
        seed=0,
        micro_batches=1,
        evaluators=[],
        eval_every=0,
        log_every=1,
        checkpoint_every=5,
        keep_checkpoints=3,
        watchdog_seconds=0,
        on_nan="stop",
        fsdp=1,
        compilation_cache="",
        profile=0,
        wandb="",
    )
    return train(made or experiment(), data or batches(), str(workdir), **options | changes)


def after(numbers) -> np.ndarray:
    """w after a step on each of these batches, by NumPy."""
    w, b = np.ones((4, 3)), np.zeros(3)
    for i in numbers:
        x = batch(i).astype(np.float64)
        slope = 2 * (x @ w + b - 1) / (BATCH * 3)
        w, b = w - 0.1 * x.T @ slope, b - 0.1 * slope.sum(0)
    return w


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def on_tensorboard(workdir) -> list[dict]:
    """What TensorBoard shows of a run, as the lines of metrics.jsonl."""
    found: dict[int, dict] = {}
    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0}).Reload()
    for name in events.Tags()["tensors"]:
        assert events.SummaryMetadata(name).plugin_data.plugin_name == "scalars"
        for event in events.Tensors(name):
            line = found.setdefault(event.step, {"step": event.step})
            assert name not in line  # twice
            line[name] = make_ndarray(event.tensor_proto).item()
    return [found[step] for step in sorted(found)]


def as_float32(lines: list[dict]) -> list[dict]:
    return [{k: v if k == "step" else float(np.float32(v)) for k, v in line.items()} for line in lines]


# --- steps that are not finite ----------------------------------------------------------------------------------------


def test_a_run_stops_says_where_and_goes_on_once_the_cause_is_gone(tmp_path):
    for start in (1, 2):
        with pytest.raises(NotFinite, match="loss is nan and the gradient norm is nan at step 8; ") as raised:
            run(tmp_path / "a", data=batches({7}))
        assert "The newest checkpoint is that of step 5. " in str(raised.value)
        assert "--may_change=schedule" in str(raised.value) and "lower learning rate" not in str(raised.value)
        assert checkpoint.newest_good_step(tmp_path / "a" / "checkpoints") == 5
        found = lines(tmp_path / "a" / "bad_steps.jsonl")
        assert len(found) == start and found[-1] == {
            "step": 8,
            "found": "the loss is nan and the gradient norm is nan at step 8",
            "action": "stop",
            "batch": 7,
            "examples": [7 * BATCH, 8 * BATCH],
        }
    state, straight = run(tmp_path / "a"), run(tmp_path / "b")
    assert checkpoint.state_sha256(state) == checkpoint.state_sha256(straight)
    assert [line["step"] for line in lines(tmp_path / "a" / "metrics.jsonl")] == list(range(1, TOTAL + 1))


@pytest.mark.parametrize("total", [TOTAL, 10], ids=["inside", "the last step"])
def test_an_update_that_is_not_finite_is_not_saved_although_its_loss_is(tmp_path, total):
    with pytest.raises(NotFinite, match="the state after step 10 is not finite; nothing of it is saved"):
        run(tmp_path, experiment(total, nan_rate_at=9))
    assert checkpoint.steps(tmp_path / "checkpoints") == [5]
    state = run(tmp_path, experiment(total))
    np.testing.assert_allclose(state.params["w"], after(range(total)), rtol=1e-5)


def test_a_bad_step_is_skipped_counted_and_named(tmp_path):
    state = run(tmp_path, experiment(nan_rate_at=9), batches({2, 7}), on_nan="skip")
    np.testing.assert_allclose(state.params["w"], after(set(range(TOTAL)) - {2, 7, 9}), rtol=1e-5)
    assert state.step == TOTAL
    assert [(line["step"], line["action"], line["batch"]) for line in lines(tmp_path / "bad_steps.jsonl")] == [
        (3, "skip", 2),
        (8, "skip", 7),
        (10, "skip", 9),
    ]
    metrics = {line["step"]: line for line in lines(tmp_path / "metrics.jsonl")}
    assert "loss" not in metrics[8] and [metrics[i]["skipped_steps"] for i in (2, 3, 7, 8, 12)] == [0, 1, 1, 2, 3]


def test_skipping_without_end_is_an_end(tmp_path):
    with pytest.raises(NotFinite, match=f"at step 14, as {MOST_SKIPPED_IN_A_ROW} steps before it, which were skipped"):
        run(tmp_path, experiment(40), batches(range(3, 40)), on_nan="skip")
    np.testing.assert_allclose(checkpoint.load_state(tmp_path)["params"]["w"], after(range(3)), rtol=1e-5)


def test_without_a_bad_step_skipping_changes_no_bit(tmp_path):
    states = [run(tmp_path / on_nan, on_nan=on_nan) for on_nan in ("stop", "skip", "roll_back")]
    assert len({checkpoint.state_sha256(state) for state in states}) == 1


def test_a_run_rolls_back_and_leaves_the_batches_out(tmp_path):
    state = run(tmp_path / "a", data=batches({7, 16}), on_nan="roll_back")
    # 5 steps, back from the 8th to 5; 3 batches are out, so batch 16 is the 14th step, beyond the end.
    np.testing.assert_allclose(state.params["w"], after([*range(5), *range(8, 15)]), rtol=1e-5)
    metrics = lines(tmp_path / "a" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, TOTAL + 1))
    assert on_tensorboard(tmp_path / "a") == as_float32(metrics)  # of two writers within a second

    def stop_at(i: int) -> None:
        if i == 13 and not stopped:
            stopped.append(i)
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = []
    with pytest.raises(preemption.Preempted):
        run(tmp_path / "b", data=batches({7, 16}, stop_at), on_nan="roll_back")
    again = run(tmp_path / "b", data=batches({7, 16}, stop_at), on_nan="roll_back")
    assert stopped and checkpoint.state_sha256(again) == checkpoint.state_sha256(state)


def test_tensorboard_has_every_step_at_once_and_none_twice(tmp_path):
    killed = metrics.MetricWriter(str(tmp_path), 0)
    for step in range(1, 6):
        killed.write(step, {"loss": step / 3})
        assert on_tensorboard(tmp_path) == as_float32([{"step": i, "loss": i / 3} for i in range(1, step + 1)])
    goes_on = metrics.MetricWriter(str(tmp_path), 3)
    goes_on.write(3, {"knn_top1": 0.1})  # the evaluation of the checkpoint that it goes on from
    goes_on.write(4, {"loss": 7.0})
    wanted = [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 3, "loss": 1.0, "knn_top1": 0.1}]
    assert on_tensorboard(tmp_path) == as_float32([*wanted, {"step": 4, "loss": 7.0}])
    for writer in (killed, goes_on):
        writer.close()


def test_rolling_back_without_end_is_an_end(tmp_path):
    with pytest.raises(NotFinite, match=f"also after going back to step 5 {MOST_ROLL_BACKS} times"):
        run(tmp_path, experiment(nan_rate_at=7), on_nan="roll_back")
    assert checkpoint.newest_good_step(tmp_path / "checkpoints") == 5


def test_wandb_that_is_not_installed_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not
    with pytest.raises(ConfigError, match=r"config.run.wandb='p' needs a package: pip install .*\[wandb\]"):
        run(tmp_path / "run", wandb="p")
    assert not (tmp_path / "run").exists()


def test_an_unknown_policy_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config.run.on_nan='rollback' is unknown; did you mean 'roll_back'"):
        run(tmp_path / "run", on_nan="rollback")
    assert not (tmp_path / "run").exists()


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_saves_its_step_and_the_run_goes_on_bit_for_bit(tmp_path, number):
    def stop_at(i: int) -> None:
        if i == 8:
            os.kill(os.getpid(), number)

    with pytest.raises(preemption.Preempted, match=number.name) as raised:
        run(tmp_path / "a", experiment(60), batches(at=stop_at), checkpoint_every=50)
    assert raised.value.exit_code == 128 + number
    saved = checkpoint.newest_good_step(tmp_path / "a" / "checkpoints")
    assert saved == lines(tmp_path / "a" / "metrics.jsonl")[-1]["step"] < 60
    state, straight = run(tmp_path / "a", experiment(60)), run(tmp_path / "b", experiment(60))
    assert checkpoint.state_sha256(state) == checkpoint.state_sha256(straight)


def child(code: str, *arguments: str, timeout: float = 100) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        env=one_device(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_ctrl_c_twice_ends_at_once_and_a_second_sigterm_does_not():
    code = """
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        from vivi_jax.distributed.preemption import Preemption
        stop = Preemption()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested  # nohup
        for name in sys.argv[1:]:
            os.kill(os.getpid(), getattr(signal, name))
        print("saving", stop.requested)
    """
    done = child(code, "SIGTERM", "SIGTERM")
    assert (done.returncode, done.stdout) == (0, "saving 15\n"), done.stderr
    done = child(code, "SIGINT")
    assert (done.returncode, done.stdout) == (0, "saving 2\n"), done.stderr
    for first in ("SIGINT", "SIGTERM"):
        done = child(code, first, "SIGINT")
        assert done.returncode == 130 and not done.stdout and "left without saving" in done.stderr, done.stderr


def test_a_signal_inside_a_callback_of_the_garbage_collector_is_not_lost():
    # An exception that such a callback raises is printed and forgotten, and JAX has one that may be running.
    code = """
        import gc, os, signal
        from vivi_jax.distributed.preemption import Preempted, Preemption
        sent = []
        def callback(phase, info):
            if not sent:
                sent.append(1)
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(1000): pass
        stop = Preemption()
        try:
            with stop.interruptible():
                gc.callbacks.append(callback)
                gc.collect()
                while True: pass
        except Preempted as preempted:
            print("saving", preempted)
        os.kill(os.getpid(), signal.SIGTERM)
        print("and no more")
    """
    done = child(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "saving SIGTERM\nand no more\n", "")


# --- before the first step --------------------------------------------------------------------------------------------


def test_a_start_that_is_refused_leaves_nothing(tmp_path):
    def refuse():
        raise ConfigError("no")

    def no_data(first: int):
        raise DataError("shard 0 is damaged")
        yield

    workdir = tmp_path / "runs" / "run"
    with pytest.raises(ConfigError, match="no"):
        run(workdir, claim=refuse)
    claimed = []
    with pytest.raises(DataError, match="shard 0 is damaged"):
        run(workdir, data=no_data, claim=lambda: claimed.append(1))
    with pytest.raises(ValueError, match="no weights"):
        run(workdir, initial=lambda: (_ for _ in ()).throw(ValueError("no weights")))
    assert not claimed and not list(tmp_path.iterdir())


def test_the_directory_is_claimed_once_when_all_is_ready(tmp_path):
    seen = []

    def claim():
        seen.append(tmp_path.exists() and list(tmp_path.iterdir()))

    run(tmp_path / "run", claim=claim, data=batches({7}), on_nan="roll_back")
    assert seen == [[]]


def test_a_run_goes_on_with_other_values_only_where_it_is_told_to(tmp_path):
    config, directory = vito.get_config("demo"), tmp_path / "run"
    main.claim_workdir(RunFolder(directory), config, write=False)
    assert not directory.exists()
    main.claim_workdir(RunFolder(directory), config)
    config.schedule.base_lr, config.run.log_every = 0.001, 7
    with pytest.raises(
        ConfigError, match=r"\(schedule.base_lr: 0.032 there, 0.001 here\); .* or go on .*--may_change=schedule$"
    ):
        main.claim_workdir(RunFolder(directory), config)
    main.claim_workdir(RunFolder(directory), config, ("schedule",))
    assert json.loads((directory / "config.json").read_text())["schedule"]["base_lr"] == 0.001
    change = {"schedule.base_lr": {"was": 0.032, "now": 0.001}}
    assert lines(directory / "config_changes.jsonl") == [{"step": 0, "changes": change}]
    main.claim_workdir(RunFolder(directory), config)  # these are the run's values now
    config.schedule.base_lr, config.encoder.width = 0.002, 2.0
    with pytest.raises(ConfigError, match=r"\(encoder.width: 0.25 there, 2.0 here\)"):
        main.claim_workdir(RunFolder(directory), config, ("schedule",))


def test_a_run_may_start_from_weights_of_its_own(tmp_path):
    made = experiment(3)
    fresh = run(tmp_path / "a", made)
    assert not np.allclose(fresh.params["w"], 0)

    def initial():
        state = checkpoint.load_state(tmp_path / "a")
        return fresh.replace(step=jnp.int32(0), params=jax.tree.map(jnp.asarray, state["params"]))

    state = run(tmp_path / "b", made, initial=initial)
    np.testing.assert_allclose(state.params["w"], after([0, 1, 2, 0, 1, 2]), rtol=1e-5)


def test_a_finished_run_is_trained_longer_as_if_it_had_been_so_long_from_the_start(tmp_path):
    """Of a constant rate, that is bit for bit the straight run; and a shorter one is refused, and changes nothing."""
    for total in (5, TOTAL):
        state = run(tmp_path / "longer", experiment(total))
    straight = run(tmp_path / "straight")
    assert checkpoint.state_sha256(state) == checkpoint.state_sha256(straight)
    assert [line["step"] for line in lines(tmp_path / "longer" / "metrics.jsonl")] == list(range(1, TOTAL + 1))
    claimed = []
    with pytest.raises(ConfigError, match="longer is at step 12, beyond the config's 10; give"):
        run(tmp_path / "longer", experiment(10), claim=lambda: claimed.append(1))
    assert not claimed and checkpoint.newest_good_step(tmp_path / "longer" / "checkpoints") == TOTAL


# --- the watchdog -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expected",
    ["dog.expect('step 7');", "with dog.phase('compiling'):", "with watched(0.3, 'compiling', 2):"],
)
def test_what_hangs_ends_with_all_stacks_and_a_code_that_launchers_restart(expected):
    code = f"""
        import threading, time
        from vivi_jax.distributed.watchdog import Watchdog, watched
        def stuck_in_a_thread():
            time.sleep(60)
        threading.Thread(target=stuck_in_a_thread, daemon=True).start()
        dog = Watchdog(0.3)
        with dog.phase("something short"):
            pass
        time.sleep(1.5)  # nothing is expected
        print("alive", flush=True)
        {expected} time.sleep(60)
    """
    done = child(code, timeout=50)
    assert done.returncode == watchdog.EXIT_CODE == 75 and done.stdout == "alive\n", done.stderr
    what = "step 7" if "step" in expected else "compiling"
    assert f"no end of {what} within its limit (config.run.watchdog_seconds=0.3)" in done.stderr
    assert "stuck_in_a_thread" in done.stderr and "Watchdog" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "hang, what",
    [
        ("evaluators=[lambda step, state: time.sleep(300 * step) or {}], eval_every=5", "the evaluation at step 5"),
        ("data=test_train.batches(at=lambda i: time.sleep(300 * (i == 7)))", "step 8"),
    ],
)
def test_a_run_that_hangs_ends_and_its_checkpoint_is_good(tmp_path, hang, what):
    code = "import sys, time; sys.path.insert(0, 'tests'); import test_train; "
    done = child(f"{code}test_train.run(sys.argv[1], watchdog_seconds=4, {hang})", str(tmp_path), timeout=200)
    assert done.returncode == 75 and f"no end of {what} within" in done.stderr, done.stderr
    assert checkpoint.newest_good_step(tmp_path / "checkpoints") == 5


def test_a_disk_that_is_full_is_one_line(tmp_path):
    def fill(i: int) -> None:  # as a write to one that is
        if i == 7:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="cannot write to .*: No space left on device; mend that"):
        run(tmp_path, data=batches(at=fill))
    assert run(tmp_path).step == TOTAL


# --- the profiler, and programs that are kept -------------------------------------------------------------------------


@pytest.mark.parametrize("steps, traced", [(2, [11, 12]), (20, list(range(1, 13))), (0, [])])
def test_the_profile_has_the_steps_behind_the_first_ten(tmp_path, steps, traced):
    run(tmp_path, profile=steps)
    found = [
        dict(event.stats)["step_num"]
        for file in tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted(found) == traced


@pytest.mark.slow
def test_a_later_start_finds_its_programs_and_ends_with_the_same_bits(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_train; from vivi_jax import checkpoint; "
        "print(checkpoint.state_sha256(test_train.run(sys.argv[1], compilation_cache=sys.argv[2])))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def start(run: str, cache: str, **variables: str) -> tuple[str, list]:
        arguments = [sys.executable, "-c", code, str(tmp_path / run), str(tmp_path / cache) if cache else ""]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment | variables)
        assert done.returncode == 0, done.stderr
        return done.stdout, sorted(tmp_path.glob("kept/*/*-cache"))

    first, programs = start("a", "kept")
    assert programs
    assert start("b", "kept") == (first, programs)
    assert start("c", "") == (first, programs)
    assert start("d", "unused", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == (first, programs)
    assert list(tmp_path.glob("own/*")) and not (tmp_path / "unused").exists()


def test_a_closed_watchdog_lets_everything_last():
    done = child(
        """
        import time
        from vivi_jax.distributed.watchdog import Watchdog
        dog = Watchdog(0.3)
        dog.expect("step 1")
        dog.close()
        Watchdog(0).expect("step 1")
        time.sleep(1)
        """
    )
    assert done.returncode == 0, done.stderr


# --- evaluations ------------------------------------------------------------------------------------------------------


def test_an_evaluation_that_was_cut_off_is_made_by_the_next_start_and_none_is_made_twice(tmp_path):
    """Cut off at step 0, at 5 (saved before), before a checkpoint of step 3, and at the last."""

    def evaluate(step, state):
        if step in cut:
            cut.remove(step)
            raise RuntimeError("killed")
        return {"score": float(state.params["w"].sum())}

    def kill(i: int) -> None:
        if i == 3 and 3 in cut:
            cut.remove(3)
            raise RuntimeError("killed")

    def records(name: str) -> list[dict]:
        found = lines(tmp_path / name / "metrics.jsonl")
        return [{key: line[key] for key in ("step", "loss", "score") if key in line} for line in found]

    cut = set()
    run(tmp_path / "straight", evaluators=[evaluate], eval_every=5)
    assert [line["step"] for line in records("straight") if "score" in line] == [0, 5, 10, TOTAL]
    cut = {0, 3, 5, TOTAL}
    for _ in range(4):
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "cut", data=batches(at=kill), evaluators=[evaluate], eval_every=5)
    for _ in range(2):  # once to its end, and a start that does nothing
        run(tmp_path / "cut", evaluators=[evaluate], eval_every=5)
        assert records("cut") == records("straight")


def test_going_back_to_the_beginning_evaluates_it_once(tmp_path):
    run(tmp_path, data=batches({2}), on_nan="roll_back", evaluators=[lambda step, state: {"score": 1.0}])
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl") if "score" in line] == [0, TOTAL]


# --- records that are damaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ['{"step": 3', "[]\n", '{"step": 3}\n', '{"step": 3, "action": "roll_back"}\n', "\x00\n"]
)
def test_damaged_bad_steps_are_one_line(tmp_path, text):
    (tmp_path / "bad_steps.jsonl").write_text(text)
    for look in (run, metrics.check):
        with pytest.raises(DataError, match=r"bad_steps.jsonl: line 1 is damaged \(.*\); take it out, or "):
            look(tmp_path)
    assert (tmp_path / "bad_steps.jsonl").read_text() == text
