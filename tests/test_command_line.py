"""What the command line answers to mistakes: one line each that names what was meant, from any folder."""

import argparse
import errno
import os
import pathlib
import re
import subprocess
import sys

import pytest

import vivi_jax
from helpers.commands import assert_one_line_error, run_module
from vivi_jax import command_line, files
from vivi_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Runs each line of its input as a command line, in a process of its own that shares what is imported.
EACH = """
import os, sys
from absl import flags
from vivi_jax import command_line

values = {"config": command_line.define_config(None, "a config"), "workdir": flags.DEFINE_string("workdir", None, "")}
for line in sys.stdin.read().splitlines():
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(1, 2)
        sys.argv = ["main", *line.split()]
        command_line.run(lambda given: print("taken:", given["config"].name), values, optional=["workdir"])
    print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
MISTAKES = {
    "--config=vito --config.optimizer.learning_rate=1": ".learning_rate; did you mean --config.schedule.base_lr?",
    "--config=vito --config.lr=0.1": "no key config.lr; did you mean --config.schedule.base_lr?",
    "--config=vdim --config.optimizer.lr=0.1": "no key config.optimizer.lr; did you mean --config.schedule.lr?",
    "--config=vito --config.weight_decay=0.1": "config.weight_decay; did you mean --config.optimizer.weight_decay?",
    "--config=vito --config.epochs=3": "no key config.epochs; did you mean --config.schedule.epochs?",
    "--config=vdim --config.epochs=3": "no key config.epochs; did you mean --config.schedule.total_steps?",
    "--config=vito --config.batchsize=8": "no key config.batchsize; did you mean --config.batch_size?",
    "--config=vito --config.data.pth=x": "no key config.data.pth; did you mean --config.data.path?",
    "--config=vito --config.optimizer.zzz=1": "no key config.optimizer.zzz. config.optimizer has momentum, name,",
    "--config=vito --batch_size=8": "no option --batch_size; did you mean --config.batch_size?",
    "--config=vito --lr=8": "no option --lr; did you mean --config.schedule.base_lr?",
    "--config=vito --wrkdir=8": "no option --wrkdir; did you mean --workdir?",
    "--config=vito --config.batch_size=eight": "--config.batch_size=eight",
    "--config=vito:demo config.schedule.epochs=2": "options begin with two dashes, --config.schedule.epochs=2",
    "--config=vito demo": "'demo' is no option",
    "--config=vitoo": "did you mean vito? Known: action, detection, moco_v3, segmentation, vdim, vito, vivi, vtab",
    "--config=configs/vitoo.py": "did you mean vito? Known: action,",
    "--config=elsewhere/vito.py": "no such file or config",
    "--config=": "no such file or config",
    "--config=vito:demoo": "did you mean 'demo'",
    "": "--config is missing",
    "--config=gs://bucket/vito.py": "--config=gs://bucket/vito.py: this command reads and writes local files only",
    "--config=vito --workdir=gs://bucket/run": "--workdir=gs://bucket/run: this command",
    "--config=vito --config.data.path=s3://bucket/store": "--config.data.path=s3://bucket/store: this command",
    "--config=vito --config.evaluation.dataset=hdfs://x/y": "--config.evaluation.dataset=hdfs://x/y: this command",
}
TAKEN = {
    "--config=vito:demo": "vito-demo",
    "--config vivi:ex2": "vivi-ex2",
    "--config=configs/vdim.py:demo --config.batch_size=8": "vdim-demo",
    f"--config={ROOT / 'configs' / 'vito.py'}:own --workdir=C:x": "vito-own",
}


def test_mistakes_and_names_of_configs(tmp_path):
    lines = [*MISTAKES, *TAKEN]
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input="\n".join(lines) + "\n",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,  # where there is no folder configs
        capture_output=True,
        text=True,
        timeout=200,
    )
    answers = done.stdout.split("exit ")
    assert len(answers) == len(lines) + 1, done.stderr
    for line, answer, end in zip(lines, answers, answers[1:], strict=False):
        text = answer.partition("\n")[2] if line != lines[0] else answer
        if line in TAKEN:
            assert f"taken: {TAKEN[line]}\n" == text and end.startswith("0"), (line, text)
        else:
            assert text.startswith("error: ") and text.count("\n") == 1, (line, text)
            assert MISTAKES[line] in text and end.startswith("1"), (line, text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["gs://b/x", "s3://b", "http://h/x", "hdfs://h/x", "gs:/b/x"])
def test_a_path_with_a_scheme_is_refused_and_a_local_one_is_not(path):
    with pytest.raises(ConfigError, match=f"--out={path}: .* local files only"):
        files.refuse_remote("--out", path)
    for fine in ("runs/x", "/a:b/c", "cifar10:3.0.2", "v3:8x8", None, 3):
        files.refuse_remote("--out", fine)


def test_every_argparse_command_refuses_a_scheme(capsys):
    parser = command_line.Parser("evaluation.report", "Writes.")
    parser.add_argument("--checkpoint")
    with pytest.raises(SystemExit) as stopped:
        command_line.run_parser(lambda options: pytest.fail("it ran"), parser, ["--checkpoint=gs://b/run"])
    assert "--checkpoint=gs://b/run: this command" in str(stopped.value)
    assert isinstance(parser, argparse.ArgumentParser)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        command_line.ended(lambda: (tmp_path / "file" / "run").mkdir())
    assert (
        str(stopped.value) == f"error: {tmp_path / 'file' / 'run'}: not a directory; see that it can be read or written"
    )
    with pytest.raises(SystemExit, match="^error: /a/disk: no space left on device; give a place that can be written$"):
        command_line.ended(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/disk")))
    with pytest.raises(FileNotFoundError):  # a fault of ours keeps its traceback
        command_line.ended(lambda: print((tmp_path / "absent").read_text()))


@pytest.mark.slow
def test_the_commands_refuse_a_scheme_before_anything_is_written():
    assert_one_line_error(
        run_module("input_pipeline.prepare", "--videos=x", "--out=gs://b/store"), "--out=gs://b/store"
    )
    assert_one_line_error(run_module("evaluation.davis", "--checkpoint=x", "--data=y", "--out=s3://b/d"), "=s3://b/d")
    assert not (ROOT / "gs:").exists() and not (ROOT / "s3:").exists()


@pytest.mark.parametrize(
    "protocol, options, message",
    [
        ("segmentation", {"workdir": "out", "pixels": 3}, "segmentation: got an unexpected keyword argument 'pixels'"),
        ("segmentation", {}, "segmentation: missing a required argument: 'workdir'"),
        ("davis", {"workdir": "out", "data": "ftp://host/davis"}, "--data=ftp://host/davis: this command reads"),
        ("probe", {"pixels": 3}, "unrecognized arguments: --pixels=3"),
        ("probe", {"config": "probe"}, "probe has no config"),
        ("vtap", {}, "did you mean 'vtab'"),
    ],
)
def test_evaluate_says_in_a_line_what_the_command_would(protocol, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        vivi_jax.evaluate(**{"protocol": protocol, "checkpoint": "RUN", "data": "DATA"} | options)
