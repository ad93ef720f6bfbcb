"""Vision transformer (Dosovitskiy et al. 2021) in the form of MoCo v3 (Chen, Xie & He 2021, arXiv:2104.02057).

A class token is the pooled feature. Positions are fixed sines and cosines of row and column, so that any image size
will do. There is no BatchNorm anywhere. The projection of patches can be frozen at its random start, which MoCo v3
found to keep training stable.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vivi_jax.config import Count
from vivi_jax.errors import ConfigError
from vivi_jax.models.base import Encoder, check_images

EPS = 1e-6  # of LayerNorm: MoCo v3's code, timm


class VisionTransformer(Encoder):
    """ViT image encoder; the defaults are ViT-S/16 as MoCo v3 has it, with 12 heads.

    Attributes:
      patch: side of a patch in pixels. Images are filled up to whole patches with their edge pixels.
      width: channels, a multiple of 4 and of heads.
      depth: blocks.
      heads: of attention.
      freeze_patches: no gradient reaches the projection of patches (MoCo v3).
      image_size: side of the images it is trained on in pixels; for exports, whose positions are of one size.
    """

    patch: Count = 16
    width: Count = 384
    depth: Count = 12
    heads: Count = 12
    freeze_patches: bool = True
    image_size: Count = 224

    def __post_init__(self):
        if min(self.patch, self.width, self.depth, self.heads) < 1 or self.width % 4 or self.width % self.heads:
            raise ConfigError(
                f"VisionTransformer patch={self.patch}, width={self.width}, depth={self.depth}, heads={self.heads}: "
                "all must be 1 or more, and width a multiple of 4 and of heads"
            )
        super().__post_init__()

    @property
    def head_norm(self) -> str:
        return "batch"

    def feature_maps(self) -> tuple[str, ...]:
        return tuple(f"block{i}" for i in range(self.depth, 0, -1))

    def for_transfer(self) -> "VisionTransformer":
        return self.clone(num_classes=None, freeze_patches=False)

    def for_dense(self, output_stride: int, dilate: bool) -> "VisionTransformer":
        return self  # all its maps have one location per patch

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes images.

        Args:
          images: float [B, H, W, 3] in [0, 1].
          train: makes no difference.

        Returns:
          pooled: float32 [B, C], the class token after the last norm.
          intermediates: "block1" ... [B, h, w, C] in `dtype`, the patch tokens after each block, the last ones after
            the last norm; "attention" float32 [B, h, w], what the class token attends to in the last block, averaged
            over heads, its sum over space 1.
        """
        check_images(images)
        rows, columns = (-(-side // self.patch) for side in images.shape[1:3])
        fill = [
            (0, 0),
            *((0, n * self.patch - s) for n, s in zip((rows, columns), images.shape[1:3], strict=True)),
            (0, 0),
        ]
        mean, std = (jnp.asarray(values).reshape(1, 1, 1, 3) for values in (self.input_mean, self.input_std))
        x = (jnp.pad((images - mean) / std, fill, mode="edge")).astype(self.dtype)

        x = PatchProjection(self.patch, self.width, self.freeze_patches, self.dtype, name="patches")(x)  # [B, h, w, C]
        x = x + positions(rows, columns, self.width).astype(x.dtype)[None]
        token = self.param("cls_token", nn.initializers.normal(1e-6), (self.width,))
        tokens = jnp.broadcast_to(token.astype(x.dtype)[None, None], (x.shape[0], 1, self.width))
        x = jnp.concatenate([tokens, x.reshape(x.shape[0], -1, self.width)], axis=1)  # [B, 1 + h w, C]

        maps, attention_BxN = {}, jnp.zeros(x.shape[:2])
        for i in range(1, self.depth + 1):
            x, attention_BxN = Block(self.heads, self.dtype, name=f"block{i}")(x)
            if i == self.depth:
                x = nn.LayerNorm(EPS, dtype=jnp.float32, name="norm")(x).astype(self.dtype)
            maps[f"block{i}"] = x[:, 1:].reshape(x.shape[0], rows, columns, self.width)
        attention = attention_BxN[:, 1:] / attention_BxN[:, 1:].sum(axis=1, keepdims=True)
        maps["attention"] = attention.reshape(x.shape[0], rows, columns)
        return self.classified(x[:, 0].astype(jnp.float32), maps)


class PatchProjection(nn.Module):
    """Non-overlapping patches, each mapped linearly."""

    patch: int
    width: int
    frozen: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, H / patch, W / patch, C]."""
        batch, height, width, channels = x.shape
        shape = (self.patch, self.patch, channels, self.width)
        bound = math.sqrt(6 / (math.prod(shape[:3]) + self.width))  # MoCo v3's code
        # Its own name, as weight decay must not shrink what no gradient holds up (optim.DECAYED).
        kernel = self.param("patch_kernel", uniform(bound), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        if self.frozen:
            kernel, bias = jax.lax.stop_gradient((kernel, bias))
        patches = x.reshape(batch, height // self.patch, self.patch, width // self.patch, self.patch, channels)
        return jnp.einsum("bhpwqc,pqcd->bhwd", patches, kernel.astype(self.dtype)) + bias.astype(self.dtype).reshape(
            1, 1, 1, -1
        )


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a shortcut."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxNxC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the tokens, and float32 [B, N]: how much the first token attends to each, averaged over heads."""
        width = x_BxNxC.shape[-1]
        y = nn.LayerNorm(EPS, dtype=jnp.float32, name="norm1")(x_BxNxC).astype(self.dtype)
        # Three square maps in one product: each starts as Xavier's of its own (MoCo v3's code).
        qkv = self._dense(3 * width, "qkv", uniform(math.sqrt(6 / (2 * width))))(y)
        q, k, v = jnp.moveaxis(qkv.reshape(*y.shape[:2], 3, self.heads, width // self.heads), 2, 0)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / math.sqrt(width // self.heads)
        weights_BxHxNxN = jax.nn.softmax(logits, axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights_BxHxNxN.astype(self.dtype), v).reshape(y.shape)
        x = x_BxNxC + self._dense(width, "proj")(y)
        y = nn.LayerNorm(EPS, dtype=jnp.float32, name="norm2")(x).astype(self.dtype)
        y = nn.gelu(self._dense(4 * width, "mlp1")(y), approximate=False)
        return x + self._dense(width, "mlp2")(y), weights_BxHxNxN[:, :, 0].mean(axis=1)

    def _dense(self, features: int, name: str, init: Any = None) -> nn.Dense:
        return nn.Dense(features, kernel_init=init or xavier(), dtype=self.dtype, name=name)


xavier = nn.initializers.xavier_uniform


def uniform(bound: float) -> Any:
    """Initialiser: U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def positions(rows: int, columns: int, width: int) -> jax.Array:
    """float32 [rows, columns, width]: sines and cosines of the row, then of the column; wavelengths to 20000 pi."""
    frequencies = 10000.0 ** (-jnp.arange(width // 4) / (width // 4))
    y = jnp.arange(rows, dtype=jnp.float32)[:, None] * frequencies[None]
    x = jnp.arange(columns, dtype=jnp.float32)[:, None] * frequencies[None]
    waves_y = jnp.concatenate([jnp.sin(y), jnp.cos(y)], axis=-1)[:, None]
    waves_x = jnp.concatenate([jnp.sin(x), jnp.cos(x)], axis=-1)[None]
    shape = (rows, columns, width // 2)
    return jnp.concatenate([jnp.broadcast_to(waves_y, shape), jnp.broadcast_to(waves_x, shape)], axis=-1)
