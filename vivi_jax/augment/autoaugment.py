"""AutoAugment's ImageNet policy (Cubuk et al. 2019) on the accelerator, with Pillow's arithmetic.

Each function takes one image float32[H, W, 3] of whole numbers in 0..255 and returns such an image. The policy is the
paper's list as torchvision gives it (AutoAugmentPolicy.IMAGENET); there is another under this name in circulation.
"""

import jax
import jax.numpy as jnp

GREY = 128.0  # fills what a rotation or shear brings in from outside: replace_value of AutoAugment's TensorFlow code

# Two triples (operation, probability, level 0..9) a line. Each image draws one of the 25 lines.
POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)


def autoaugment(image: jax.Array, key: jax.Array) -> jax.Array:
    """One random sub-policy on one image float32[H, W, 3] in [0, 1], which is rounded to 256 levels first.

    All operations are computed and one is kept: in one program over a batch that is split over devices, an image cannot
    take a branch of its own. Next to the encoder they cost little.
    """
    policy_key, *keys = jax.random.split(key, 3)
    policy = jax.random.randint(policy_key, (), 0, len(POLICY))
    names = list(OPERATIONS)
    operation, probability, level = (
        jnp.array([[(names.index(op[0]), *op[1:])[i] for op in pair] for pair in POLICY])[policy] for i in range(3)
    )
    keys = jnp.stack(keys)

    def apply(turn: int, image: jax.Array) -> jax.Array:  # a loop of two, so that each operation is compiled once
        coin_key, sign_key = jax.random.split(keys[turn])
        sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
        applied = jax.lax.switch(
            operation[turn], list(OPERATIONS.values()), image, level[turn].astype(jnp.float32), sign
        )
        return jnp.where(jax.random.bernoulli(coin_key, probability[turn]), applied, image)

    return jax.lax.fori_loop(0, 2, apply, jnp.round(image * 255)) / 255


# ---- Operations: (image, level 0..9, sign -1 or 1) -> image ---------------------------------------------------------
def rotate(image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """By up to 30 degrees either way about the middle, nearest pixels."""
    angle = jnp.deg2rad(sign * level * 30 / 9)
    height, width = image.shape[:2]
    y, x = pixel_centres(height, width)
    dy, dx = y - height / 2, x - width / 2
    return sample_nearest(
        image,
        jnp.sin(angle) * dx + jnp.cos(angle) * dy + height / 2,
        jnp.cos(angle) * dx - jnp.sin(angle) * dy + width / 2,
    )


def shear_x(image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Each row by up to 0.3 of its distance from the top, nearest pixels."""
    y, x = pixel_centres(*image.shape[:2])
    return sample_nearest(image, y, x + sign * level * 0.3 / 9 * y)


def color(image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Saturation: away from or towards the grey image by up to 0.9."""
    return blend(luma(image)[..., None], image, 1 + sign * level * 0.9 / 9)


def contrast(image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Away from or towards the mean grey level by up to 0.9."""
    return blend(jnp.floor(luma(image).mean(keepdims=True) + 0.5)[..., None], image, 1 + sign * level * 0.9 / 9)


def sharpness(image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Away from or towards a smoothed image by up to 0.9; the outermost pixels have no smoothed value and stay."""
    height, width = image.shape[:2]
    inner = slice(1, height - 1), slice(1, width - 1)
    around = sum(image[dy : height - 2 + dy, dx : width - 2 + dx] for dy in range(3) for dx in range(3))
    smooth = image.at[inner].set(jnp.floor((around + 4 * image[inner]) / 13 + 0.5))
    return blend(smooth, image, 1 + sign * level * 0.9 / 9)


def posterize(image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Keeps the 8 to 4 highest bits."""
    del sign
    step = 2.0 ** jnp.round(4 * level / 9)
    return jnp.floor(image / step) * step


def solarize(image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Inverts the values at or above a threshold that falls from 255 (level 0) to 0 (level 9)."""
    del sign
    return jnp.where(image < 255 * (1 - level / 9), image, 255 - image)


def autocontrast(image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Stretches each channel to 0..255."""
    del level, sign
    low, high = image.min(axis=(0, 1), keepdims=True), image.max(axis=(0, 1), keepdims=True)
    stretched = jnp.clip(jnp.floor((image - low) * 255 / jnp.maximum(high - low, 1) + 1e-4), 0, 255)
    return jnp.where(high > low, stretched, image)


def equalize(image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Makes the histogram of each channel flat."""
    del level, sign

    def channel(values_P: jax.Array) -> jax.Array:
        values_P = values_P.astype(jnp.int32)
        counts = jax.lax.platform_dependent(values_P, tpu=count_by_comparison, default=count_by_scatter)
        step = (values_P.size - counts[values_P.max()]) // 255
        below = jnp.cumsum(counts) - counts
        table = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, table[values_P], values_P)

    flat_PxC = image.reshape(-1, image.shape[-1])
    return jax.vmap(channel, in_axes=1, out_axes=1)(flat_PxC).reshape(image.shape).astype(image.dtype)


def count_by_comparison(values_P: jax.Array) -> jax.Array:
    """How often each of 256 levels occurs: each pixel is compared with every level, without memory and scatter."""
    return (values_P[:, None] == jnp.arange(256)[None]).sum(axis=0)


def count_by_scatter(values_P: jax.Array) -> jax.Array:
    """The same, 50 times faster on a CPU at 224 px; TPUs run scatters one update after the other."""
    return jnp.zeros(256, jnp.int32).at[values_P].add(1)


def invert(image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """255 minus the image."""
    del level, sign
    return 255 - image


OPERATIONS = {
    "rotate": rotate,
    "shear_x": shear_x,
    "color": color,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
}


# ---- What they share ------------------------------------------------------------------------------------------------
def luma(image: jax.Array) -> jax.Array:
    """Grey levels [H, W], rounded (ITU-R 601-2)."""
    return jnp.floor((image @ jnp.array([19595.0, 38470.0, 7471.0]) + 32768) / 65536)


def blend(other: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """other + factor * (image - other), clipped and cut to whole numbers."""
    # The small number makes up for float32, where a whole result may come out just below.
    return jnp.floor(jnp.clip(other + factor * (image - other), 0, 255) + 1e-4)


def pixel_centres(height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """y, x float32[H, W]."""
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    return y, x


def sample_nearest(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """The pixels that hold the points (y, x), [H, W] each; GREY outside."""
    height, width = image.shape[:2]
    row, column = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return jnp.where(inside[..., None], image[row.clip(0, height - 1), column.clip(0, width - 1)], GREY)
