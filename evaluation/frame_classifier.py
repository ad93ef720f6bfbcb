"""An image classifier for video frames: what input_pipeline.curate asks about a video."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evaluation import adapt
from vivi_jax import checkpoint
from vivi_jax.errors import CheckpointError


class FrameClassifier(NamedTuple):
    """Attributes:
      top1: (uint8[N, H, W, 3] RGB, N at most `batch_size`) -> int32[N], the most probable class of each.
      num_classes: of its output.
      sha256: of its weights.
    """
    top1: Callable[[np.ndarray], np.ndarray]
    num_classes: int
    sha256: str


def load(weights: str, *, batch_size: int) -> FrameClassifier:
    """A ResNet with a classifier: a run directory, or a .safetensors file in torchvision's or timm's names.

    Raises:
      CheckpointError: nothing there, it does not verify, or it has no classifier.
    """
    encoder, variables, _ = adapt.load_encoder(weights)
    if getattr(encoder, "num_classes", None) is None:
        raise CheckpointError(f"{weights} has no classifier: give a ResNet with one, such as torchvision's resnet50 of "
                              "ImageNet saved as safetensors")
    variables = jax.device_put(variables)

    @jax.jit
    def predict(images_NxHxWx3):
        logits = encoder.apply(variables, images_NxHxWx3.astype(jnp.float32) / 255, train=False)[1]["logits"]
        return logits.argmax(axis=-1)

    def top1(images_NxHxWx3: np.ndarray) -> np.ndarray:
        missing = batch_size - len(images_NxHxWx3)  # padded, so that one program serves all
        padded = np.concatenate([images_NxHxWx3, np.zeros((missing, *images_NxHxWx3.shape[1:]), np.uint8)])
        return np.asarray(predict(padded))[:len(images_NxHxWx3)]

    return FrameClassifier(top1, encoder.num_classes, checkpoint.state_sha256(variables))
