"""Box AP as LVIS defines it (Gupta et al. 2019, §3): COCO's average precision under a federated set of labels.

Each image has labels for some categories only. In an image a category is
  positive          objects of it are labelled: detections are matched with them as in COCO;
  negative          listed in "neg_category_ids", known to be absent: every detection of it is false;
  not exhaustive    listed in "not_exhaustive_category_ids", some objects are not labelled: detections of it that match
                    nothing do not count;
  neither           nothing is known: detections of it do not count.
A detector may give 300 detections per image. The mean over all categories with objects in the set is AP; the means over
those in few (r, below 10), some (c, below 100) and many (f) training images are APr, APc and APf.
"""

import collections

import numpy as np

from evaluation.protocols.detection.data import numbered
from vivi_jax.errors import DataError

MAX_DETECTIONS = 300
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}  # pixels, both ends included
FREQUENCIES = ("r", "c", "f")
_NONE, _MATCHED, _OUT_OF_RANGE = 0, 1, 2  # what a detection is matched with


def lvis_ap(truth: dict, detections: list[dict]) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl, APr, APc, APf and AR of boxes, in [0, 1]; -1 where no category has objects.

    Args:
      truth: an LVIS annotation file, as detection_data.read_annotations gives it.
      detections: {"image_id", "category_id", "bbox": [x, y, width, height], "score"} each.

    Raises:
      DataError: the file has no lists of negative categories, or no frequencies: it is not LVIS's.
    """
    for part, keys in (("images", ("neg_category_ids", "not_exhaustive_category_ids")), ("categories", ("frequency",))):
        for key in keys:
            if any(key not in row for row in truth[part]):
                raise DataError(f"its {part} have no {key!r}: this is no LVIS annotation file; use the metric 'coco'")
    truth, detections = numbered(truth, detections)
    categories = sorted(truth["categories"], key=lambda row: row["id"])
    precision, recall = [], []  # of each category: [areas, thresholds, recalls], [areas, thresholds]; -1: no objects
    by_category = _by_category(truth, detections)
    for category in categories:
        of_category = by_category.get(category["id"], [])
        values = [precision_and_recall(of_category, area) for area in range(len(AREAS))]
        precision.append([p for p, _ in values])
        recall.append([r for _, r in values])
    precision, recall = np.array(precision), np.array(recall)  # [K, areas, thresholds, recalls], [K, areas, thresholds]

    frequency = np.array([row["frequency"] for row in categories])
    result = {"AP": _mean(precision[:, 0]), "AP50": _mean(precision[:, 0, 0]), "AP75": _mean(precision[:, 0, 5])}
    result |= {f"AP{name}": _mean(precision[:, i]) for i, name in enumerate(AREAS) if name}
    result |= {f"AP{group}": _mean(precision[frequency == group, 0]) for group in FREQUENCIES}
    return result | {f"AR{name}": _mean(recall[:, i]) for i, name in enumerate(AREAS)}


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _by_category(truth: dict, detections: list[dict]) -> dict[int, list[tuple]]:
    """Category -> for each image that counts, (scores [D], matches [areas, thresholds, D], ignored likewise, objects).

    `objects` int[areas] are the labelled ones whose area is in the range.
    """
    boxes, areas = collections.defaultdict(list), collections.defaultdict(list)
    for row in truth["annotations"]:
        boxes[row["category_id"], row["image_id"]].append(row["bbox"])
        areas[row["category_id"], row["image_id"]].append(row["area"])
    negative = {row["id"]: set(row["neg_category_ids"]) for row in truth["images"]}
    partial = {row["id"]: set(row["not_exhaustive_category_ids"]) for row in truth["images"]}

    found = collections.defaultdict(list)
    for row in best_per_image(detections, MAX_DETECTIONS):
        key = row["category_id"], row["image_id"]
        if key in boxes or row["category_id"] in negative[row["image_id"]]:
            found[key].append((row["score"], row["bbox"]))

    result = collections.defaultdict(list)
    ranges = np.array(list(AREAS.values()))  # [areas, 2]
    for category, image in sorted(boxes.keys() | found.keys()):
        detected = sorted(found[category, image], key=lambda pair: -pair[0])
        scores = np.array([score for score, _ in detected])
        detected_boxes = np.array([box for _, box in detected], float).reshape(-1, 4)
        true_boxes = np.array(boxes.get((category, image), []), float).reshape(-1, 4)
        area = np.array(areas.get((category, image), []), float)
        out_of_range = (area[None] < ranges[:, :1]) | (area[None] > ranges[:, 1:])  # [areas, G]
        matches = match(box_iou(detected_boxes, true_boxes), out_of_range)
        detected_area = detected_boxes[:, 2] * detected_boxes[:, 3]
        excused = (detected_area[None] < ranges[:, :1]) | (detected_area[None] > ranges[:, 1:])  # [areas, D]
        excused |= category in partial[image]
        ignored = (matches == _OUT_OF_RANGE) | ((matches == _NONE) & excused[:, None])
        result[category].append((scores, matches == _MATCHED, ignored, (~out_of_range).sum(axis=1)))
    return result


def best_per_image(detections: list[dict], count: int) -> list[dict]:
    """The `count` best of each image, over all categories; of equal scores the first given."""
    by_image = collections.defaultdict(list)
    for row in detections:
        by_image[row["image_id"]].append(row)
    return [row for rows in by_image.values() for row in sorted(rows, key=lambda row: -row["score"])[:count]]


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes (x, y, width, height) [D, 4] and [G, 4]: float64[D, G]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
    common = np.maximum(high - low, 0).prod(axis=-1)
    union = a[:, 2:].prod(axis=1)[:, None] + b[:, 2:].prod(axis=1)[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def match(iou_DxG: np.ndarray, out_of_range: np.ndarray) -> np.ndarray:
    """Which detections find an object, best first: int8[areas, thresholds, D].

    A detection takes the object of the largest IoU that no better detection has taken and whose IoU reaches the
    threshold; objects in the range of areas first (of equal ones the last, as in COCO's code).
    """
    detections, objects = iou_DxG.shape
    result = np.zeros((len(out_of_range), len(IOU_THRESHOLDS), detections), np.int8)
    if not objects:
        return result
    free = np.ones((*result.shape[:2], objects), bool)
    in_range = ~out_of_range[:, None]  # [areas, 1, G]
    needed = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[None, :, None]
    for d, overlap in enumerate(iou_DxG):
        reached = free & (overlap >= needed)  # [areas, thresholds, G]
        first_choice = reached & in_range
        allowed = np.where(first_choice.any(axis=-1, keepdims=True), first_choice, reached)
        value = np.where(allowed, overlap, -1.0)[..., ::-1]
        taken = objects - 1 - value.argmax(axis=-1)  # [areas, thresholds]
        hit = allowed.any(axis=-1)
        outside = np.take_along_axis(out_of_range, taken, axis=1)
        result[..., d] = np.where(hit, np.where(outside, _OUT_OF_RANGE, _MATCHED), _NONE)
        a, t = np.nonzero(hit)
        free[a, t, taken[a, t]] = False
    return result


def precision_and_recall(images: list[tuple], area: int) -> tuple[np.ndarray, np.ndarray]:
    """(precision at each of RECALLS [thresholds, 101], final recall [thresholds]) of one category; -1 without objects.

    The precision at a recall is the largest at this recall or beyond; 0 where the recall is not reached.
    """
    objects = sum(int(counts[area]) for _, _, _, counts in images)
    if not objects:
        return np.full((len(IOU_THRESHOLDS), len(RECALLS)), -1.0), np.full(len(IOU_THRESHOLDS), -1.0)
    scores = np.concatenate([scores for scores, _, _, _ in images])
    order = np.argsort(-scores, kind="stable")
    matched, ignored = (np.concatenate([image[part][area] for image in images], axis=1)[:, order] for part in (1, 2))
    true = np.cumsum(matched & ~ignored, axis=1).astype(float)
    false = np.cumsum(~matched & ~ignored, axis=1).astype(float)
    recall = true / objects
    precision = true / np.maximum(true + false, np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    at_recall = np.zeros((len(IOU_THRESHOLDS), len(RECALLS)))
    for t in range(len(IOU_THRESHOLDS)):
        first = np.searchsorted(recall[t], RECALLS, side="left")
        reached = first < len(order)
        at_recall[t, reached] = precision[t, first[reached]]
    return at_recall, recall[:, -1] if len(order) else np.zeros(len(IOU_THRESHOLDS))
