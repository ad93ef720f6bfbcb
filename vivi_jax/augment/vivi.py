"""Colours of VIVI (section 4), on the accelerator: Inception's, HSV randomisation, grey, AutoAugment.

Each function takes one image float32[H, W, 3] in [0, 1] and its own key, as in color.py. Crops and flips are the
host's (input_pipeline/streams/shots.py). Sources: the code of S4L (Zhai et al. 2019), which shares authors with VIVI.
"""

import math

import jax
import jax.numpy as jnp

from vivi_jax.augment import color as color_ops
from vivi_jax.augment.autoaugment import autoaugment
from vivi_jax.errors import lookup
from vivi_jax.models.base import Encoder


def augment(images_NxHxWx3: jax.Array, keys_N: jax.Array, *, color: str, hsv: bool, grey_prob: float) -> jax.Array:
    """Augments each image with its own random values.

    Args:
      images_NxHxWx3: uint8, cropped and flipped.
      keys_N: one typed PRNG key per image.
      color: a key of COLORS: "inception" (VIVI section 4), "autoaugment" (VIVI Table 2) or "none".
      hsv: HSV randomisation after `color` (VIVI: for models co-trained with a fraction of the labels).
      grey_prob: chance that an image becomes grey before `color` (not in VIVI; 0.66 in the code of its reference [33]).

    Returns:
      float32[N, H, W, 3] in [0, 1].
    """
    change_color = lookup("config.method.color", color, COLORS)

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        grey_key, color_key, hsv_key = jax.random.split(key, 3)
        image = image.astype(jnp.float32) / 255
        if grey_prob:
            grey = jnp.broadcast_to(image.mean(axis=-1, keepdims=True), image.shape)
            image = jnp.where(jax.random.bernoulli(grey_key, grey_prob), grey, image)
        image = change_color(image, color_key)
        return hsv_randomisation(image, hsv_key) if hsv else image

    return jax.vmap(one)(images_NxHxWx3, keys_N)


def standardized(images: jax.Array, encoder: Encoder) -> jax.Array:
    """[..., H, W, 3] -> of mean 0 and deviation 1 over all pixels and channels of an image, behind the encoder's norm.

    As TensorFlow's: the deviation is at least 1 / sqrt(3 H W), so that a plain image becomes zeros. What is returned is
    in the encoder's units, as it subtracts its input_mean and divides by its input_std itself.
    """
    axes = (-3, -2, -1)
    floor = math.prod(images.shape[-3:]) ** -0.5 / 255  # TensorFlow's is of images in [0, 255]
    deviation = jnp.maximum(images.std(axis=axes, keepdims=True), floor)
    unit = (images - images.mean(axis=axes, keepdims=True)) / deviation
    mean, std = (jnp.array(v).reshape((1,) * (images.ndim - 1) + (3,)) for v in (encoder.input_mean, encoder.input_std))
    return unit * std + mean


def inception_color(image: jax.Array, key: jax.Array) -> jax.Array:
    """Inception's colours in fast mode: brightness +- 32/255, then saturation times U(0.5, 1.5), clipped."""
    brightness_key, saturation_key = jax.random.split(key)
    shift = jax.random.uniform(brightness_key, minval=-32 / 255, maxval=32 / 255)
    factor = jax.random.uniform(saturation_key, minval=0.5, maxval=1.5)
    return shift_and_saturate(image, shift, factor)


def shift_and_saturate(image: jax.Array, shift: jax.Array, factor: jax.Array) -> jax.Array:
    """Adds `shift` to all channels, then multiplies S in HSV by `factor`; clipped to [0, 1] at the end, as there."""
    # HSV of values outside [0, 1] is the same formula, V being the largest channel.
    planes = color_ops.adjust_hsv(color_ops.split(image + shift), factor, 0.0)
    return jnp.clip(color_ops.merge(planes), 0.0, 1.0)


def hsv_randomisation(image: jax.Array, key: jax.Array) -> jax.Array:
    """S4L's HSV noise: H + U(-0.1, 0.1) turns; S and V each to mul * x^pow + add, clipped.

    pow = 2^U(-2, 2), mul = 2^U(-0.5, 0.5), add = U(-0.1, 0.1), drawn for S and V separately.
    """
    u_7 = jax.random.uniform(key, (7,), minval=-1.0, maxval=1.0)
    return change_hsv(
        image, hue=0.1 * u_7[0], power=2.0 ** (2 * u_7[1:3]), factor=2.0 ** (0.5 * u_7[3:5]), shift=0.1 * u_7[5:7]
    )


def change_hsv(image: jax.Array, *, hue: jax.Array, power: jax.Array, factor: jax.Array, shift: jax.Array) -> jax.Array:
    """Turns H by `hue` of a circle and maps S and V by factor * x^power + shift; the last three are [2]: S, V."""
    h, s, v = color_ops.rgb_to_hsv(*color_ops.split(image))
    s, v = (jnp.clip(factor[i] * x ** power[i] + shift[i], 0.0, 1.0) for i, x in enumerate((s, v)))
    return color_ops.merge(color_ops.hsv_to_rgb((h + hue) % 1.0, s, v))


COLORS = {"inception": inception_color, "autoaugment": autoaugment, "none": lambda image, key: image}
