"""The shell commands of the pages' code blocks: each is run here at a tiny size, or named with what runs it instead.

A training on the paper's network is begun as far as its first batch; tests/test_readers.py traces a step of each.
"""

import itertools
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from evaluation import attention, embed, probe, report
from helpers.commands import ROOT, one_device
from helpers.documented import PAGES
from helpers.runs import make_run
from input_pipeline import check
from input_pipeline.rendered.shapes import write_videos
from vivi_jax import command_line
from vivi_jax import main as training
from vivi_jax.build import build
from vivi_jax.export import __main__ as export

HERE = {  # module -> its main, of commands that run here
    "evaluation.attention": attention.main,
    "evaluation.embed": embed.main,
    "evaluation.probe": probe.main,
    "evaluation.report": report.main,
    "input_pipeline.check": check.main,
    "vivi_jax.export": export.main,
}
NOT_HERE = {  # beginning of a command -> what runs it, or why nothing does
    # Tests that run the module on data of its own.
    "python -m evaluation.action": "tests/test_action.py",
    "python -m evaluation.all": "tests/test_all.py",
    "python -m evaluation.davis": "tests/test_davis.py",
    "python -m evaluation.detection": "tests/test_detection.py",
    "python -m evaluation.segmentation": "tests/test_segmentation.py",
    "python -m evaluation.vid_robust": "tests/test_vid_robust.py",
    "python -m evaluation.vtab": "tests/test_vtab.py",
    "python -m input_pipeline.curate": "tests/test_curate.py",
    "python -m input_pipeline.prepare --videos=VIDEOS --labels=VIDEONET": "tests/test_curate.py",
    "python -m input_pipeline.prepare_beam": "tests/test_prepare_beam.py",
    "python -m input_pipeline.synthetic ": "tests/test_synthetic.py",
    "python -m input_pipeline.synthetic_actions": "tests/test_synthetic_actions.py",
    "python -m benchmarks.bucket_kills": "a benchmark of many runs; tests/test_runs_in_buckets.py has a few",
    "python -m benchmarks.faults": "tests/test_faults.py",
    "python -m benchmarks.small_paper": "hours of trainings; tests/test_small_paper.py has a tiny one",
    "python -m vivi_jax.plan": "tests/test_plan.py",
    "python -m launch.sweep": "tests/test_grid.py",
    "bash launch/beam.sh": "tests/test_launch.py",
    "bash launch/gke.sh": "tests/test_launch.py",
    "bash launch/image.sh": "tests/test_launch.py",
    "bash launch/sky.sh": "tests/test_launch.py",
    "bash launch/slurm.sh": "tests/test_launch.py",
    "bash launch/tpu_vm.sh": "tests/test_launch.py",
    "docker run": "tests/test_launch.py",
    "python -m vivi_jax.main --config=configs/vito.py --config.data.path=gs://": "tests/test_buckets.py",
    "python -m vivi_jax.main ... --may_change": "tests/test_resume.py",
    "python -m vivi_jax.main --config=vito:own --config.init_from": "tests/test_initial.py",
    # What CI itself is, or makes its environment with.
    "bash .ci/run": "is CI",
    "bash launch/demo.sh": "CI runs it",
    "bash launch/test.sh": "CI runs it",
    ".venv/bin/ruff": "CI runs it",
    "UPDATE_GOLDEN=1": "writes what CI compares with",
    "git diff": "shows what the line before has written",
    "python3 -m venv": "CI begins with it",
    # Downloads.
    "git clone": "a download",
    "python -m pip install": "downloads; launch/environment.sh does the like in CI",
    "pip install": "a download",
    "python3.11 -m venv OLDEST": "downloads; docs/install.md says when it was last run",
    "OLDEST/bin/python": "needs the line before it",
    "python -c": "shows the devices of the reader's machine",
}


def commands() -> dict[str, str]:
    """Each command of the blocks, without comments and the path of the environment -> the first page that has it."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.setdefault(shlex.join(words).replace(".venv/bin/python", "python"), page.name)
    return found


def module_of(command: str) -> str:
    return command.split()[2] if command.startswith("python -m ") else ""


def named(command: str) -> list[str]:
    return [beginning for beginning in NOT_HERE if command.startswith(beginning.strip("'"))]


RUN_HERE = [c for c in commands() if module_of(c) in HERE and not named(c)]
PREPARED = [c for c in commands() if module_of(c) == "input_pipeline.prepare" and not named(c)]
TRAINED = [c for c in commands() if module_of(c) == "vivi_jax.main" and not named(c)]


def test_every_command_is_run_here_or_named_with_what_runs_it():
    here = {*RUN_HERE, *PREPARED, *TRAINED}
    nowhere = [
        f"{page}: {command}" for command, page in commands().items() if command not in here and not named(command)
    ]
    assert not nowhere
    assert not [beginning for beginning in NOT_HERE if not any(beginning in named(c) for c in commands())]
    for runs in NOT_HERE.values():
        assert not runs.startswith("tests/") or (ROOT / runs).is_file()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands name: VIDEOS, STORE (made by README's command), IMAGES, FOLDER and RUN."""
    root = tmp_path_factory.mktemp("reader")
    write_videos(root / "VIDEOS", videos=12, seed=0, size=32, seconds=4.0, shots=4, classes=("ring", "star"), workers=1)
    rng = np.random.default_rng(0)
    for (split, count), name in itertools.product((("train", 12), ("test", 2)), ("a", "b")):
        (root / "IMAGES" / split / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(root / f"IMAGES/{split}/{name}/{i}.png")
    (root / "FOLDER").symlink_to(root / "IMAGES" / "test" / "a")
    for command in PREPARED:
        words = [sys.executable, *shlex.split(command)[1:]]
        made = subprocess.run(words, cwd=root, env=one_device(), capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        (root / "STORE").rename(root / f"STORE{PREPARED.index(command)}")
    (root / "STORE0").rename(root / "STORE")
    (root / "runs/demo/store").mkdir(parents=True)
    (root / "runs/demo/store/train").symlink_to(root / "STORE")  # where the demo has it
    make_run(root / "RUN", "demo", path="STORE", clip_seconds=0.8)
    return root


@pytest.mark.slow
def test_commands_that_need_a_store_or_a_run_end_well(folder, monkeypatch):
    """In one process, as most of a command's time is that of its imports."""
    monkeypatch.chdir(folder)
    for command in RUN_HERE:
        HERE[module_of(command)](shlex.split(command)[3:])
    assert {"attention.png", "features.parquet", "encoder.safetensors", "FEATURES"} <= {*os.listdir(folder)}


SMALL = {  # where the config has the key
    "batch_size": 4,
    "encoder.depth": 18,
    "data.image_size": 32,
    "data.clip_seconds": 0.8,
    "data.frame_rate": 8.0,
    "data.min_shot_seconds": 0.0,
    "data.labelled_fraction": 1.0,
    "method.triplet_groups": 1,
    "method.num_classes": 2,
}


@pytest.mark.slow
def test_trainings_get_as_far_as_their_first_batch(folder, monkeypatch):
    """Config, data and a batch are as the command says, in batches of four and smaller pictures."""
    monkeypatch.chdir(folder)
    for command in TRAINED:
        words = dict(word.lstrip("-").split("=", 1) for word in shlex.split(command)[3:])
        values = {key.removeprefix("config."): value for key, value in words.items() if key.startswith("config.")}
        config = command_line.configured(words["config"], values)
        trained(config, command)


def trained(config, command: str) -> None:
    known = command_line.flat(config.to_dict())
    small = {key: value for key, value in SMALL.items() if key in known}
    if "data.shots" in known:
        small["data.frames"] = 2
    if known["method.name"] == "vdim":  # whose layers without padding need more
        del small["data.image_size"]
    if known.get("data.labelled_batch_size"):
        small["data.labelled_batch_size"] = 4
    config.update_from_flattened_dict(small)
    training.check_sections(config)
    training.fit_to_data(config)
    experiment = build(config)
    batch = next(training.open_data(config)(0, 1))
    assert {name: x.shape for name, x in batch.items()} == {n: x.shape for n, x in experiment.batch_spec.items()}, (
        command
    )
