"""The one road to an encoder for all evaluations: load a run, an exported file or random weights; extract features.

Needs neither TensorFlow nor scikit-learn.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vivi_jax import checkpoint
from vivi_jax.config import call_with_config
from vivi_jax.distributed import sharding
from vivi_jax.errors import CheckpointError
from vivi_jax.export.pretrained import EXPORT_IMAGE_SIZE, LoadedEncoder, load
from vivi_jax.models import build_encoder
from vivi_jax.models.base import Encoder


class HasApply(Protocol):
    """A network to be evaluated: a Flax module, or what stands in for one."""

    def apply(self, variables: Any, images: Any, /, *, train: bool) -> Any: ...


def apply_to_pixels(network: HasApply, variables: dict, images: jax.Array) -> Any:
    """What a trained network makes of uint8 [..., H, W, 3] images."""
    return network.apply(variables, images.astype(jnp.float32) / 255, train=False)


def load_encoder(source: str, *, random: Mapping[str, Any] | None = None) -> LoadedEncoder:
    """The encoder of a run directory or of a file of weights, written here or elsewhere (vivi_jax/export).

    Args:
      random: config.encoder of "none", which has no weights: where random ones serve, see random_variables.

    Raises:
      CheckpointError: nothing there, or it does not verify.
      ConfigError: `random` is no encoder.
    """
    if source == "none" and random is not None:
        return LoadedEncoder(call_with_config("encoder", build_encoder, **random), {}, EXPORT_IMAGE_SIZE)
    return load(str(source))


def random_variables(encoder: Encoder, seed: int) -> dict:
    """Random weights, and statistics of an untrained network, on the device."""
    image = np.zeros((1, 32, 32, 3), np.float32)
    return jax.jit(lambda key: encoder.init(key, image, train=False))(jax.random.key(seed))


def extract_features(encoder: HasApply, variables: dict, batches: Iterable[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features of all images, computed on all devices.

    Args:
      batches: of {"image": uint8[b, H, W, 3], "label": int32[b]}; every process gives the same ones. The last may be
        smaller: it is padded to the size of the first, so that one program serves all, and the padding is cut off.

    Returns:
      (features float32[N, C], labels int32[N]), in the order of the batches.
    """
    mesh = sharding.make_mesh()
    variables = jax.device_put(variables, sharding.replicated(mesh))
    features, labels, rows = [], [], 0
    for batch in batches:
        image = batch["image"]
        rows = rows or -(-len(image) // mesh.size) * mesh.size  # the devices share the rows equally
        padded = np.concatenate([image, np.zeros((rows - len(image), *image.shape[1:]), np.uint8)])
        on_devices = jax.make_array_from_callback(padded.shape, sharding.batch_sharding(mesh), padded.__getitem__)
        pooled = _pooled(encoder, sharding.replicated(mesh), variables, on_devices)
        features.append(np.asarray(pooled)[: len(image)])
        labels.append(batch["label"])
    return np.concatenate(features), np.concatenate(labels)


def extract_logits(encoder: Encoder, variables: dict, batches: Iterable[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(logits float32[N, num_classes], labels int32[N]) of an encoder with a classifier; as extract_features."""
    wrapped = {name: {"encoder": tree} for name, tree in variables.items()}
    return extract_features(_Logits(encoder), wrapped, batches)


class _Logits(nn.Module):
    """An encoder whose logits stand in for its features."""

    encoder: Encoder

    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict]:
        return self.encoder(images, train=train)[1]["logits"], {}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pooled(
    encoder: HasApply, out_sharding: jax.sharding.Sharding, variables: dict, images_BxHxWx3: jax.Array
) -> jax.Array:
    """float32[B, C] on every device: the caller reads all of it."""
    pooled, _ = apply_to_pixels(encoder, variables, images_BxHxWx3)
    return jax.lax.with_sharding_constraint(pooled, out_sharding)


class FrameClassifier(NamedTuple):
    """A classifier of single frames.

    Attributes:
      top1: (uint8[N, H, W, 3] RGB, N at most `batch_size`) -> int32[N], the most probable class of each.
      num_classes: of its output.
      sha256: of its weights.
    """

    top1: Callable[[np.ndarray], np.ndarray]
    num_classes: int
    sha256: str


def load_frame_classifier(weights: str, *, batch_size: int) -> FrameClassifier:
    """An encoder with a classifier: a run directory, or a file of weights such as torchvision's.

    Raises:
      CheckpointError: nothing there, it does not verify, or it has no classifier.
    """
    encoder, variables, _ = load_encoder(weights)
    if encoder.num_classes is None:
        raise CheckpointError(
            f"{weights} has no classifier: give an encoder with one, such as a supervised or co-trained run, or "
            "torchvision's resnet50 of ImageNet saved as safetensors"
        )
    variables = jax.device_put(variables)

    @jax.jit
    def predict(images_NxHxWx3: jax.Array) -> jax.Array:
        _, maps = apply_to_pixels(encoder, variables, images_NxHxWx3)
        return maps["logits"].argmax(axis=-1)

    def top1(images_NxHxWx3: np.ndarray) -> np.ndarray:
        missing = batch_size - len(images_NxHxWx3)  # padded, so that one program serves all
        padded = np.concatenate([images_NxHxWx3, np.zeros((missing, *images_NxHxWx3.shape[1:]), np.uint8)])
        return np.asarray(predict(padded))[: len(images_NxHxWx3)]

    return FrameClassifier(top1, encoder.num_classes, checkpoint.state_sha256(variables))
