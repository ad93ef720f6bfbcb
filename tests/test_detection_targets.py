"""Detection's geometry against slow, plain references: assignment, suppression, anchors, box coding, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluation.protocols.detection import nms as detection_nms
from evaluation.protocols.detection import targets as detection_targets
from evaluation.protocols.detection.method import focal_loss
from evaluation.protocols.detection.targets import CROWD, IGNORED, NEGATIVE, NO_BOX

LEVELS, STRIDES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)], [8, 16, 32, 64, 128]
SIZES = [height * width for height, width in LEVELS]


def random_boxes(rng, count, *, height=64, width=96) -> np.ndarray:
    """On a grid of quarter pixels, so that squares of distances are exact and ties are true ties."""
    low = rng.integers(0, (4 * (width - 8), 4 * (height - 8)), (count, 2))
    size = rng.integers(8, 4 * 48, (count, 2))
    high = np.minimum(low + size, (4 * width, 4 * height))
    return (np.concatenate([low, high], axis=1) / 4).astype(np.float32)


def plain_iou(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def share_inside(anchor, box) -> float:
    width = min(anchor[2], box[2]) - max(anchor[0], box[0])
    height = min(anchor[3], box[3]) - max(anchor[1], box[1])
    return max(width, 0.0) * max(height, 0.0) / ((anchor[2] - anchor[0]) * (anchor[3] - anchor[1]))


def plain_atss(anchors, boxes, classes, nearest):
    """Algorithm 1 of ATSS, line by line."""
    best = {}
    for g in range(len(boxes)):
        if classes[g] < 0:
            continue
        x, y = (boxes[g][0] + boxes[g][2]) / 2, (boxes[g][1] + boxes[g][3]) / 2
        candidates, start = [], 0
        for size in SIZES:
            centre = [((a[0] + a[2]) / 2, (a[1] + a[3]) / 2) for a in anchors[start : start + size]]
            order = sorted(range(size), key=lambda i: ((centre[i][0] - x) ** 2 + (centre[i][1] - y) ** 2, i))
            candidates += [start + i for i in order[:nearest]]
            start += size
        overlaps = [plain_iou(boxes[g], anchors[a]) for a in candidates]
        threshold = np.mean(overlaps) + np.std(overlaps, ddof=1)
        for a, overlap in zip(candidates, overlaps, strict=True):
            cx, cy = (anchors[a][0] + anchors[a][2]) / 2, (anchors[a][1] + anchors[a][3]) / 2
            inside = boxes[g][0] < cx < boxes[g][2] and boxes[g][1] < cy < boxes[g][3]
            if overlap >= threshold and inside and overlap > best.get(a, (-1, 0))[0]:
                best[a] = overlap, g
    return [best[a][1] if a in best else background(anchors[a], boxes, classes) for a in range(len(anchors))]


def plain_retinanet(anchors, boxes, classes, positive, negative):
    real = [g for g in range(len(boxes)) if classes[g] >= 0]
    overlap = {(a, g): plain_iou(anchors[a], boxes[g]) for a in range(len(anchors)) for g in real}
    result = []
    for a in range(len(anchors)):
        g = max(real, key=lambda g: overlap[a, g], default=None)
        top = overlap[a, g] if real else 0
        forced = any(
            overlap[a, h] > 0 and overlap[a, h] == max(overlap[b, h] for b in range(len(anchors))) for h in real
        )
        if real and (top >= positive or forced):
            result.append(g)
        else:
            result.append(background(anchors[a], boxes, classes) if top < negative else IGNORED)
    return result


def background(anchor, boxes, classes) -> int:
    in_crowd = any(c == CROWD and share_inside(anchor, b) >= 0.5 for b, c in zip(boxes, classes, strict=True))
    return IGNORED if in_crowd else NEGATIVE


@pytest.fixture(scope="module")
def scenes():
    """Images of random boxes: full, with padding, with a crowd, without objects, and with one box inside another."""
    rng = np.random.default_rng(0)
    boxes = np.stack([random_boxes(rng, 6) for _ in range(6)])
    classes = rng.integers(0, 3, (6, 6)).astype(np.int32)
    classes[1, 3:] = NO_BOX
    classes[2, 0] = CROWD
    classes[3] = NO_BOX
    classes[4, 1:] = CROWD
    boxes[5, 1] = boxes[5, 0] + np.array([4, 4, -4, -4], np.float32)
    boxes[1, 3:] = 0
    return boxes, classes


def test_atss_equals_the_algorithm(scenes):
    boxes, classes = scenes
    anchors = detection_targets.anchors(LEVELS, STRIDES, cells_per_side=4, octaves=1, aspects=(1.0,))
    assign = jax.jit(jax.vmap(lambda b, c: detection_targets.assign_atss(jnp.asarray(anchors), SIZES, b, c, nearest=5)))
    got = np.asarray(assign(boxes, classes))
    expected = np.array(
        [plain_atss(anchors.astype(float), b.astype(float), c, 5) for b, c in zip(boxes, classes, strict=True)]
    )
    assert (got == expected).all()
    assert (expected[3] == NEGATIVE).all() and (expected[4] == IGNORED).any() and (expected >= 0).sum() > 30


def test_retinanets_assignment_equals_its_rules(scenes):
    boxes, classes = scenes
    anchors = detection_targets.anchors(LEVELS[1:3], STRIDES[1:3], cells_per_side=2, octaves=2, aspects=(0.5, 1.0))
    assign = jax.jit(
        jax.vmap(lambda b, c: detection_targets.assign_by_iou(jnp.asarray(anchors), b, c, positive=0.5, negative=0.4))
    )
    got = np.asarray(assign(boxes, classes))
    expected = np.array([plain_retinanet(anchors, b, c, 0.5, 0.4) for b, c in zip(boxes, classes, strict=True)])
    assert (got == expected).all()
    assert (expected[3] == NEGATIVE).all() and (expected[[0, 1, 5]] == IGNORED).any()


def test_anchors_have_retinanets_shapes_and_places():
    anchors = detection_targets.anchors(
        [(100, 128), (50, 64), (25, 32), (13, 16), (7, 8)],
        STRIDES,
        cells_per_side=4,
        octaves=3,
        aspects=(0.5, 1.0, 2.0),
    )
    assert anchors.shape == (9 * (12800 + 3200 + 800 + 208 + 56), 4)
    size = anchors[:, 2:] - anchors[:, :2]
    first = 32 * 2 ** (np.arange(3) / 3)
    np.testing.assert_allclose(size[:9].prod(axis=1), np.repeat(first, 3) ** 2, rtol=1e-5)
    np.testing.assert_allclose(size[:9, 1] / size[:9, 0], [0.5, 1, 2] * 3, rtol=1e-5)
    np.testing.assert_allclose(size[-9:], 16 * size[:9], rtol=1e-5)  # 512 px at stride 128
    centre = (anchors[:, 2:] + anchors[:, :2]) / 2
    np.testing.assert_allclose(centre[9 * 129], [12, 12], atol=1e-4)  # second row, second column of stride 8


def test_box_coding_has_known_values_and_inverts():
    anchor = np.array([[10, 20, 30, 60]], np.float32)  # 20 x 40 around (20, 40)
    box = np.array([[10, 40, 50, 80]], np.float32)  # 40 x 40 around (30, 60)
    deltas = jax.jit(detection_targets.encode_deltas)(box, anchor)
    np.testing.assert_allclose(deltas, [[0.5, 0.5, np.log(2), 0]], atol=1e-6)
    boxes = random_boxes(np.random.default_rng(1), 50)
    anchors = random_boxes(np.random.default_rng(2), 50)
    back = jax.jit(lambda b, a: detection_targets.decode_deltas(detection_targets.encode_deltas(b, a), a))(
        boxes, anchors
    )
    np.testing.assert_allclose(back, boxes, atol=1e-3)
    logs = np.array([[0, 0, 0, 0], np.log([2, 1, 0.5, 0.25]), [1e9] * 4], np.float32)
    got = np.asarray(jax.jit(detection_targets.decode_distances)(logs, anchor))
    np.testing.assert_allclose(got[:2], [[10, 20, 30, 60], [0, 20, 25, 45]], atol=1e-5)
    assert np.isfinite(got).all()


def test_overlaps_have_known_values():
    a = np.array([[0, 0, 2, 2], [0, 0, 1, 1], [3, 3, 3, 3], [2, 2, 1, 1]], np.float32)
    b = np.array([[1, 1, 3, 3], [2, 2, 3, 3], [3, 3, 3, 3], [0, 0, 4, 4]], np.float32)

    def overlaps(a):
        return detection_targets.giou(a, b).sum(), (detection_targets.iou(a, b), detection_targets.giou(a, b))

    gradient, (iou, giou) = jax.jit(jax.grad(overlaps, has_aux=True))(a)
    np.testing.assert_allclose(iou, [1 / 7, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(np.asarray(giou)[:2], [1 / 7 - 2 / 9, -7 / 9], atol=1e-6)
    assert np.isfinite(np.asarray(gradient)).all()  # also of boxes without area, or inside out


# ---- Suppression ----------------------------------------------------------------------------------------------------


def plain_nms(boxes, scores, classes, max_overlap, count):
    kept = []
    for i in sorted((i for i in range(len(boxes)) if scores[i] > 0), key=lambda i: (-scores[i], i)):
        if all(classes[i] != classes[j] or plain_iou(boxes[i], boxes[j]) <= max_overlap for j in kept):
            kept.append(i)
    return kept[:count]


def test_suppression_equals_the_greedy_one():
    rng = np.random.default_rng(0)
    suppress = jax.jit(jax.vmap(lambda *x: detection_nms.suppress(*x, max_overlap=0.5, max_detections=25)))
    boxes = np.stack([random_boxes(rng, 60, height=40, width=40) for _ in range(4)])
    scores = rng.permutation(240).reshape(4, 60).astype(np.float32) / 240
    scores[1, 10:] = 0  # few candidates
    scores[2] = 0  # none
    boxes[3, ::3] = boxes[3, 1]  # many equal boxes
    classes = rng.integers(0, 3, (4, 60)).astype(np.int32)
    got = jax.tree.map(np.asarray, suppress(boxes, scores, classes))
    for i in range(4):
        kept = plain_nms(boxes[i].astype(float), scores[i], classes[i], 0.5, 25)
        n = len(kept)
        np.testing.assert_array_equal(got["scores"][i], np.r_[scores[i][kept], np.zeros(25 - n)].astype(np.float32))
        np.testing.assert_array_equal(got["boxes"][i][:n], boxes[i][kept])
        np.testing.assert_array_equal(got["classes"][i][:n], classes[i][kept])
    assert (got["scores"][2] == 0).all() and (got["scores"][0] > 0).sum() > 5


def test_the_best_pairs_are_those_of_a_full_sort_and_faint_ones_are_dropped():
    rng = np.random.default_rng(3)
    scores = rng.permutation(40 * 7).reshape(40, 7).astype(np.float32) / 280
    boxes = random_boxes(rng, 40)
    got_boxes, got, classes = jax.jit(lambda *x: detection_nms.best_pairs(*x, 10))(scores, boxes)
    order = np.argsort(-scores.ravel())[:10]
    np.testing.assert_array_equal(got, scores.ravel()[order])
    np.testing.assert_array_equal(classes, order % 7)
    np.testing.assert_array_equal(got_boxes, boxes[order // 7])
    found = jax.jit(
        lambda scores, boxes: detection_nms.select(
            scores, boxes, level_sizes=[30, 10], min_score=0.9, per_level=1000, max_overlap=1.0, max_detections=50
        )
    )(scores, boxes)
    expected = np.sort(scores[scores >= 0.9])[::-1]
    np.testing.assert_array_equal(found["scores"], np.r_[expected, np.zeros(50 - len(expected))].astype(np.float32))


def test_focal_loss_is_equation_5():
    logits = np.array([[[0.3, -2.0], [1.5, 0.0], [1e4, -1e4]]], np.float32)
    got = np.asarray(jax.jit(lambda x: focal_loss(x, jnp.array([[1, -1, 1]]), alpha=0.25, gamma=2.0))(logits))
    p = 1 / (1 + np.exp(-logits[0, :2].astype(float)))
    positive, negative = -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p)
    np.testing.assert_allclose(got[0, :2], [negative[0, 0] + positive[0, 1], negative[1].sum()], rtol=1e-5)
    assert np.isfinite(got).all()
