"""Colour and blur of one image on the accelerator: the operations that all three systems draw from.

Each function takes one image float32[H, W, 3] in [0, 1], or its three planes, and is batched with `jax.vmap`.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

Planes = tuple[jax.Array, jax.Array, jax.Array]  # one [H, W] per channel


def color_jitter(
    image: jax.Array, key: jax.Array, brightness: float, contrast: float, saturation: float, hue: float
) -> jax.Array:
    """Brightness, contrast, saturation and hue in random order, clipped to [0, 1] after each.

    Brightness adds U(-b, b); contrast multiplies deviations from each channel's mean by U(1-c, 1+c); saturation
    multiplies S in HSV by U(1-s, 1+s); hue adds U(-h, h) turns to H (BYOL's published code; its paper gives the
    magnitudes only).
    """
    order_key, *keys = jax.random.split(key, 5)
    return jitter_in_order(
        image,
        jax.random.permutation(order_key, 4),
        shift=jax.random.uniform(keys[0], minval=-brightness, maxval=brightness),
        contrast_factor=jax.random.uniform(keys[1], minval=1 - contrast, maxval=1 + contrast),
        saturation_factor=jax.random.uniform(keys[2], minval=1 - saturation, maxval=1 + saturation),
        hue_shift=jax.random.uniform(keys[3], minval=-hue, maxval=hue),
    )


def jitter_in_order(
    image: jax.Array,
    order: jax.Array,
    *,
    shift: jax.Array,
    contrast_factor: jax.Array,
    saturation_factor: jax.Array,
    hue_shift: jax.Array,
) -> jax.Array:
    """Brightness (0), contrast (1), saturation (2) and hue (3) in the given order, int[4], clipping after each."""

    def apply(position: int, planes: Planes) -> Planes:
        # All four run, three of them with parameters that change nothing: cheaper than four branches, all of which a
        # batch with an order per image would compute anyway.
        turn = order[position]
        planes = _clipped(plane + jnp.where(turn == 0, shift, 0.0) for plane in planes)
        factor = jnp.where(turn == 1, contrast_factor, 1.0)
        planes = _clipped(adjust_contrast(plane, factor) for plane in planes)
        return _clipped(
            adjust_hsv(planes, jnp.where(turn == 2, saturation_factor, 1.0), jnp.where(turn == 3, hue_shift, 0.0))
        )

    # Apart, the planes are contiguous: on CPUs four times as fast as with the channels innermost.
    return merge(jax.lax.fori_loop(0, 4, apply, split(image)))


def torchvision_jitter(
    image: jax.Array, key: jax.Array, brightness: float, contrast: float, saturation: float, hue: float
) -> jax.Array:
    """Brightness, contrast, saturation and hue in random order, clipped to [0, 1] after each, as torchvision has them.

    Factors are U(1-x, 1+x): brightness multiplies; contrast blends with the mean luma of the image, saturation with
    each pixel's luma; hue adds U(-h, h) turns to H in HSV.
    """
    order_key, *keys = jax.random.split(key, 5)
    return torchvision_jitter_in_order(
        image,
        jax.random.permutation(order_key, 4),
        factors=[
            jax.random.uniform(k, minval=1 - x, maxval=1 + x)
            for k, x in zip(keys, (brightness, contrast, saturation), strict=False)
        ],
        hue_shift=jax.random.uniform(keys[3], minval=-hue, maxval=hue),
    )


def torchvision_jitter_in_order(
    image: jax.Array, order: jax.Array, *, factors: list[jax.Array], hue_shift: jax.Array
) -> jax.Array:
    """Brightness (0), contrast (1), saturation (2), each with its factor, and hue (3) in the given order, int[4]."""

    def apply(position: int, planes: Planes) -> Planes:
        turn = order[position]  # all four run, as in jitter_in_order
        factor = [jnp.where(turn == i, value, 1.0) for i, value in enumerate(factors)]
        planes = _clipped(plane * factor[0] for plane in planes)
        mean = luma(*planes).mean()
        planes = _clipped(mean + (plane - mean) * factor[1] for plane in planes)
        grey = luma(*planes)
        planes = _clipped(grey + (plane - grey) * factor[2] for plane in planes)
        return _clipped(adjust_hsv(planes, 1.0, jnp.where(turn == 3, hue_shift, 0.0)))

    return merge(jax.lax.fori_loop(0, 4, apply, split(image)))


def luma(red: jax.Array, green: jax.Array, blue: jax.Array) -> jax.Array:
    """Luma of ITU-R BT.601, with the weights of torchvision and BYOL's code."""
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def split(image: jax.Array) -> Planes:
    """[..., 3] -> its three channels [...]."""
    return image[..., 0], image[..., 1], image[..., 2]


def merge(planes: Planes) -> jax.Array:
    """[...] three times -> [..., 3]."""
    return jnp.stack(planes, axis=-1)


def _clipped(planes: Iterable[jax.Array]) -> Planes:
    red, green, blue = (jnp.clip(plane, 0.0, 1.0) for plane in planes)
    return red, green, blue


def adjust_contrast(plane: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies the deviations from the channel's mean."""
    mean = plane.mean()
    return (plane - mean) * factor + mean


def adjust_hsv(planes: Planes, saturation_factor: jax.Array | float, hue_shift: jax.Array | float) -> Planes:
    """Multiplies S (clipped to [0, 1]) and turns H by `hue_shift` of a full circle."""
    h, s, v = rgb_to_hsv(*planes)
    h = h + hue_shift
    return hsv_to_rgb(h - jnp.floor(h), jnp.clip(s * saturation_factor, 0.0, 1.0), v)


def rgb_to_hsv(r: jax.Array, g: jax.Array, b: jax.Array) -> Planes:
    """H, S and V in [0, 1], of the same shape; the hexcone model (H = S = 0 for grey)."""
    v = jnp.maximum(jnp.maximum(r, g), b)
    chroma = v - jnp.minimum(jnp.minimum(r, g), b)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    # `red` is in [-1, 1], the other sectors in [1, 3] and [3, 5]: a comparison replaces the remainder and is cheaper.
    red = (g - b) / safe
    # Not v == r and v == g: compilers may compute r for the one side with other roundings than for the other, and then
    # neither holds.
    sector = jnp.where(
        (r >= g) & (r >= b),
        jnp.where(red < 0, red + 6, red),
        jnp.where(g >= b, (b - r) / safe + 2, (r - g) / safe + 4),
    )
    return jnp.where(chroma > 0, sector / 6, 0.0), jnp.where(v > 0, chroma / jnp.where(v > 0, v, 1.0), 0.0), v


def hsv_to_rgb(h: jax.Array, s: jax.Array, v: jax.Array) -> Planes:
    """Inverse of `rgb_to_hsv`, for H in [0, 1]."""

    def channel(offset: int) -> jax.Array:  # 5, 3, 1 for r, g, b: how far the channel lies below V around the hexagon
        k = offset + h * 6
        k = jnp.where(k >= 6, k - 6, k)
        return v - v * s * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)

    return channel(5), channel(3), channel(1)


def to_grey(image: jax.Array) -> jax.Array:
    """Luma, in all three channels."""
    return jnp.broadcast_to(luma(*split(image))[..., None], image.shape)


def solarize(image: jax.Array, threshold: float = 0.5) -> jax.Array:
    """Inverts the values at or above the threshold."""
    return jnp.where(image < threshold, image, 1.0 - image)


def gaussian_blur(image: jax.Array, sigma: jax.Array, radius: int) -> jax.Array:
    """Separable Gaussian blur, kernel 2 * radius + 1, zero padding.

    Written as two products with banded matrices: with a sigma per image a convolution would need one group per image,
    which accelerators run slowly; the products map to the matrix unit.
    """

    def band(size: int) -> jax.Array:
        distance = jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
        weights = jnp.exp(-jnp.square(distance.astype(jnp.float32)) / (2 * sigma**2))
        support = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
        norm = jnp.exp(-jnp.square(support) / (2 * sigma**2)).sum()
        return jnp.where(jnp.abs(distance) <= radius, weights, 0.0) / norm

    height, width, _ = image.shape
    return jnp.einsum("hy,ywc,xw->hxc", band(height), image, band(width))
