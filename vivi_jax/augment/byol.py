"""BYOL's photometric augmentation on the accelerator, with VITO's tables (VITO A.1).

The host crops, resizes and flips (input_pipeline); everything that needs no JPEG happens here, per image and with a key
per image, so that an image's augmentation does not depend on how the batch is split over devices or micro-batches.
Each function takes one image float32[H, W, 3] in [0, 1] and is batched with `jax.vmap`.
"""

import jax
import jax.numpy as jnp

from vivi_jax.augment.color import color_jitter, gaussian_blur, solarize, to_grey

# BYOL's two distributions (Grill et al. 2020, table 6), which VITO A.1 adopts "without modification".
# Views 1 and 3 use A1, view 2 uses A2 (VITO A.1). Crop and flip stand in the data section: the host does them.
BYOL_A1 = dict(
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grey_prob=0.2,
    blur_prob=1.0,
    solarize_prob=0.0,
)
BYOL_A2 = dict(BYOL_A1, blur_prob=0.1, solarize_prob=0.2)
BYOL_VIEWS = (BYOL_A1, BYOL_A2, BYOL_A1)


def byol_views(views_BxVxHxWx3: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Augments V views of each example, at most 3, with A1, A2, A1.

    Args:
      views_BxVxHxWx3: uint8, cropped and flipped.
      keys_B: one typed PRNG key per example.

    Returns:
      float32[B, V, H, W, 3] in [0, 1].
    """
    batch, views = views_BxVxHxWx3.shape[:2]
    table_V = {name: jnp.array([row[name] for row in BYOL_VIEWS[:views]]) for name in BYOL_A1}
    keys_BxV = jax.vmap(lambda key: jax.random.split(key, views))(keys_B)
    # One traced copy of the pipeline for all views: the table's rows are data, which keeps the compiled step small.
    over_views = jax.vmap(lambda image, key, row: byol(image, key, **row))
    over_batch = jax.vmap(over_views, in_axes=(0, 0, None))
    return over_batch(views_BxVxHxWx3.astype(jnp.float32) / 255, keys_BxV, table_V)


def byol(
    image: jax.Array,
    key: jax.Array,
    *,
    jitter_prob: float,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    grey_prob: float,
    blur_prob: float,
    solarize_prob: float,
) -> jax.Array:
    """BYOL's photometric pipeline in its order: jitter, grey, blur, solarise, clip (VITO A.1, items 3-6)."""
    jitter_key, jitter_coin, grey_coin, blur_key, blur_coin, solarize_coin = jax.random.split(key, 6)
    size = image.shape[0]
    jittered = color_jitter(image, jitter_key, brightness, contrast, saturation, hue)
    image = jnp.where(jax.random.bernoulli(jitter_coin, jitter_prob), jittered, image)
    image = jnp.where(jax.random.bernoulli(grey_coin, grey_prob), to_grey(image), image)
    # At 224 px a kernel of 23 and std U[0.1, 2.0] (VITO A.1); at other sizes both in proportion. BYOL's code scales the
    # kernel only, which at 64 px would blur away what a 224 px image keeps.
    sigma = jax.random.uniform(blur_key, minval=0.1, maxval=2.0) * size / 224
    blurred = gaussian_blur(image, sigma, radius=int(size / 10 / 2))
    image = jnp.where(jax.random.bernoulli(blur_coin, blur_prob), blurred, image)
    image = jnp.where(jax.random.bernoulli(solarize_coin, solarize_prob), solarize(image), image)
    return jnp.clip(image, 0.0, 1.0)
