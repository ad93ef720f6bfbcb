"""launch/sweep.py: a line for each setting of a grid, which a shell runs as it stands, and none twice."""

import json
import subprocess
import sys

import pytest

from helpers.commands import ROOT, assert_one_line_error, run_module

# Stands for a command that trains: leaves its options as the summary of its run directory.
COMMAND = """
import json, pathlib, sys
workdir = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
workdir.mkdir(parents=True)
(workdir / "summary.json").write_text(json.dumps(sys.argv[1:-1]))
"""
GRID = ["--set=schedule.base_lr=0.1,2e-3", "--set", "seed=0,1", "--set=--checkpoint=none,runs/a b"]


def test_the_lines_are_the_grid_and_what_is_finished_is_left_out(tmp_path):
    fixed = ["--config=vito:demo", "--config.data.path=it's here"]
    words = [*GRID, f"--workdir={tmp_path / 'sweep'}", "--", sys.executable, "-c", COMMAND.replace("\n", ";"), *fixed]
    words[-3] = words[-3].strip(";")
    printed = run_module("launch.sweep", *words)
    lines = printed.stdout.splitlines()
    assert printed.returncode == 0 and len(lines) == 8 and not printed.stderr, printed.stderr
    subprocess.run(["bash", "-e"], input="\n".join(lines[:5]), text=True, check=True, cwd=ROOT)
    again = run_module("launch.sweep", *words)
    assert again.stdout.splitlines() == lines[5:] and again.stderr.count("finished: ") == 5
    subprocess.run(["bash", "-e"], input=again.stdout, text=True, check=True, cwd=ROOT)
    ran = sorted(json.loads(file.read_text()) for file in tmp_path.rglob("summary.json"))
    assert ran == sorted(
        [*fixed, f"--config.schedule.base_lr={rate}", f"--config.seed={seed}", f"--checkpoint={weights}"]
        for rate in ("0.1", "2e-3")
        for seed in (0, 1)
        for weights in ("none", "runs/a b")
    )


@pytest.mark.parametrize(
    "setting, command, message",
    [
        (
            "optimizer.learning_rate=1",
            "--config=vito",
            "no key config.optimizer.learning_rate; did you mean --config.s",
        ),
        ("seed=1,x", "--config=vito", "config.seed=x"),
        ("seed=1,1", "--config=vito", "seed or a value is given twice"),
        ("--checkpoint=runs/a,runs_a", "--k=3", "or two would share a folder"),
        ("seed=", "--config=vito", "it is KEY=VALUE,VALUE"),
        ("seed=1", "--k=3", "the command has no --config=NAME"),
        ("seed=1", "--workdir=x", "each run gets a directory of its own"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_printed(tmp_path, setting, command, message):
    done = run_module("launch.sweep", f"--set={setting}", f"--workdir={tmp_path}", "--", "python", command)
    assert_one_line_error(done, message)
    assert not done.stdout
