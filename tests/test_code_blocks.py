"""The Python of README and of the pages runs as it stands; that of extending.md and of the notebook elsewhere."""

import itertools
import re

import numpy as np
import pytest
from PIL import Image

from helpers.documented import PAGES
from helpers.networks import random_variables
from helpers.runs import make_store
from helpers.torchvision_models import import_or_skip
from vivi_jax import export
from vivi_jax.models.resnet import ResNet

ELSEWHERE = {
    "extending.md": "tests/test_extending.py",
    "data_at_scale.md": "fetches torchvision's weights",
}


SMALL = {
    "encoder.depth": 18,
    "encoder.width": 0.0625,
    "method.attention_hidden": 8,
    "method.projector_hidden": 16,
    "data.image_size": 32,
    "data.views": 2,
    "data.clip_seconds": 0.8,
}


def blocks() -> dict[str, list[str]]:
    found = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}
    return {name: code for name, code in found.items() if code}


def test_every_page_with_python_is_run_somewhere():
    assert set(blocks()) == {"README.md", "own_videos.md", *ELSEWHERE}


def class_folders(root):
    """Images of two classes, dark and light: 12 to learn from, 2 held out."""
    rng = np.random.default_rng(0)
    for (split, count), (name, level) in itertools.product(
        (("train", 12), ("test", 2)), (("dark", 40), ("light", 200))
    ):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(level - 20, level + 20, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i}.png")


@pytest.mark.slow
def test_the_python_of_readme_and_of_own_videos_runs(tmp_path, monkeypatch):
    """README trains a small network; the pages' model takes a ResNet-50's file."""
    torchvision = import_or_skip("torchvision")
    make_store(tmp_path, videos=12)  # the tests have eight devices, which share a batch
    (tmp_path / "store" / "train").rename(tmp_path / "STORE")
    class_folders(tmp_path / "IMAGES")
    encoder = ResNet(depth=50)
    variables = random_variables(encoder)
    export.export_torchvision(encoder, variables, tmp_path / "encoder.safetensors")
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), np.uint8)
    for name in ("README.md", "own_videos.md"):
        names: dict = {"images": images}
        for number, code in enumerate(blocks()[name]):
            code = code.replace('"schedule.epochs": 100.0', f'"schedule.epochs": 1.0, **{SMALL}')
            exec(compile(code, f"{name}, block {number}", "exec"), names)  # noqa: S102 (our own pages)
        assert names["features"].shape[0] == 2 and names["features"].dtype == np.float32
        if name == "README.md":
            assert names["run"]["step"] >= 1 and names["run"]["metrics"]["loss"] > 0
            assert names["scores"]["knn_top1"] == 1.0  # one class is dark, one is light
        assert isinstance(names["model"], torchvision.models.ResNet)
        kernel = np.asarray(variables["params"]["stem_conv"]["kernel"])
        assert name != "README.md" or {"features", "stage4"} <= set(names["maps"])
        np.testing.assert_array_equal(names["model"].conv1.weight.detach().numpy(), kernel.transpose(3, 2, 0, 1))
