"""The classifier that supervised training or co-training learns: read back, exported and scored."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import vito, vivi
from evaluation import encoders, probe, vid_robust
from helpers.runs import write_run
from vivi_jax import checkpoint, export
from vivi_jax.export import __main__ as export_main
from vivi_jax.methods.base import encoder_variables
from vivi_jax.models import build_encoder

CLASSES = 1000  # as ImageNet-Vid-Robust needs
ENCODERS = {
    "v2": dict(width=0.0625),
    "v1": dict(width=0.0625, version=1),
    "vit": dict(name="vit", patch=8, width=24, depth=2, heads=3, image_size=48),
}
FORMATS = {"v2": "timm", "v1": "torchvision"}


def blocks(seed: int, count: int) -> np.ndarray:
    """uint8[count, 48, 48, 3]: nine plain blocks each, so that features differ much."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 3, 3), np.uint8).repeat(16, 1).repeat(16, 2)


@pytest.fixture(scope="module", params=ENCODERS)
def run(request, tmp_path_factory):
    """(name, run directory of supervised training)."""
    config = vivi.get_config("sup,co=100,demo")
    config.method.num_classes = CLASSES
    kwargs = ENCODERS[request.param]
    if kwargs.get("name") == "vit":
        with config.unlocked():
            config.encoder = type(config)(kwargs)
    else:
        config.encoder.update(kwargs)
    return request.param, write_run(tmp_path_factory.mktemp("runs") / request.param, config)


def test_logits_are_the_learnt_map_of_the_features(run):
    """Against the state itself: features of the bare encoder, times the kernel, plus the bias, in float64."""
    _, directory = run
    images = blocks(0, 3)
    state = checkpoint.load_state(directory)
    bare = build_encoder(**checkpoint.load_config(directory)["encoder"])
    features, _ = encoders.apply_to_pixels(bare, encoder_variables(state["params"], state["model_state"]), images)
    head = jax.tree.map(np.float64, state["params"]["classifier"])
    encoder, variables, _ = encoders.load_encoder(str(directory))
    pooled, maps = encoders.apply_to_pixels(encoder, variables, images)
    assert encoder.num_classes == CLASSES
    np.testing.assert_array_equal(pooled, features)
    expected = np.float64(features) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(maps["logits"], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_export_has_it_and_every_reader_of_classifiers_takes_both(run, tmp_path):
    name, directory = run
    images = blocks(1, 20)
    model = encoders.load_frame_classifier(str(directory), batch_size=20)
    top1 = model.top1(images)
    assert model.num_classes == CLASSES and len(np.unique(top1)) > 1  # they differ, or nothing below could fail
    for k, image in enumerate(images):
        path = tmp_path / f"val/{k:04d}/000100.JPEG"
        path.parent.mkdir(parents=True)
        Image.fromarray(image).save(path, format="PNG")
    names = [f"val/{k:04d}/000100.JPEG" for k in range(20)]
    # Class 0 of the 30 has the class predicted for the first frame; the others have one that is predicted for none.
    rest = np.setdiff1d(np.arange(CLASSES), top1)[:29]
    for file, content in (
        ("pmsets", {name: [] for name in names}),
        ("labels", {name: [0] for name in names}),
        ("rev_class_idx_map", {str(k): [int(c)] for k, c in enumerate([top1[0], *rest])}),
    ):
        (tmp_path / f"{file}.json").write_text(json.dumps(content))

    sources, scores = [directory], []
    if name in FORMATS:
        file = tmp_path / "encoder.safetensors"
        export_main.main([f"--checkpoint={directory}", f"--format={FORMATS[name]}", f"--out={file}"])
        config, variables = export.load_encoder(file)
        head = checkpoint.load_state(directory)["params"]["classifier"]
        assert config["num_classes"] == CLASSES
        np.testing.assert_array_equal(variables["params"]["classifier"]["kernel"], head["kernel"])
        np.testing.assert_array_equal(variables["params"]["classifier"]["bias"], head["bias"])
        sources.append(file)
    for source in sources:
        out = tmp_path / "scores.json"
        vid_robust.main([f"--data={tmp_path}", f"--checkpoint={source}", "--image_size=48", f"--out={out}"])
        scores.append(json.loads(out.read_text())["pm"])
        assert 0 < scores[-1][0]["right"] <= 20
    assert all(score == scores[0] for score in scores)


def test_top1_and_top5_of_the_classifier(tmp_path, capsys):
    """Class folders of which the classifier's ranks are known; an encoder without it, or of others, is refused."""
    config = vivi.get_config("sup,co=100,demo")
    config.encoder.width = 0.0625
    config.method.num_classes = 7
    run = write_run(tmp_path / "run", config)
    images = blocks(2, 14)
    encoder, variables, _ = encoders.load_encoder(str(run))
    logits = np.asarray(encoders.apply_to_pixels(encoder, variables, images)[1]["logits"])
    ranks = np.arange(14) % 7  # of image i's class among its logits
    labels = np.argsort(-logits, axis=1)[np.arange(14), ranks]
    for k in range(7):
        for split in ("train", "test"):
            (tmp_path / "data" / split / f"class{k}").mkdir(parents=True)
        Image.fromarray(images[0]).save(tmp_path / "data/train" / f"class{k}" / "0.png")
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(tmp_path / "data/test" / f"class{label}" / f"{i}.png")
    empty = set(range(7)) - set(labels.tolist())
    for k in empty:  # a class must have an image; those without one get a copy, and count as wrong or right
        Image.fromarray(images[0]).save(tmp_path / "data/test" / f"class{k}" / "copy.png")
    of_copies = [int(np.flatnonzero(np.argsort(-logits[0]) == k)[0]) for k in empty]
    all_ranks = np.array([*ranks, *of_copies])
    probe.main([f"--checkpoint={run}", f"--data={tmp_path}/data", "--mode=classifier", "--image_size=48"])
    found = json.loads(capsys.readouterr().out)
    assert found["classifier_top1"] == pytest.approx((all_ranks < 1).mean())
    assert found["classifier_top5"] == pytest.approx((all_ranks < 5).mean())
    assert found["test_images"] == len(all_ranks) and "train_images" not in found

    without = vito.get_config("demo")
    without.encoder.width = 0.0625
    other = write_run(tmp_path / "other", without)
    with pytest.raises(SystemExit, match="error: the encoder has no classifier, the images have 7 classes: --mode=cl"):
        probe.main([f"--checkpoint={other}", f"--data={tmp_path}/data", "--mode=classifier"])
