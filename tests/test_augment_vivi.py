"""VIVI's colours against their formulas, and AutoAugment's operations against Pillow."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from vivi_jax.augment import autoaugment
from vivi_jax.augment import vivi as augment_vivi
from vivi_jax.errors import ConfigError
from vivi_jax.models import build_encoder

PHOTO = (
    np.random.default_rng(0).integers(30, 220, (5, 4, 3)).repeat(6, 0).repeat(6, 1)
    + np.random.default_rng(1).integers(-25, 26, (30, 24, 3))
).astype(np.uint8)
GREY = (128, 128, 128)


def enhance(kind):
    return lambda image, level, sign: kind(image).enhance(1 + sign * level * 0.1)


ORACLES = {  # Pillow's own
    "rotate": lambda image, level, sign: image.rotate(sign * level * 30 / 9, fillcolor=GREY),
    "shear_x": lambda image, level, sign: image.transform(
        image.size, Image.Transform.AFFINE, (1, sign * level * 0.3 / 9, 0, 0, 1, 0), fillcolor=GREY
    ),
    "color": enhance(ImageEnhance.Color),
    "contrast": enhance(ImageEnhance.Contrast),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 8 - round(4 * level / 9)),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 255 * (1 - level / 9)),
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
}


@pytest.mark.parametrize("name", ORACLES)
def test_operations_equal_pillows(name):
    for level in (0, 4, 9):
        for sign in (-1, 1):
            out = autoaugment.OPERATIONS[name](jnp.asarray(PHOTO, jnp.float32), jnp.float32(level), jnp.float32(sign))
            expected = np.asarray(ORACLES[name](Image.fromarray(PHOTO), level, sign), np.float32)
            difference = np.abs(np.asarray(out) - expected)
            if name in ("rotate", "shear_x"):  # a point on the border of two pixels may fall to either
                assert np.mean(difference.max(axis=-1) > 0) < 0.02, (level, sign)
            else:
                assert difference.max() <= 1 and np.mean(difference > 0) < 0.05, (level, sign)  # cut, not rounded


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_operations_on_a_single_colour_and_on_few(name):
    for picture in (np.full((8, 8, 3), 77, np.uint8), (PHOTO // 64) * 64):
        out = autoaugment.OPERATIONS[name](jnp.asarray(picture, jnp.float32), 0.0, 1.0)
        np.testing.assert_array_equal(out, np.asarray(ORACLES[name](Image.fromarray(picture), 0, 1), np.float32))


def test_both_ways_to_count_levels_count():
    levels = PHOTO[..., 0].ravel().astype(np.int32)
    expected = np.bincount(levels, minlength=256)
    np.testing.assert_array_equal(autoaugment.count_by_comparison(jnp.asarray(levels)), expected)
    np.testing.assert_array_equal(autoaugment.count_by_scatter(jnp.asarray(levels)), expected)


def test_the_policy_is_the_papers():
    assert len(autoaugment.POLICY) == 25 and all(len(pair) == 2 for pair in autoaugment.POLICY)
    operations = [op for pair in autoaugment.POLICY for op in pair]
    counts = {name: sum(op[0] == name for op in operations) for name in autoaugment.OPERATIONS}
    assert counts == {
        "rotate": 6,
        "shear_x": 1,
        "color": 6,
        "contrast": 2,
        "sharpness": 1,
        "posterize": 5,
        "solarize": 7,
        "autocontrast": 2,
        "equalize": 17,
        "invert": 3,
    }
    assert all(0 <= probability <= 1 and 0 <= level <= 9 for _, probability, level in operations)


@pytest.fixture(scope="module")
def many():
    keys = jax.random.split(jax.random.key(0), 400)
    return np.asarray(jax.jit(jax.vmap(autoaugment.autoaugment, in_axes=(None, 0)))(jnp.asarray(PHOTO) / 255.0, keys))


def test_autoaugment_draws_sub_policies_and_leaves_some_images_alone(many):
    assert many.min() >= 0 and many.max() <= 1
    untouched = np.mean([np.array_equal(np.round(image * 255), PHOTO) for image in many])
    # A sub-policy leaves an image alone with the product of the chances that its operations are not applied.
    expected = np.mean([(1 - a[1]) * (1 - b[1]) for a, b in autoaugment.POLICY])
    assert abs(untouched - expected) < 4 * np.sqrt(expected / len(many))
    assert len({image.tobytes() for image in many}) > 25


def test_inception_colours_by_hand():
    image = np.random.default_rng(2).random((4, 4, 3)).astype(np.float32)
    out = augment_vivi.shift_and_saturate(jnp.asarray(image), 0.1, 1.4)

    def pixel(rgb):
        h, s, v = colorsys.rgb_to_hsv(*(rgb + 0.1))
        return colorsys.hsv_to_rgb(h, min(s * 1.4, 1), v)

    np.testing.assert_allclose(out, np.clip(np.apply_along_axis(pixel, -1, image), 0, 1), atol=1e-5)


def test_standardised_images_are_tensorflows_behind_the_encoders_norm():
    encoder = build_encoder("resnet", depth=18, input_mean=(0.5, 0.4, 0.3), input_std=(0.5, 0.25, 0.2))
    images = np.stack([PHOTO[:8, :8], np.full((8, 8, 3), 90, np.uint8)])
    shifted = np.asarray(augment_vivi.standardized(jnp.asarray(images, jnp.float32) / 255, encoder))
    seen = (shifted - np.array(encoder.input_mean)) / np.array(encoder.input_std)
    expected = tf.image.per_image_standardization(images).numpy()
    np.testing.assert_allclose(seen, expected, atol=5e-3)  # the plain image's rounding errors are divided by 3e-4
    assert np.abs(seen[1]).max() < 5e-3 and np.abs(seen[0]).max() > 1


def test_hsv_randomisation_by_hand():
    image = np.random.default_rng(3).random((4, 4, 3)).astype(np.float32)
    out = augment_vivi.change_hsv(
        jnp.asarray(image),
        hue=0.08,
        power=jnp.array([2.0, 0.5]),
        factor=jnp.array([0.9, 1.2]),
        shift=jnp.array([0.05, -0.1]),
    )

    def pixel(rgb):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + 0.08) % 1, np.clip(0.9 * s**2 + 0.05, 0, 1), np.clip(1.2 * v**0.5 - 0.1, 0, 1))

    np.testing.assert_allclose(out, np.apply_along_axis(pixel, -1, image), atol=1e-5)


@pytest.mark.slow
def test_each_image_has_its_own_draw_and_options_are_kept_apart():
    images = jnp.asarray(np.stack([PHOTO[:8, :8]] * 64))
    keys = jax.random.split(jax.random.key(1), 64)
    plain = augment_vivi.augment(images, keys, color="none", hsv=False, grey_prob=0.0)
    np.testing.assert_array_equal(plain, images.astype(jnp.float32) / 255)
    grey = np.asarray(augment_vivi.augment(images, keys, color="none", hsv=False, grey_prob=0.66))
    share = np.mean([np.ptp(image, axis=-1).max() < 1e-6 for image in grey])
    assert abs(share - 0.66) < 4 * np.sqrt(0.66 * 0.34 / 64)
    for options in (dict(color="inception", hsv=False), dict(color="none", hsv=True)):
        out = np.asarray(augment_vivi.augment(images, keys, grey_prob=0.0, **options))
        assert len({image.tobytes() for image in out}) == 64 and out.min() >= 0 and out.max() <= 1
        alone = augment_vivi.augment(images[5:6], keys[5:6], grey_prob=0.0, **options)
        np.testing.assert_allclose(alone[0], out[5], atol=1e-6)
    with pytest.raises(ConfigError, match="did you mean 'inception'"):
        augment_vivi.augment(images, keys, color="incepton", hsv=False, grey_prob=0.0)
