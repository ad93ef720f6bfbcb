"""docs/first_look.ipynb: its cells run as they stand, on a small export and the run that it is of."""

import json
import pathlib

import matplotlib
import numpy as np
import pytest
from PIL import Image

from helpers.commands import ROOT
from helpers.runs import make_run
from vivi_jax.export import __main__ as export

NOTEBOOK = json.loads((ROOT / "docs" / "first_look.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_no_outputs_are_stored():
    assert len(CODE) >= 4 and not [cell for cell in CODE if cell["outputs"] or cell["execution_count"]]


def twins(folder: pathlib.Path, per_class: int) -> None:
    """Each picture of `per_class` of two classes lies there twice."""
    rng = np.random.default_rng(0)
    for name in ("rough", "smooth"):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            side = 48 if name == "rough" else 2 + i % 2
            picture = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize((48, 48))
            for twin in "ab":
                picture.save(folder / name / f"{i}{twin}.png")


@pytest.mark.slow
def test_every_image_is_nearest_to_its_twin_and_the_attention_is_drawn(tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    run, weights = make_run(tmp_path / "run", "demo"), tmp_path / "encoder.safetensors"
    export.main([f"--checkpoint={run}", "--format=torchvision", f"--out={weights}"])
    twins(tmp_path / "images", 4)
    names = {"CHECKPOINT": str(weights), "IMAGES": str(tmp_path / "images"), "RUN": str(run)}
    space: dict = {}
    plt.close("all")
    for cell in CODE:
        exec("".join(cell["source"]), space)  # noqa: S102 (our own cells)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(names) <= set(space)
            space |= names
    assert [figure for figure in plt.get_fignums()] == [1, 2]
    plt.close("all")
    assert len(space["pixels"]) == 16 and space["features"].shape[0] == 16
    assert (space["nearest"][:, 0] == np.arange(16) ^ 1).all()  # a and b of one picture lie side by side
    assert set(space["masks"]) and all(mask.shape[0] == 5 for mask in space["masks"].values())
    assert "the nearest image is of the same class for 100%" in capsys.readouterr().out
