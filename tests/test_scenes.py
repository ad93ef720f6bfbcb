"""Filmed creatures: what a class is, and that nothing but it tells the class."""

import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.folders import digests
from input_pipeline.preparation.local import prepare
from input_pipeline.preparation.steps import Settings
from input_pipeline.rendered import scenes, shapes
from input_pipeline.rendered.creatures import CREATURES, PERIOD, SKINS, contours, skin
from input_pipeline.store import FrameStore
from vivi_jax.errors import DataError

NAMES = list(CREATURES)


def mask_of(parts: list[np.ndarray], pixels: int = 100) -> np.ndarray:
    mask = np.zeros((8 * pixels, 8 * pixels), np.uint8)
    for part in parts:
        cv2.fillPoly(mask, [np.round((part + 4) * pixels).astype(np.int32)], 1)
    return mask


@pytest.mark.parametrize("name", NAMES)
def test_every_creature_has_unit_area_and_its_centre_at_the_origin_over_a_gait(name):
    cycle = 2 * np.pi * np.arange(24) / 24
    parts = contours(name, cycle)
    masks = [mask_of([part[t] for part in parts]) for t in range(len(cycle))]
    assert np.mean([mask.sum() / 100**2 for mask in masks]) == pytest.approx(1, abs=0.03)
    centres = [np.argwhere(mask).mean(axis=0) / 100 - 4 for mask in masks]
    np.testing.assert_allclose(np.mean(centres, axis=0), 0, atol=0.03)
    assert any((a != b).any() for a, b in zip(masks, masks[1:], strict=False))  # it moves


@pytest.mark.parametrize("name", SKINS)
def test_every_skin_has_its_two_tones_equally_often(name):
    values = np.stack([skin(np.random.default_rng([4, i]), name) for i in range(20)]) / 255
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    assert np.mean(values < 0.05) == pytest.approx(0.385, abs=0.03) == np.mean(values > 0.95)
    assert PERIOD[1] < 0.5  # a creature shows some periods


def test_a_class_is_a_plan_and_every_skin_belongs_to_two():
    skins = [plan.skin for plan in CREATURES.values()]
    assert sorted(skins) == sorted([*SKINS, *SKINS])
    assert len({plan.limbs for plan in CREATURES.values()}) == len(CREATURES)


def thumbnail_and_histogram(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a video's first frame: 8 x 8 pixels, and counts of 512 colours."""
    frame = scenes.render_shot(np.random.default_rng([99, i]), NAMES[i % 10], scenes.Settings(48, 1))[0][0]
    bins = (frame >> 5).astype(int) @ np.array([64, 8, 1])
    return cv2.resize(frame, (8, 8), interpolation=cv2.INTER_AREA).ravel() / 255, np.bincount(
        bins.ravel(), minlength=512
    )


@pytest.mark.slow
def test_neither_thumbnails_nor_histograms_tell_the_class():
    """Linear classifiers stay within 2 points of chance, 10 %, on 1300 others (their standard error is 0.8)."""
    features, labels = [thumbnail_and_histogram(i) for i in range(2600)], np.arange(2600) % 10
    for of_all in map(np.stack, zip(*features, strict=True)):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=1e-2, max_iter=200))
        classifier.fit(of_all[:1300], labels[:1300])
        assert classifier.score(of_all[1300:], labels[1300:]) == pytest.approx(0.1, abs=0.02)


def test_masks_show_what_is_visible():
    """Without anything else in the picture the creature covers what its size says; with something, no more."""
    alone = scenes.Settings(96, 12, distractors=(0, 0))
    for i, name in enumerate(NAMES):
        frames, masks = scenes.render_shot(np.random.default_rng([2, i]), name, alone, masks=True)
        assert masks is not None and masks.shape == frames.shape[:3] and set(np.unique(masks)) <= {0, 1}
        share = (masks == 1).mean(axis=(1, 2))
        assert share.max() < 1.35 * scenes.SIDE[1] ** 2  # a gait's area varies
        again, none = scenes.render_shot(np.random.default_rng([2, i]), name, alone)
        np.testing.assert_array_equal(frames, again)  # masks change no pixel
        assert none is None
    crowded = scenes.Settings(96, 4, distractors=(3, 3))
    _, masks = scenes.render_shot(np.random.default_rng(8), "crab", crowded, masks=True)
    assert masks is not None and set(np.unique(masks)) <= {0, 1, 2, 3, 4} and len(np.unique(masks)) >= 4


def test_files_are_the_same_for_a_seed_and_go_on_after_a_break(tmp_path):
    settings: dict = dict(videos=8, seed=5, size=32, seconds=0.4, classes=("crab", "fish"), workers=1)
    scenes.write_scenes(tmp_path / "a", **settings)
    scenes.write_scenes(tmp_path / "b", **settings)
    expected = digests(tmp_path / "a")
    assert expected == digests(tmp_path / "b")
    next((tmp_path / "b" / "train").rglob("*.mp4")).unlink()
    scenes.write_scenes(tmp_path / "b", **settings)
    assert digests(tmp_path / "b") == expected
    with pytest.raises(DataError, match="classes must be two or more different ones of crab"):
        settings["classes"] = ("star", "ring")
        scenes.write_scenes(tmp_path / "c", **settings)


def test_the_product_finds_the_shots_of_a_video(tmp_path):
    settings = scenes.Settings(64, 80, shots=4)
    (tmp_path / "videos").mkdir()
    for i, name in enumerate(NAMES[:3]):
        video = scenes.render_video(np.random.default_rng([6, i]), name, settings)
        shapes.write_video(tmp_path / "videos" / f"{i}.mp4", video, scenes.FPS)
    prepare(str(tmp_path / "videos"), str(tmp_path / "store"), Settings(short_side=64), workers=1)
    store = FrameStore(tmp_path / "store")
    assert [len(store.shots(video)) for video in range(3)] == [4, 4, 4]
