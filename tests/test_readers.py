"""Every system's run in every reader: each ends with a result or with one line that says why there is none."""

import functools
import pathlib
import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import action as action_config
from configs import detection as detection_config
from configs import moco_v3, vdim, vito, vivi
from configs import segmentation as segmentation_config
from evaluation import attention, davis, encoders, probe, report, transfer
from evaluation.protocols.action import evaluate as action
from evaluation.protocols.detection import evaluate as detection
from evaluation.protocols.segmentation import evaluate as segmentation
from evaluation.protocols.vtab import finetune
from helpers.runs import make_store, write_run
from vivi_jax.build import build
from vivi_jax.distributed import sharding
from vivi_jax.errors import CheckpointError, ConfigError
from vivi_jax.export import __main__ as export
from vivi_jax.planning import chips, planner
from vivi_jax.train_step import create

RUNS = {  # name -> (config file, its argument)
    "vito": (vito, "demo"),
    "vito-average": (vito, "demo,pooling=average"),
    "vito-swin": (vito, "demo,encoder=swin_t"),
    "moclr": (vito, "demo,moclr"),
    "moclr-images": (vito, "demo,moclr,images"),
    **{
        f"vivi-{row}": (vivi, f"{row},demo")
        for row in ("ex4", "ex2", "order", "ex-s", "ex-f", "ex-images", "rot4", "rot-f", "ex4,co=10", "sup,co=100")
    },
    "vdim": (vdim, "demo"),
    "vdim-difference": (vdim, "demo,difference=yes"),
    "moco_v3": (moco_v3, "demo"),
}


FAST = ("vito", "vivi-ex4", "vdim", "moco_v3")  # one of each kind of encoder that compiles soon; all others are slow
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


def tiny(name: str, store: pathlib.Path):
    """The config of a run on `store`, its network made small."""
    file, argument = RUNS[name]
    config = file.get_config(argument)
    if config.encoder.name == "resnet":
        config.encoder.width = 0.0625
        config.data.image_size = 32
    elif config.encoder.name == "swin":
        config.encoder.update(dict(width=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2)))
        config.data.image_size = 32
    elif config.encoder.name == "vit":
        config.encoder.update(dict(width=24, depth=2, heads=3))
    if name not in ("moclr-images", "vivi-sup,co=100"):
        config.data.path = str(store / "train")
    config.evaluation.dataset = str(store)
    return config


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("rendered"))


@pytest.fixture(scope="module")
def run_of(store, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def make(name: str) -> pathlib.Path:
        return write_run(root / name.replace(",", "-"), tiny(name, store))

    return make


@pytest.fixture(scope="module")
def davis_folder(tmp_path_factory):
    """One sequence of three frames, of a square that moves."""
    root = tmp_path_factory.mktemp("davis")
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p" / "square").mkdir(parents=True)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("square\n")
    for t in range(3):
        mask = np.zeros((64, 96), np.uint8)
        mask[20:44, 20 + 4 * t : 44 + 4 * t] = 1
        picture = Image.fromarray(mask, "P")
        picture.putpalette([0, 0, 0, 128, 0, 0])
        picture.save(root / f"Annotations/480p/square/{t:05d}.png")
        cv2.imwrite(str(root / f"JPEGImages/480p/square/{t:05d}.jpg"), 255 * np.repeat(mask[..., None], 3, -1))
    return root


def ends_well(command, arguments: list[str]) -> str:
    """ "" if the command ends with its result, else its line; anything else, such as a traceback, fails the test."""
    try:
        command([str(argument) for argument in arguments])
    except SystemExit as end:
        assert re.fullmatch(r"error: .+", str(end.code)), end.code  # one line
        return str(end.code)
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_report(name, run_of):
    run = run_of(name)
    assert ends_well(report.main, [f"--checkpoint={run}"]) == ""
    page = (run / "report.html").read_text()
    has_attention = name in ("vito", "vito-swin", "moco_v3")
    assert ("Masks of the online network" in page) == has_attention
    assert (page.count("Left out: ") >= 1) or has_attention


@pytest.mark.parametrize("name", NAMES)
def test_attention(name, run_of, store, tmp_path):
    out = tmp_path / "attention.png"
    arguments = [f"--checkpoint={run_of(name)}", f"--images={store}/train", f"--out={out}", "--count=2"]
    line = ends_well(attention.main, arguments)
    if name in ("vito", "vito-swin", "moco_v3"):
        assert line == "" and out.stat().st_size > 1000
    else:
        assert re.search("has no attention to show|configured without attention", line) and not out.exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format_name", ["torchvision", "timm"])
def test_export(name, format_name, run_of, tmp_path):
    out = tmp_path / "encoder.safetensors"
    line = ends_well(export.main, [f"--checkpoint={run_of(name)}", f"--format={format_name}", f"--out={out}"])
    having = {"vdim": (), "moco_v3": ("timm",), "vivi": ("timm",)}.get(
        re.match("vdim|moco_v3|vivi|", name)[0], ("torchvision", "timm")
    )
    if format_name in having:
        assert line == "" and out.is_file() and pathlib.Path(f"{out}.sha256").is_file()
    else:
        assert f"format {format_name} h" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["knn", "linear"])
def test_probe(name, mode, run_of, store, capsys):
    arguments = [f"--checkpoint={run_of(name)}", f"--data={store}", f"--mode={mode}", "--k=2", "--batch_size=8"]
    assert ends_well(probe.main, arguments) == ""
    assert f'"{mode}_top1"' in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_davis(name, run_of, davis_folder, tmp_path):
    arguments = [f"--checkpoint={run_of(name)}", f"--data={davis_folder}", f"--workdir={tmp_path}", "--short_side=64"]
    line = ends_well(davis.main, arguments)
    if name.startswith("vdim"):  # its layers without padding need 48 pixels and more
        assert line == "" or "too small" in line
    else:
        assert line == "" and (tmp_path / "davis.json").is_file()


# ---- What trains: a step's shapes alone, from the run's weights ------------------------------------------------------


def abstract_step(experiment, pretrained) -> str:
    """The run's weights are those that the network wants, and a step keeps the shapes of its state."""
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    transfer.with_pretrained(state.params, state.model_state, pretrained)  # or says what does not fit
    new_state, metrics = jax.eval_shape(experiment.train_step, state, experiment.batch_spec)
    assert "loss" in metrics
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    return ""


def segmentation_step(run) -> str:
    config = segmentation_config.get_config("voc,demo")
    encoder, pretrained = transfer.load_pretrained(str(run), config)
    method = segmentation.make_method(config, encoder, 3)
    return abstract_step(transfer.make_experiment(config, method, 8, seed=0), pretrained)


def detection_step(run) -> str:
    config = detection_config.get_config("coco,demo")
    encoder, pretrained = detection.load_pretrained(str(run), config)
    method = detection.make_method(config, encoder, 3)
    return abstract_step(transfer.make_experiment(config, method, 8, seed=0), pretrained)


def action_step(run, argument) -> str:
    config = action_config.get_config(argument)
    config.batch_size = 8
    encoder, phi_dim, pretrained = action.load_pretrained(str(run), config)
    method = action.make_method(config, encoder, 3, phi_dim)
    return abstract_step(action.make_experiment(config, method, 8, seed=0), pretrained)


def vtab_step(run) -> str:
    loaded = encoders.load_encoder(str(run))
    module, variables = finetune.make_classifier(loaded.encoder, loaded.variables, num_classes=3, image_size=48)
    state = variables["params"], variables["batch_stats"], variables["params"]
    batch = {"image": jnp.zeros((4, 48, 48, 3), jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    *new_state, _ = jax.eval_shape(
        lambda state, batch: finetune.train_step(module, *state, batch, 0.1, momentum=0.9), state, batch
    )
    assert jax.tree.map(jnp.shape, tuple(new_state)) == jax.tree.map(jnp.shape, state)
    return ""


PROTOCOLS = {
    "segmentation": segmentation_step,
    "detection": detection_step,
    "action-clips": functools.partial(action_step, argument="demo"),
    "action-frames": functools.partial(action_step, argument="ucf101_vito"),
    "vtab": vtab_step,
}


ENCODERS = ("vito", "vito-swin", "vivi-ex4", "vivi-ex4,co=10", "vdim", "moco_v3")  # a run of each kind of encoder


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_fine_tuning(name, protocol, run_of):
    try:
        line = PROTOCOLS[protocol](run_of(name))
    except (ConfigError, CheckpointError) as error:
        line = str(error)
        assert line and "\n" not in line
    if protocol == "action-clips":
        assert (line == "") == (name == "vdim"), line
    elif name.startswith(("vito", "vivi")):  # the others have no maps for some protocols, and say so
        assert line == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_plan(name, store):
    """One of each kind, as each is compiled."""
    config = tiny(name, store)
    config.batch_size = 8
    experiment = build(config)
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    mesh = sharding.make_mesh(jax.devices()[:1])
    plan = planner.compile_for(chips.parse_topology("gpu:h100x1"), mesh, experiment, state)
    assert plan["flops"] > 0 and plan["estimate"]["examples_per_second"] > 0
