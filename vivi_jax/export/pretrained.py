"""Trained encoders for use in other code: `vivi_jax.load(path).features(images)`."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vivi_jax import checkpoint, export
from vivi_jax.errors import CheckpointError, DataError
from vivi_jax.models import build_encoder
from vivi_jax.models.base import Encoder

EXPORT_IMAGE_SIZE = 224  # a file of weights does not say what size it was trained at; a run does


class LoadedEncoder(NamedTuple):
    """An encoder and its weights.

    Attributes:
      encoder: the module.
      variables: {"params", and "batch_stats" with BatchNorm}, ready for encoder.apply; {} of "none".
      image_size: pixels of a side, as trained.
    """

    encoder: Encoder
    variables: dict
    image_size: int

    def features(self, images: np.ndarray) -> np.ndarray:
        """Pooled features float32[B, C]; for arguments and errors see `maps`."""
        return self.maps(images)["features"]

    def maps(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """What the encoder makes of images: {"features": float32[B, C], name of a feature map: [B, h, w, c], ...}.

        Args:
          images: RGB [B, H, W, 3] of any size, or one [H, W, 3]; uint8, or floats in [0, 1]. An encoder of clips also
            takes [B, T, H, W, 3]. The network is compiled anew for each shape.

        Raises:
          DataError: an array of another shape, type or range.
        """
        array = np.asarray(images)
        array = array[None] if array.ndim == 3 else array
        if array.ndim not in (4, 5) or array.shape[-1] != 3:
            raise DataError(f"images are [B, H, W, 3], not an array of shape {array.shape}")
        if array.dtype != np.uint8 and not (np.issubdtype(array.dtype, np.floating) and self._in_range(array)):
            raise DataError(f"images are uint8, or floats from 0 to 1; these are {array.dtype} beyond that range")
        pixels = array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1)
        return {name: np.asarray(array) for name, array in _outputs(self.encoder, self.variables, pixels).items()}

    @staticmethod
    def _in_range(array: np.ndarray) -> bool:
        return not array.size or bool(array.min() >= 0 and array.max() <= 1)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(encoder: Encoder, variables: dict, images: Any) -> dict[str, jax.Array]:
    found: Any = encoder.apply(variables, jnp.asarray(images), train=False)
    pooled, maps = found
    return {"features": pooled} | maps


def load(source: str) -> LoadedEncoder:
    """The encoder of a run directory or of a file of weights, written here or elsewhere (docs/weights.md).

    Both may be in a bucket, gs:// or s3://.

    Raises:
      CheckpointError: nothing there, it does not verify, or holds what no encoder could use.
    """
    source = checkpoint.local_copy(source)
    if export.is_weight_file(source):
        kwargs, variables = export.load_encoder(source)
        return LoadedEncoder(build_encoder(**kwargs), jax.device_put(variables), EXPORT_IMAGE_SIZE)
    kwargs, variables = checkpoint.load_encoder(source)
    encoder = build_encoder(**kwargs)
    try:
        export.check_weights(encoder, variables)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return LoadedEncoder(encoder, variables, checkpoint.load_config(source)["data"]["image_size"])
