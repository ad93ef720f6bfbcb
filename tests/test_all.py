"""evaluation.all: what is found and what is not, each command as it stands, failures, going on, and the page."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from evaluation.all import found, page
from evaluation.all.__main__ import before, main, reason
from evaluation.all.published import PUBLISHED
from helpers.commands import ROOT, one_device, start_module
from helpers.documented import configured, file_of, options_of
from helpers.runs import make_run
from vivi_jax.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of few channels; beside it data/ with two classes of images and a part of ImageNet-Vid-Robust."""
    root = tmp_path_factory.mktemp("all")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, level in (("dark", 60), ("light", 200)):
            folder = root / "data" / "Classes" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(level - 40, level + 40, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    folders(root / "data", "vid_robust/pmsets.json")
    return make_run(root / "run", "demo")


def folders(root: pathlib.Path, *names: str) -> str:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}") if path.suffix else path.mkdir(exist_ok=True)
    return str(root)


# ---- What is found --------------------------------------------------------------------------------------------------
def test_each_data_set_is_found_under_its_names_and_what_is_not_says_where_it_was_looked_for(tmp_path):
    (run := tmp_path / "run").mkdir()
    data = folders(tmp_path, "DAVIS/JPEGImages", "VOCdevkit/VOC2012/JPEGImages", "coco/annotations/lvis_v1_train.json")
    plan = found.plan(data, str(run))
    assert {name: str(path.relative_to(tmp_path)) for name, path in plan.found.items()} == {
        "davis": "DAVIS",
        "voc": "VOCdevkit/VOC2012",
        "lvis": "coco",
    }
    assert set(plan.found) | set(plan.left_out) == set(found.EVALUATIONS)
    assert plan.left_out["coco"] == f"not found: {data}/coco has no annotations/instances_train2017.json"
    assert plan.left_out["ucf101-vito"] == f"not found: looked for {data}/ucf101 or {data}/ucf-101"
    assert list(found.plan(data, str(run), only="voc").found) == ["voc"]
    assert list(found.plan(folders(tmp_path, "hmdb51"), str(run), only="hmdb51-vito").found) == ["hmdb51-vito"]


def test_encoders_of_clips_and_of_images_have_their_own_protocols(tmp_path):
    data = folders(tmp_path, "ucf101", "clips", "images", "coco/annotations/instances_train2017.json")
    for name, encoder in (("clips", "vdim"), ("images", "resnet")):
        (tmp_path / name / "config.json").write_text(json.dumps({"encoder": {"name": encoder}}))
    clips, images = (found.plan(data, str(tmp_path / name)) for name in ("clips", "images"))
    assert list(clips.found) == ["ucf101-vdim"] and list(images.found) == ["ucf101-vito", "coco"]
    assert clips.left_out["coco"] == "only for encoders of images"
    assert images.left_out["ucf101-vdim"] == "only for encoders of clips"


def test_mistakes_are_one_line_before_anything_is_made(tmp_path):
    (run := tmp_path / "run").mkdir()
    for data, checkpoint, only, message in (
        (tmp_path / "no", run, "", "no folder .*no: give the folder"),
        (folders(tmp_path / "empty", "x"), run, "", "nothing to do with .*davis: not found: looked for"),
        (folders(tmp_path / "d", "davis/JPEGImages"), tmp_path / "no", "", "no .*no: give a run directory"),
        (folders(tmp_path / "d", "davis/JPEGImages"), run, "davi", "--only='davi' is unknown; did you mean 'davis'"),
    ):
        with pytest.raises((CheckpointError, ConfigError, DataError), match=message) as error:
            found.plan(str(data), str(checkpoint), only=only)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", found.EVALUATIONS)
def test_each_command_exists_as_it_stands(name, tmp_path):
    for demo in (False, True):
        module, *words = found.command(name, checkpoint="RUN", data=tmp_path, out=tmp_path / "{data}", demo=demo)
        options = dict(word.removeprefix("--").split("=", 1) for word in words)
        keys = {key.removeprefix("config."): options.pop(key) for key in [*options] if key.startswith("config.")}
        assert set(options) <= options_of(file_of(module)), module
        assert str(tmp_path / "{data}") in options.get("out", options.get("workdir", "")), "a folder of its own"
        if "config" in options:
            file, _, argument = options["config"].partition(":")
            config = configured(f"configs/{file}.py:{argument}", keys)
            if name in ("coco", "lvis"):
                files = [
                    config.data[f"{part}_{key}"] for part in ("train", "test") for key in ("annotations", "images")
                ]
                official = configured(f"configs/{file}.py:{name}", {}).data
                assert files == [
                    official[f"{part}_{key}"] for part in ("train", "test") for key in ("annotations", "images")
                ]


def test_every_published_row_is_of_an_evaluation_and_has_a_source():
    assert set(PUBLISHED) <= set(found.EVALUATIONS)
    assert all(
        row.source and all(0 < value < 100 for value in row.scores.values()) for r in PUBLISHED.values() for row in r
    )


# ---- The page -------------------------------------------------------------------------------------------------------
def test_the_page_has_scores_beside_the_papers_and_says_what_failed_and_what_was_left_out(tmp_path):
    rows = [
        {"name": "davis", "state": "done", "data": "D", "scores": {"J&F": 0.5, "J": 0.25}, "note": "", "seconds": 90},
        {"name": "voc", "state": "failed", "why": "no masks", "log": "voc/log.txt"},
        {"name": "coco", "state": "to do", "why": "not yet made"},
        {"name": "lvis", "state": "left out", "why": "not found"},
    ]
    text = page.write(tmp_path, {"checkpoint": "RUN", "data": "ROOT", "demo": True}, rows)
    assert (tmp_path / "all.md").read_text() == text
    assert "1 of 3 evaluations are done" in text and "no scores of the benchmarks" in text
    assert (
        "|  | J&F | J | F |\n| --- | --- | --- | --- |\n| **here** | 50.0 | 25.0 |  |\n| VITO [1] |  | 65.5 |  |"
        in text
    )
    assert "| VFS, ResNet-50 [3] | 69.5 | 67.0 | 72.0 |" in text and "3. its own code's table" in text
    assert "D, 1.5 minutes." in text
    for part in (
        "Failed\n\n- voc: no masks (voc/log.txt)",
        "Still to do\n\n- coco: not",
        "Left out\n\n- lvis: not found",
    ):
        assert f"## {part}" in text
    assert [page.in_a_line(row) for row in rows[:2]] == ["J&F 50.0 %, J 25.0 %", "failed: no masks"]
    report = json.loads((tmp_path / "all.json").read_text())
    assert report["evaluations"][0]["published"][0]["scores"] == {"J": 65.5}


def test_what_an_earlier_start_has_done_stays_on_the_page(tmp_path):
    done = {"name": "davis", "state": "done", "data": "D", "scores": {}, "note": "", "seconds": 1}
    folders(tmp_path, "davis/done.json")
    (tmp_path / "davis" / "done.json").write_text(json.dumps(done))
    plan = found.Plan({"voc": tmp_path}, {"davis": "not among --only", "coco": "not found"})
    rows = before(tmp_path, plan)
    assert rows["davis"] == done and [rows[name]["state"] for name in ("voc", "coco")] == ["to do", "left out"]


# ---- Whole runs -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_one_that_fails_keeps_no_other_from_its_score_and_a_finished_one_is_not_made_again(
    run, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("XLA_FLAGS", one_device()["XLA_FLAGS"])  # of the processes of the evaluations
    out, data = tmp_path / "out", run.parent / "data"

    def start(*more: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([f"--checkpoint={run}", f"--data={data}", f"--out={out}", *more])
        return str(end.value.code)

    def report() -> dict[str, dict]:
        return {row["name"]: row for row in json.loads((out / "all.json").read_text())["evaluations"]}

    words = (f"--checkpoint={run}", f"--data={data}", f"--out={out}", "--only=classes-linear,vid_robust")
    stopped = start_module("evaluation.all", *words, stderr=subprocess.PIPE)
    log = out / "classes-linear" / "log.txt"
    wait_until(lambda: log.is_file() and log.stat().st_size > 0, stopped)
    stopped.send_signal(signal.SIGTERM)
    _, text = stopped.communicate(timeout=60)
    assert stopped.returncode == 143 and text.endswith("stopped by SIGTERM; run the same command again, it goes on\n")
    assert {row["state"] for row in report().values()} == {"to do", "left out"}

    assert (
        start("--only=classes-linear,vid_robust") == f"error: 1 of 2 evaluations failed: vid_robust; see {out}/all.md"
    )
    shown = capfd.readouterr()
    for line in (f"found: classes-linear in {data}/Classes", f"vid_robust: failed: no {data}/vid_robust/rev_class"):
        assert line in shown.err
    linear = json.loads((out / "classes-linear" / "result.json").read_text())
    first = report()
    assert first["classes-linear"]["scores"] == {"top-1": linear["linear_top1"]}
    assert first["vid_robust"]["state"] == "failed" and "copy the files" in first["vid_robust"]["why"]
    assert shown.out == (out / "all.md").read_text() + "\n"
    assert f"| **here** | {100 * linear['linear_top1']:.1f} |" in shown.out

    made = (out / "classes-linear" / "log.txt").read_bytes()
    main([f"--checkpoint={run}", f"--data={data}", f"--out={out}", "--only=classes-linear"])
    assert (out / "classes-linear" / "log.txt").read_bytes() == made and report()["classes-linear"] == first[
        "classes-linear"
    ]
    assert report()["vid_robust"]["why"] == "not among --only"
    assert "was begun with other values (demo: False there, True here); use another --out" in start("--demo")


def wait_until(there, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


CHILD = """
import pathlib, signal, sys, time
def leave(number, _):
    time.sleep(0.5)  # saving
    pathlib.Path(sys.argv[1]).write_text(f"saved after {number}")
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[1]).write_text("at work")
time.sleep(60)
"""
PARENT = "import sys; from evaluation.all.__main__ import ended_with; ended_with(sys.argv[1:], sys.stdout)"


def test_a_signal_reaches_the_evaluation_which_saves_before_the_command_ends(tmp_path):
    file = tmp_path / "state"
    command = [sys.executable, "-c", PARENT, sys.executable, "-c", CHILD, str(file)]
    process = subprocess.Popen(command, cwd=ROOT, env=one_device(), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: file.exists() and file.read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 143 and text == "stopped by SIGTERM; run the same command again, it goes on\n", text
    assert file.read_text() == "saved after 15"


def test_an_evaluation_killed_from_outside_says_so(tmp_path):
    log = tmp_path / "log"
    log.write_text("old\nerror: of an earlier start\nstep 1\nerror: no data\n(a warning of a library)\n")
    assert reason(log, 4 + len("error: of an earlier start\n"), 1) == "no data"
    assert reason(log, 0, -signal.SIGKILL) == "killed by SIGKILL"
    assert reason(log, log.stat().st_size, 3) == "exit code 3"
