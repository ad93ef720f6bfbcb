"""VDIM's colour augmentation of clips, on the accelerator: one draw per clip, the same map for all its frames.

VDIM section 3.1 names the operations: random colour jitter and random grey; or a conversion to Lab, of which a random
channel is dropped. It gives no magnitudes: jitter and grey have those of AMDIM, on whose code VDIM builds, and exactly
one channel of Lab is dropped, each as often as the others. Crop, flip and rotation are done by input_pipeline/windows.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vivi_jax.augment import color as color_ops
from vivi_jax.errors import lookup

# AMDIM's code, whose jitter is torchvision's.
AMDIM = dict(jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey_prob=0.25)
# AVID's code, with torchvision's jitter too, with which VITO fine-tunes on action recognition.
AVID = dict(jitter_prob=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, grey_prob=0.0)

# sRGB (IEC 61966-2-1) to CIE XYZ, Y = 1 for white; and the white point D65 that it is defined with.
XYZ_OF_RGB = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
D65 = (0.95047, 1.0, 1.08883)
# Not in the paper: mean and deviation of L, a and b over everyday photographs (COCO, VOC, ADE20K, CIFAR-10), rounded.
LAB_MEAN, LAB_STD = (50.0, 0.0, 6.0), (24.0, 10.0, 15.0)


def augment_clips(clips_BxTxHxWx3: jax.Array, keys_B: jax.Array, *, color: str) -> jax.Array:
    """Colours of a batch of clips.

    Args:
      clips_BxTxHxWx3: uint8, sRGB.
      keys_B: one typed PRNG key per clip.
      color: of COLORS: "jitter_grey" (AMDIM), "jitter" (AVID), "lab" or "none".

    Returns:
      float32[B, T, H, W, 3]: RGB in [0, 1]; with "lab" normalised Lab instead (mean about 0, deviation about 1), of
      which one channel is 0.
    """
    function = lookup("config.method.color", color, COLORS)
    return jax.vmap(function)(clips_BxTxHxWx3.astype(jnp.float32) / 255, keys_B)


def jitter_grey(
    clip_TxHxWx3: jax.Array, key: jax.Array, *, jitter_prob: float, grey_prob: float, **magnitudes: float
) -> jax.Array:
    """Colour jitter as color.torchvision_jitter, and grey; RGB in [0, 1]."""
    jitter_key, jitter_coin, grey_coin = jax.random.split(key, 3)
    # As one tall picture: contrast then pivots on the mean of the clip, not on each frame's own.
    tall = clip_TxHxWx3.reshape(-1, *clip_TxHxWx3.shape[2:])
    jittered = color_ops.torchvision_jitter(tall, jitter_key, **magnitudes)
    tall = jnp.where(jax.random.bernoulli(jitter_coin, jitter_prob), jittered, tall)
    tall = jnp.where(jax.random.bernoulli(grey_coin, grey_prob), color_ops.to_grey(tall), tall)
    return tall.reshape(clip_TxHxWx3.shape)


def lab_dropout(clip_TxHxWx3: jax.Array, key: jax.Array) -> jax.Array:
    """Normalised Lab without one of its channels, chosen at random."""
    return lab_without(clip_TxHxWx3, jax.random.randint(key, (), 0, 3))


def lab_without(rgb: jax.Array, channel: jax.Array | int) -> jax.Array:
    """RGB [..., 3] in [0, 1] -> normalised Lab [..., 3] with one channel (0: L, 1: a, 2: b) set to 0."""
    axes = (1,) * (rgb.ndim - 1)
    mean, std = (jnp.array(values).reshape(*axes, 3) for values in (LAB_MEAN, LAB_STD))
    kept = (jnp.arange(3) != channel).reshape(*axes, 3)
    return jnp.where(kept, (rgb_to_lab(rgb) - mean) / std, 0.0)


def rgb_to_lab(rgb: jax.Array) -> jax.Array:
    """sRGB [..., 3] in [0, 1] -> CIE L*a*b* [..., 3] (white D65): L in [0, 100], a and b within about +-108."""
    # Lower-bounded, as the branch that is not taken must not give NaN gradients at 0.
    linear = jnp.where(rgb <= 0.04045, rgb / 12.92, ((jnp.maximum(rgb, 0.04045) + 0.055) / 1.055) ** 2.4)
    # In full precision: by default TPUs multiply float32 matrices in bfloat16.
    xyz = jnp.matmul(linear, jnp.array(XYZ_OF_RGB).T, precision=jax.lax.Precision.HIGHEST)
    x, y, z = (_lab_f(xyz[..., i] / D65[i]) for i in range(3))
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _lab_f(t: jax.Array) -> jax.Array:
    """CIE 15: the cube root, and its tangent below (6/29)^3."""
    delta = 6 / 29
    return jnp.where(t > delta**3, jnp.cbrt(jnp.maximum(t, delta**3)), t / (3 * delta**2) + 4 / 29)


COLORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "jitter_grey": functools.partial(jitter_grey, **AMDIM),
    "jitter": functools.partial(jitter_grey, **AVID),
    "lab": lab_dropout,
    "none": lambda clip_TxHxWx3, key: clip_TxHxWx3,
}
