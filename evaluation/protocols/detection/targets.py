"""Which prediction learns which box: cells and anchors, ATSS and RetinaNet's assignment, box coding. Pure JAX.

Boxes are float32 (x0, y0, x1, y1) in pixels of the network's input. An image has G rows of boxes; their `classes` say
what a row is: a class number, NO_BOX (padding) or CROWD (many objects in one box: they neither teach nor contradict).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

NO_BOX, CROWD = -1, -2
NEGATIVE, IGNORED = -1, -2  # in place of the row of a matched box

_CROWD_SHARE = 0.5  # of an anchor's area inside crowd boxes, from which it is ignored; not in the papers


# ---- Cells and anchors ----------------------------------------------------------------------------------------------


def cell_centres(height: int, width: int, stride: float) -> np.ndarray:
    """Centres (x, y) of a level's cells, float32[height * width, 2], row by row (FCOS §3.1)."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return ((np.stack([x.ravel(), y.ravel()], axis=1) + 0.5) * stride).astype(np.float32)


def anchor_shapes(side: float, *, octaves: int, aspects: Sequence[float]) -> np.ndarray:
    """(width, height) of the anchors of a cell, float32[octaves * len(aspects), 2].

    Their areas are (side * 2^(k / octaves))^2, their heights `aspect` times their widths (RetinaNet §4: three scales in
    an octave, three aspects).
    """
    shapes = [
        (side * 2 ** (k / octaves) / np.sqrt(aspect), side * 2 ** (k / octaves) * np.sqrt(aspect))
        for k in range(octaves)
        for aspect in aspects
    ]
    return np.array(shapes, np.float32)


def anchors(
    levels: Sequence[tuple[int, int]],
    strides: Sequence[float],
    *,
    cells_per_side: float,
    octaves: int,
    aspects: Sequence[float],
) -> np.ndarray:
    """All anchors, float32[A, 4]: level by level, cell by cell, the anchors of a cell together.

    Args:
      levels: (height, width) of each in cells; strides: pixels per cell.
      cells_per_side: of the smallest square anchor.
    """
    result = []
    for (height, width), stride in zip(levels, strides, strict=True):
        centres = cell_centres(height, width, stride)[:, None]  # [cells, 1, 2]
        half = anchor_shapes(cells_per_side * stride, octaves=octaves, aspects=aspects)[None] / 2
        result.append(np.concatenate([centres - half, centres + half], axis=-1).reshape(-1, 4))
    return np.concatenate(result)


# ---- Overlaps -------------------------------------------------------------------------------------------------------


def area(boxes: jax.Array) -> jax.Array:
    """[..., 4] -> [...]; 0 for boxes turned inside out."""
    return jnp.maximum(boxes[..., 2] - boxes[..., 0], 0) * jnp.maximum(boxes[..., 3] - boxes[..., 1], 0)


def intersection(a: jax.Array, b: jax.Array) -> jax.Array:
    """Areas of a ∩ b; both [..., 4] of one rank, broadcast against each other."""
    return area(jnp.concatenate([jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], axis=-1))


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union in [0, 1]; two boxes without area have 0."""
    common = intersection(a, b)
    return common / jnp.maximum(area(a) + area(b) - common, 1e-9)


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalised IoU in (-1, 1] (Rezatofighi et al. 2019): IoU less the share of the hull that neither box covers."""
    common = intersection(a, b)
    union = area(a) + area(b) - common
    hull = area(jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1))
    return common / jnp.maximum(union, 1e-9) - (hull - union) / jnp.maximum(hull, 1e-9)


# ---- Assignment -----------------------------------------------------------------------------------------------------


def assign_atss(
    anchors_Ax4: jax.Array, level_sizes: Sequence[int], boxes_Gx4: jax.Array, classes_G: jax.Array, *, nearest: int
) -> jax.Array:
    """Adaptive training sample selection (Zhang et al. 2020, algorithm 1) for one image.

    Candidates of a box are, on each level, the `nearest` anchors by the distance of centres. Those whose IoU is at
    least the candidates' mean + standard deviation (n - 1, as in the authors' code), and whose centre is in the box,
    are its positives. An anchor wanted by several boxes goes to that of the largest IoU.

    Args:
      level_sizes: anchors per level, adding up to A.

    Returns:
      int32[A]: row of the box, NEGATIVE or IGNORED.
    """
    overlap_GxA = iou(boxes_Gx4[:, None], anchors_Ax4[None])
    centres_Ax2 = (anchors_Ax4[:, :2] + anchors_Ax4[:, 2:]) / 2
    box_centres_Gx2 = (boxes_Gx4[:, :2] + boxes_Gx4[:, 2:]) / 2
    distance_GxA = jnp.square(box_centres_Gx2[:, None] - centres_Ax2[None]).sum(axis=-1)

    candidates, start = [], 0
    for size in level_sizes:
        candidates.append(start + bottom_k(distance_GxA[:, start : start + size], min(nearest, size)))
        start += size
    candidate_GxC = jnp.concatenate(candidates, axis=1)

    overlap_GxC = jnp.take_along_axis(overlap_GxA, candidate_GxC, axis=1)
    threshold_G = overlap_GxC.mean(axis=1) + overlap_GxC.std(axis=1, ddof=1)
    centre_GxCx2 = centres_Ax2[candidate_GxC]
    inside_GxC = ((centre_GxCx2 > boxes_Gx4[:, None, :2]) & (centre_GxCx2 < boxes_Gx4[:, None, 2:])).all(axis=-1)
    positive_GxC = (overlap_GxC >= threshold_G[:, None]) & inside_GxC & (classes_G >= 0)[:, None]

    rows_Gx1 = jnp.arange(len(boxes_Gx4))[:, None]
    claim_GxA = jnp.full_like(overlap_GxA, -1).at[rows_Gx1, candidate_GxC].set(jnp.where(positive_GxC, overlap_GxC, -1))
    matched_A = jnp.where(claim_GxA.max(axis=0) >= 0, claim_GxA.argmax(axis=0), NEGATIVE)
    return _without_crowds(matched_A, anchors_Ax4, boxes_Gx4, classes_G)


def bottom_k(values_GxA: jax.Array, count: int) -> jax.Array:
    """Indices int32[G, count] of the `count` smallest numbers of each row, in order; of equal ones the first.

    One after the other: lax.top_k of a batch that is split over devices would be computed by each of them as a whole.
    """
    column_1xA = jnp.arange(values_GxA.shape[1])[None]

    def take(left_GxA: jax.Array, _) -> tuple[jax.Array, jax.Array]:
        index_G = left_GxA.argmin(axis=1)
        return jnp.where(column_1xA == index_G[:, None], jnp.inf, left_GxA), index_G

    return jax.lax.scan(take, values_GxA, length=count)[1].T


def assign_by_iou(
    anchors_Ax4: jax.Array, boxes_Gx4: jax.Array, classes_G: jax.Array, *, positive: float, negative: float
) -> jax.Array:
    """RetinaNet's assignment (§4) for one image, with detectron2's rule that no box goes without an anchor.

    An anchor belongs to the box of its largest IoU if that is at least `positive`, or if no anchor has a larger IoU
    with some box; below `negative` it is background; between them it is ignored.

    Returns:
      int32[A]: row of the box, NEGATIVE or IGNORED.
    """
    real_Gx1 = (classes_G >= 0)[:, None]
    overlap_GxA = jnp.where(real_Gx1, iou(boxes_Gx4[:, None], anchors_Ax4[None]), 0)
    best_A, row_A = overlap_GxA.max(axis=0), overlap_GxA.argmax(axis=0)
    best_G = overlap_GxA.max(axis=1, keepdims=True)
    last_resort_A = ((overlap_GxA == best_G) & (best_G > 0)).any(axis=0)
    unmatched_A = jnp.where(best_A < negative, NEGATIVE, IGNORED)
    matched_A = jnp.where((best_A >= positive) | last_resort_A, row_A, unmatched_A)
    return _without_crowds(matched_A, anchors_Ax4, boxes_Gx4, classes_G)


def _without_crowds(
    matched_A: jax.Array, anchors_Ax4: jax.Array, boxes_Gx4: jax.Array, classes_G: jax.Array
) -> jax.Array:
    """Background inside crowds becomes IGNORED: COCO's metric does not count detections there either."""
    share_GxA = intersection(boxes_Gx4[:, None], anchors_Ax4[None]) / area(anchors_Ax4)[None]
    in_crowd_A = ((share_GxA >= _CROWD_SHARE) & (classes_G == CROWD)[:, None]).any(axis=0)
    return jnp.where((matched_A == NEGATIVE) & in_crowd_A, IGNORED, matched_A).astype(jnp.int32)


# ---- Box coding -----------------------------------------------------------------------------------------------------

_MAX_LOG = float(np.log(1000 / 16))  # detectron2's bound on predicted logarithms: a box of 1000 px on an anchor of 16


def encode_deltas(boxes: jax.Array, anchors: jax.Array) -> jax.Array:
    """Boxes relative to anchors (R-CNN): ((x - xa) / wa, (y - ya) / ha, log(w / wa), log(h / ha)), x and y centres."""
    size_a, size = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
    centre_a, centre = (anchors[..., :2] + anchors[..., 2:]) / 2, (boxes[..., :2] + boxes[..., 2:]) / 2
    return jnp.concatenate([(centre - centre_a) / size_a, jnp.log(jnp.maximum(size, 1e-3) / size_a)], axis=-1)


def decode_deltas(deltas: jax.Array, anchors: jax.Array) -> jax.Array:
    """Inverse of encode_deltas; sizes up to 62.5 times the anchor's."""
    size_a, centre_a = anchors[..., 2:] - anchors[..., :2], (anchors[..., :2] + anchors[..., 2:]) / 2
    centre = centre_a + deltas[..., :2] * size_a
    half = jnp.exp(jnp.minimum(deltas[..., 2:], _MAX_LOG)) * size_a / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def decode_distances(logs: jax.Array, anchors: jax.Array) -> jax.Array:
    """FCOS: exp of four numbers are the distances (left, top, right, bottom) from the cell's centre to the box.

    They count in half anchors, so that zeros are the anchor itself (FCOS counts in strides: a quarter of it).
    """
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    half = (anchors[..., 2:] - anchors[..., :2]) / 2
    distances = jnp.exp(jnp.minimum(logs, _MAX_LOG)) * jnp.concatenate([half, half], axis=-1)
    return jnp.concatenate([centre - distances[..., :2], centre + distances[..., 2:]], axis=-1)
