"""Photometric augmentation of VIVI."""
import jax
import jax.numpy as jnp


def augment(images: jax.Array, keys: jax.Array, *, color: str, hsv: bool, grey_prob: float) -> jax.Array:
    """uint8[N, H, W, 3] -> float32 in [0, 1]."""
    del keys, color, hsv, grey_prob
    return images.astype(jnp.float32) / 255
