"""Weights & Biases, offline: what its files hold of a run that is stopped and goes on, and what its failures cost."""

import json
import struct
import subprocess
import sys
import textwrap

import pytest

from helpers.commands import ROOT, one_device

pytest.importorskip("wandb", reason="needs the extra wandb")

BEGIN = """
    import os, sys
    from vivi_jax.metrics import MetricWriter
    folder = sys.argv[1]
"""


def child(code: str, folder, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python in a process of its own, whose home is `folder`: it knows no key of whoever tests."""
    begin, code = (textwrap.dedent(part) for part in (BEGIN, code))
    with open(folder / "stderr", "w+") as file:  # a pipe would be held open by processes of W&B that outlive its own
        done = subprocess.run(
            [sys.executable, "-c", begin + code, str(folder)],
            cwd=ROOT,
            env={**one_device(), "HOME": str(folder), **environment},
            stderr=file,
            timeout=500,
        )
        file.seek(0)
        done.stderr = file.read()
    return done


def records(path) -> list:
    """The records of a .wandb file: of LevelDB's log format, protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a block ends with zeros where no header fits
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_the_same_run_of_wandb(tmp_path):
    """And a key that is missing costs a line; so does W&B's process, if it dies."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"batch_size": 16, "data": {"path": "store"}}')
    stopped = child(
        """
        writer = MetricWriter(folder + "/no_key", 0, "tries")
        writer.write(1, {"loss": 1.0})
        writer.close()
        import wandb
        wandb.teardown()
        os.environ["WANDB_MODE"] = "offline"
        writer = MetricWriter(folder + "/run", 0, "tries")
        try:
            for step in range(1, 8):
                writer.write(step, {"loss": step / 3})
            raise SystemExit(143)
        finally:  # while it is on its way out
            writer.close()
        """,
        tmp_path,
    )
    assert stopped.returncode == 143, stopped.stderr
    warnings = [line for line in stopped.stderr.splitlines() if "Weights & Biases" in line]
    assert len(warnings) == 1 and "there is no key; run `wandb login`" in warnings[0]
    assert (tmp_path / "no_key" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'

    gone_on = child(
        """
        writer = MetricWriter(folder + "/run", 5, "tries")
        writer.write(5, {"knn_top1": 0.5})  # the evaluation that was cut off
        for step in range(6, 9):
            writer.write(step, {"loss": step / 3})
        writer.close()

        sys.path.insert(0, "tests")
        import test_train
        from helpers.commands import children
        def end_its_process(i):
            if i == 5:
                for pid in children(os.getpid()):
                    os.kill(pid, 9)
        test_train.run(folder + "/dies", data=test_train.batches(at=end_its_process), wandb="tries")
        """,
        tmp_path,
        WANDB_MODE="offline",
    )
    assert gone_on.returncode == 0, gone_on.stderr
    assert gone_on.stderr.count("Weights & Biases") == 1 and "The run goes on without it" in gone_on.stderr
    assert len((tmp_path / "dies" / "metrics.jsonl").read_text().splitlines()) == 12

    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    for path, exit_code in ((first, 1), (second, 0)):
        run = next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.project) == (identity, "tries")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["batch_size"] == 16 and config["data"] == {"path": "store"}
        assert [r.exit.exit_code for r in records(path) if r.WhichOneof("record_type") == "exit"] == [exit_code]
    losses = [{"step": step, "loss": step / 3} for step in range(1, 9)]
    assert rows(first) == losses[:7] and rows(second) == [{"step": 5, "knn_top1": 0.5}, *losses[5:]]


def rows(path) -> list[dict]:
    """What a run was given, without W&B's own values."""
    history = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    found = [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in history]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in found]
