"""ResNet for images: depths 18 to 200, v1 and v2, BatchNorm or GroupNorm + weight standardisation, any width.

v1 is "ResNet v1.5" (He et al. 2015, with the stride on the 3x3 convolution), numerically torchvision's `resnet50`:
VITO's encoder. v2 is the pre-activation form (He et al. 2016) in the variant of VIVI and BiT: the shortcut's projection
comes after the first norm + ReLU, the root convolution has no norm, a final norm + ReLU closes the network.

Padding is torch's: symmetric, also at stride 2. TensorFlow's and haiku's "SAME" is not: at even sizes it shifts the
grid by a pixel, so that the same weights make another function. Networks from there have padding="same".
A stage's map is what the next stage reads: in v2 after that stage's first norm + ReLU, as the blocks' sum itself has no
fixed scale (attention pooling of it starts on a single place).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from vivi_jax.config import Count, Decay, NonNegative, Positive
from vivi_jax.errors import ConfigError
from vivi_jax.models.base import Encoder, check_choice, check_images

# depth -> (blocks per stage, bottleneck?). He et al. 2015, table 1; 200: He et al. 2016.
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}
NORMS = ("batch", "group")
STEMS = ("imagenet", "small")
OUTPUT_STRIDES = (8, 16, 32)
PADDINGS = ("torch", "same")


class ResNet(Encoder):
    """ResNet image encoder.

    Attributes:
      depth: one of DEPTHS.
      version: 1 (post-activation, v1.5) or 2 (pre-activation).
      norm: "batch" (over the whole global batch) or "group" (32 groups).
      norm_decay, norm_eps: of BatchNorm's running statistics, and of either norm.
      weight_standardization: standardise every convolution kernel (goes with norm="group" in VIVI and BiT).
      kernel_init: of the convolutions, one of KERNEL_INITS.
      last_scale: initial scale of the last norm of a bottleneck's branch, v1 only; 0: a block starts as its shortcut.
        Basic blocks start at 1 (haiku).
      width: multiplier of all channel counts (3 for VIVI's Big; fractions for small test networks).
      stem: "imagenet" (7x7 stride 2, 3x3 max-pool stride 2) or "small" (3x3 stride 1, no pool; for images to 64 px).
      output_stride: pixels between neighbouring locations of stage4 with the "imagenet" stem, 32, 16 or 8 ("small": a
        quarter of it). 16 and 8 leave out the strides of the last one or two stages; the parameters are the same.
      dilate: convolutions behind a stride that is left out are dilated, so that every 2nd (4th) location has the value
        it has with the stride. False: they stay as they are and see less far (as VFS and CRW do for DAVIS).
      bn_groups: BatchNorm normalises this many equal, consecutive groups of examples separately (VIVI trained with
        statistics per TPU core); 1 = the whole batch.
      padding: "torch", or "same" for weights from TensorFlow or haiku, whose max-pool is then padded with -inf.
      kernel_eps: added to the variance of a kernel that is standardised: 1e-10 in BiT's code, 1e-8 in timm.
      remat: recompute each block in the backward pass: less memory, about a third more time.
    """

    depth: int = 50
    version: int = 1
    norm: str = "batch"
    weight_standardization: bool = False
    norm_decay: Decay = 0.9
    norm_eps: Positive = 1e-5
    kernel_init: str = "torchvision"
    last_scale: float = 1.0
    width: Positive = 1
    stem: str = "imagenet"
    output_stride: int = 32
    dilate: bool = True
    bn_groups: Count = 1
    padding: str = "torch"
    kernel_eps: NonNegative = 1e-10
    remat: bool = False

    def __post_init__(self):
        for field, known in (
            ("depth", tuple(DEPTHS)),
            ("version", (1, 2)),
            ("norm", NORMS),
            ("kernel_init", tuple(KERNEL_INITS)),
            ("stem", STEMS),
            ("output_stride", OUTPUT_STRIDES),
            ("padding", PADDINGS),
        ):
            check_choice("ResNet", field, getattr(self, field), known)
        if round(64 * self.width) < 1:
            raise ConfigError(f"ResNet width={self.width!r}: leaves no channels (64 * width must be at least 1)")
        super().__post_init__()

    @property
    def head_norm(self) -> str:
        return self.norm

    def feature_maps(self) -> tuple[str, ...]:
        return ("stage4", "stage3", "stage2", "stage1")

    def for_transfer(self) -> "ResNet":
        return self.clone(num_classes=None, bn_groups=1)

    def for_dense(self, output_stride: int, dilate: bool) -> "ResNet":
        return self.clone(output_stride=output_stride, dilate=dilate)

    def cast_kernels(self, params: dict) -> dict:
        if self.weight_standardization:  # before rounding to `dtype`
            params = jax.tree.map(
                lambda leaf: standardize_kernel(leaf, self.kernel_eps) if leaf.ndim == 4 else leaf, params
            )
        return super().cast_kernels(params)

    def on_cast_kernels(self) -> "ResNet":
        return self.clone(weight_standardization=False)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes images.

        Args:
          images: float [B, H, W, 3] in [0, 1].
          train: BatchNorm uses the batch's statistics and updates `batch_stats` (make that collection mutable).

        Returns:
          pooled: float32 [B, C], the spatial mean of stage4.
          intermediates: "stage1".."stage4" [B, h, w, c] in `dtype` (at 224 px and output stride 32: 56, 28, 14, 7), in
            v2 after norm + ReLU; and "logits" float32 [B, num_classes] if there is a classifier.

        Raises:
          ValueError: images that are not floating point [B, H, W, 3].
        """
        check_images(images)
        stage_blocks, bottleneck = DEPTHS[self.depth]
        channels = round(64 * self.width)
        conv = functools.partial(
            Conv,
            standardize=self.weight_standardization,
            init=KERNEL_INITS[self.kernel_init],
            padding=self.padding,
            kernel_eps=self.kernel_eps,
            dtype=self.dtype,
        )
        norm = functools.partial(
            make_norm,
            self.norm,
            bn_groups=self.bn_groups,
            decay=self.norm_decay,
            eps=self.norm_eps,
            dtype=self.dtype,
        )

        x = (images - channelwise(self.input_mean, 4)) / channelwise(self.input_std, 4)
        x = self._stem(x.astype(self.dtype), channels, conv, norm, train)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block  # argument 2 of __call__ is `train`
        stages, total_stride, dilation = {}, 4, 1
        for stage, num_blocks in enumerate(stage_blocks, 1):
            first_dilation, stride = dilation, 2 if stage > 1 and total_stride < self.output_stride else 1
            if stage > 1 and stride == 1 and self.dilate:
                dilation *= 2  # from behind the convolution that had the stride
            total_stride *= stride
            for i in range(1, num_blocks + 1):
                x, read = block(
                    channels=channels * 2 ** (stage - 1),
                    stride=stride if i == 1 else 1,
                    dilations=(first_dilation if i == 1 else dilation, dilation),
                    bottleneck=bottleneck,
                    version=self.version,
                    last_scale=self.last_scale,
                    conv=conv,
                    norm=norm,
                    name=f"stage{stage}_block{i}",
                )(x, train)
                if stage > 1 and i == 1:
                    stages[f"stage{stage - 1}"] = read  # [B, h, w, c]
        stages["stage4"] = x = nn.relu(norm(name="final_norm")(x, train)) if self.version == 2 else x

        pooled = x.astype(jnp.float32).mean(axis=(1, 2))  # [B, C]
        return self.classified(pooled, stages)

    def _stem(self, x, channels, conv, norm, train):
        """[B, H, W, 3] -> [B, H/4, W/4, channels] ("imagenet") or [B, H, W, channels] ("small")."""
        small = self.stem == "small"
        x = conv(channels, 3 if small else 7, stride=1 if small else 2, name="stem_conv")(x)
        if self.version == 1:
            x = nn.relu(norm(name="stem_norm")(x, train))
        if self.padding == "same" and not small:
            return nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="SAME")
        # v2 pools signed values; VIVI and BiT pad them with zeros. In v1 all values are >= 0 and padding never wins.
        return x if small else max_pool(x, pad_value=0.0 if self.version == 2 else -jnp.inf)


class Block(nn.Module):
    """Residual block: basic (two 3x3 convolutions) or bottleneck (1x1, 3x3, 1x1 with 4 times the channels)."""

    channels: int
    stride: int
    bottleneck: bool
    version: int
    last_scale: float
    conv: Any  # (features, size, stride, dilation, name) -> module
    norm: Any  # (name) -> module
    dilations: tuple[int, int] = (1, 1)  # of the convolutions up to the one with the stride, and of those behind it

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, C] -> [B, H/stride, W/stride, C'], and what the branch reads: x, in v2 after norm + ReLU."""
        before, behind = self.dilations
        if self.bottleneck:  # (features, kernel size, stride, dilation)
            convs = ((self.channels, 1), (self.channels, 3, self.stride, before), (4 * self.channels, 1))
        else:
            convs = ((self.channels, 3, self.stride, before), (self.channels, 3, 1, behind))
        features_out = convs[-1][0]
        projects = self.stride != 1 or x.shape[-1] != features_out

        if self.version == 1:
            y = read = x
            for i, spec in enumerate(convs, 1):
                scale = self.last_scale if i == 3 else 1.0
                y = self.norm(name=f"norm{i}", scale=scale)(self.conv(*spec, name=f"conv{i}")(y), train)
                y = nn.relu(y) if i < len(convs) else y
            if projects:
                x = self.norm(name="proj_norm")(self.conv(features_out, 1, self.stride, name="proj_conv")(x), train)
            return nn.relu(x + y), read

        y = read = nn.relu(self.norm(name="norm1")(x, train))
        if projects:
            x = self.conv(features_out, 1, self.stride, name="proj_conv")(y)
        for i, spec in enumerate(convs, 1):
            y = self.conv(*spec, name=f"conv{i}")(y)
            y = nn.relu(self.norm(name=f"norm{i + 1}")(y, train)) if i < len(convs) else y
        return x + y, read


class Conv(nn.Module):
    """Square convolution without bias.

    Attributes:
      padding: "torch": by dilation * (size // 2) on every side; "same": as little as gives ceil(H / stride) rows, and
        where that is odd, one more below and to the right.
    """

    features: int
    size: int
    stride: int = 1
    dilation: int = 1
    standardize: bool = False
    init: Any = None  # torchvision_kernel by default
    padding: str = "torch"
    kernel_eps: float = 1e-10
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]."""
        kernel = self.param(
            "kernel", self.init or torchvision_kernel, (self.size, self.size, x.shape[-1], self.features)
        )
        if self.standardize:
            kernel = standardize_kernel(kernel, self.kernel_eps)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.size == 1:
            # On XLA:CPU a matmul of two axes is faster than a convolution (weight gradient: 4x), and than a matmul of
            # four axes, whose weight gradient transposes the activations (a fifth of the whole step).
            if self.stride > 1:  # not by an index: jax 0.6 makes a gather of it
                x = lax.slice(x, (0,) * 4, x.shape, (1, self.stride, self.stride, 1))
            return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], self.features)
        pad = self.dilation * (self.size // 2)
        return lax.conv_general_dilated(
            x,
            kernel,
            (self.stride,) * 2,
            ((pad, pad),) * 2 if self.padding == "torch" else "SAME",
            rhs_dilation=(self.dilation,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def torchvision_kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """torchvision's initial kernels [kh, kw, C, C'] for ResNets: N(0, 2 / (kh * kw * C')) (He et al., fan-out)."""
    return _flat(jax.random.normal, key, shape, dtype) * math.sqrt(2 / (shape[0] * shape[1] * shape[3]))


def haiku_kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """haiku's default, of kernels [..., C, C']: N(0, 1 / inputs of an output), cut off at two deviations.

    Unlike flax's lecun_normal it is not widened again after the cut: its deviation is 0.88 of that.
    """
    cut_normal = functools.partial(jax.random.truncated_normal, lower=-2.0, upper=2.0)
    return _flat(lambda key, shape, dtype: cut_normal(key, shape=shape, dtype=dtype), key, shape, dtype) / math.sqrt(
        math.prod(shape[:-1])
    )


def glorot_kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """TensorFlow's default, of kernels [..., C, C']: U(-b, b) with b^2 = 6 / (inputs of an output + outputs of an
    input)."""
    window = math.prod(shape[:-2])
    bound = math.sqrt(6 / (window * (shape[-2] + shape[-1])))
    return _flat(jax.random.uniform, key, shape, dtype) * 2 * bound - bound


def _flat(draw: Any, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Drawn flat: XLA:CPU unrolls the small leading axes and compiles six times as long; the values are the same."""
    return draw(key, (math.prod(shape),), dtype).reshape(shape)


KERNEL_INITS = {"torchvision": torchvision_kernel, "haiku": haiku_kernel, "tensorflow": glorot_kernel}


class BatchNorm(nn.Module):
    """BatchNorm over all axes but the last, with float32 statistics.

    Under jit the batch is the global one, whatever its sharding. flax's own module cannot normalise groups of examples
    (its axis names are mapped axes, which a jitted global batch does not have). The running variance is the mean of the
    biased batch variances, as in TF, haiku and flax; torch keeps the unbiased one.

    Attributes:
      groups: equal, consecutive groups of examples that are normalised separately.
      decay, eps: BYOL's code, and so VITO's.
      initial_scale: of every channel.
    """

    groups: int = 1
    dtype: Any = "float32"
    decay: float = 0.9
    eps: float = 1e-5
    initial_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, ..., C] -> same shape in `dtype`.

        Raises:
          ConfigError: the batch cannot be divided into `groups` equal groups.
        """
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.constant(self.initial_scale), (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if not train:
            mean, var = channelwise(running_mean.value, x.ndim), channelwise(running_var.value, x.ndim)
            return self._normalize(x, mean, var, scale, bias)

        if x.shape[0] % self.groups:
            raise ConfigError(f"bn_groups={self.groups} does not divide the batch of {x.shape[0]} examples")
        spatial = tuple(range(1, x.ndim - 1))
        x32 = x.astype(jnp.float32)

        def mean_of_groups(values) -> jax.Array:
            """[B, ..., C] -> [G, C]"""
            return values.mean(spatial).reshape(self.groups, -1, channels).mean(axis=1)

        mean_GxC = mean_of_groups(x32)
        # E[x^2] - E[x]^2 reads x once for both moments; rounding can take it just below 0 where x is constant.
        var_GxC = jnp.maximum(mean_of_groups(jnp.square(x32)) - jnp.square(mean_GxC), 0.0)
        if not self.is_initializing():
            for running, batch_GxC in ((running_mean, mean_GxC), (running_var, var_GxC)):
                running.value = self.decay * running.value + (1 - self.decay) * batch_GxC.mean(0)

        def for_examples(values_GxC) -> jax.Array:
            """[G, C] -> [B, 1, ..., 1, C]"""
            values_BxC = jnp.repeat(values_GxC, len(x) // self.groups, axis=0)
            return values_BxC.reshape(-1, *[1] * len(spatial), channels)

        return self._normalize(x, for_examples(mean_GxC), for_examples(var_GxC), scale, bias)

    def _normalize(self, x, mean, var, scale, bias):
        factor = lax.rsqrt(var + self.eps) * channelwise(scale, x.ndim)
        return ((x.astype(jnp.float32) - mean) * factor + channelwise(bias, x.ndim)).astype(self.dtype)


class GroupNorm(nn.Module):
    """GroupNorm with 32 groups (BiT); fewer groups where 32 does not divide the channels (tiny networks).

    Same call as BatchNorm; `train` makes no difference.
    """

    dtype: Any = "float32"
    eps: float = 1e-5
    initial_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, ..., C] -> same shape in `dtype`."""
        del train
        channels = x.shape[-1]
        groups = math.gcd(32, channels)
        scale = self.param("scale", nn.initializers.constant(self.initial_scale), (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        norm = nn.GroupNorm(groups, epsilon=self.eps, use_scale=False, use_bias=False, dtype=jnp.float32)
        return (norm(x) * channelwise(scale, x.ndim) + channelwise(bias, x.ndim)).astype(self.dtype)


def make_norm(
    norm: str,
    *,
    bn_groups: int = 1,
    decay: float = 0.9,
    eps: float = 1e-5,
    scale: float = 1.0,
    dtype: Any = "float32",
    name: str,
) -> nn.Module:
    """Returns the module of `norm` ("batch" or "group"): called with ([B, ..., C], train), same shape out."""
    if norm == "batch":
        return BatchNorm(groups=bn_groups, decay=decay, eps=eps, initial_scale=scale, dtype=dtype, name=name)
    return GroupNorm(eps=eps, initial_scale=scale, dtype=dtype, name=name)


def channelwise(values, ndim: int) -> jax.Array:
    """[C] -> [1, ..., 1, C] with `ndim` axes: explicit broadcasting along the last axis of an array."""
    return jnp.asarray(values).reshape((1,) * (ndim - 1) + (-1,))


def standardize_kernel(kernel: jax.Array, eps: float = 1e-10) -> jax.Array:
    """Gives each output channel of a kernel [kh, kw, C, C'] mean 0 and variance 1 (Qiao et al. 2019)."""
    centred = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(axis=(0, 1, 2), keepdims=True) + eps)


def max_pool(x: jax.Array, *, pad_value: float) -> jax.Array:
    """3x3 max-pool, stride 2, one row or column of `pad_value` on each side: [B, H, W, C] -> [B, H/2, W/2, C]."""
    # As the maximum of shifted slices the CPU step is 2 % faster, but the TPU compiler estimates 66 % more cycles for
    # the stem.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=pad_value)
    return nn.max_pool(x, window_shape=(3, 3), strides=(2, 2))
