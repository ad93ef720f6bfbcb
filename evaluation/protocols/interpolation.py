"""For protocols that predict at every location: finer feature maps, and bilinear interpolation as matrix products."""

import jax
import jax.numpy as jnp

from vivi_jax.models.base import Encoder

EXACT = jax.lax.Precision.HIGHEST  # TPUs would round the factors of these products to bfloat16


def dense_encoder(encoder: Encoder, depth: int, *, output_stride: int, dilate: bool) -> tuple[Encoder, str]:
    """Returns (the encoder with finer feature maps, name of the map to take): 0, the last one, or 1, that before it.

    With fewer strides a ResNet's maps have 1/16 or 1/8 of the image's sides; its weights are the same.
    """
    return encoder.for_transfer().for_dense(output_stride, dilate), encoder.feature_maps()[depth]


def as_map(features: jax.Array) -> jax.Array:
    """[B, h, w, C] unchanged; [B, t, h, w, C], of an image that VDIM's encoder repeated in time, averaged over t."""
    return features.mean(axis=1) if features.ndim == 5 else features


def linear_weights(positions_N: jax.Array, length: int) -> jax.Array:
    """float32[N, length]: row i reads a sequence of `length` values linearly at positions_N[i] in [0, length - 1]."""
    distance_NxL = jnp.abs(positions_N[:, None] - jnp.arange(length, dtype=jnp.float32)[None])
    return jnp.maximum(1 - distance_NxL, 0)


def aligned(size: int, length: int) -> jax.Array:
    """float32[size] positions in a sequence of `length`: first on first, last on last ("align_corners=True")."""
    return jnp.linspace(0, length - 1, size, dtype=jnp.float32)


def upsample(maps_BxhxwxC: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear, corners aligned: float32[B, height, width, C]."""
    rows = linear_weights(aligned(height, maps_BxhxwxC.shape[1]), maps_BxhxwxC.shape[1])
    columns = linear_weights(aligned(width, maps_BxhxwxC.shape[2]), maps_BxhxwxC.shape[2])
    return jnp.einsum("Yh,bhwc,Xw->bYXc", rows, maps_BxhxwxC, columns, precision=EXACT)
