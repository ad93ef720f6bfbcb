"""Weights & Biases, offline: what its files hold of a run that is stopped and goes on, and what its failures cost."""

import json
import signal
import struct
import subprocess
import sys
import textwrap

import pytest

from helpers.commands import ROOT, one_device

pytest.importorskip("wandb", reason="needs the extra wandb")

BEGIN = """
    import os, sys
    sys.path.insert(0, "tests")
    import test_train, wandb
    from helpers.commands import children
    from vivi_jax.distributed import preemption
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
            timeout=200,
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


def rows(path) -> list[dict]:
    history = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in history]


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_as_the_same_run_of_wandb(tmp_path):
    """And a key that is missing costs a line; so does W&B's process, if it dies."""
    stopped = child(
        f"""
        test_train.run(folder + "/no_key", wandb="tries")
        wandb.teardown()
        os.environ["WANDB_MODE"] = "offline"
        def stop(i):
            if i == 8:
                os.kill(os.getpid(), {int(signal.SIGTERM)})
        os.makedirs(folder + "/run")
        open(folder + "/run/config.json", "w").write('{{"batch_size": 16, "data": {{"path": "store"}}}}')
        try:
            test_train.run(folder + "/run", data=test_train.batches(at=stop), wandb="tries")
        except preemption.Preempted as stopped:
            sys.exit(int(stopped.exit_code))
        """,
        tmp_path,
    )
    assert stopped.returncode == 143, stopped.stderr
    warnings = [line for line in stopped.stderr.splitlines() if "Weights & Biases" in line]
    assert len(warnings) == 1 and "there is no key; run `wandb login`" in warnings[0]
    assert len((tmp_path / "no_key" / "metrics.jsonl").read_text().splitlines()) == 12

    gone_on = child(
        """
        test_train.run(folder + "/run", wandb="tries")
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
    assert gone_on.stderr.count("Weights & Biases") == 1
    assert len((tmp_path / "dies" / "metrics.jsonl").read_text().splitlines()) == 12

    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    for path, exit_code in ((first, 1), (second, 0)):
        found = {record.WhichOneof("record_type"): record for record in records(path)}
        assert (found["run"].run.run_id, found["run"].run.project) == (identity, "tries")
        config = {item.key: json.loads(item.value_json) for item in found["run"].run.config.update}
        assert config["batch_size"] == 16 and config["data"] == {"path": "store"}
        assert found["exit"].exit.exit_code == exit_code
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    written = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows(first) + rows(second)]
    assert written == metrics and [line["step"] for line in metrics] == list(range(1, 13))
