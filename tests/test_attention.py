"""Attention pictures: from a real run on disk to a PNG in which the attended place is where the colour is."""

import io
import json

import cv2
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from evaluation import attention
from helpers.runs import make_run, make_store
from input_pipeline.store import FrameStore
from vivi_jax import checkpoint
from vivi_jax.build import build
from vivi_jax.errors import ConfigError, DataError
from vivi_jax.methods.base import encoder_variables


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), "demo")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("rendered"))


def test_masks_are_those_of_the_online_network(run):
    """Against the definition, from the weights on disk: softmax over space of a two-layer MLP of the features."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    masks = attention.load_masks(str(run), attention.method_with_attention(str(run)), pictures)
    assert {stage: mask.shape for stage, mask in masks.items()} == {"stage3": (3, 2, 2), "stage4": (3, 1, 1)}
    state = checkpoint.load_state(str(run))
    encoder = build(ml_collections.ConfigDict(checkpoint.load_config(run))).method.network.encoder
    _, features = jax.jit(lambda v, x: encoder.apply(v, x, train=False))(
        encoder_variables(state["params"], state["model_state"]), pictures / np.float32(255)
    )
    mlp = state["params"]["pool"]["stage3"]
    hidden = jnp.maximum(features["stage3"] @ mlp["mlp1"]["kernel"] + mlp["mlp1"]["bias"].reshape(1, 1, 1, -1), 0)
    logits = np.asarray(hidden @ mlp["mlp2"]["kernel"], np.float64)[..., 0]
    expected = np.exp(logits) / np.exp(logits).sum((1, 2), keepdims=True)
    np.testing.assert_allclose(masks["stage3"], expected, rtol=1e-4)


def test_overlay_colours_the_attended_place():
    grey = np.full((40, 40, 3), 128, np.uint8)
    mask = np.full((4, 4), 0.01)
    mask[1, 3] = 1 - 0.15
    shown = attention.overlay(grey, mask, peak=float(mask.max()) * 16)
    warmth = shown[..., 0] - shown[..., 2]
    assert np.unravel_index(warmth.argmax(), warmth.shape)[0] == pytest.approx(14.5, abs=3)
    assert np.unravel_index(warmth.argmax(), warmth.shape)[1] > 30
    # elsewhere: attention 0.16x of uniform, so almost the colour of none, black, over the grey
    np.testing.assert_allclose(shown[30:, :10], (1 - attention.HEAT) * 128 / 255, atol=0.05)
    uniform = attention.overlay(grey, np.full((4, 4), 1 / 16), peak=4.0)
    assert np.ptp(uniform.reshape(-1, 3), axis=0).max() < 1e-6


def test_store_gives_pairs_of_the_same_clip(store):
    pictures, captions = attention.load_images(str(store / "train"), count=6, size=32)
    assert pictures.shape == (6, 32, 32, 3) and pictures.dtype == np.uint8
    names, times = zip(*[caption.split(", ") for caption in captions], strict=True)
    assert names[0::2] == names[1::2] and len(set(names)) == 3
    seconds = np.array([float(t.split()[0]) for t in times])
    np.testing.assert_allclose(seconds[1::2] - seconds[0::2], 0.76, atol=0.011)
    frames = FrameStore(store / "train")
    first = frames.read(frames.first_record[0] + round(seconds[0] * 25)).item()
    expected = cv2.imdecode(np.frombuffer(first, np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(pictures[0], expected)


def test_folder_of_images(sample_data, tmp_path):
    pictures, captions = attention.load_images(str(sample_data / "cifar10_mini" / "test"), count=5, size=24)
    assert pictures.shape == (5, 24, 24, 3) and len(captions) == 5
    with pytest.raises(DataError, match="neither a frame store nor a folder with"):
        attention.load_images(str(tmp_path), count=5, size=24)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="broken.png does not decode"):
        attention.load_images(str(tmp_path), count=5, size=24)


def test_wide_picture_gives_its_central_square(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = (0, 0, 255)  # BGR: red in the middle
    cv2.imwrite(str(tmp_path / "wide.png"), picture)
    pictures, _ = attention.load_images(str(tmp_path), count=1, size=20)
    assert (pictures[0] == (255, 0, 0)).all()


def test_figure_has_a_column_per_frame_and_a_row_per_scale():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    masks = {"stage3": rng.dirichlet(np.ones(16), 5).reshape(5, 4, 4), "stage4": np.full((5, 2, 2), 0.25)}
    png = io.BytesIO()
    attention.attention_figure(pictures, masks, ["a"] * 5, png)
    drawn = cv2.imdecode(np.frombuffer(png.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape[1] > 1.4 * drawn.shape[0]  # 5 columns, 3 rows


def test_command_line(run, store, tmp_path):
    out = tmp_path / "attention.png"
    attention.main([f"--checkpoint={run}", f"--images={store / 'train'}", f"--out={out}", "--count=3"])
    assert cv2.imread(str(out)).shape[0] > 300


def test_average_pooling_has_no_masks(tmp_path):
    run = make_run(tmp_path, "demo,pooling=average")
    method = attention.method_with_attention(str(run))
    with pytest.raises(ConfigError, match="configured without attention"):
        attention.load_masks(str(run), method, np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(SystemExit, match="error: .* is neither a frame store nor"):
        (tmp_path / "empty").mkdir()
        attention.main([f"--checkpoint={run}", f"--images={tmp_path}/empty", f"--out={tmp_path}/a.png"])
    assert json.loads((run / "config.json").read_text())["method"]["pooling"] == "average"
