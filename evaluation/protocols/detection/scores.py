"""Detections as COCO's results JSON, and their AP: COCO's by pycocotools, LVIS's by lvis_ap."""

import contextlib
import importlib.util
import io
import json
import pathlib
from typing import Any

import numpy as np

from evaluation.protocols.detection import data as detection_data
from evaluation.protocols.detection.data import DetectionSet, Placement
from evaluation.protocols.detection.lvis_ap import lvis_ap
from vivi_jax.errors import ConfigError, DataError, lookup

# What pycocotools summarises, in its order.
COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")


def to_rows(dataset: DetectionSet, index: int, place: Placement, detected: dict[str, np.ndarray]) -> list[dict]:
    """The detections of one image, in its own pixels, as rows of COCO's results format; none without area.

    Args:
      detected: {"boxes": float32[D, 4] in pixels of the network's input, "scores", "classes"}; score 0: none.
    """
    boxes = detection_data.clip(place.to_image(detected["boxes"]).astype(np.float64), dataset.sizes[index])
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = (detected["scores"] > 0) & (sides > 0).all(axis=1)
    return [
        {
            "image_id": dataset.image_ids[index],
            "category_id": dataset.category_ids[k],
            "bbox": [*box[:2].tolist(), *side.tolist()],
            "score": float(score),
        }
        for box, side, score, k in zip(
            boxes[kept], sides[kept], detected["scores"][kept], detected["classes"][kept], strict=True
        )
    ]


def read_rows(path: pathlib.Path) -> list[dict]:
    """Rows of a results file.

    Raises:
      DataError: it is no list of detections.
    """
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is no JSON or is cut off ({error}); remove it to detect again") from None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"image_id", "category_id", "bbox", "score"} <= row.keys() for row in rows
    ):
        raise DataError(
            f"{path} is no results file: it must be a list of objects with image_id, category_id, bbox and score"
        )
    return rows


def coco_ap(truth: dict, rows: list[dict]) -> dict:
    """{"AP", ...: the twelve of COCO_NAMES, "per_category": {name: AP}}, in [0, 1]; -1 where there is nothing to find.

    Args:
      truth: an annotation file, as data.read_annotations gives it.
      rows: detections; an empty list is allowed (pycocotools' own loader refuses it).
    """
    truth, rows = detection_data.numbered(truth, rows)
    from pycocotools.coco import COCO  # an extra: only scoring needs it
    from pycocotools.cocoeval import COCOeval

    def coco(annotations: list[dict]) -> COCO:
        result = COCO()
        parts: Any = {"images": truth["images"], "categories": truth["categories"], "annotations": annotations}
        result.dataset = parts
        result.createIndex()
        return result

    with contextlib.redirect_stdout(io.StringIO()):
        detections = [{**row, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]} for row in rows]
        # Of our own, as it notes in them what it ignores, and takes an object whose id is 0 for one that is not there.
        scorer = COCOeval(coco(truth["annotations"]), coco(detections), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    precision = scorer.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, K], all areas, 100 detections
    names = {row["id"]: row["name"] for row in truth["categories"]}
    per_category = {
        names[k]: float(precision[..., i].mean())
        for i, k in enumerate(scorer.params.catIds)
        if (precision[..., i] > -1).all()
    }
    return {name: float(value) for name, value in zip(COCO_NAMES, scorer.stats, strict=True)} | {
        "per_category": per_category
    }


METRICS = {"coco": coco_ap, "lvis": lvis_ap}


def check_truth(metric: str, truth: dict, source: str) -> None:
    """Says what the annotation file `source`, read as `truth`, lacks for a metric: before the training, not after it.

    Raises:
      ConfigError: no such metric, or pycocotools is not installed.
      DataError: the annotation file does not hold what the metric needs.
    """
    lookup("config.metric", metric, METRICS)
    if metric == "coco" and importlib.util.find_spec("pycocotools") is None:
        raise ConfigError("COCO's AP needs the package pycocotools: pip install -c constraints.txt -e .[evaluation]")
    if metric == "lvis":
        try:
            lvis_ap(truth, [])
        except DataError as error:
            raise DataError(f"{source}: {error}") from None
