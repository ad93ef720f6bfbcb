"""Scores and boxes of all anchors -> a fixed number of detections per image, on the accelerator."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from evaluation.protocols.detection.targets import iou


def select(
    scores_AxK: jax.Array,
    boxes_Ax4: jax.Array,
    *,
    level_sizes: Sequence[int],
    min_score: float,
    per_level: int,
    max_overlap: float,
    max_detections: int,
) -> dict[str, jax.Array]:
    """Detections of one image: the best of each level, then non-maximum suppression within each class.

    Args:
      scores_AxK: in [0, 1], per anchor and class; boxes_Ax4: one per anchor, in pixels.
      min_score: below it nothing is a detection.
      per_level: best pairs of anchor and class of each level that go on to suppression (RetinaNet §4: 1000).

    Returns:
      {"boxes": float32[D, 4], "scores": float32[D], "classes": int32[D]}, D = max_detections, best first; where there
      are fewer, the rest has score 0.
    """
    parts, start = [], 0
    for size in level_sizes:
        parts.append(best_pairs(scores_AxK[start : start + size], boxes_Ax4[start : start + size], per_level))
        start += size
    boxes, scores, classes = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    return suppress(
        boxes,
        jnp.where(scores >= min_score, scores, 0),
        classes,
        max_overlap=max_overlap,
        max_detections=max_detections,
    )


def best_pairs(scores_AxK: jax.Array, boxes_Ax4: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(boxes [n, 4], scores [n], classes [n]) of the `count` largest scores, or of all if there are fewer.

    In two steps, without sorting all A * K: the `count` best pairs lie on the `count` anchors with the best maxima.
    """
    anchors, classes = scores_AxK.shape
    _, rows = jax.lax.top_k(scores_AxK.max(axis=1), min(count, anchors))
    scores, index = jax.lax.top_k(scores_AxK[rows].reshape(-1), min(count, len(rows) * classes))
    return boxes_Ax4[rows[index // classes]], scores, index % classes


def suppress(
    boxes_Nx4: jax.Array, scores_N: jax.Array, classes_N: jax.Array, *, max_overlap: float, max_detections: int
) -> dict[str, jax.Array]:
    """Greedy non-maximum suppression within each class; what `select` returns.

    A detection falls if a better one of its class overlaps it by more than `max_overlap` (IoU). Detections are kept in
    the order of their scores, so `max_detections` rounds of "take the best, strike out what it covers" give exactly the
    first of the full suppression, without an N x N matrix.
    """

    def keep_best(left_N: jax.Array, _) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        best = left_N.argmax()
        covered_N = (iou(boxes_Nx4[best][None], boxes_Nx4) > max_overlap) & (classes_N == classes_N[best])
        return jnp.where(covered_N, 0, left_N).at[best].set(0), (best, left_N[best])

    _, (kept, scores) = jax.lax.scan(keep_best, scores_N, length=max_detections)
    return {"boxes": boxes_Nx4[kept], "scores": scores, "classes": classes_N[kept].astype(jnp.int32)}
