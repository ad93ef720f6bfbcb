"""docs/extending.md: its code runs as it stands, and its table names every file that knows of the worked example."""

import pathlib
import re

import jax
import numpy as np
import pytest

from vivi_jax.methods import METHODS
from vivi_jax.models import ENCODERS
from vivi_jax.train_step import create

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture(scope="module")
def page():
    """The names that the page's code leaves behind."""
    names = {"__name__": "extending"}
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(compile(block, "docs/extending.md", "exec"), names)  # noqa: S102 - our own page
        yield names
    finally:
        METHODS.pop("centred", None), ENCODERS.pop("patch_mean", None)


def test_the_loss_keeps_state_and_the_average_covers_what_the_target_has(page):
    experiment, batch = page["experiment"], page["batch"]
    before = create(experiment.method, experiment.optimizer, experiment.batch_spec, 0)
    after, _ = page["step"](before, batch)
    assert int(page["state"].step) == 2 and np.any(page["state"].loss_state["centre"] != 0)
    embeddings, _, _ = experiment.method.embed(
        before.params, before.model_state, before.target, batch, {"views": _keys(experiment, batch)}
    )
    np.testing.assert_allclose(after.loss_state["centre"], 0.1 * embeddings["goals"].mean(0), rtol=1e-4, atol=1e-6)
    assert set(after.target["params"]) == {"encoder", "projector"} and "predictor" in after.params


def _keys(experiment, batch):
    from vivi_jax.train_step import example_keys

    return example_keys(0, 0, batch)["views"]


def test_micro_batches_change_nothing(page):
    from vivi_jax.build import build

    config = page["config"].copy_and_resolve_references()
    config.micro_batches = 2
    whole, parts = page["experiment"], build(config)
    state = create(whole.method, whole.optimizer, whole.batch_spec, 0)
    one, two = (jax.jit(experiment.train_step)(state, page["batch"])[0] for experiment in (whole, parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.loss_state, two.loss_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one.params, two.params)


def test_the_table_names_every_file_of_the_worked_example():
    named = set(re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE))
    assert all((ROOT / name).is_file() for name in named) and len(named) == 8 + 2
    word = re.compile(r"moco_?v3|\bvit\b|VisionTransformer|patch_kernel", re.IGNORECASE)
    product = [
        p for room in ("vivi_jax", "evaluation", "input_pipeline", "configs") for p in (ROOT / room).rglob("*.py")
    ]
    knowing = {str(path.relative_to(ROOT)) for path in product if word.search(path.read_text())}
    assert knowing == named
