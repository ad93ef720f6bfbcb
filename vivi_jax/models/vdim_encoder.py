"""VDIM's (2+1)D clip encoder (Hjelm & Bachman 2020, Table 1): AMDIM's image encoder with convolutions over time.

A block convolves in space (k_s x k_s, stride s_s) and then in time (k_t, stride s_t). Nothing is padded after row 1, so
the features of "Local 1" and "Local 2" see only a patch of the clip each, while "Global" sees all of it.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from vivi_jax.config import Count, Positive
from vivi_jax.errors import ConfigError
from vivi_jax.models.base import Encoder, check_choice, check_images
from vivi_jax.models.resnet import NORMS, channelwise, make_norm


class ConvRow(NamedTuple):
    """ConvBlock(k_s, k_t, s_s, s_t, use_bn) of Table 1; use_bn is False in all rows. `pad`: positions on each side."""

    channels: int
    k_s: int
    k_t: int
    s_s: int
    s_t: int
    pad: int
    view: str = ""


class ResRow(NamedTuple):
    """ResBlock(k_s, s_s, k_t, s_t, n) of Table 1: a residual unit with these kernels, then n with kernels of 1."""

    channels: int
    k_s: int
    s_s: int
    k_t: int
    s_t: int
    n: int
    view: str = ""  # the name of the row's output among the intermediates


TABLES = {
    # The paper's Table 1, for 32 frames of 128 x 128. It prints spatial strides of 1 in rows 3, 4 and 5 and a temporal
    # one of 1 in row 5, with which its sizes do not come out; with 2 all of them do, and the spatial ones are AMDIM's.
    # The first number of its size column, headed "B", is channels. Padding is not printed: 2 in row 1 follows from the
    # sizes. n is read as "n units after the strided one": that gives the paper's 17.3 M parameters, n - 1 does not.
    "paper": (  # row     C x  T x  H x  W    sees frames, pixels
        ConvRow(64, 5, 5, 2, 2, pad=2),  # 1      64 x 16 x 64 x 64     5,   5
        ConvRow(64, 3, 3, 1, 1, pad=0),  # 2      64 x 14 x 62 x 62     9,   9
        ResRow(128, 4, 2, 1, 1, 3),  # 3     128 x 14 x 30 x 30     9,  15
        ResRow(256, 4, 2, 1, 1, 3),  # 4     256 x 14 x 14 x 14     9,  27
        ResRow(512, 2, 2, 2, 2, 3, view="local1"),  # 5     512 x  7 x  7 x  7    11,  35
        ResRow(512, 3, 1, 3, 1, 3, view="local2"),  # 6     512 x  5 x  5 x  5    19,  67
        ResRow(512, 3, 1, 3, 1, 3),  # 7     512 x  3 x  3 x  3    27,  99
        ResRow(512, 3, 1, 3, 1, 0, view="global"),  # 8     512 x  1 x  1 x  1    35, 131
    ),
    # Ours, for 8 frames of 48 x 48 and two CPU cores: the same blocks, fewer and narrower, on patches of 4 x 4.
    "small": (
        ConvRow(32, 4, 2, 4, 1, pad=0),  # 1      32 x  7 x 12 x 12     2,   4
        ConvRow(32, 3, 3, 1, 1, pad=0),  # 2      32 x  5 x 10 x 10     4,  12
        ResRow(64, 4, 2, 1, 1, 1),  # 3      64 x  5 x  4 x  4     4,  24
        ResRow(128, 2, 1, 2, 1, 1, view="local1"),  # 4     128 x  4 x  3 x  3     5,  32
        ResRow(128, 2, 1, 2, 1, 1, view="local2"),  # 5     128 x  3 x  2 x  2     6,  40
        ResRow(128, 2, 1, 3, 1, 0, view="global"),  # 6     128 x  1 x  1 x  1     8,  48
    ),
}


def fan_in_uniform(variance: float) -> Callable:
    """Initialiser of kernels [..., C, C']: uniform, of this variance divided by the inputs of an output."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        bound = math.sqrt(3 * variance / math.prod(shape[:-1]))
        # Drawn flat, which XLA:CPU compiles several times as fast; the values are the same.
        return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)

    return init


# AMDIM: torch's default in the first convolution of a unit, zeros in the second, so that a unit begins as its shortcut.
# In ConvBlocks, which have no shortcut, He's: torch's default would shrink the signal some thousandfold over four.
UNIT_INIT, CONV_BLOCK_INIT = fan_in_uniform(1 / 3), fan_in_uniform(2)


class VdimEncoder(Encoder):
    """Clip encoder; also takes images, which it repeats in time.

    Attributes:
      table: "paper" or "small", of TABLES.
      width: multiplier of all channel counts.
      frames: length in time to which single images are repeated; clips have their own.
      norm: "batch" (decay 0.9, eps 1e-5, over the whole global batch) or "group" (32 groups, for which one location
        needs channels enough), on the global layer only: the paper has it "on the output of the encoder", none inside.
      input_mean, input_std: (0, 0, 0) and (1, 1, 1) for normalised Lab.
    """

    table: str = "paper"
    width: Positive = 1
    frames: Count = 32
    norm: str = "batch"

    def __post_init__(self):
        for field, known in (("table", tuple(TABLES)), ("norm", NORMS)):
            check_choice("VdimEncoder", field, getattr(self, field), known)
        if round(TABLES[self.table][0].channels * self.width) < 1:
            raise ConfigError(f"VdimEncoder width={self.width!r}: leaves no channels in row 1")
        super().__post_init__()

    @property
    def head_norm(self) -> str:
        return self.norm

    def feature_maps(self) -> tuple[str, ...]:
        return ("global", "local2", "local1")

    def for_transfer(self) -> "VdimEncoder":
        return self.clone(num_classes=None)

    def for_dense(self, output_stride: int, dilate: bool) -> "VdimEncoder":
        return self  # its strides are part of what its layers see

    @nn.compact
    def __call__(self, clips: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes clips or images of any size that leaves the global layer a location or more.

        Args:
          clips: float [B, T, H, W, 3], or images [B, H, W, 3]; RGB in [0, 1] with the default input_mean.
          train: BatchNorm uses the batch's statistics and updates `batch_stats` (make that collection mutable).

        Returns:
          pooled: float32 [B, C], the mean over the global layer's locations (one, at the size of the table).
          intermediates: "local1", "local2", "global" [B, t, h, w, C'] in `dtype`, "global" after its norm.

        Raises:
          ValueError: input of another shape or type.
          ConfigError: clips too short or too small for the table.
        """
        check_images(clips, dims=(4, 5))
        if clips.ndim == 4:
            clips = jnp.broadcast_to(clips[:, None], (clips.shape[0], self.frames, *clips.shape[1:]))
        x = ((clips - channelwise(self.input_mean, 5)) / channelwise(self.input_std, 5)).astype(self.dtype)

        views = {}
        for i, row in enumerate(TABLES[self.table], 1):
            check_size(x.shape, row, i, clips.shape)
            row = row._replace(channels=round(row.channels * self.width))
            if isinstance(row, ConvRow):
                x = ConvBlock(row, dtype=self.dtype, name=f"block{i}")(x)
            else:
                x = ResBlock(row, dtype=self.dtype, name=f"block{i}")(x)
            if row.view == "global":
                x = make_norm(self.norm, dtype=self.dtype, name="norm")(x, train)
            if row.view:
                views[row.view] = x  # [B, t, h, w, C]
        return self.classified(x.astype(jnp.float32).mean(axis=(1, 2, 3)), views)


def check_size(shape: tuple[int, ...], row: ConvRow | ResRow, index: int, clips: tuple[int, ...]) -> None:
    """Raises ConfigError if a row's kernels do not fit into its input [B, T, H, W, C]."""
    pad = row.pad if isinstance(row, ConvRow) else 0
    _, frames, height, width, _ = shape
    if frames + 2 * pad < row.k_t or min(height, width) + 2 * pad < row.k_s or min(height, width) <= pad:
        raise ConfigError(
            f"clips of {clips[1]} frames of {clips[2]} x {clips[3]} pixels are too small for the VDIM "
            f"encoder: row {index} needs {row.k_t} frames of {row.k_s} x {row.k_s}, it gets {frames} of "
            f"{height} x {width}; use longer or larger clips, or encoder.table='small'"
        )


class ConvBlock(nn.Module):
    """Convolution in space, ReLU, convolution in time, ReLU (Fig. 2a); both with a bias, having no norm."""

    row: ConvRow
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, t, h, w, C']."""
        row, pad = self.row, (self.row.pad, self.row.pad)
        conv = dict(features=row.channels, bias=True, init=CONV_BLOCK_INIT, dtype=self.dtype)
        x = jnp.pad(x, ((0, 0), (0, 0), pad, pad, (0, 0)), mode="reflect")  # AMDIM
        x = nn.relu(SpatialConv(k=row.k_s, stride=row.s_s, name="spatial", **conv)(x))
        x = jnp.pad(x, ((0, 0), pad, (0, 0), (0, 0), (0, 0)))  # in time zeros: the paper does not say
        return nn.relu(TemporalConv(k=row.k_t, stride=row.s_t, name="temporal", **conv)(x))


class ResBlock(nn.Module):
    """A unit with the row's kernels and strides, then n units with kernels of 1 (Fig. 2b)."""

    row: ResRow
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, t, h, w, C']."""
        x = ResUnit(self.row, dtype=self.dtype, name="unit1")(x)
        pointwise = ResRow(self.row.channels, k_s=1, s_s=1, k_t=1, s_t=1, n=0)
        for i in range(self.row.n):
            x = ResUnit(pointwise, dtype=self.dtype, name=f"unit{i + 2}")(x)
        return x


class ResUnit(nn.Module):
    """AMDIM's ConvResNxN, its second convolution over time: conv, ReLU, conv, plus the average over the same window."""

    row: ResRow
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, t, h, w, C'], C' >= C."""
        row = self.row
        y = SpatialConv(row.channels, row.k_s, row.s_s, init=UNIT_INIT, dtype=self.dtype, name="spatial")(x)
        y = TemporalConv(row.channels, row.k_t, row.s_t, init=nn.initializers.zeros, dtype=self.dtype, name="temporal")(
            nn.relu(y)
        )
        for axis, k, stride in ((1, row.k_t, row.s_t), (2, row.k_s, row.s_s), (3, row.k_s, row.s_s)):
            x = average_pool(x, axis, k, stride)
        return y + jnp.pad(x, ((0, 0),) * 4 + ((0, row.channels - x.shape[-1]),))


class SpatialConv(nn.Module):
    """k x k convolution of every frame, without padding."""

    features: int
    k: int
    stride: int
    init: Callable
    bias: bool = False
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, T, h, w, features]."""
        kernel = self.param("kernel", self.init, (self.k, self.k, x.shape[-1], self.features)).astype(self.dtype)
        if self.k == 1:  # as a matmul: a 1x1 convolution's weight gradient is slow on XLA:CPU (resnet.Conv)
            if self.stride > 1:
                x = lax.slice(x, (0,) * 5, x.shape, (1, 1, self.stride, self.stride, 1))
            y = matmul(x, kernel[0, 0])
        else:
            y = lax.conv_general_dilated(
                x.reshape(-1, *x.shape[2:]),
                kernel,
                (self.stride,) * 2,
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            y = y.reshape(*x.shape[:2], *y.shape[1:])
        return add_bias(self, y) if self.bias else y


class TemporalConv(nn.Module):
    """Convolution of k frames at each place, without padding."""

    features: int
    k: int
    stride: int
    init: Callable
    bias: bool = False
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, t, H, W, features]."""
        kernel = self.param("kernel", self.init, (self.k, x.shape[-1], self.features)).astype(self.dtype)
        # A matmul per tap: on XLA:CPU a step is twice as fast as with a k x 1 convolution.
        products = (matmul(tap, kernel[i]) for i, tap in enumerate(taps(x, 1, self.k, self.stride)))
        y = functools.reduce(operator.add, products)
        return add_bias(self, y) if self.bias else y


def add_bias(module: nn.Module, y: jax.Array) -> jax.Array:
    """Adds the module's parameter "bias" [C], zeros at first, to [..., C]."""
    bias = module.param("bias", nn.initializers.zeros, (y.shape[-1],))
    return y + channelwise(bias.astype(y.dtype), y.ndim)


def matmul(x: jax.Array, kernel_CxD: jax.Array) -> jax.Array:
    """[..., C] -> [..., D], over two axes (why: resnet.Conv)."""
    return (x.reshape(-1, x.shape[-1]) @ kernel_CxD).reshape(*x.shape[:-1], -1)


def taps(x: jax.Array, axis: int, k: int, stride: int) -> list[jax.Array]:
    """Strided slices of x, one for each of the k places in a window: (n - k) // stride + 1 positions along `axis`."""
    last = (x.shape[axis] - k) // stride * stride
    return [lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(k)]


def average_pool(x: jax.Array, axis: int, k: int, stride: int) -> jax.Array:
    """Mean over sliding windows along one axis, without padding; one axis at a time is fast on XLA:CPU."""
    return functools.reduce(operator.add, taps(x, axis, k, stride)) / k
