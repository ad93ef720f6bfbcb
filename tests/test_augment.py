"""Each augmentation against its formula, and the BYOL table's probabilities."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vivi_jax.augment import byol, color


@pytest.fixture(scope="module")
def image():
    return jnp.asarray(np.random.default_rng(0).random((24, 20, 3)), jnp.float32)


def test_hsv_equals_colorsys(image):
    h, s, v = color.rgb_to_hsv(*color.split(image))
    expected = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in np.asarray(image).reshape(-1, 3)])
    np.testing.assert_allclose(np.stack([h, s, v], -1).reshape(-1, 3), expected, atol=2e-6)
    np.testing.assert_allclose(color.merge(color.hsv_to_rgb(h, s, v)), image, atol=1e-6)


@pytest.mark.parametrize("colour", [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_hsv_at_greys_and_corners(colour):
    pixel = jnp.asarray(colour, jnp.float32).reshape(1, 1, 3)
    h, s, v = color.rgb_to_hsv(*color.split(pixel))
    np.testing.assert_allclose([h.item(), s.item(), v.item()], colorsys.rgb_to_hsv(*colour), atol=1e-6)
    np.testing.assert_allclose(color.merge(color.hsv_to_rgb(h, s, v)), pixel, atol=1e-6)


def test_contrast_scales_deviations_from_each_channels_mean(image):
    out = np.stack([color.adjust_contrast(plane, 1.4) for plane in color.split(image)], axis=-1)
    mean = np.asarray(image).mean((0, 1))
    np.testing.assert_allclose(out, (np.asarray(image) - mean) * 1.4 + mean, atol=1e-6)


def test_saturation_and_hue(image):
    out = color.merge(color.adjust_hsv(color.split(image), 1.2, 0.1))
    expected = []
    for pixel in np.asarray(image).reshape(-1, 3):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((h + 0.1) % 1, min(s * 1.2, 1), v))
    np.testing.assert_allclose(np.asarray(out).reshape(-1, 3), expected, atol=1e-5)


def test_grey_and_solarize(image):
    luma = np.asarray(image) @ np.array([0.2989, 0.587, 0.114])
    np.testing.assert_allclose(color.to_grey(image), np.repeat(luma[..., None], 3, -1), atol=1e-6)
    x = np.asarray(image)
    np.testing.assert_allclose(color.solarize(image), np.where(x < 0.5, x, 1 - x), atol=1e-7)


def test_blur_is_a_zero_padded_normalised_gaussian(image):
    sigma, radius = 1.3, 3
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    x = np.pad(np.asarray(image, np.float64), ((radius, radius), (radius, radius), (0, 0)))
    height, width, _ = image.shape
    expected = np.zeros(image.shape)
    for dy, wy in zip(offsets, kernel, strict=True):
        for dx, wx in zip(offsets, kernel, strict=True):
            expected += wy * wx * x[radius + dy : radius + dy + height, radius + dx : radius + dx + width]
    np.testing.assert_allclose(color.gaussian_blur(image, jnp.float32(sigma), radius), expected, atol=1e-5)


def test_jitter_is_the_identity_at_zero_magnitude_and_stays_in_range(image):
    keys = jax.random.split(jax.random.key(0), 32)
    still = jax.vmap(lambda k: color.color_jitter(image, k, 0.0, 0.0, 0.0, 0.0))(keys)
    np.testing.assert_allclose(still, np.broadcast_to(image, still.shape), atol=1e-5)
    strong = jax.vmap(lambda k: color.color_jitter(image, k, 0.4, 0.4, 0.2, 0.1))(keys)
    assert strong.min() >= 0 and strong.max() <= 1
    assert np.asarray(jnp.abs(strong - image[None]).max(axis=(1, 2, 3)) > 0.01).all()


def test_jitter_applies_its_operations_in_the_order_drawn():
    image = jnp.zeros((4, 4, 3)).at[:2].set(1.0)
    options = dict(shift=0.4, contrast_factor=0.5, saturation_factor=1.0, hue_shift=0.0)
    brightness_first = color.jitter_in_order(image, jnp.array([0, 1, 2, 3]), **options)  # {.4, 1} about .7
    contrast_first = color.jitter_in_order(image, jnp.array([1, 0, 2, 3]), **options)  # {.25, .75} + .4, clipped
    np.testing.assert_allclose([brightness_first[3, 0, 0], brightness_first[0, 0, 0]], [0.55, 0.85], atol=1e-6)
    np.testing.assert_allclose([contrast_first[3, 0, 0], contrast_first[0, 0, 0]], [0.65, 1.0], atol=1e-6)


def test_byol_table_has_the_published_probabilities():
    expected = {
        "jitter_prob": (0.8, 0.8),
        "grey_prob": (0.2, 0.2),
        "blur_prob": (1.0, 0.1),
        "solarize_prob": (0.0, 0.2),
        "brightness": (0.4, 0.4),
        "contrast": (0.4, 0.4),
        "saturation": (0.2, 0.2),
        "hue": (0.1, 0.1),
    }
    assert {name: (byol.BYOL_A1[name], byol.BYOL_A2[name]) for name in expected} == expected
    assert byol.BYOL_VIEWS == (byol.BYOL_A1, byol.BYOL_A2, byol.BYOL_A1)


@pytest.mark.slow
def test_each_step_happens_as_often_as_its_probability():
    """Counted on images where each step leaves a mark of its own; bounds are five standard deviations."""
    n = 1000
    keys = jax.random.split(jax.random.key(2), n)
    off = dict(
        jitter_prob=0.0,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
        grey_prob=0.0,
        blur_prob=0.0,
        solarize_prob=0.0,
    )
    image = jnp.zeros((224, 4, 3)).at[::2].set(jnp.array([0.9, 0.3, 0.2]))
    for name, probability, extra in (
        ("grey_prob", 0.2, {}),
        ("blur_prob", 0.1, {}),
        ("solarize_prob", 0.2, {}),
        ("jitter_prob", 0.8, {"brightness": 0.4}),
    ):
        options = off | {name: probability} | extra
        out = jax.jit(jax.vmap(lambda k, options=options: byol.byol(image, k, **options)))(keys)
        count = int((jnp.abs(out - image[None]).max(axis=(1, 2, 3)) > 1e-6).sum())
        assert abs(count - n * probability) < 5 * np.sqrt(n * probability * (1 - probability)), name


@pytest.mark.slow
def test_views_of_one_example_do_not_depend_on_the_rest_of_the_batch():
    rng = np.random.default_rng(3)
    views = rng.integers(0, 256, (4, 3, 16, 16, 3), dtype=np.uint8)
    others = rng.integers(0, 256, views.shape, dtype=np.uint8)
    others[1] = views[1]
    keys = jax.random.split(jax.random.key(4), 4)
    augmented = jax.jit(byol.byol_views)
    one, other = augmented(views, keys), augmented(others, keys)
    assert one.shape == views.shape and one.dtype == jnp.float32
    np.testing.assert_array_equal(one[1], other[1])
    assert np.abs(one[0] - other[0]).max() > 0.1
    assert np.abs(one[1, 0] - one[1, 2]).max() > 0.1 and (augmented(views, keys[::-1])[1] != one[1]).any()
