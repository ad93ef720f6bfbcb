"""LVIS's AP against its definition written out, on the sample annotations with invented detections."""

import copy

import numpy as np
import pytest

from evaluation.protocols.detection import lvis_ap
from evaluation.protocols.detection.data import read_annotations
from evaluation.protocols.detection.scores import check_truth
from vivi_jax.errors import DataError


@pytest.fixture(scope="module")
def truth(sample_data) -> dict:
    """The sample, with some categories of some images not exhaustively labelled."""
    contents = read_annotations(sample_data / "lvis" / "lvis_val_100.json")
    rng = np.random.default_rng(0)
    for image in contents["images"]:
        present = sorted({row["category_id"] for row in contents["annotations"] if row["image_id"] == image["id"]})
        image["not_exhaustive_category_ids"] = [c for c in present if rng.random() < 0.2]
    return contents


@pytest.fixture(scope="module")
def detections(truth) -> list[dict]:
    """Moved copies of the labelled boxes, some twice; others of categories that are absent or of unknown presence.

    Scores have two digits, so that many are equal, and one image has more than 300.
    """
    rng = np.random.default_rng(1)
    rows, categories = [], [row["id"] for row in truth["categories"]]
    for row in truth["annotations"]:
        for _ in range(rng.integers(0, 3)):
            box = np.array(row["bbox"]) * (1 + 0.06 * rng.standard_normal(4))
            rows.append(
                {
                    "image_id": row["image_id"],
                    "category_id": row["category_id"],
                    "bbox": box.tolist(),
                    "score": round(float(rng.random()), 2),
                }
            )
    for image in truth["images"]:
        wrong = image["neg_category_ids"][:3] + rng.choice(categories, 3).tolist()
        for category in wrong + ([categories[0]] * 300 if image is truth["images"][5] else []):
            rows.append(
                {
                    "image_id": image["id"],
                    "category_id": int(category),
                    "bbox": [*rng.uniform(0, 300, 2), *rng.uniform(1, 200, 2)],
                    "score": round(float(rng.random()), 2),
                }
            )
    return [rows[i] for i in rng.permutation(len(rows))]


def overlap(a, b) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def per_category(truth, detections) -> dict[int, list[tuple]]:
    """Category -> (image, its labels, its detections) wherever something is known about it."""
    result = {row["id"]: [] for row in truth["categories"]}
    for image in sorted(truth["images"], key=lambda image: image["id"]):
        labels = [row for row in truth["annotations"] if row["image_id"] == image["id"]]
        best = sorted((row for row in detections if row["image_id"] == image["id"]), key=lambda row: -row["score"])
        for category in result:
            mine = [row for row in labels if row["category_id"] == category]
            if mine or category in image["neg_category_ids"]:
                result[category].append((image, mine, [row for row in best[:300] if row["category_id"] == category]))
    return result


def average_precision(images, category, threshold, low, high) -> float | None:
    """One category at one IoU and one range of areas, as the LVIS paper and its published code define it."""
    objects, outcomes = 0, []
    for image, labelled, mine in images:
        counted = [low <= row["area"] <= high for row in labelled]
        objects += sum(counted)
        taken = set()
        for row in mine:
            choice, choice_overlap = None, threshold
            for kind in (True, False):  # objects that count come first
                for g, label in enumerate(labelled):
                    if counted[g] is kind and g not in taken and overlap(row["bbox"], label["bbox"]) >= choice_overlap:
                        choice, choice_overlap = g, overlap(row["bbox"], label["bbox"])
                if choice is not None:
                    break
            if choice is not None:
                taken.add(choice)
                if counted[choice]:
                    outcomes.append((row["score"], True))
            elif (
                category not in image["not_exhaustive_category_ids"] and low <= row["bbox"][2] * row["bbox"][3] <= high
            ):
                outcomes.append((row["score"], False))
    if not objects:
        return None
    outcomes.sort(key=lambda outcome: -outcome[0])
    right = np.cumsum([hit for _, hit in outcomes])
    points = [(n / objects, n / i) for i, n in enumerate(right, 1)]  # (recall, precision)
    at_recall = [max((p for r, p in points if r >= level), default=0.0) for level in np.linspace(0, 1, 101)]
    return float(np.mean(at_recall))


def mean(values) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else -1.0


def test_every_score_is_the_definitions(truth, detections):
    got = lvis_ap.lvis_ap(truth, detections)
    images = per_category(truth, detections)
    used = {row["category_id"] for row in truth["annotations"]}
    categories = {row["id"]: row["frequency"] for row in truth["categories"] if row["id"] in used}
    everything = 0, 1e10
    by_iou = {t: {c: average_precision(images[c], c, t, *everything) for c in categories} for t in (0.5, 0.75)}
    assert got["AP50"] == pytest.approx(mean(by_iou[0.5].values()), abs=1e-9)
    assert got["AP75"] == pytest.approx(mean(by_iou[0.75].values()), abs=1e-9)
    assert 0.05 < got["AP75"] < got["AP50"] < 0.9
    some = sorted(categories)[::5]
    small = {
        "images": truth["images"],
        "categories": [row for row in truth["categories"] if row["id"] in some],
        "annotations": [row for row in truth["annotations"] if row["category_id"] in some],
    }
    few = lvis_ap.lvis_ap(small, detections)
    thresholds = np.linspace(0.5, 0.95, 10)
    for name, area in (("AP", everything), ("APs", (0, 1024)), ("APm", (1024, 9216)), ("APl", (9216, 1e10))):
        values = [[average_precision(images[c], c, t, *area) for t in thresholds] for c in some]
        assert few[name] == pytest.approx(mean(v for row in values for v in row), abs=1e-9), name
        for group in "rcf" if name == "AP" else "":
            grouped = [v for c, row in zip(some, values, strict=True) if categories[c] == group for v in row]
            assert few[f"AP{group}"] == pytest.approx(mean(grouped), abs=1e-9), group
    assert few["APf"] > 0 and len({few[name] for name in ("APr", "APc", "APf")}) > 1


def one_box(**image) -> dict:
    return {
        "images": [{"id": 7, "neg_category_ids": [2], "not_exhaustive_category_ids": [], **image}],
        "categories": [{"id": c, "name": str(c), "frequency": "rcf"[c % 3]} for c in (1, 2, 3)],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 50, 50], "area": 2500}],
    }


def row(category, box, score) -> dict:
    return {"image_id": 7, "category_id": category, "bbox": box, "score": score}


def test_federated_labels_decide_what_counts():
    hit, stray = row(1, [0, 0, 50, 50], 0.5), row(1, [200, 0, 50, 50], 0.9)
    assert lvis_ap.lvis_ap(one_box(), [hit])["AP"] == 1
    assert lvis_ap.lvis_ap(one_box(), [hit, stray])["AP"] == pytest.approx(0.5)
    assert lvis_ap.lvis_ap(one_box(not_exhaustive_category_ids=[1]), [hit, stray])["AP"] == 1
    unknown = [row(3, [0, 0, 9, 9], 0.9), row(2, [0, 0, 9, 9], 0.9)]  # nothing is known; absent, as in all images
    assert lvis_ap.lvis_ap(one_box(), [hit, *unknown]) == lvis_ap.lvis_ap(one_box(), [hit])
    more = one_box()
    more["images"].append({"id": 8, "neg_category_ids": [1], "not_exhaustive_category_ids": []})
    assert lvis_ap.lvis_ap(more, [hit, {**stray, "image_id": 8}])["AP"] == pytest.approx(0.5)  # a false one elsewhere
    crowded = [row(2, [0, 0, 9, 9], 0.9)] * 300
    assert lvis_ap.lvis_ap(one_box(), [*crowded, hit])["AP"] == 0  # the 301st of its image


def test_empty_and_degenerate_input_has_defined_scores():
    nothing = lvis_ap.lvis_ap(one_box(), [])
    assert nothing["AP"] == 0 and nothing["APc"] == 0 and nothing["APr"] == nothing["APf"] == -1 and nothing["AR"] == 0
    assert lvis_ap.lvis_ap({**one_box(), "annotations": []}, [])["AP"] == -1
    flat = copy.deepcopy(one_box())
    flat["annotations"][0].update(bbox=[3, 3, 0, 0], area=0)
    assert lvis_ap.lvis_ap(flat, [row(1, [3, 3, 0, 0], 0.5)])["AP"] == 0  # nothing overlaps a box without area
    with pytest.raises(DataError, match="a.json: its images have no 'neg_category_ids'.*no LVIS annotation file"):
        check_truth("lvis", {**one_box(), "images": [{"id": 7}]}, "a.json")
