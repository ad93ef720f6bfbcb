"""Runs and exports that version 0.1.0 wrote: tests/testdata/version_0_1_0.tar.xz holds the third step of small
runs of VITO and VDIM, and exports of VITO's and VIVI's encoders."""

import json
import logging
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from evaluation import attention, encoders
from helpers.streams import run_stream
from helpers.video_files import scenes, write_video
from input_pipeline.preparation.local import prepare
from input_pipeline.preparation.steps import Settings
from input_pipeline.store import META, OLD_SHOTS, FrameStore
from input_pipeline.streams.shots import shot_frames
from vivi_jax import checkpoint
from vivi_jax.errors import DataError

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


def test_a_store_of_an_earlier_version_opens_and_says_what_its_shots_are(tmp_path, caplog):
    """Its files are as today's; its version and one setting more say that it is of 0.1.0."""
    videos, out = tmp_path / "videos", tmp_path / "store"
    videos.mkdir()
    for v in range(2):
        write_video(videos / f"{v}.mp4", scenes([20, 20], seed=v))
    assert prepare(str(videos), str(out), Settings())
    meta = json.loads((out / META).read_text())
    assert meta["version"] == 3 and not FrameStore(out).shots_may_hold_cuts
    del meta["id"], meta["files"]  # and no file had a hash
    (out / META).write_text(json.dumps(meta | {"version": 1, "settings": meta["settings"] | {"min_shot_frames": 8}}))

    store = FrameStore(out)
    assert store.shots_may_hold_cuts and store.shots(0).tolist() == [[0, 20], [20, 40]]
    options = dict(shots=2, frames=2, frame_rate=5, min_shot_seconds=0, image_size=16, min_crop_area=0.5)
    with caplog.at_level(logging.WARNING, logger="input_pipeline"):
        assert len(
            list(run_stream(shot_frames, store, seed=0, batch_size=2, sampler="consecutive", num_steps=1, **options))
        )
    assert [record.getMessage() for record in caplog.records] == [f"{out}: {OLD_SHOTS}"]
    assert not prepare(str(videos), str(out), Settings())  # complete
    with pytest.raises(DataError, match="was begun with fps=25.0, this run has fps=1.0"):
        prepare(str(videos), str(out), Settings(fps=1.0))
    (out / META).write_text(json.dumps(meta | {"version": 4}))
    with pytest.raises(DataError, match="has format version 4, this code reads 1, 2, 3; prepare it again"):
        FrameStore(out)


def test_attention_of_an_earlier_run(earlier):
    """Its config has `ema_base` among the method's options."""
    run = str(earlier / "vito")
    masks = attention.load_masks(run, attention.method_with_attention(run), np.zeros((2, 64, 64, 3), np.uint8))
    assert {stage: mask.shape for stage, mask in masks.items()} == {"stage3": (2, 4, 4), "stage4": (2, 2, 2)}
    np.testing.assert_allclose([mask.sum((1, 2)) for mask in masks.values()], 1, rtol=1e-5)
