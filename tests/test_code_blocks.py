"""The Python of README and of the pages runs as it stands; that of extending.md and of the notebook elsewhere."""

import re

import numpy as np
import pytest

from helpers.documented import PAGES
from helpers.networks import random_variables
from helpers.runs import make_run
from helpers.torchvision_models import import_or_skip
from vivi_jax import export
from vivi_jax.models.resnet import ResNet

ELSEWHERE = {
    "extending.md": "tests/test_extending.py",
    "data_at_scale.md": "fetches torchvision's weights",
}


def blocks() -> dict[str, list[str]]:
    found = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}
    return {name: code for name, code in found.items() if code}


def test_every_page_with_python_is_run_somewhere():
    assert set(blocks()) == {"README.md", "own_videos.md", *ELSEWHERE}


@pytest.mark.slow
def test_the_python_of_readme_and_of_own_videos_runs(tmp_path, monkeypatch):
    """On a run of a small network, and on a ResNet-50's file, which is what the page's model takes."""
    torchvision = import_or_skip("torchvision")
    make_run(tmp_path / "RUN", "demo")
    encoder = ResNet(depth=50)
    variables = random_variables(encoder)
    export.export_torchvision(encoder, variables, tmp_path / "encoder.safetensors")
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), np.uint8)
    for name in ("README.md", "own_videos.md"):
        names: dict = {"images": images}
        for number, code in enumerate(blocks()[name]):
            exec(compile(code, f"{name}, block {number}", "exec"), names)  # noqa: S102 (our own pages)
        assert names["features"].shape[0] == 2 and names["features"].dtype == np.float32
        assert isinstance(names["model"], torchvision.models.ResNet)
        kernel = np.asarray(variables["params"]["stem_conv"]["kernel"])
        assert name != "README.md" or {"features", "stage4"} <= set(names["maps"])
        np.testing.assert_array_equal(names["model"].conv1.weight.detach().numpy(), kernel.transpose(3, 2, 0, 1))
