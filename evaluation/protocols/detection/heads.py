"""Feature pyramid and prediction head on an image encoder: FCOS* has one cell per location, RetinaNet nine anchors."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vivi_jax.errors import ConfigError
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import make_norm

STAGES = ("stage2", "stage3", "stage4")  # of the encoder: a pixel in 8, 16, 32
LEVELS = 5  # P3 to P7


class DetectionNetwork(nn.Module):
    """Encoder -> pyramid -> head.

    Attributes:
      encoder: gives STAGES (vivi_jax.models).
      num_classes: K.
      anchors_per_cell: predictions at each location.
      predict_iou: one more output, the IoU of the predicted box with the true one (Wu et al. 2020).
      scale_levels: a learned factor for the boxes of each level (FCOS §3.2; RetinaNet has none).
      extra_from_encoder: P6 comes from stage4 (RetinaNet §4) and not from P5 (FCOS §3.2).
      channels: of the pyramid and head; layers: convolutions in each tower.
      norm: "group" (FCOS's and ATSS's code) or "" (RetinaNet: none), in the towers.
    """

    encoder: Encoder
    num_classes: int
    anchors_per_cell: int
    predict_iou: bool
    scale_levels: bool
    extra_from_encoder: bool
    channels: int
    layers: int
    norm: str

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Float images [B, H, W, 3] in [0, 1] -> float32 outputs of all A anchors, in the order of targets.anchors.

        {"logits": [B, A, K], "boxes": [B, A, 4], as targets.py decodes them, "iou": logits [B, A], if asked for}
        """
        dtype = self.encoder.dtype
        _, stages = self.encoder(images, train=train)
        levels = Pyramid(self.channels, self.extra_from_encoder, dtype, name="pyramid")([stages[s] for s in STAGES])
        return Head(
            self.num_classes,
            self.anchors_per_cell,
            self.predict_iou,
            self.scale_levels,
            self.channels,
            self.layers,
            self.norm,
            dtype,
            name="head",
        )(levels, train)


class Pyramid(nn.Module):
    """Feature pyramid (Lin et al. 2017) with two levels more, as RetinaNet and FCOS have it."""

    channels: int
    extra_from_encoder: bool
    dtype: Any

    @nn.compact
    def __call__(self, stages: list[jax.Array]) -> list[jax.Array]:
        """Three maps [B, h, w, c], each half the size of the one before -> five of `channels`, P3 to P7."""

        def conv(name: str, size: int, stride: int = 1) -> nn.Module:
            return nn.Conv(
                self.channels,
                (size, size),
                stride,
                padding=size // 2,
                dtype=self.dtype,
                name=name,
                kernel_init=uniform_by_fan_in,
            )

        x = [conv(f"lateral{level}", 1)(stage) for level, stage in enumerate(stages, 3)]
        for i in (1, 0):
            x[i] = x[i] + x[i + 1].repeat(2, axis=1).repeat(2, axis=2)
        p3, p4, p5 = [conv(f"out{level}", 3)(y) for level, y in enumerate(x, 3)]
        p6 = conv("out6", 3, 2)(stages[-1] if self.extra_from_encoder else p5)
        return [p3, p4, p5, p6, conv("out7", 3, 2)(nn.relu(p6))]


class Head(nn.Module):
    """Two towers shared by all levels: one for classes, one for boxes (and their IoU)."""

    num_classes: int
    anchors_per_cell: int
    predict_iou: bool
    scale_levels: bool
    channels: int
    layers: int
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, levels: list[jax.Array], train: bool) -> dict[str, jax.Array]:
        def conv(features: int, name: str, bias: float = 0.0) -> nn.Module:
            return nn.Conv(
                features,
                (3, 3),
                padding=1,
                dtype=self.dtype,
                name=name,
                kernel_init=small_normal,
                bias_init=nn.initializers.constant(bias),
            )

        def tower(name: str):
            convs = [conv(self.channels, f"{name}_conv{i}") for i in range(1, self.layers + 1)]
            norms = [
                make_norm(self.norm, dtype=self.dtype, name=f"{name}_norm{i}") if self.norm else None
                for i in range(1, self.layers + 1)
            ]

            def run(x: jax.Array) -> jax.Array:
                for convolve, normalise in zip(convs, norms, strict=True):
                    x = convolve(x)
                    x = nn.relu(normalise(x, train) if normalise else x)
                return x

            return run

        def flat(x: jax.Array, outputs: int) -> jax.Array:  # [B, h, w, anchors * outputs] -> [B, all anchors, outputs]
            return x.astype(jnp.float32).reshape(x.shape[0], -1, outputs)

        n = self.anchors_per_cell
        class_tower, box_tower = tower("class"), tower("box")
        # Every class begins at a probability of 0.01, so that background does not swamp the loss (RetinaNet §4.1).
        to_logits = conv(n * self.num_classes, "logits", bias=-math.log(99))
        to_boxes = conv(n * 4, "boxes")
        to_iou = conv(n, "iou") if self.predict_iou else None
        parts = {"logits": [], "boxes": [], "iou": []}
        for level, x in enumerate(levels, 3):
            box_features = box_tower(x)
            parts["logits"].append(flat(to_logits(class_tower(x)), self.num_classes))
            boxes = flat(to_boxes(box_features), 4)
            parts["boxes"].append(Scale(name=f"level{level}")(boxes) if self.scale_levels else boxes)
            if to_iou:
                parts["iou"].append(flat(to_iou(box_features), 1)[..., 0])
        return {name: jnp.concatenate(values, axis=1) for name, values in parts.items() if values}


# Both are drawn flat: XLA:CPU unrolls the small leading axes of a kernel and compiles much longer.
def small_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """N(0, 0.01^2): RetinaNet §4.1, for heads."""
    return 0.01 * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def uniform_by_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform with variance 1 / (kh * kw * C) for kernels [kh, kw, C, C']: detectron2's pyramids."""
    bound = math.sqrt(3 / math.prod(shape[:3]))
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


class Scale(nn.Module):
    """One learned factor per level, as the head is shared by all of them (FCOS §3.2)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("scale", nn.initializers.ones, ())


def pyramid_levels(encoder: nn.Module, image_size: tuple[int, int]) -> tuple[list[tuple[int, int]], list[int]]:
    """((height, width) in cells, stride in pixels) of P3 to P7, without computing anything.

    Raises:
      ConfigError: the encoder gives no such maps, or the image does not divide into their cells.
    """
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)

    def maps(key, image):
        variables = encoder.init(key, image, train=False)
        return encoder.apply(variables, image, train=False)[1]

    shapes = jax.eval_shape(maps, jax.random.key(0), image)
    if missing := [stage for stage in STAGES if stage not in shapes]:
        raise ConfigError(
            f"the encoder {type(encoder).__name__} has no {', '.join(missing)}: detection needs maps of "
            "three strides, as a ResNet of images gives them"
        )
    sizes = [shapes[stage].shape[1:3] for stage in STAGES]
    strides = [2 ** math.ceil(math.log2(image_size[0] / height)) for height, _ in sizes]
    if any((h * s, w * s) != tuple(image_size) for (h, w), s in zip(sizes, strides, strict=True)):
        raise ConfigError(
            f"config.data.image_size={tuple(image_size)}: height and width must be multiples of "
            f"{strides[0] * 4} for this encoder"
        )
    while len(sizes) < LEVELS:
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
        strides.append(strides[-1] * 2)
    return sizes, strides
