"""Runs and exports that version 0.1.0 wrote: tests/testdata/version_0_1_0.tar.xz holds the third step of small
runs of VITO and VDIM, and exports of VITO's and VIVI's encoders."""

import pathlib
import tarfile

import jax
import numpy as np
import pytest

from evaluation import attention, encoders
from vivi_jax import checkpoint

ARCHIVE = pathlib.Path(__file__).parent / "testdata" / "version_0_1_0.tar.xz"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    root = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root / "version_0_1_0"


@pytest.mark.parametrize("name", ["vito", "vdim", "vito.safetensors", "vivi.safetensors"])
def test_weights_are_the_same_bits_and_features_the_same_numbers(earlier, name):
    encoder, variables, _ = encoders.load_encoder(str(earlier / name))
    recorded = np.load(earlier / "features.npz")
    key = name.replace(".", "_")
    assert checkpoint.state_sha256(variables) == str(recorded[f"{key}_sha"])
    images = np.random.default_rng(0).random((4, 64, 64, 3), np.float32)
    features, _ = jax.jit(lambda x: encoder.apply(variables, x, train=False))(images)
    # Bit for bit on the machine that wrote them; another CPU adds in another order.
    np.testing.assert_allclose(features, recorded[key], rtol=1e-4, atol=1e-5)


def test_attention_of_an_earlier_run(earlier):
    """Its config has `ema_base` among the method's options."""
    run = str(earlier / "vito")
    masks = attention.load_masks(run, attention.method_with_attention(run), np.zeros((2, 64, 64, 3), np.uint8))
    assert {stage: mask.shape for stage, mask in masks.items()} == {"stage3": (2, 4, 4), "stage4": (2, 2, 2)}
    np.testing.assert_allclose([mask.sum((1, 2)) for mask in masks.values()], 1, rtol=1e-5)
