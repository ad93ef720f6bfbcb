"""Colours of clips: Lab against two independent implementations, one draw per clip, one channel dropped."""

import colorsys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from vivi_jax.augment import color
from vivi_jax.augment import vdim as augment_vdim
from vivi_jax.errors import ConfigError

B, T, H, W = 24, 3, 5, 6
augment_clips = jax.jit(augment_vdim.augment_clips, static_argnames="color")
RANGE = np.array([100.0, 184.5, 202.4])  # of L, a, b over the colours of sRGB


@pytest.fixture(scope="module")
def colours() -> np.ndarray:
    """float32[N, 1, 3]: a grid of sRGB with black, white, all primaries, and the greys around the companding's knee."""
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 18)] * 3), axis=-1).reshape(-1, 3)
    return np.concatenate([grid, np.linspace(0, 0.1, 101)[:, None].repeat(3, 1)])[:, None].astype(np.float32)


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (B, T, H, W, 3), np.uint8)


@pytest.fixture(scope="module")
def keys() -> jax.Array:
    return jax.random.split(jax.random.key(0), B)


def test_lab_equals_scikit_image(colours):
    color = pytest.importorskip("skimage.color")
    error = np.abs(np.asarray(augment_vdim.rgb_to_lab(colours)) - color.rgb2lab(colours.astype(np.float64))) / RANGE
    assert error.max() < 1e-4


def test_lab_equals_opencv(colours):
    """OpenCV tabulates the companding and approximates the cube root: it differs from both others by up to 0.3 %."""
    error = np.abs(np.asarray(augment_vdim.rgb_to_lab(colours)) - cv2.cvtColor(colours, cv2.COLOR_RGB2Lab)) / RANGE
    assert error.max() < 1e-2 and error.mean() < 1e-3


def test_lab_of_known_colours():
    known = {
        (0, 0, 0): (0, 0, 0),
        (1, 1, 1): (100, 0, 0),
        (1, 0, 0): (53.24, 80.09, 67.20),
        (0, 1, 0): (87.73, -86.18, 83.18),
        (0, 0, 1): (32.30, 79.19, -107.86),
    }
    np.testing.assert_allclose(
        augment_vdim.rgb_to_lab(jnp.array(list(known), jnp.float32)), list(known.values()), atol=0.02
    )


def test_lab_has_finite_gradients_at_black():
    gradient = jax.grad(lambda rgb: augment_vdim.rgb_to_lab(rgb).sum())(jnp.zeros(3))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_lab_drops_one_channel_per_clip_each_as_often(clips):
    keys = jax.random.split(jax.random.key(1), 600)
    lab = np.asarray(augment_clips(np.resize(clips, (600, 2, 2, 2, 3)), keys, color="lab"))
    dropped = (lab == 0).all(axis=(1, 2, 3))  # [B, 3]: over all frames
    assert (dropped.sum(axis=1) == 1).all()
    assert ((lab == 0).sum(axis=(1, 2, 3, 4)) < 16).all()  # and the others are kept: 8 places are 0
    assert dropped.sum(axis=0).min() > 160  # 200 each
    for i in range(20):
        full = (
            augment_vdim.rgb_to_lab(np.resize(clips, (600, 2, 2, 2, 3))[i] / np.float32(255))
            - np.array(augment_vdim.LAB_MEAN).reshape(1, 1, 1, 3)
        ) / np.array(augment_vdim.LAB_STD).reshape(1, 1, 1, 3)
        np.testing.assert_allclose(lab[i], np.where(dropped[i], 0, full), atol=1e-5)


@pytest.mark.parametrize("color", ["jitter_grey", "lab", "none"])
def test_all_frames_of_a_clip_undergo_the_same_map(color, keys):
    """A picture shown T times stays the same picture T times, and clips differ from one another."""
    picture = np.random.default_rng(1).integers(0, 256, (1, 1, H, W, 3), np.uint8)
    out = np.asarray(augment_clips(np.tile(picture, (B, T, 1, 1, 1)), keys, color=color))
    assert out.shape == (B, T, H, W, 3) and out.dtype == np.float32
    np.testing.assert_array_equal(out, out[:, :1].repeat(T, axis=1))
    distinct = len({clip.tobytes() for clip in out})
    assert {"jitter_grey": distinct > B // 2, "lab": distinct == 3, "none": distinct == 1}[color]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_jitter_is_torchvisions(order):
    """Against Pillow's enhancers, which torchvision applies to Pillow images; hue against colorsys.

    Pillow cuts off to whole levels after each, and rounds the mean of the luma: some levels at the end.
    """
    image = np.random.default_rng(4).integers(0, 256, (9, 8, 3), np.uint8)
    factors, hue = (1.3, 0.7, 1.35), 0.08
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

    def turn(rgb):
        h, s, v = colorsys.rgb_to_hsv(*rgb / 255)
        return np.round(255 * np.array(colorsys.hsv_to_rgb((h + hue) % 1, s, v)))

    expected = image
    for i in order:
        if i == 3:
            expected = np.apply_along_axis(turn, -1, expected).astype(np.uint8)
        else:
            expected = np.asarray(kinds[i](Image.fromarray(expected)).enhance(factors[i]))
    found = color.torchvision_jitter_in_order(
        jnp.asarray(image, jnp.float32) / 255, jnp.array(order), factors=list(map(jnp.float32, factors)), hue_shift=hue
    )
    error = np.abs(255 * np.asarray(found) - expected)
    assert error.max() < 5 and error.mean() < 1.5
    assert np.abs(expected - image.astype(int)).mean() > 10


def test_brightness_multiplies():
    """A black clip stays black, as no shift would leave it; a plain one is scaled by U(0.6, 1.4)."""
    keys = jax.random.split(jax.random.key(7), 400)
    black = np.zeros((400, 1, 2, 2, 3), np.uint8)
    assert np.abs(augment_clips(black, keys, color="jitter_grey")).max() < 1e-6
    scales = np.asarray(augment_clips(black + np.uint8(128), keys, color="jitter"))[:, 0, 0, 0, 0] / (128 / 255)
    assert 0.6 <= scales.min() < 0.63 and 1.37 < scales.max() <= 1.4


def test_frames_of_different_brightness_share_one_affine_map(keys):
    """Grey frames of levels 0.4, 0.5, 0.6 under jitter: level -> a * level + b with one (a, b) for all frames."""
    levels = np.array([102, 128, 153], np.uint8)
    grey = np.tile(levels[None, :, None, None, None], (B, 1, H, W, 3))
    out = np.asarray(augment_clips(grey, keys, color="jitter_grey"))[:, :, 0, 0, 0]
    inside = ((out > 0.01) & (out < 0.99)).all(axis=1)
    assert inside.sum() > B // 2
    slope = np.diff(out[inside], axis=1) / (np.diff(levels) / 255)
    np.testing.assert_allclose(slope[:, 0], slope[:, 1], atol=1e-3)
    assert slope.std() > 0.05  # contrast; with each frame's own mean as pivot all slopes would be 1


def test_jitter_and_grey_come_with_amdims_chances():
    keys = jax.random.split(jax.random.key(2), 800)
    clip = np.random.default_rng(3).integers(60, 190, (1, 1, 2, 2, 3), np.uint8)
    out = np.asarray(augment_clips(np.tile(clip, (800, 1, 1, 1, 1)), keys, color="jitter_grey"))
    grey = np.ptp(out, axis=-1).max(axis=(1, 2, 3)) < 1e-6
    luma = np.asarray(color.to_grey(jnp.asarray(clip[0, 0] / np.float32(255))))
    untouched = (np.abs(out - clip / 255).max(axis=(1, 2, 3, 4)) < 1e-6) | (
        np.abs(out - luma).max(axis=(1, 2, 3, 4)) < 1e-6
    )
    assert 160 < grey.sum() < 240 and 120 < untouched.sum() < 200  # 200 and 160 of 800
    assert out.min() >= 0 and out.max() <= 1


def test_a_clip_does_not_depend_on_its_batch(clips, keys):
    together = augment_clips(clips, keys, color="jitter_grey")
    alone = augment_clips(clips[5:6], keys[5:6], color="jitter_grey")
    np.testing.assert_allclose(together[5], alone[0], atol=1e-6)


def test_unknown_colours_are_refused(clips, keys):
    with pytest.raises(ConfigError, match="did you mean 'jitter_grey'"):
        augment_clips(clips, keys, color="jitter_gray")
