"""Pictures of what a run is trained on: what its first step gives the encoder, and times that obey their law."""

import dataclasses
import itertools
import pathlib

import cv2
import jax
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

from configs import moco_v3, vdim, vito, vivi
from evaluation.pictures import times, views
from helpers.frame_stores import jpeg, write_store
from input_pipeline.streams import sampling
from vivi_jax.build import build
from vivi_jax.errors import DataError
from vivi_jax.main import open_data
from vivi_jax.models.base import Encoder
from vivi_jax.train_step import create

FPS, SHOT = 10, 15  # frames per second, and in each of a video's two shots


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> pathlib.Path:
    """Six videos of two classes and two shots, whose frames are smooth noise."""
    rng = np.random.default_rng(0)
    frames = [
        jpeg(cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (48, 40), interpolation=cv2.INTER_CUBIC))
        for _ in range(6 * 2 * SHOT)
    ]
    row = dict(frames=2 * SHOT, fps=FPS, height=40, width=48, shot_starts=[0, SHOT])
    rows = [row | {"label": v % 2} for v in range(6)]
    return write_store(tmp_path_factory.mktemp("data") / "store", rows, frames, ("a", "b")).directory


def small(name: str, store: pathlib.Path):
    """The config of a run on the store, of a network of few channels."""
    file, argument = SYSTEMS[name]
    config = file.get_config(argument)
    if config.encoder.name == "resnet":
        config.encoder.width = 0.0625
        config.data.image_size = 32
    elif config.encoder.name == "vit":
        config.encoder.update(dict(width=24, depth=2, heads=3))
        config.data.image_size = 32
    config.batch_size, config.data.path, config.data.min_crop_area = 6, str(store), 0.5
    if file is vivi:
        config.data.update(dict(frames=2, frame_rate=4.0, min_shot_seconds=0.0))
    if "labelled_path" in config.data:
        config.data.update(dict(labelled_path=str(store), labelled_fraction=1.0, labelled_batch_size=4))
        config.method.num_classes = 2
    return config


SYSTEMS = {
    "vito": (vito, "demo"),
    "vivi": (vivi, "ex2,demo"),
    "vivi-co-training": (vivi, "rot2,demo,co=10"),
    "vdim": (vdim, "demo,difference=yes"),
    "moco_v3": (moco_v3, "video"),
    "moclr": (vito, "demo,moclr"),
}


def given_to_the_encoder(config) -> np.ndarray:
    """All pictures that the encoder is given in the run's first step: float32[n, H, W, 3]."""
    experiment, recorded = build(config), []

    def record(next_function, arguments, options, context):
        if isinstance(context.module, Encoder) and context.method_name == "__call__":
            jax.debug.callback(lambda images: recorded.append(np.array(images)), arguments[0])
        return next_function(*arguments, **options)

    @jax.jit
    def step(state, batch) -> None:  # without a result, so that no more is compiled than what the encoder is given
        experiment.train_step(state, batch)

    shapes = jax.eval_shape(lambda: create(experiment.method, experiment.optimizer, experiment.batch_spec, 0))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    with nn.intercept_methods(record):
        step(state, next(open_data(config)(0, 1)))
    jax.effects_barrier()
    return np.concatenate([images.reshape(-1, *images.shape[-3:]) for images in recorded])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vito", "vivi-co-training", "vdim", "moco_v3"])
def test_what_is_shown_is_what_the_first_step_gives_the_encoder(name, store):
    config = small(name, store)
    found, given = views.first_views(config.to_dict()), given_to_the_encoder(config)
    assert len(found.groups) == (3 if name == "vivi-co-training" else 2)
    for group, pictures in found.groups.items():
        assert len(pictures) >= 2
        for row, i in itertools.product(*map(range, pictures.shape[:2])):
            nearest = np.abs(given - pictures[row, i]).max((1, 2, 3)).min()
            assert nearest < 1e-4, (group, row, i, nearest)


def test_the_rows_shown_are_the_first_of_the_batch(store):
    """Also where the batch is cut into few rows, as of many processes; each has its time in the video."""
    config = small("vito", store)
    order = views.first_rows(config.to_dict())
    assert (order.process_count, order.rows) == (1, 6)
    whole = next(open_data(config)(0, 1))["views"]
    found = views.first_views(config.to_dict())
    half = dataclasses.replace(order, process_count=2)
    np.testing.assert_array_equal(next(views.open_stream(config.to_dict(), half)(0, 1))["views"], whole[:3])
    assert all(seconds.shape == (6, 1) for seconds in found.seconds.values())
    assert all(0 <= seconds.min() and seconds.max() < 2 * SHOT / FPS for seconds in found.seconds.values())
    config.batch_size = 4096 * 6
    assert views.first_rows(config.to_dict()).rows == 8


def test_the_triangular_law_is_that_of_all_pairs_and_of_the_sampler():
    clip, draws = 64, 20_000
    law = times.triangular(clip)
    a, b = np.indices((clip, clip))
    np.testing.assert_allclose(law, np.bincount(np.abs(a - b).ravel()) / clip**2)
    pairs = np.array([sampling.marginal(sampling.example_rng(0, i), clip, 2, 0) for i in range(draws)])
    counted = np.bincount(np.abs(np.diff(pairs)[:, 0]), minlength=clip)
    assert scipy.stats.chisquare(counted, law * draws).pvalue > 1e-3


@pytest.mark.parametrize("name", ["vito", "vivi", "vdim", "moco_v3"])
def test_times_are_those_of_the_sampler(name, store):
    """VITO's and MoCo v3's follow the law of independent frames; VIVI's shots and VDIM's windows say their own."""
    config = small(name, store).to_dict()
    found = times.time_differences(config)
    if name in ("vito", "moco_v3"):
        edges = np.linspace(0, 2.56, 17)
        counted, law = np.histogram(found["different views"], edges)[0], times.expected(config, edges)
        assert [*found] == ["different views"] and law.sum() == pytest.approx(1)
        np.testing.assert_allclose(counted / counted.sum(), law, atol=0.02)
    elif name == "vivi":
        step = round(FPS / config["data"]["frame_rate"]) / FPS
        np.testing.assert_allclose(found["the same shot"], step)
        assert found["different shots"].min() >= 1 / FPS and found["different shots"].max() < 2 * SHOT / FPS
        assert times.expected(config, np.linspace(0, 1, 3)) is None
    else:
        data = config["data"]
        longest = (data["offset"] + data["downsample"] * (2 * data["frames"] - 1)) / FPS
        assert found["different views"].max() <= longest + 1e-9
        assert set(found) == {"different views", "the same view"}


def test_still_images_and_one_frame_have_no_times(store):
    with pytest.raises(DataError, match="crops of one frame"):
        times.time_differences(small("moclr", store).to_dict())
    config = small("vito", store)
    config.data = dict(source="images", path=str(store), views=2, image_size=32, min_crop_area=0.5)
    with pytest.raises(DataError, match="still images"):
        times.time_differences(config.to_dict())
    assert views.first_views(config.to_dict()).seconds == {}


def test_the_figure_says_what_it_leaves_out_and_what_it_scales():
    """Of 20 frames six are shown in each of two views; Lab's values are moved into [0, 1]."""
    pictures = np.linspace(-2, 3, 20, dtype=np.float32)[None, :, None, None, None] * np.ones(
        (2, 1, 8, 8, 3), np.float32
    )
    seconds = np.tile(np.arange(20) / 10, (2, 1))
    shown = views.Views({"view 1": pictures, "view 2": pictures / 3 + 0.5}, {"view 1": seconds, "view 2": seconds})
    figure, notes = views.views_figure(shown)
    assert "of the 20 frames of view 1 6 are shown" in notes and any("view 1 is no RGB" in note for note in notes)
    assert len(figure.axes) == 4 and figure.axes[0].get_title() == "view 1, 0.00 to 1.90 s"
    strip = np.asarray(figure.axes[0].images[0].get_array())
    assert strip.shape == (8, 6 * (8 + views.GAP) - views.GAP, 3)
    assert strip[0, 0, 0] == 0 and strip[0, -1, 0] == 1 and strip[0, 8, 0] == 1  # the gap is white
