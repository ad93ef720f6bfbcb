"""Swin transformer (Liu et al. 2021, arXiv:2103.14030), numerically torchvision's `swin_t` and `swin_s`.

VITO's second backbone. Its §4.3 says that results "scale well when using Swin transformers (see Sec. A.4)"; the
appendix at hand has no A.4, so that size, stochastic depth, feature maps and optimizer are not known.

Feature maps come out normalised, each place over its channels, as pooling, label propagation and pyramids need: the
residual stream grows from block to block. stage4 has the network's own last norm. stage1 to stage3 have none in the
network (detectors on Swin add new ones), so theirs is without scale and offset: the parameters are the published ones,
and what reads the maps begins with a linear layer.

Sizes are treated as torchvision does: pixels beyond the last whole patch are left out; maps that are no whole windows
are filled with zeros, which are attended to, then shifted (timm shifts first, and differs there); odd maps are filled
with a row or column of zeros before merging. Windows larger than the map are not shifted.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vivi_jax.config import Count, Decay
from vivi_jax.errors import ConfigError
from vivi_jax.models.base import Encoder, check_images

EPS = 1e-5  # of LayerNorm
MASKED = -100.0  # added to logits between parts of a window that are no neighbours in the image: Swin's code
TABLE = "relative_position_bias_table"
MLP_RATIO = 4  # Swin §3.3


class SwinTransformer(Encoder):
    """Swin image encoder; the defaults are Swin-T, and depths=(2, 2, 18, 2) is Swin-S (Swin §3.3).

    Attributes:
      width: channels of stage1; each further stage has twice as many.
      depths: blocks of the four stages.
      heads: of attention, in the four stages; they divide the channels.
      window: places of a window's side.
      patch: side of a patch in pixels.
      stochastic_depth: probability that the last block's branches are left out in training, per example; that of the
        others grows linearly from 0 at the first (Huang et al. 2016). > 0 needs keys from the method, see `drop`.
      remat: recompute each block in the backward pass: less memory, about a third more time.
    """

    width: Count = 96
    depths: tuple[Count, ...] = (2, 2, 6, 2)
    heads: tuple[Count, ...] = (3, 6, 12, 24)
    window: Count = 7
    patch: Count = 4
    stochastic_depth: Decay = 0.0
    remat: bool = False

    def __post_init__(self):
        sizes = (self.width, self.window, self.patch, *self.depths, *self.heads)
        if len(self.depths) != 4 or len(self.heads) != 4 or min(sizes) < 1:
            raise ConfigError(
                f"SwinTransformer width={self.width}, depths={self.depths}, heads={self.heads}, window={self.window}, "
                f"patch={self.patch}: depths and heads need four numbers, and all must be 1 or more"
            )
        if wrong := [i for i, heads in enumerate(self.heads) if self.width * 2**i % heads]:
            raise ConfigError(
                f"SwinTransformer heads={self.heads}: {self.heads[wrong[0]]} do not divide the "
                f"{self.width * 2 ** wrong[0]} channels of stage{wrong[0] + 1}"
            )
        if not 0 <= self.stochastic_depth < 1:
            raise ConfigError(f"SwinTransformer stochastic_depth={self.stochastic_depth!r}: must be from 0 to below 1")
        super().__post_init__()

    @property
    def head_norm(self) -> str:
        return "batch"

    def feature_maps(self) -> tuple[str, ...]:
        return ("stage4", "stage3", "stage2", "stage1")

    def for_transfer(self) -> "SwinTransformer":
        return self.clone(num_classes=None, stochastic_depth=0.0)

    def for_dense(self, output_stride: int, dilate: bool) -> "SwinTransformer":
        return self  # its strides are merged patches, whose weights need them

    def without_noise(self) -> "SwinTransformer":
        return self.clone(stochastic_depth=0.0)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes images.

        Args:
          images: float [B, H, W, 3] in [0, 1], H and W at least `patch`.
          train: blocks are left out at random if stochastic_depth > 0.

        Returns:
          pooled: float32 [B, C], the spatial mean of stage4.
          intermediates: "stage1".."stage4" [B, h, w, c] in `dtype`, normalised (at 224 px and patches of 4: 56, 28, 14,
            7); and "logits" float32 [B, num_classes] if there is a classifier.

        Raises:
          ValueError: images that are not floating point [B, H, W, 3].
          ConfigError: images smaller than a patch, or a method that gives no keys for stochastic depth.
        """
        check_images(images)
        if min(images.shape[1:3]) < self.patch:
            raise ConfigError(f"images of {images.shape[1:3]} pixels are smaller than a patch of {self.patch}")
        keys_B = self.drop_keys() if train and self.stochastic_depth else None
        mean, std = (jnp.asarray(values).reshape(1, 1, 1, 3) for values in (self.input_mean, self.input_std))
        x = ((images - mean) / std).astype(self.dtype)
        x = nn.Conv(
            self.width, (self.patch,) * 2, self.patch, "VALID", kernel_init=patch_init, bias_init=zeros,
            dtype=self.dtype, name="patches",
        )(x)  # fmt: skip
        x = self.norm("patches_norm", x)

        make_block = nn.remat(Block) if self.remat else Block
        rates, maps, block = np.linspace(0, self.stochastic_depth, sum(self.depths)), {}, 0
        for stage, depth in enumerate(self.depths, 1):
            if stage > 1:
                x = self.merge(x, stage)
            for i in range(1, depth + 1):
                x = make_block(
                    heads=self.heads[stage - 1],
                    window=self.window,
                    shift=0 if i % 2 else self.window // 2,
                    rate=float(rates[block]) if keys_B is not None else 0.0,
                    number=block,
                    dtype=self.dtype,
                    name=f"stage{stage}_block{i}",
                )(x, keys_B)
                block += 1
            plain = nn.LayerNorm(EPS, dtype=jnp.float32, use_bias=False, use_scale=False)
            maps[f"stage{stage}"] = self.norm("norm", x) if stage == 4 else plain(x).astype(self.dtype)
        pooled = maps["stage4"].astype(jnp.float32).mean(axis=(1, 2))
        return self.classified(pooled, maps)

    def drop_keys(self) -> jax.Array:
        """A key per example [B], from the method: the variable "keys" of the encoder's collection "noise".

        A key for each row, so that what an example becomes does not hang on how the batch is split.
        """
        if not self.has_variable("noise", "keys"):
            raise ConfigError(
                f"config.encoder.stochastic_depth={self.stochastic_depth}: this method leaves out no blocks: set 0"
            )
        return self.get_variable("noise", "keys")

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(EPS, dtype=jnp.float32, name=name)(x).astype(self.dtype)

    def merge(self, x: jax.Array, stage: int) -> jax.Array:
        """Neighbouring 2x2 places become one: [B, h, w, C] -> [B, ceil(h / 2), ceil(w / 2), 2 C]."""
        batch, height, width, channels = x.shape
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        x = x.reshape(batch, -(-height // 2), 2, -(-width // 2), 2, channels)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(*x.shape[:2], x.shape[3], 4 * channels)  # columns before rows: Swin's
        x = self.norm(f"stage{stage}_merge_norm", x)
        dense = nn.Dense(
            2 * channels, use_bias=False, kernel_init=dense_init, dtype=self.dtype, name=f"stage{stage}_merge"
        )
        return dense(x)


class Block(nn.Module):
    """Attention within windows, and an MLP, each behind a LayerNorm and beside a shortcut.

    Attributes:
      shift: places that the windows are moved by, down and right.
      rate: probability that a branch is left out; the others are scaled by 1 / (1 - rate), so that the mean stays.
      number: of the block, which makes its random numbers its own.
    """

    heads: int
    window: int
    shift: int
    rate: float
    number: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        """[B, h, w, C] -> the same."""
        channels = x.shape[-1]
        y = nn.LayerNorm(EPS, dtype=jnp.float32, name="norm1")(x).astype(self.dtype)
        x = x + self.drop(self.attend(y), keys_B, 0)
        y = nn.LayerNorm(EPS, dtype=jnp.float32, name="norm2")(x).astype(self.dtype)
        y = nn.gelu(self.dense(MLP_RATIO * channels, "mlp1")(y), approximate=False)
        return x + self.drop(self.dense(channels, "mlp2")(y), keys_B, 1)

    def attend(self, x: jax.Array) -> jax.Array:
        """Attention of each place to its window: [B, h, w, C] -> the same."""
        size, (batch, height, width, channels) = self.window, x.shape
        rows, columns = -(-height // size), -(-width // size)  # of windows
        x = jnp.pad(x, ((0, 0), (0, rows * size - height), (0, columns * size - width), (0, 0)))
        shifts = 0 if rows == 1 else self.shift, 0 if columns == 1 else self.shift
        x = jnp.roll(x, [-shift for shift in shifts], axis=(1, 2))
        x = x.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
        x = x.reshape(batch, rows * columns, size**2, channels)  # [B, windows, places, C]

        qkv = self.dense(3 * channels, "qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:3], 3, self.heads, channels // self.heads), 3, 0)
        q = q * (channels // self.heads) ** -0.5
        logits = jnp.einsum("bwqhd,bwkhd->bwhqk", q, k).astype(jnp.float32)
        table = self.param(TABLE, nn.initializers.normal(0.02), ((2 * size - 1) ** 2, self.heads))
        logits = logits + table[relative_positions(size)].transpose(2, 0, 1)[None, None]
        if any(shifts):
            logits = logits + separate_parts(rows, columns, size, shifts)[None, :, None]
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        x = jnp.einsum("bwhqk,bwkhd->bwqhd", weights, v).reshape(x.shape)
        x = self.dense(channels, "proj")(x)

        x = x.reshape(batch, rows, columns, size, size, channels).swapaxes(2, 3)
        x = x.reshape(batch, rows * size, columns * size, channels)
        return jnp.roll(x, shifts, axis=(1, 2))[:, :height, :width]

    def dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, kernel_init=dense_init, dtype=self.dtype, name=name)

    def drop(self, y: jax.Array, keys_B: jax.Array | None, branch: int) -> jax.Array:
        """Stochastic depth: the branch of an example is zero with probability `rate`."""
        if keys_B is None or not self.rate:
            return y
        kept_B = jax.vmap(
            lambda key: jax.random.bernoulli(jax.random.fold_in(key, 2 * self.number + branch), 1 - self.rate)
        )(keys_B)
        return jnp.where(kept_B.reshape(-1, 1, 1, 1), y / (1 - self.rate), 0).astype(y.dtype)


def relative_positions(size: int) -> np.ndarray:
    """int[size^2, size^2]: row of the table for (query, key), by the offset of their rows, then of their columns.

    >>> relative_positions(2)[0]  # from the upper left place: to itself, right, down, down and right
    array([4, 3, 1, 0])
    """
    rows, columns = np.divmod(np.arange(size**2), size)
    offset = [along[:, None] - along[None] + size - 1 for along in (rows, columns)]
    return offset[0] * (2 * size - 1) + offset[1]


def separate_parts(rows: int, columns: int, size: int, shifts: tuple[int, int]) -> np.ndarray:
    """float32[windows, size^2, size^2]: MASKED where query and key met only because shifting wraps around, else 0."""
    parts = np.zeros((rows * size, columns * size), np.int32)
    for axis, shift in enumerate(shifts):
        if shift:
            place = np.arange(parts.shape[axis])
            part = (place >= parts.shape[axis] - size).astype(np.int32) + (place >= parts.shape[axis] - shift)
            parts = 3 * parts + np.expand_dims(part, 1 - axis)
    parts = parts.reshape(rows, size, columns, size).swapaxes(1, 2).reshape(rows * columns, size**2)
    return np.where(parts[:, :, None] == parts[:, None], 0, MASKED).astype(np.float32)


dense_init = nn.initializers.normal(0.02)  # Swin's code
zeros = nn.initializers.zeros


def patch_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """torch's initial kernels of convolutions, which Swin's code keeps: U(-b, b), b = 1 / sqrt(kh * kw * C)."""
    bound = 1 / math.sqrt(math.prod(shape[:3]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)
