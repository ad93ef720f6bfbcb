"""The network of semantic segmentation, as a method of vivi_jax.loop, and its predictions of whole images."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from evaluation.encoders import HasApply, apply_to_pixels
from evaluation.protocols.interpolation import EXACT, as_map, linear_weights, upsample
from evaluation.protocols.parallel import in_parallel
from evaluation.protocols.segmentation.data import IGNORE, SegmentationSet, on_canvas, resized
from vivi_jax.config import Count
from vivi_jax.distributed import sharding
from vivi_jax.methods.base import Batch, BatchSpec, Keys, MethodState, Metrics, Tree, init_network
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import BatchNorm, Conv

CANVAS = 32  # whole images go onto canvases of 32 n + 1 pixels a side: few programs, and 1/8 and 1/16 come out even


class FCN(nn.Module):
    """Fully convolutional network of He et al. 2020 (MoCo): encoder, two dilated 3x3 convolutions, linear classifier.

    Attributes:
      layer: the encoder's feature map to take.
      channels, dilation: of the two convolutions.
    """

    encoder: Encoder
    layer: str
    num_classes: int
    channels: Count
    dilation: Count

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """float [B, H, W, 3] in [0, 1] -> logits float32 [B, h, w, num_classes], of the size of the feature map."""
        _, stages = self.encoder(images, train=train)
        x = as_map(stages[self.layer])
        for i in (1, 2):
            x = Conv(self.channels, 3, dilation=self.dilation, dtype=self.encoder.dtype, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(dtype=self.encoder.dtype, name=f"norm{i}")(x, train))
        # N(0, 0.01): mmsegmentation's; a footnote of VITO's paper names that code.
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="classifier")(
            x.astype(jnp.float32)
        )


class Segmenter:
    """The method (vivi_jax/methods/base.py): embeddings are logits, the loss is cross-entropy per pixel."""

    def __init__(self, network: FCN):
        self.network = network

    def batch_spec(self, batch_size: int, data: Any) -> BatchSpec:
        """Shapes of the global batch, from config.data: {"image": uint8[B, S, S, 3], "mask": uint8[B, S, S]}."""
        size = (batch_size, data.crop_size, data.crop_size)
        return {"image": jax.ShapeDtypeStruct((*size, 3), jnp.uint8), "mask": jax.ShapeDtypeStruct(size, jnp.uint8)}

    def init(self, key: jax.Array, batch: Batch | BatchSpec) -> MethodState:
        """Random parameters; `with_pretrained` then puts those of a checkpoint in their place."""
        return MethodState(*init_network(self.network, key, jnp.zeros((1, *batch["image"].shape[1:])), train=True))

    def embed(
        self, params: Tree, model_state: Tree, target: Tree, batch: Batch, keys: Keys
    ) -> tuple[jax.Array, Tree, Tree]:
        """Logits float32[B, h, w, classes]."""
        del keys  # size, crop and flip are the host's, and there is nothing else
        logits, model_state = self.network.apply(
            {"params": params, **model_state},
            batch["image"].astype(jnp.float32) / 255,
            train=True,
            mutable=list(model_state),
        )
        return logits, model_state, target

    def loss(
        self, embeddings: jax.Array, batch: Batch, loss_state: Tree, step: jax.Array
    ) -> tuple[jax.Array, Tree, Metrics]:
        """Mean cross-entropy over all labelled pixels of the batch, 0 if there are none."""
        mask_BxHxW = batch["mask"].astype(jnp.int32)
        logits = upsample(embeddings, *mask_BxHxW.shape[1:])
        labelled = mask_BxHxW != IGNORE
        target = jnp.where(labelled, mask_BxHxW, 0)
        pixel_loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        count = jnp.maximum(labelled.sum(), 1)
        correct = labelled & (logits.argmax(axis=-1) == target)
        return (
            jnp.where(labelled, pixel_loss, 0).sum() / count,
            loss_state,
            {"train_accuracy": correct.sum() / count, "labelled": labelled.mean()},
        )


# ---- Predictions of whole images ------------------------------------------------------------------------------------
@functools.partial(jax.jit, static_argnums=0)
def _logits(network: HasApply, variables: dict, images: jax.Array) -> jax.Array:
    return apply_to_pixels(network, variables, images)


@functools.partial(jax.jit, static_argnums=0)
def _classes(
    out_sharding: jax.sharding.Sharding, logits_BxhxwxC: jax.Array, rows_BxH: jax.Array, columns_BxW: jax.Array
) -> jax.Array:
    """uint8[B, H, W], the largest logit at these positions of the feature map; on every device.

    32 rows at a time: the logits of a whole image of ADE20K at full size would take a gigabyte.
    """
    _, height, width, _ = logits_BxhxwxC.shape
    columns = jax.vmap(lambda positions: linear_weights(positions, width))(columns_BxW)

    def some_rows(rows_BxR: jax.Array) -> jax.Array:
        rows = jax.vmap(lambda positions: linear_weights(positions, height))(rows_BxR)
        logits = jnp.einsum("bYh,bhwc,bXw->bYXc", rows, logits_BxhxwxC, columns, precision=EXACT)
        return logits.argmax(axis=-1).astype(jnp.uint8)

    chunks = jnp.moveaxis(rows_BxH.reshape(len(rows_BxH), -1, CANVAS), 1, 0)  # [H / 32, B, 32]
    found = jnp.moveaxis(jax.lax.map(some_rows, chunks), 0, 1)
    return jax.lax.with_sharding_constraint(found.reshape(*rows_BxH.shape, columns_BxW.shape[1]), out_sharding)


def predict(
    network: HasApply,
    variables: dict,
    dataset: SegmentationSet,
    *,
    short_side: Count,
    long_side: Count,
    fill: tuple[int, int, int],
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Segments every image of a set as a whole: resized, through the network once, logits brought back to full size.

    The image lies on a canvas that is up to 32 pixels larger, of the colour `fill`: so there is one program for many
    sizes. Its right and lower edges see that colour where the network alone would see zeros.

    Yields:
      (i, image uint8[H, W, 3], true classes uint8[H, W], predicted classes uint8[H, W]), those of like size together.
    """
    mesh = sharding.make_mesh()
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    variables = jax.device_put(variables, whole)

    def prepare(i: int):
        image, mask = dataset.read(i)
        return i, image, mask, resized(image, short_side, long_side)

    def canvas_of(example: tuple) -> tuple[tuple[int, int], tuple[int, int]]:
        _, _, mask, small = example
        return (
            tuple(-(-(side - 1) // CANVAS) * CANVAS + 1 for side in small.shape[:2]),
            tuple(-(-side // CANVAS) * CANVAS for side in mask.shape),
        )

    for (canvas, output), group in _grouped(in_parallel(prepare, range(len(dataset))), canvas_of, mesh.size):
        padded = group + group[-1:] * (mesh.size - len(group))
        images = np.stack([on_canvas(small, canvas, fill) for *_, small in padded])
        logits = _logits(network, variables, _place(images, split))
        height, width = logits.shape[1:3]
        rows = np.stack(
            [_positions(mask.shape[0], small.shape[0], canvas[0], height, output[0]) for _, _, mask, small in padded]
        )
        columns = np.stack(
            [_positions(mask.shape[1], small.shape[1], canvas[1], width, output[1]) for _, _, mask, small in padded]
        )
        classes = np.asarray(_classes(whole, logits, _place(rows, split), _place(columns, split)))
        for (i, image, mask, _), found in zip(group, classes, strict=False):
            yield i, image, mask, found[: mask.shape[0], : mask.shape[1]]


def _grouped(examples: Iterable, key: Callable[[Any], tuple], size: int) -> Iterator[tuple[tuple, list]]:
    """(key, `size` examples that share it), the last group of each key smaller; holds at most 16 groups' examples."""
    waiting: dict[tuple, list] = {}
    for example in examples:
        group = waiting.setdefault(key(example), [])
        group.append(example)
        if len(group) == size:
            yield key(example), waiting.pop(key(example))
        elif sum(map(len, waiting.values())) >= 16 * size:
            fullest = max(waiting, key=lambda k: len(waiting[k]))
            yield fullest, waiting.pop(fullest)
    yield from waiting.items()


def _positions(full: int, small: int, canvas: int, length: int, padded: int) -> np.ndarray:
    """float32[padded]: where each pixel of the full-size image lies in a feature map of `length` over the canvas."""
    in_small = np.linspace(0, small - 1, full)
    positions = np.zeros(padded, np.float32)
    positions[:full] = in_small * (length - 1) / max(canvas - 1, 1)
    return positions


def _place(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)


# ---- The measure ----------------------------------------------------------------------------------------------------
def confusion(true_classes: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64[classes, classes]: pixels by (true, predicted) class; IGNORE pixels are left out."""
    counted = true_classes != IGNORE
    pairs = true_classes[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def scores(confusion_CxC: np.ndarray) -> dict:
    """{"miou", "pixel_accuracy", "iou": a number, or None for a class that is neither there nor predicted, per class}.

    Intersection over union of each class over all pixels of the set; the mean leaves out the Nones.
    """
    right = np.diag(confusion_CxC)
    union = confusion_CxC.sum(axis=0) + confusion_CxC.sum(axis=1) - right
    iou = [float(r / u) if u else None for r, u in zip(right, union, strict=True)]
    return {
        "miou": float(np.mean([value for value in iou if value is not None])),
        "pixel_accuracy": float(right.sum() / confusion_CxC.sum()),
        "iou": iou,
    }
