"""FCOS* and RetinaNet as methods, and the protocol: losses, full sizes, learning by heart, kills, one-line mistakes."""

import json
import pathlib
import signal
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import detection as detection_config
from evaluation.protocols.detection import data as detection_data
from evaluation.protocols.detection import evaluate as detection
from evaluation.protocols.detection import report as detection_report
from evaluation.protocols.detection import scores as detection_scores
from evaluation.protocols.detection import targets as detection_targets
from evaluation.protocols.detection.method import Detector
from evaluation.transfer import make_experiment, means, with_pretrained
from helpers.commands import assert_one_line_error, run_module, start_module
from helpers.runs import make_run
from vivi_jax import optim
from vivi_jax.config import without_name
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError, DataError
from vivi_jax.loop import compile_step
from vivi_jax.models import build_encoder
from vivi_jax.planning import hlo
from vivi_jax.train_step import create

VARIANTS = ("coco", "lvis", "retinanet")
PLAIN = ("331352", "403385", "41888", "153299", "143931", "6818")  # images of a few objects, none tiny


def make_detector(variant: str, classes=3, **changes) -> Detector:
    """The demo's detector on 64 x 96 px."""
    config = detection_config.get_config(f"{variant},demo")
    config.data.image_size, config.data.max_boxes = (64, 96), 4
    for key, value in changes.items():
        config.method[key] = value
    encoder, _ = detection.load_pretrained("none", config)
    return detection.make_method(config, encoder, classes)


@pytest.fixture(scope="module")
def detectors() -> dict[str, Detector]:
    return {variant: make_detector(variant) for variant in ("coco", "retinanet")}


def make_batch() -> dict[str, np.ndarray]:
    """Eight images: with objects, without, with a crowd alone, and with padding among its boxes."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 40, (8, 4, 2))
    boxes = np.concatenate([low, low + rng.uniform(10, 24, (8, 4, 2))], axis=2).astype(np.float32)
    classes = rng.integers(0, 3, (8, 4)).astype(np.int32)
    classes[1] = detection_targets.NO_BOX
    classes[2] = [detection_targets.CROWD, -1, -1, -1]
    classes[3, 2:] = detection_targets.NO_BOX
    boxes[classes == detection_targets.NO_BOX] = 0
    return {"image": rng.integers(0, 256, (8, 64, 96, 3), dtype=np.uint8), "boxes": boxes, "classes": classes}


def make_outputs(detector: Detector, seed=0) -> dict[str, np.ndarray]:
    rng, count = np.random.default_rng(seed), len(detector.anchors)
    shapes = {"logits": (8, count, 3), "boxes": (8, count, 4)} | (
        {"iou": (8, count)} if detector.form.predict_iou else {}
    )
    return {name: (0.5 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


# ---- The methods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant, levels", [("coco", 5), ("retinanet", 0)])
def test_only_fcos_learns_a_factor_per_level(detectors, variant, levels):
    params = jax.eval_shape(detectors[variant].init, jax.random.key(0), make_batch()).params
    assert sum("level" in name for name in params["head"]) == levels


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["coco", "retinanet"])
def test_the_loss_is_written_out_and_the_same_on_eight_devices(detectors, variant):
    """Class loss of all but ignored anchors, box loss of positive ones, both per positive anchor of the whole batch."""
    detector, batch = detectors[variant], make_batch()
    outputs = make_outputs(detector)

    def loss(outputs, batch):
        value, _, metrics = detector.loss(outputs, batch, {}, 0)
        return value, metrics

    results = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=sharding.batch_sharding(mesh))
        results.append(jax.tree.map(np.asarray, step(outputs, batch)))
    chex.assert_trees_all_close(*results, rtol=2e-4, atol=1e-6)
    (value, metrics), gradient = results[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))

    anchors = jnp.asarray(detector.anchors)
    matched = np.asarray(
        jax.jit(jax.vmap(lambda boxes, classes: detector.form.assign(anchors, detector.level_sizes, boxes, classes)))(
            batch["boxes"], batch["classes"]
        )
    )
    image, anchor = np.nonzero(matched >= 0)
    row = matched[image, anchor]
    p = 1 / (1 + np.exp(-outputs["logits"].astype(float)))
    target = np.zeros_like(p)
    target[image, anchor, batch["classes"][image, row]] = 1
    focal = -np.where(target == 1, 0.25 * (1 - p) ** 2 * np.log(p), 0.75 * p**2 * np.log(1 - p)).sum(axis=-1)
    counted = focal[matched != detection_targets.IGNORED].sum()
    assert metrics["class_loss"] == pytest.approx(counted / len(row), rel=1e-4)
    true, raw = batch["boxes"][image, row], outputs["boxes"][image, anchor]
    if variant == "coco":
        decode_and = [
            lambda raw, anchors, true, overlap=overlap: overlap(detector.form.decode(raw, anchors), true)
            for overlap in (detection_targets.giou, detection_targets.iou)
        ]
        giou, iou = (np.asarray(jax.jit(function)(raw, detector.anchors[anchor], true)) for function in decode_and)
        per_box = 2 * (1 - giou)
        q = 1 / (1 + np.exp(-outputs["iou"][image, anchor].astype(float)))
        assert metrics["iou_loss"] == pytest.approx(-(iou * np.log(q) + (1 - iou) * np.log(1 - q)).mean(), rel=1e-4)
    else:
        encode = jax.jit(detection_targets.encode_deltas)
        error = np.abs(raw - np.asarray(encode(true, detector.anchors[anchor])))
        per_box = np.where(error < 0.1, error**2 / 0.2, error - 0.05).sum(axis=-1)
    assert metrics["box_loss"] == pytest.approx(per_box.mean(), rel=1e-4)
    assert value == pytest.approx(sum(metrics[name] for name in metrics if name.endswith("loss")), rel=1e-5)
    assert metrics["positives_per_image"] == len(row) / 8 and set(image) == {0, 3, 4, 5, 6, 7}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["coco", "retinanet"])
def test_a_batch_without_objects_teaches_background_alone(detectors, variant):
    detector, batch = detectors[variant], make_batch()
    batch["classes"][:] = detection_targets.NO_BOX
    batch["boxes"][:] = 0

    def loss(outputs):
        value, _, metrics = detector.loss(outputs, batch, {}, 0)
        return value, metrics

    (_, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(make_outputs(detector))
    assert metrics["box_loss"] == 0 and metrics["positives_per_image"] == 0 and metrics["class_loss"] > 0
    assert (np.asarray(gradient["logits"]) > 0).all() and not np.asarray(gradient["boxes"]).any()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_detection_finds_what_the_outputs_say(detectors):
    """A head that is sure of two anchors: their boxes and classes come out, scored by class and IoU."""
    detector = detectors["coco"]
    outputs = {name: np.full_like(value, -20) for name, value in make_outputs(detector).items()}
    outputs["boxes"][:] = 0
    outputs["logits"][0, 5, 2] = outputs["logits"][0, 40, 1] = 20
    outputs["iou"][0, 5], outputs["iou"][0, 40] = 0.0, 20

    class Fixed:
        def apply(self, variables, images, train):
            return variables

    detector_like = Detector.__new__(Detector)
    detector_like.__dict__ = detector.__dict__ | {"network": Fixed()}
    found = jax.jit(
        lambda outputs, images: detector_like.detect(
            outputs, images, min_score=0.05, per_level=50, max_overlap=0.5, max_detections=5
        )
    )(outputs, np.zeros((8, 64, 96, 3), np.uint8))
    np.testing.assert_allclose(found["scores"][0], [1, np.sqrt(0.5), 0, 0, 0], atol=1e-4)
    assert found["classes"][0, :2].tolist() == [1, 2] and not np.asarray(found["scores"][1:]).any()
    np.testing.assert_allclose(found["boxes"][0, :2], detector.anchors[[40, 5]], atol=1e-3)


@pytest.mark.slow
def test_eight_devices_find_what_one_finds_and_send_only_that(detectors):
    config, detector, batch = detection_config.get_config("coco,demo"), detectors["coco"], make_batch()
    config.test.min_score = 0.0
    params, state, *_ = jax.jit(detector.init)(jax.random.key(0), batch)
    images = {"image": batch["image"], "index": np.arange(8, dtype=np.int32)}
    found = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        compiled = (
            detection.make_detect(config, detector, mesh)
            .lower({"params": params, **state}, jax.device_put(images, sharding.batch_sharding(mesh)))
            .compile()
        )
        found.append(
            jax.tree.map(
                np.asarray, compiled({"params": params, **state}, jax.device_put(images, sharding.batch_sharding(mesh)))
            )
        )
    assert found[0]["index"].tolist() == list(range(8)) and (found[0]["scores"] > 0).any()
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-3)
    sent = sum(collective.bytes for collective in hlo.read(compiled.as_text()).collectives)
    assert sent <= sum(value.nbytes for value in found[1].values())


def test_impossible_encoders_sizes_and_forms_are_refused():
    config = detection_config.get_config("coco,demo")
    encoder, _ = detection.load_pretrained("none", config)
    config.data.image_size = (100, 160)
    with pytest.raises(ConfigError, match=r"image_size=\(100, 160\): height and width must be multiples of 32"):
        detection.make_method(config, encoder, 3)
    with pytest.raises(ConfigError, match="did you mean 'fcos'"):
        make_detector("coco", form="fcoss")
    vdim = build_encoder(
        "vdim",
        table="small",
        width=1.0,
        frames=8,
        norm="batch",
        input_mean=(0.0,) * 3,
        input_std=(1.0,) * 3,
        dtype="float32",
    )
    config.data.image_size = (64, 64)
    with pytest.raises(ConfigError, match="VdimEncoder has no stage2, stage3, stage4"):
        detection.make_method(config, vdim, 3)


@pytest.mark.slow
def test_a_runs_encoder_goes_under_the_detector(tmp_path):
    """All its weights and statistics; the rest starts afresh."""
    config = detection_config.get_config("coco,demo")
    encoder, pretrained = detection.load_pretrained(str(make_run(tmp_path, "demo")), config)
    assert (encoder.width, encoder.dtype, encoder.num_classes) == (0.0625, "float32", None)
    detector = detection.make_method(config, encoder, 3)
    params, state, *_ = jax.eval_shape(lambda: detector.init(jax.random.key(0), detector.batch_spec(1, None)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (params, state))
    params, state = with_pretrained(*zeros, pretrained)
    for tree, loaded in ((params, pretrained["params"]), (state["batch_stats"], pretrained["batch_stats"])):
        chex.assert_trees_all_equal(tree["encoder"], loaded["encoder"])
    assert set(params) == {"encoder", "pyramid", "head"} and not any(x.any() for x in jax.tree.leaves(params["head"]))


# ---- The papers' sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant, images, steps, lr_at",
    [
        ("coco", 118_287, 27_724, {0: 1e-3 / 232, 231: 1e-3, 18_481: 1e-3, 18_484: 1e-4, 24_645: 1e-5}),
        ("lvis", 100_170, 23_477, {0: 1e-3 / 197, 196: 1e-3, 15_655: 1e-4}),
        ("retinanet", 118_287, 90_000, {1000: 0.01, 59_999: 0.01, 60_001: 1e-3, 80_001: 1e-4}),
    ],
)
def test_schedules_of_the_sheet(variant, images, steps, lr_at):
    config = detection_config.get_config(variant)
    rate, total = optim.piecewise(config.batch_size, examples_per_epoch=images, **without_name(config.schedule))
    assert total == steps
    for step, lr in lr_at.items():
        assert float(rate(step)) == pytest.approx(lr, rel=1e-3), step


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, classes, anchors", [("coco", 80, 17_064), ("lvis", 1203, 17_064), ("retinanet", 80, 153_576)]
)
def test_the_papers_step_has_its_shapes(variant, classes, anchors):
    """Training (of LVIS, which has COCO's network, the state alone) and testing at full size and batch, abstractly."""
    config = detection_config.get_config(variant)
    encoder, _ = detection.load_pretrained("none", config)
    detector = detection.make_method(config, encoder, classes)
    assert detector.anchors.shape == (anchors, 4) and sum(detector.level_sizes) == anchors
    experiment = make_experiment(config, detector, 118_287, seed=0)
    assert experiment.batch_spec["image"].shape == ({"retinanet": 16}.get(variant, 128), 800, 1024, 3)
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    if variant != "lvis":
        new_state, metrics = jax.eval_shape(experiment.train_step, state, experiment.batch_spec)
        before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, new_state))
        assert before == after
        assert metrics["loss"].dtype == jnp.float32
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in state.params.items()}
    assert sizes["encoder"] == 25_557_032 - 2_049_000
    batch = {
        "image": jax.ShapeDtypeStruct((64, 800, 1024, 3), np.uint8),
        "index": jax.ShapeDtypeStruct((64,), np.int32),
    }
    variables = {"params": state.params, **state.model_state}
    found = jax.eval_shape(detection.make_detect(config, detector, sharding.make_mesh()), variables, batch)
    assert found["boxes"].shape == (64, 300 if variant == "lvis" else 100, 4)


@pytest.mark.slow
def test_a_step_at_full_image_size_compiles_for_eight_devices():
    """ResNet-18 in place of 50, which takes minutes to compile on one core; all else is the paper's."""
    config = detection_config.get_config("coco")
    config.encoder.depth = 18
    encoder, _ = detection.load_pretrained("none", config)
    experiment = make_experiment(config, detection.make_method(config, encoder, 80), 118_287, seed=0)
    state = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    compiled = compile_step(experiment, state, sharding.make_mesh())
    # Sums over devices, of gradients and statistics; no device is sent another's images or what is predicted for them.
    assert {found.operation for found in hlo.read(compiled.as_text()).collectives} == {"all-reduce"}
    memory = compiled.memory_analysis()
    images = 128 // 8 * 800 * 1024 * 3
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves((state.params, state.model_state, state.opt_state)))
    assert images + parameters <= memory.argument_size_in_bytes < 1.01 * (images + parameters)


# ---- The program ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_coco(sample_data, tmp_path_factory) -> pathlib.Path:
    """The sample's images with few and large objects, and the one without any."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    (root / "images").symlink_to(sample_data / "coco" / "images")
    contents = json.loads((sample_data / "coco" / "annotations" / "instances_mini.json").read_text())
    labelled = {row["image_id"] for row in contents["annotations"]}
    chosen = {*map(int, PLAIN), *(row["id"] for row in contents["images"] if row["id"] not in labelled)}
    contents["images"] = [row for row in contents["images"] if row["id"] in chosen]
    contents["annotations"] = [row for row in contents["annotations"] if row["image_id"] in chosen]
    used = {row["category_id"] for row in contents["annotations"]}
    contents["categories"] = [row for row in contents["categories"] if row["id"] in used]
    (root / "annotations" / "instances_mini.json").write_text(json.dumps(contents))
    return root


def command(variant: str, data: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    return [
        "evaluation.detection",
        f"--config=configs/detection.py:{variant},demo",
        "--checkpoint=none",
        f"--data={data}",
        f"--workdir={workdir}",
        *more,
    ]


BY_HEART = (
    "--config.batch_size=7",
    "--config.test.batch_size=7",
    "--config.data.flip_prob=0.0",
    "--config.data.image_size=(64,96)",
    "--config.method.layers=1",
    "--config.schedule.warmup_steps=5",
    "--config.schedule.total_steps=100",
    "--config.schedule.boundaries=(70,90)",
    "--config.run.log_every=5",
)


def check_run(directory: pathlib.Path, data: pathlib.Path) -> None:
    """AP50 above 0.9, in all the files that say so; and the boxes' file gives any tool the same scores."""
    result = json.loads((directory / "result.json").read_text())
    repeat = result["repeats"]["repeat_0"]
    assert result["AP50"] > 0.9 and result["AP_std"] is None and repeat["test_images"] == 7
    rows = json.loads((directory / "repeat_0" / "detections.json").read_text())
    truth = detection_data.read_annotations(data / "annotations" / "instances_mini.json")
    again = detection_scores.coco_ap(truth, rows)
    assert {name: again[name] for name in again} == {name: repeat[name] for name in again}
    assert f"| mean | {100 * result['AP']:.1f} | {100 * result['AP50']:.1f} |" in (directory / "result.md").read_text()
    assert len(list((directory / "repeat_0" / "pictures").glob("*.png"))) == 7


@pytest.mark.slow
def test_fcos_learns_by_heart_also_when_killed(plain_coco, tmp_path):
    arguments = command(
        "coco", plain_coco, tmp_path / "w", *BY_HEART, "--config.schedule.lr=3e-3", "--config.run.checkpoint_every=20"
    )
    saved = tmp_path / "w" / "repeat_0" / "checkpoints" / "20" / "MANIFEST.json"
    with open(tmp_path / "log", "w") as log:  # a file: a full pipe would stop the run
        process = start_module(*arguments, stderr=log)
        while not saved.exists():  # checkpoints are written beside the steps
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run_module(*arguments, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on from step" in done.stderr
    check_run(tmp_path / "w", plain_coco)


@pytest.mark.slow
def test_retinanet_learns_by_heart(plain_coco, tmp_path):
    arguments = command(
        "retinanet",
        plain_coco,
        tmp_path / "w",
        *BY_HEART,
        "--config.schedule.lr=2e-2",
        "--config.method.options.cells_per_side=2.0",
    )  # anchors from 16 px, as the image is small
    done = run_module(*arguments, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    check_run(tmp_path / "w", plain_coco)


@pytest.mark.slow
def test_a_missing_image_is_one_line_before_anything_is_written(plain_coco, tmp_path):
    (tmp_path / "annotations").symlink_to(plain_coco / "annotations")
    (tmp_path / "images").mkdir()
    for name in PLAIN:
        (tmp_path / "images" / f"{int(name):012}.jpg").symlink_to(plain_coco / "images" / f"{int(name):012}.jpg")
    assert_one_line_error(run_module(*command("coco", tmp_path, tmp_path / "w")), "1 of the 7 images of")
    assert not (tmp_path / "w").exists()


def test_what_is_wrong_with_the_config_is_said_before_the_training(plain_coco, tmp_path):
    def evaluate(**changes):
        config = detection_config.get_config("coco,demo")
        config.data.image_size, config.batch_size = (64, 96), 8
        for place, value in changes.items():
            section, _, key = place.rpartition("__")
            (config[section] if section else config)[key] = value
        detection.evaluate(config, source="none", data=str(plain_coco), workdir=str(tmp_path / "w"))

    for changes, error, message in (
        (dict(metric="lvis"), DataError, "no LVIS annotation file"),
        (dict(metric="mAP"), ConfigError, "config.metric='mAP' is unknown; did you mean"),
        (dict(test__batch_size=9), ConfigError, "config.test.batch_size=9 does not divide over 8 devices"),
        (
            dict(schedule__epochs=2.0),
            ConfigError,
            "exactly one of .*, and has total_steps=100 and epochs=2.0",
        ),
        (dict(data__flips=0.5), ConfigError, "config.data: .*flips"),
        (dict(data__scale=(1.25, 0.8)), DataError, r"scale=\(1.25, 0.8\).*sizes need 0 < low <= high"),
        (dict(data__test_images="nowhere"), DataError, "7 of the 7 images of"),
    ):
        with pytest.raises(error, match=message):
            evaluate(**changes)
    assert not (tmp_path / "w").exists()


def test_means_and_tables():
    counts = {"metric": "coco", "train_images": 3, "test_images": 2, "detections": 9}
    repeats = {
        "repeat_0": {"AP": 0.25, "AP50": 0.5, "APs": -1.0, **counts},
        "repeat_1": {"AP": 0.35, "AP50": 0.6, "APs": -1.0, **counts},
    }
    found = means(repeats) | detection_report.spread(repeats)
    assert found == pytest.approx({"AP": 0.3, "AP50": 0.55, "APs": -1.0, "AP_std": np.sqrt(0.005)})
    text = detection_report.markdown({"config": "coco", "checkpoint": "RUN", "data": "D", "repeats": repeats, **found})
    assert "| repeat_1 | 35.0 | 60.0 | - |" in text and "| mean | 30.0 | 55.0 | - |" in text and "7.07." in text
    assert detection_report.spread({"repeat_0": repeats["repeat_0"]})["AP_std"] is None
