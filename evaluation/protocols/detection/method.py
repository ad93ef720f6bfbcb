"""FCOS* and RetinaNet as methods of vivi_jax.loop: predictions are the embeddings, the loss compares them with boxes.

FCOS*       ATSS's assignment (Zhang et al. 2020), GIoU loss, score = sqrt(class probability * predicted IoU)
            (Wu et al. 2020). VITO A.2 names FCOS, these two and Feng et al. 2021 (task alignment); their combination
            is described in Odin (arXiv:2203.08777), which we could not consult. Task alignment is left out.
RetinaNet   Lin et al. 2017, with the values of detectron2 where those differ.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluation.encoders import apply_to_pixels
from evaluation.protocols.detection import targets
from evaluation.protocols.detection.heads import DetectionNetwork, pyramid_levels
from evaluation.protocols.detection.nms import select
from vivi_jax.config import Chance, Count, NonNegative, NotEmpty, OneOf, Positive, call_with_config
from vivi_jax.errors import lookup
from vivi_jax.methods.base import Batch, BatchSpec, Keys, MethodState, Metrics, Tree, init_network
from vivi_jax.models.base import Encoder


class Fcos:
    """FCOS*: one prediction per cell, for which ATSS assumes a square anchor.

    Args:
      cells_per_side: of that anchor (ATSS §3.3: 8); nearest: ATSS's candidates per level (§3.3: 9).
      box_weight: of the GIoU loss (ATSS's code: 2).
    """

    anchors_per_cell, predict_iou, scale_levels, extra_from_encoder = 1, True, True, False

    def __init__(self, *, cells_per_side: Positive, nearest: Count, box_weight: NonNegative):
        self.shapes = dict(cells_per_side=cells_per_side, octaves=1, aspects=(1.0,))
        self.nearest, self.box_weight = nearest, box_weight

    def assign(self, anchors, level_sizes, boxes, classes):
        return targets.assign_atss(anchors, level_sizes, boxes, classes, nearest=self.nearest)

    @staticmethod
    def decode(outputs, anchors):
        return targets.decode_distances(outputs, anchors)

    def box_loss(self, outputs, decoded, boxes, anchors):
        return self.box_weight * (1 - targets.giou(decoded, boxes))


class RetinaNet:
    """RetinaNet: nine anchors per cell, a class and four deltas for each.

    Args:
      cells_per_side: of the smallest square anchor (§4: 32 px at stride 8); octaves: scales in an octave (§4: 3).
      aspects: height / width (§4). positive, negative: IoU from which an anchor is an object, and below which not.
      huber: half width of the quadratic part of the box loss.
    """

    predict_iou, scale_levels, extra_from_encoder = False, False, True

    def __init__(
        self,
        *,
        cells_per_side: Positive,
        octaves: Count,
        aspects: Annotated[tuple[Positive, ...], NotEmpty()],
        positive: Chance,
        negative: Chance,
        huber: Positive,
    ):
        self.shapes = dict(cells_per_side=cells_per_side, octaves=octaves, aspects=tuple(aspects))
        self.anchors_per_cell = octaves * len(aspects)
        self.positive, self.negative, self.huber = positive, negative, huber

    def assign(self, anchors, level_sizes, boxes, classes):
        del level_sizes
        return targets.assign_by_iou(anchors, boxes, classes, positive=self.positive, negative=self.negative)

    @staticmethod
    def decode(outputs, anchors):
        return targets.decode_deltas(outputs, anchors)

    def box_loss(self, outputs, decoded, boxes, anchors):
        error = jnp.abs(outputs - targets.encode_deltas(boxes, anchors))  # smooth L1, summed over the four numbers
        return jnp.where(error < self.huber, error**2 / (2 * self.huber), error - self.huber / 2).sum(axis=-1)


DETECTORS = {"fcos": Fcos, "retinanet": RetinaNet}


class Detector:
    """The method (vivi_jax/methods/base.py); `detect` is for testing.

    Args:
      form: one of DETECTORS; `options` are its arguments.
      image_size: (height, width) in pixels; max_boxes: G, rows of boxes per image.
      alpha, gamma: of the focal loss.
      channels, layers, norm: of the network, see heads.py.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        form: str,
        options: dict,
        num_classes: int,
        image_size: tuple[Count, Count],
        max_boxes: Count,
        alpha: Chance,
        gamma: NonNegative,
        channels: Count,
        layers: Count,
        norm: Annotated[str, OneOf(("", "group", "batch"))],
    ):
        self.form = call_with_config("method.options", lookup("config.method.form", form, DETECTORS), **options)
        height, width = image_size
        self.image_size, self.max_boxes, self.alpha, self.gamma = (height, width), max_boxes, alpha, gamma
        self.network = DetectionNetwork(
            encoder,
            num_classes,
            self.form.anchors_per_cell,
            self.form.predict_iou,
            self.form.scale_levels,
            self.form.extra_from_encoder,
            channels,
            layers,
            norm,
        )
        levels, strides = pyramid_levels(encoder, self.image_size)
        self.level_sizes = [height * width * self.form.anchors_per_cell for height, width in levels]
        self.anchors = targets.anchors(levels, strides, **self.form.shapes)  # float32[A, 4]

    def batch_spec(self, batch_size: int, data: Any) -> BatchSpec:
        """{"image": uint8[B, H, W, 3], "boxes": float32[B, G, 4], "classes": int32[B, G]}, see targets.py."""
        return {
            "image": jax.ShapeDtypeStruct((batch_size, *self.image_size, 3), np.uint8),
            "boxes": jax.ShapeDtypeStruct((batch_size, self.max_boxes, 4), np.float32),
            "classes": jax.ShapeDtypeStruct((batch_size, self.max_boxes), np.int32),
        }

    def init(self, key: jax.Array, batch: Batch | BatchSpec) -> MethodState:
        """Random parameters; `with_pretrained` then puts those of a checkpoint in their place."""
        return MethodState(*init_network(self.network, key, jnp.zeros((1, *batch["image"].shape[1:])), train=True))

    def embed(
        self, params: Tree, model_state: Tree, target: Tree, batch: Batch, keys: Keys
    ) -> tuple[dict[str, jax.Array], Tree, Tree]:
        del keys
        outputs, model_state = self.network.apply(
            {"params": params, **model_state},
            batch["image"].astype(jnp.float32) / 255,
            train=True,
            mutable=list(model_state),
        )
        return outputs, model_state, target

    def loss(
        self, embeddings: dict[str, jax.Array], batch: Batch, loss_state: Tree, step: jax.Array
    ) -> tuple[jax.Array, Tree, Metrics]:
        """Sums over the anchors of the whole batch, divided by the number of those with a box (RetinaNet §3.3)."""
        anchors_1xAx4 = jnp.asarray(self.anchors)[None]
        matched_BxA = jax.vmap(
            lambda boxes, classes: self.form.assign(anchors_1xAx4[0], self.level_sizes, boxes, classes)
        )(batch["boxes"], batch["classes"])
        positive_BxA = matched_BxA >= 0
        count = jnp.maximum(positive_BxA.sum(), 1)
        row_BxA = jnp.maximum(matched_BxA, 0)
        class_BxA = jnp.where(positive_BxA, jnp.take_along_axis(batch["classes"], row_BxA, axis=1), -1)
        boxes_BxAx4 = jnp.take_along_axis(batch["boxes"], row_BxA[..., None], axis=1)

        def mean_of_positives(values_BxA: jax.Array) -> jax.Array:
            return jnp.where(positive_BxA, values_BxA, 0).sum() / count

        focal_BxA = focal_loss(embeddings["logits"], class_BxA, alpha=self.alpha, gamma=self.gamma)
        decoded_BxAx4 = self.form.decode(embeddings["boxes"], anchors_1xAx4)
        # Anchors without a box get a harmless one: values that are masked out must be finite, or the gradient is NaN.
        boxes_BxAx4 = jnp.where(positive_BxA[..., None], boxes_BxAx4, anchors_1xAx4)
        parts = {
            "class_loss": jnp.where(matched_BxA == targets.IGNORED, 0, focal_BxA).sum() / count,
            "box_loss": mean_of_positives(
                self.form.box_loss(embeddings["boxes"], decoded_BxAx4, boxes_BxAx4, anchors_1xAx4)
            ),
        }
        if self.form.predict_iou:
            quality_BxA = jax.lax.stop_gradient(targets.iou(decoded_BxAx4, boxes_BxAx4))
            parts["iou_loss"] = mean_of_positives(optax.sigmoid_binary_cross_entropy(embeddings["iou"], quality_BxA))
        return (
            sum(parts.values(), start=jnp.float32(0)),
            loss_state,
            parts | {"positives_per_image": positive_BxA.sum() / len(positive_BxA)},
        )

    def detect(
        self,
        variables: dict,
        images_BxHxWx3: jax.Array,
        *,
        min_score: Chance,
        per_level: Count,
        max_overlap: Chance,
        max_detections: Count,
    ) -> dict[str, jax.Array]:
        """uint8 images -> {"boxes": float32[B, D, 4], "scores": [B, D], "classes": [B, D]}, see nms.select.

        Boxes are in pixels of the network's input and may reach beyond it.
        """
        outputs = apply_to_pixels(self.network, variables, images_BxHxWx3)
        scores_BxAxK = jax.nn.sigmoid(outputs["logits"])
        if self.form.predict_iou:  # Wu et al. 2020, equation 5, with its alpha of 0.5
            scores_BxAxK = jnp.sqrt(scores_BxAxK * jax.nn.sigmoid(outputs["iou"])[..., None])
        boxes_BxAx4 = self.form.decode(outputs["boxes"], jnp.asarray(self.anchors)[None])
        return jax.vmap(
            lambda scores, boxes: select(
                scores,
                boxes,
                level_sizes=self.level_sizes,
                min_score=min_score,
                per_level=per_level,
                max_overlap=max_overlap,
                max_detections=max_detections,
            )
        )(scores_BxAxK, boxes_BxAx4)


def focal_loss(logits_BxAxK: jax.Array, class_BxA: jax.Array, *, alpha: float, gamma: float) -> jax.Array:
    """-alpha_t (1 - p_t)^gamma log p_t, summed over classes: [B, A] (RetinaNet, equation 5). Class -1: background."""
    is_class = class_BxA[..., None] == jnp.arange(logits_BxAxK.shape[-1])[None, None]
    signed = jnp.where(is_class, logits_BxAxK, -logits_BxAxK)  # p_t = sigmoid of it
    loss = jax.nn.softplus(-signed) * jax.nn.sigmoid(-signed) ** gamma
    return (jnp.where(is_class, alpha, 1 - alpha) * loss).sum(axis=-1)
