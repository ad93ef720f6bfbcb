"""Curation keeps exactly the videos that satisfy the rule, wherever and however often it is run, and says why not."""

import json
import pathlib
import shutil
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from helpers.commands import run_module, start_module
from helpers.folders import contents
from helpers.video_files import write_video
from input_pipeline.curation import steps
from input_pipeline.curation.local import curate
from input_pipeline.curation.steps import Rule
from input_pipeline.preparation import inputs
from input_pipeline.preparation.sandbox import Sandbox
from vivi_jax.errors import DataError

COLOURS = {"ruby": (200, 40, 40), "jade": (40, 190, 60), "sapphire": (40, 60, 210)}
RULE = Rule(short_side=36, image_size=32)
FPS = 10
CLASSES = "class,names\nruby,ruby; red stone\njade,\nsapphire,sapphire;blue stone;stone\n"
MANIFEST = """video,title,note
ruby.mp4,"A Ruby, up close",kept: it is one
ruby.mp4,RED STONE found,the same video again
jade.mp4,nothing of the kind,
jade.mp4,my rubys and rubyfish,whole words only
jade.mp4,ruby,another thing
short.mp4,jade,9.9 s
late.mp4,a jade at last,only from frame 100 on
ends.mp4,a jade at last,frame 99 is the last that is looked at
both.mp4,jade or sapphire,more frames of the second
ends.mp4,a ruby,most frames are of another class
broken.mp4,jade,
missing.mp4,jade,
"""
# What must come of each line, by hand: status and class, or the first word of the reason.
EXPECTED = [
    "ruby",
    "again",
    "title",
    "title",
    "classifier",
    "short",
    "classifier",
    "jade",
    "sapphire",
    "classifier",
    "video",
    "video",
]


def film(*parts):
    """Noisy pictures of a colour each: (name, frames), one after the other."""
    rng = np.random.default_rng(0)
    return np.concatenate(
        [np.clip(rng.normal(COLOURS[name], 12, (count, 40, 48, 3)), 0, 255).astype(np.uint8) for name, count in parts]
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Videos, manifest.csv and classes.csv."""
    folder = tmp_path_factory.mktemp("library")
    for name, parts in {
        "ruby": [("ruby", 100)],
        "jade": [("jade", 120)],
        "short": [("jade", 99)],
        "late": [("ruby", 100), ("jade", 10)],
        "ends": [("sapphire", 0), ("ruby", 0), ("jade", 100)],
        "both": [("jade", 40), ("sapphire", 60)],
    }.items():
        if name == "ends":  # one frame of the class, the hundredth
            parts = [("sapphire", 99), ("jade", 5)]
        write_video(folder / f"{name}.mp4", film(*parts), fps=FPS)
    (folder / "broken.mp4").write_bytes((folder / "jade.mp4").read_bytes()[:3000])
    (folder / "manifest.csv").write_text(MANIFEST)
    (folder / "classes.csv").write_text(CLASSES)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A ResNet whose classifier was fitted to the colours: random features, ridge regression."""
    import jax  # here, as all that loads a network: the tests without one are quick

    from helpers.networks import random_variables
    from vivi_jax import export
    from vivi_jax.models.resnet import ResNet

    encoder = ResNet(depth=18, width=0.125, num_classes=3)
    variables = random_variables(encoder)
    images = np.stack([picture for name in COLOURS for picture in film((name, 20))[:, 4:36, 8:40]])
    without = ResNet(depth=18, width=0.125)
    body = {
        "params": {k: v for k, v in variables["params"].items() if k != "classifier"},
        "batch_stats": variables["batch_stats"],
    }
    features = np.asarray(jax.jit(lambda x: without.apply(body, x, train=False)[0])(np.float32(images) / 255))
    mean = features.mean(axis=0)
    targets = np.repeat(np.eye(3), 20, axis=0)
    centred = features - mean
    kernel = np.linalg.solve(centred.T @ centred + 1e-3 * np.eye(len(mean)), centred.T @ (targets - 1 / 3))
    assert ((centred @ kernel).argmax(axis=1) == targets.argmax(axis=1)).all()
    variables["params"]["classifier"] = {"kernel": np.float32(kernel), "bias": np.float32(-mean @ kernel)}
    path = tmp_path_factory.mktemp("classifier") / "resnet.safetensors"
    export.export_torchvision(encoder, variables, path)
    return str(path)


def nearest_colour(frames_NxHxWx3):
    """A classifier without a network: the nearest of the colours."""
    mean = frames_NxHxWx3.mean(axis=(1, 2))
    return np.abs(mean[:, None] - np.array(list(COLOURS.values()))).sum(axis=-1).argmin(axis=1)


def outcomes(decisions):
    return [row["class"] if row["status"] == "kept" else row["reason"].split(":")[0] for row in decisions]


def flags(library, classifier, out):
    return [
        f"--manifest={library / 'manifest.csv'}",
        f"--classes={library / 'classes.csv'}",
        f"--classifier={classifier}",
        f"--out={out}",
        "--short_side=36",
        "--image_size=32",
    ]


def test_exactly_those_that_satisfy_the_rule(library):
    lines = steps.read_manifest(str(library / "manifest.csv"))
    sandbox = Sandbox(**RULE.limits)
    decisions = [
        steps.decide(
            line,
            root=str(library),
            classes=steps.read_classes(str(library / "classes.csv")),
            rule=RULE,
            sandbox=sandbox,
            top1=nearest_colour,
        )
        for line in lines
    ]
    sandbox.close()
    decisions = steps.drop_repeats(decisions)
    assert outcomes(decisions) == EXPECTED
    assert [row["line"] for row in decisions] == list(range(1, 13))
    assert [(row["frames"], row["votes"]) for row in decisions if row["class"]] == [(100, 100), (100, 1), (100, 60)]
    assert decisions[5]["seconds"] == 9.9 and "9.9 s" in decisions[5]["reason"]
    assert decisions[8]["candidates"] == ["jade", "sapphire"]
    assert decisions[9]["reason"] == "classifier: 0 of 100 frames show ruby, 99 sapphire"
    assert decisions[10]["reason"].startswith("video: not a video") and "No such file" in decisions[11]["reason"]


def test_a_class_in_the_manifest_is_the_one_in_question(library):
    classes = steps.read_classes(str(library / "classes.csv"))
    sandbox = Sandbox(**RULE.limits)

    def outcome(title, label):
        line = steps.Line(0, "both.mp4", title, label)
        return outcomes(
            [steps.decide(line, root=str(library), classes=classes, rule=RULE, sandbox=sandbox, top1=nearest_colour)]
        )[0]

    assert outcome("jade or sapphire", "jade") == "jade"  # not sapphire, of which it has more frames
    assert outcome("jade or sapphire", "ruby") == "title" and outcome("jade", "opal") == "class"
    sandbox.close()


def test_names_in_titles(library):
    classes = steps.read_classes(str(library / "classes.csv"))
    for title, named in {
        "Red  stone-wall": [0, 2],
        "red, stone": [0, 2],
        "redstone": [],
        "RUBY/JADE": [0, 1],
        "ｒｕｂｙ": [0],
        "a stone": [2],
        "": [],
    }.items():  # full-width letters are letters
        assert classes.named_in(title) == named, title


@pytest.mark.parametrize(
    "manifest, classes, message",
    [
        ("file,title\na,b\n", CLASSES, "manifest.csv has no column video: its first line must name .* video,title"),
        ("video;title\na;b\n", CLASSES, "no column video, title: .* it is 'video;title'"),
        ("video,title\n", CLASSES, "manifest.csv names no video"),
        ("video,title\n../a.mp4,b\n", CLASSES, "'../a.mp4' is no name of anything in the folder of the videos"),
        ("video,title\n/etc/a.mp4,b\n", CLASSES, "'/etc/a.mp4' is no name of anything in the folder of the videos"),
        ("video,title\n,b\n", CLASSES, "line 2 names no video"),
        (MANIFEST, CLASSES + "jade,\n", "jade is on line 3 and on line 5; a class must stand once"),
        (MANIFEST, "class\njade\n", "classes.csv has no column names"),
        (MANIFEST, "class,names\n", "names no class"),
        (MANIFEST, "class,names\n-,\n", "line 2 has no class"),
    ],
)
def test_bad_lists_are_refused_in_one_line(tmp_path, manifest, classes, message):
    (tmp_path / "manifest.csv").write_text(manifest)
    (tmp_path / "classes.csv").write_text(classes)
    with pytest.raises(DataError, match=message) as error:
        curate(str(tmp_path / "manifest.csv"), str(tmp_path / "classes.csv"), "none", str(tmp_path / "out"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_command_here_and_on_beam(library, classifier, tmp_path, monkeypatch):
    """The same bytes by one worker, by several, by Beam, and after kills; the report adds up; prepare can use it."""
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install -e '.[beam]'")
    monkeypatch.setattr(steps, "ROWS_PER_CHUNK", 5)
    options = {
        "manifest": str(library / "manifest.csv"),
        "classes": str(library / "classes.csv"),
        "classifier": classifier,
        "rule": RULE,
    }
    assert curate(**options, out=str(tmp_path / "local"), workers=1)
    decisions = [json.loads(line) for line in (tmp_path / "local" / steps.DECISIONS).read_text().splitlines()]
    assert outcomes(decisions) == EXPECTED
    assert curate(**options, out=str(tmp_path / "three"), workers=3)
    assert curate(**options, out=str(tmp_path / "beam"), beam_options=["--runner=DirectRunner"])
    assert contents(tmp_path / "local") == contents(tmp_path / "three") == contents(tmp_path / "beam")
    from helpers.fake_bucket import FakeBucket

    fake_bucket = tmp_path / "fake_bucket"
    fake_bucket.mkdir()
    monkeypatch.setattr(FakeBucket, "root", fake_bucket, raising=False)
    for path in (*library.iterdir(), pathlib.Path(classifier)):
        shutil.copy(path, fake_bucket / f"b%in%{path.name}")
    assert curate(
        "shelf://b/in/manifest.csv",
        "shelf://b/in/classes.csv",
        "shelf://b/in/resnet.safetensors",
        "shelf://b/out",
        rule=RULE,
        beam_options=["--runner=DirectRunner"],
    )
    in_bucket = {path.name.removeprefix("b%out%"): path.read_bytes() for path in fake_bucket.glob("b%out%*")}
    missing = b"unreadable: No such file or directory"
    assert in_bucket.keys() == contents(tmp_path / "local").keys()
    assert in_bucket["report.json"] == contents(tmp_path / "local")["report.json"]
    assert in_bucket["decisions.jsonl"].count(b"unreadable: cannot read shelf://b/in/missing.mp4") == 1
    assert contents(tmp_path / "local")["decisions.jsonl"].count(missing) == 1  # the only line that differs
    assert set(contents(tmp_path / "local")) == {
        "decisions.jsonl",
        "kept.csv",
        "report.json",
        "report.md",
        "report.png",
    }
    assert not curate(**options, out=str(tmp_path / "beam"))
    with pytest.raises(DataError, match="was begun with another rule"):
        curate(**options | {"rule": Rule(short_side=36, image_size=32, min_votes=2)}, out=str(tmp_path / "beam"))

    report = json.loads((tmp_path / "local/report.json").read_text())
    assert report["kept"] == 3 and report["lines"] == 12 == report["kept"] + sum(report["reasons"].values())
    assert report["reasons"] == {"classifier": 3, "title": 2, "video": 2, "again": 1, "short": 1}
    assert [(row["class"], row["candidates"], row["kept"]) for row in report["per_class"]] == [
        ("ruby", 3, 1),
        ("jade", 6, 1),
        ("sapphire", 1, 1),
    ]
    assert report["balance"]["effective_classes"] == 3 and report["kept_seconds"] == 30.4
    assert np.asarray(Image.open(tmp_path / "local/report.png")).std() > 10
    assert "| video | 2 | the video does not open or decode |" in (tmp_path / "local/report.md").read_text()
    names = [file.name for file in inputs.find(str(library / "*.mp4"), "")]
    labels, class_names = inputs.read_labels(str(tmp_path / "local/kept.csv"), names)
    assert {name: class_names[label] for name, label in zip(names, labels, strict=True) if label >= 0} == {
        "ruby.mp4": "ruby",
        "ends.mp4": "jade",
        "both.mp4": "sapphire",
    }


@pytest.mark.slow
def test_the_command_line(library, classifier, tmp_path):
    """Killed once; then it goes on. And what is wrong with the classifier is said in one line."""
    from evaluation import encoders
    from vivi_jax import export

    out = tmp_path / "out"
    process = start_module(
        "input_pipeline.curate",
        *flags(library, classifier, out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (out / ".partial/plan.json").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    run = run_module("input_pipeline.curate", *flags(library, classifier, out))
    assert run.returncode == 0, run.stderr
    for line in ("12 lines", "3 kept", "2 dropped: the video does not open or decode"):
        assert line in run.stdout
    assert outcomes(map(json.loads, (out / steps.DECISIONS).read_text().splitlines())) == EXPECTED
    encoder, variables, _ = encoders.load_encoder(classifier)
    bare = tmp_path / "bare.safetensors"
    export.export_torchvision(
        encoder.clone(num_classes=None),
        {
            "params": {k: v for k, v in variables["params"].items() if k != "classifier"},
            "batch_stats": variables["batch_stats"],
        },
        bare,
    )
    with pytest.raises(DataError, match="has no classifier: give an encoder with one"):
        curate(str(library / "manifest.csv"), str(library / "classes.csv"), str(bare), str(tmp_path / "other"))
    (tmp_path / "two.csv").write_text("class,names\nruby,\njade,\n")
    with pytest.raises(DataError, match="has 3 classes, .*two.csv names 2"):
        curate(str(library / "manifest.csv"), str(tmp_path / "two.csv"), classifier, str(tmp_path / "other"))
