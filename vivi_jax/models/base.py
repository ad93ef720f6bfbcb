"""What an encoder is: the contract between encoders, methods, evaluations and exports."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from vivi_jax.config import Count, DType, Positive
from vivi_jax.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLASSIFIER = "classifier"  # the part of an encoder, or of a method, that is a linear map of the pooled features


class Encoder(nn.Module):
    """An image encoder: `apply(variables, images, train=bool) -> (pooled, intermediates)`.

    images: float [B, H, W, 3] in [0, 1], RGB; an encoder of clips also takes [B, T, H, W, 3].
    pooled: float32 [B, C].
    intermediates: {name: feature map [B, h, w, c] in `dtype`}, of clips [B, t, h, w, c]; "logits" float32 [B, classes]
      if there is a classifier; and what else is worth showing.

    A subclass says what follows here, and nothing else asks what kind of encoder it is.

    Attributes:
      input_mean, input_std: per RGB channel, in [0, 1]; the encoder normalises its input itself.
      dtype: compute type ("float32" or "bfloat16"); parameters and statistics are always float32.
      num_classes: outputs of a linear classifier on the pooled features; None: there is none.
    """

    input_mean: tuple[float, float, float] = IMAGENET_MEAN
    input_std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    dtype: DType = "float32"
    num_classes: Count | None = None

    @property
    def head_norm(self) -> str:
        """The norm of heads on top of the encoder: "batch", or "group" where examples must stay independent."""
        raise NotImplementedError

    def feature_maps(self) -> tuple[str, ...]:
        """Names of the feature maps among the intermediates, from the coarsest (or last) to the finest (or first)."""
        raise NotImplementedError

    def for_transfer(self) -> Self:
        """The encoder as evaluations use it: without classifier, BatchNorm over the whole batch; the same weights."""
        raise NotImplementedError

    def for_dense(self, output_stride: int, dilate: bool) -> Self:
        """The same weights with finer last feature maps, for dense prediction; itself where it has no such form.

        Args:
          output_stride: pixels between neighbouring locations of the last map.
          dilate: convolutions behind a stride that is left out see as far as before.
        """
        raise NotImplementedError

    def without_noise(self) -> Self:
        """The same weights with nothing left out at random in training; for the networks that targets come from."""
        return self

    def classified(
        self, pooled_BxC: jax.Array, intermediates: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What `__call__` ends with: (pooled, intermediates), with "logits" among them if there is a classifier."""
        if self.num_classes is None:
            return pooled_BxC, intermediates
        # N(0, 0.01): Goyal et al. 2017, section 5.1.
        dense = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name=CLASSIFIER)
        return pooled_BxC, intermediates | {"logits": dense(pooled_BxC)}

    def cast_kernels(self, params: dict) -> dict:
        """Parameters whose kernels are what the layers compute with; for `on_cast_kernels`. See the function below."""
        return cast_kernels(params, self.dtype)

    def on_cast_kernels(self) -> Self:
        """The encoder that takes the parameters of `cast_kernels`."""
        return self


def cast_kernels(params: dict, dtype: Any, *, keep: tuple[str, ...] = ()) -> dict:
    """Kernels in the type that layers compute in, made once for all views or streams: the values are the same.

    Made in each view, the gradient of every kernel would go over the network once per view: sums of converted
    gradients are not taken before the sum over the devices.

    Args:
      params: nested dict; leaves whose name ends in "kernel" are kernels.
      keep: names of modules that compute in float32.
    """

    def cast(path, leaf: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        return leaf.astype(dtype) if names[-1].endswith("kernel") and not set(keep) & set(names) else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def check_choice(owner: str, field: str, value: Any, known: tuple) -> None:
    """Raises ConfigError unless `value` is one of `known`."""
    if value not in known:
        raise ConfigError(f"{owner} {field}={value!r}: must be one of {known}")


def check_images(images: jax.Array, dims: tuple[int, ...] = (4,)) -> None:
    """Raises ValueError unless `images` is floating point [..., H, W, 3] with one of `dims` axes."""
    if images.ndim not in dims or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be float [B, H, W, 3] in [0, 1], got {images.dtype} {images.shape}")
