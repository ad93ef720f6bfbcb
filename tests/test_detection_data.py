"""Detection's files: annotations and what may be wrong with them, geometry of training and testing, COCO's AP."""

import contextlib
import io
import json
import logging
import pathlib
import re
import unicodedata

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.protocols.detection import data as detection_data
from evaluation.protocols.detection import report as detection_report
from evaluation.protocols.detection import scores as detection_scores
from evaluation.protocols.detection.targets import CROWD, NO_BOX
from vivi_jax.errors import DataError

GREEN, RED = (0, 255, 0), (255, 0, 0)
CATEGORIES = [{"id": 9, "name": "nine"}, {"id": 4, "name": "four"}]  # not in order


def write_set(
    root: pathlib.Path, *, name="a.json", images=None, annotations=None, categories=CATEGORIES
) -> pathlib.Path:
    """Three images: green with red boxes at known places, grey as a one-channel PNG, and one without objects."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    pixels = np.full((60, 100, 3), GREEN, np.uint8)
    pixels[10:30, 20:50] = RED
    cv2.imwrite(str(root / "images" / "red.png"), pixels[:, :, ::-1])
    cv2.imwrite(str(root / "images" / "grey.png"), np.full((80, 40), 77, np.uint8))
    cv2.imwrite(str(root / "images" / "empty.png"), np.full((30, 30, 3), 200, np.uint8))
    rows = [
        {"id": i, "file_name": f"{stem}.png", "height": h, "width": w}
        for i, (stem, h, w) in enumerate((("red", 60, 100), ("grey", 80, 40), ("empty", 30, 30)), 1)
    ]
    labels = [box(1, 1, 9, [20, 10, 30, 20]), box(2, 1, 4, [0, 0, 100, 60]), box(3, 2, 4, [5, 5, 20, 30])]
    contents = {
        "images": rows if images is None else images,
        "categories": categories,
        "annotations": labels if annotations is None else annotations,
    }
    (root / name).write_text(json.dumps(contents))
    return root


def box(number, image, category, bbox, **more) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, **more}


# ---- Annotations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"file_name": "../outside.png"},
        {"file_name": "/etc/outside.png"},
        {"file_name": "none.png", "coco_url": "http://host/../outside.png"},
    ],
)
def test_an_image_that_lies_outside_is_refused(tmp_path, row):
    cv2.imwrite(str(tmp_path / "outside.png"), np.zeros((30, 30, 3), np.uint8))
    root = write_set(tmp_path / "set", images=[{"id": 1, "height": 30, "width": 30} | row], annotations=[])
    with pytest.raises(DataError, match="outside.png' is no name of anything in .*set"):
        detection_data.load_set(root, "a.json", "images")
    dataset = detection_data.load_set(write_set(tmp_path / "set"), "a.json", str(tmp_path / "set/images"))
    assert len(dataset.files) == 3  # the folder is the user's own word


def test_a_set_is_read_with_its_classes_in_order_of_ids(tmp_path):
    dataset = detection_data.load_set(write_set(tmp_path), "a.json", "images")
    assert dataset.category_ids == [4, 9] and dataset.class_names == ["four", "nine"]
    assert [c.tolist() for c in dataset.classes] == [[1, 0], [0], []]
    np.testing.assert_array_equal(dataset.boxes[0], [[20, 10, 50, 30], [0, 0, 100, 60]])
    assert dataset.boxes[2].shape == (0, 4) and dataset.sizes.tolist() == [[60, 100], [80, 40], [30, 30]]
    detection_data.check_sets(dataset, dataset)
    contents = detection_data.read_annotations(dataset.source)
    assert [(row["iscrowd"], row["area"]) for row in contents["annotations"]] == [(0, 600), (0, 6000), (0, 600)]


def test_degenerate_boxes_are_dropped_and_named_and_crowds_kept_apart(tmp_path, caplog):
    labels = [
        box(1, 1, 9, [20, 10, 0, 20]),
        box(2, 1, 9, [120, 10, 30, 20]),
        box(3, 1, 9, [5, 5, -3, 4]),
        box(4, 1, 9, [-10, -10, 30, 30]),
        box(5, 2, 4, [0, 0, 40, 80], iscrowd=1),
    ]
    write_set(tmp_path, annotations=labels)
    dataset = detection_data.load_set(tmp_path, "a.json", "images")
    assert dataset.boxes[0].tolist() == [[0, 0, 20, 20]]  # cut to the image
    assert dataset.classes[1].tolist() == [CROWD]
    assert "3 boxes have no area inside their image and teach nothing (annotation 1)" in caplog.text
    caplog.set_level(logging.INFO, "evaluation")
    detection_data.check_sets(dataset, dataset)
    assert "1 objects of 2 classes, 2 images without an object" in caplog.text
    write_set(tmp_path, annotations=labels[:3] + labels[4:])
    nothing = detection_data.load_set(tmp_path, "a.json", "images")
    with pytest.raises(DataError, match="no box that is not degenerate or a crowd: nothing to train on"):
        detection_data.check_sets(nothing, dataset)


def test_images_are_found_by_name_or_by_their_address(tmp_path):
    write_set(tmp_path)
    (tmp_path / "train2017").mkdir()
    (tmp_path / "images" / "red.png").rename(tmp_path / "train2017" / "7.png")
    contents = json.loads((tmp_path / "a.json").read_text())
    contents["images"][0] |= {"file_name": "elsewhere.png", "coco_url": "http://images.cocodataset.org/train2017/7.png"}
    (tmp_path / "a.json").write_text(json.dumps(contents))
    dataset = detection_data.load_set(tmp_path, "a.json", "images")
    assert [pathlib.Path(file).relative_to(tmp_path).as_posix() for file in dataset.files] == [
        "train2017/7.png",
        "images/grey.png",
        "images/empty.png",
    ]
    (tmp_path / "train2017" / "7.png").unlink()
    with pytest.raises(DataError, match="1 of the 3 images of .*a.json are not in .*images, such as elsewhere.png"):
        detection_data.load_set(tmp_path, "a.json", "images")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(annotations=[box(1, 5, 9, [0, 0, 1, 1])]), "1 annotations have a image_id that is not among its images"),
        (dict(annotations=[box(1, 1, 5, [0, 0, 1, 1])]), "category_id that is not among its categories, such as 5"),
        (dict(annotations=[box(1, 1, 9, [0, 0, 1, 1])] * 2), "1 ids of annotations occur more than once, such as 1"),
        (dict(annotations=[box(1, 1, 9, [0, 0, float("nan"), 1])]), "annotation 1 is .*not four finite numbers"),
        (dict(annotations=[{"id": 1}, 7]), "2 entries lack what they need, such as: annotations need id, image_id"),
        (dict(annotations=[box(1, 1, 9, "0123")]), "annotation 1 is '0123', not four finite numbers"),
        (dict(images=[], annotations=[]), "lists no images"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path, changes, message):
    write_set(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as error:
        detection_data.load_set(tmp_path, "a.json", "images")
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_not_cocos(tmp_path):
    with pytest.raises(DataError, match="no .*a.json; docs/detection.md says"):
        detection_data.read_annotations(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"images": [')
    with pytest.raises(DataError, match="no JSON or is cut off"):
        detection_data.read_annotations(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="no COCO annotation file"):
        detection_data.read_annotations(tmp_path / "a.json")
    write_set(tmp_path)
    write_set(tmp_path, name="b.json", categories=[*CATEGORIES, {"id": 11, "name": "more"}])
    train, test = (detection_data.load_set(tmp_path, name, "images") for name in ("a.json", "b.json"))
    with pytest.raises(DataError, match="different categories, such as id 11"):
        detection_data.check_sets(train, test)


def test_damaged_and_wrong_images_are_named(tmp_path):
    dataset = detection_data.load_set(write_set(tmp_path), "a.json", "images")
    assert (detection_data.read_image(dataset, 1) == 77).all() and detection_data.read_image(dataset, 1).shape[2] == 3
    (tmp_path / "images" / "red.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="red.png is damaged and does not decode"):
        detection_data.read_image(dataset, 0)
    (tmp_path / "images" / "red.png").write_bytes((tmp_path / "images" / "empty.png").read_bytes())
    with pytest.raises(DataError, match="red.png is 30 x 30 pixels, .*a.json says 100 x 60"):
        detection_data.read_image(dataset, 0)
    (tmp_path / "images" / "red.png").unlink()
    with pytest.raises(DataError, match="red.png cannot be read"):
        next(
            detection_data.train_batches(
                dataset, 0, seed=0, batch_size=3, image_size=(32, 32), scale=(1.0, 1.0), flip_prob=0.0, max_boxes=2
            )
        )


# ---- Geometry -------------------------------------------------------------------------------------------------------


def test_pixels_and_boxes_move_together(tmp_path):
    """Wherever the image is resized, mirrored and cut to, its box is where its red pixels are."""
    dataset = detection_data.load_set(write_set(tmp_path), "a.json", "images")
    seen = 0
    for seed in range(20):
        image, boxes, classes = detection_data.training_example(
            dataset, 0, np.random.default_rng(seed), image_size=(128, 160), scale=(0.5, 2.0), flip_prob=0.5, max_boxes=4
        )
        assert image.shape == (128, 160, 3) and boxes.shape == (4, 4) and (classes[2:] == NO_BOX).all()
        y, x = np.nonzero((image[..., 0] > 127) & (image[..., 1] < 100))
        if 1 in classes:
            expected = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            np.testing.assert_allclose(boxes[list(classes).index(1)], expected, atol=1.5)
            seen += 1
        else:
            assert len(x) < 160  # at most a line of it is left
    assert seen > 10


def test_testing_fits_the_image_in_and_its_boxes_come_back():
    place = detection_data.letterbox(480, 640, (800, 1024))
    assert place.size == (768, 1024) and place.scale == (1.6, 1.6) and place.offset == (0, 0)
    place = detection_data.letterbox(640, 427, (800, 1024))
    assert place.size == (800, 534)
    boxes = np.array([[10, 20, 300, 640]], np.float32)
    np.testing.assert_allclose(place.to_image(place.to_input(boxes)), boxes, rtol=1e-5)
    cut = detection_data.letterbox(480, 640, (800, 1024), scale=1.25, shift=(0.999, 0.5))
    assert cut.size == (960, 1280) and cut.offset == (256, 80)
    picture = detection_data.render(
        np.full((480, 640, 3), 9, np.uint8), detection_data.letterbox(480, 640, (80, 90)), (80, 90)
    )
    assert (picture[:68] == 9).all() and (picture[68:] == detection_data.PAD).all()


def test_of_too_many_boxes_the_largest_are_kept(tmp_path):
    labels = [box(i, 2, 4, [i, 1, 2 + 3 * i, 10]) for i in range(1, 8)]
    dataset = detection_data.load_set(write_set(tmp_path, annotations=labels), "a.json", "images")
    _, boxes, classes = detection_data.training_example(
        dataset, 1, np.random.default_rng(0), image_size=(80, 40), scale=(1.0, 1.0), flip_prob=0.0, max_boxes=3
    )
    assert boxes[:, 0].tolist() == [5, 6, 7] and classes.tolist() == [0, 0, 0]


def test_training_batches_depend_on_the_step_alone(tmp_path):
    dataset = detection_data.load_set(write_set(tmp_path), "a.json", "images")
    options = dict(seed=3, batch_size=2, image_size=(32, 48), scale=(0.8, 1.25), flip_prob=0.5, max_boxes=3)
    batches = detection_data.train_batches(dataset, 0, **options)
    first = [next(batches) for _ in range(6)]
    later = next(detection_data.train_batches(dataset, 4, threads=1, **options))
    parts = [
        next(detection_data.train_batches(dataset, 4, process_index=i, process_count=2, **options)) for i in (0, 1)
    ]
    for name, value in first[4].items():
        np.testing.assert_array_equal(value, later[name])
        np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))
    kinds = [tuple(sorted(row)) for batch in first for row in batch["classes"].tolist()]
    for epoch in range(4):  # three images, every one once
        assert len({kind.count(NO_BOX) for kind in kinds[3 * epoch : 3 * epoch + 3]}) == 3
    assert first[0]["image"].dtype == np.uint8 and first[0]["classes"].dtype == np.int32

    scored = list(detection_data.scoring_batches(dataset, batch_size=2, image_size=(32, 48)))
    assert [batch["index"].tolist() for batch in scored] == [[0, 1], [2, -1]]
    assert (scored[1]["image"][0] == 200).any() and not scored[1]["image"][1].any()


# ---- COCO's AP ------------------------------------------------------------------------------------------------------


def invent(truth: dict, seed: int) -> list[dict]:
    """Moved copies of the labelled boxes, the crowds' too, some twice or with a wrong class."""
    rng, rows = np.random.default_rng(seed), []
    for row in truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            other = rng.choice([c["id"] for c in truth["categories"]]) if rng.random() < 0.2 else row["category_id"]
            moved = np.array(row["bbox"]) * (1 + 0.04 * rng.standard_normal(4))
            rows.append(
                {
                    "image_id": row["image_id"],
                    "category_id": int(other),
                    "bbox": moved.tolist(),
                    "score": float(np.float32(rng.random())),
                }
            )
    return rows


def directly(truth_file: pathlib.Path, rows_file: pathlib.Path) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_file))
        scorer = COCOeval(truth, truth.loadRes(str(rows_file)), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats


def test_ap_is_pycocotools(sample_data, tmp_path):
    source = sample_data / "coco" / "annotations" / "instances_mini.json"
    truth = detection_data.read_annotations(source)
    assert sum(row["iscrowd"] for row in truth["annotations"]) == 2
    rows = invent(truth, 0)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    ours = detection_scores.coco_ap(truth, detection_scores.read_rows(tmp_path / "rows.json"))
    expected = directly(source, tmp_path / "rows.json")
    assert [ours[name] for name in detection_scores.COCO_NAMES] == pytest.approx(expected.tolist(), abs=1e-6)
    assert 0.1 < ours["AP"] < ours["AP50"] < 0.95
    assert np.mean(list(ours["per_category"].values())) == pytest.approx(ours["AP"])
    assert ours == detection_scores.coco_ap(truth, rows)  # twice the same: nothing is left behind in what it is given

    crowds = [row["image_id"] for row in truth["annotations"] if row["iscrowd"]]
    only = {
        **truth,
        "images": [row for row in truth["images"] if row["id"] in crowds],
        "annotations": [row for row in truth["annotations"] if row["image_id"] in crowds],
    }
    (tmp_path / "only.json").write_text(json.dumps(only))
    part = [row for row in rows if row["image_id"] in crowds]
    (tmp_path / "part.json").write_text(json.dumps(part))
    ours = detection_scores.coco_ap(only, part)
    assert [ours[name] for name in detection_scores.COCO_NAMES] == pytest.approx(
        directly(tmp_path / "only.json", tmp_path / "part.json").tolist(), abs=1e-6
    )


def test_empty_cases_have_defined_scores(sample_data):
    truth = detection_data.read_annotations(sample_data / "coco" / "annotations" / "instances_mini.json")
    nothing = detection_scores.coco_ap(truth, [])
    assert nothing["AP"] == nothing["AR"] == nothing["APl"] == 0
    unlabelled = {**truth, "annotations": []}
    assert detection_scores.coco_ap(unlabelled, invent(truth, 1))["AP"] == -1


def test_an_object_whose_id_is_0_can_be_found():
    """pycocotools marks what is matched by its id, and takes 0 for "not matched"."""
    truth = {
        "images": [{"id": 1, "height": 9, "width": 9}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [box(0, 1, 1, [1, 1, 5, 5], iscrowd=0, area=25)],
    }
    assert detection_scores.coco_ap(truth, [{**box(1, 1, 1, [1, 1, 5, 5]), "score": 0.5}])["AP"] == pytest.approx(1)


def test_perfect_detections_on_the_networks_grid_score_1(sample_data):
    """Labels -> the network's input -> back -> rows -> AP: what is lost on the way is rounding."""
    root = sample_data / "coco"
    dataset = detection_data.load_set(root, "annotations/instances_mini.json", "images")
    rows = []
    for i in range(len(dataset)):
        place, real = detection_data.letterbox(*dataset.sizes[i], (800, 1024)), dataset.classes[i] >= 0
        detected = {
            "boxes": place.to_input(dataset.boxes[i][real]),
            "classes": dataset.classes[i][real],
            "scores": np.linspace(1, 0.5, real.sum(), dtype=np.float32),
        }
        empty = {
            "boxes": np.zeros((2, 4), np.float32),
            "classes": np.zeros(2, np.int32),
            "scores": np.array([0, 0.9], np.float32),
        }  # no detection, and one without area
        rows += detection_scores.to_rows(dataset, i, place, {k: np.concatenate([detected[k], empty[k]]) for k in empty})
    assert len(rows) == 172
    scores = detection_scores.coco_ap(detection_data.read_annotations(dataset.source), rows)
    assert scores["AP"] == pytest.approx(1) and scores["APs"] == pytest.approx(1)


def test_results_that_are_none_are_refused(tmp_path):
    for text in ("[", "{}", '[{"image_id": 1}]'):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(DataError, match="rows.json is no"):
            detection_scores.read_rows(tmp_path / "rows.json")


# ---- Ids and values of other kinds ----------------------------------------------------------------------------------
# Three images and two categories, each kind in ascending order, so that ties between equal scores are broken alike.
IDS = {
    "digits": (["000001", "000002", "000003"], ["04", "09"]),
    "words": (["a/1", "a/2", "b 3"], ["four", "nine"]),
    "beyond 2**63": ([2**70, 2**70 + 1, 2**70 + 2], [2**53, 2**53 + 1]),
    "fractions": ([0.25, 1.5, 2.0], [0, 0.5]),
    "mixed": ([7, "07", "8"], [4, "4"]),
    "zero and below": ([-1, 0, 1], [-4, 0]),
}


def renamed(contents: dict, image_ids: list, category_ids: list) -> dict:
    """Annotations with images 1, 2, 3 and categories 4, 9 called otherwise."""
    image, category = dict(zip((1, 2, 3), image_ids, strict=True)), dict(zip((4, 9), category_ids, strict=True))
    return {
        "images": [{**row, "id": image[row["id"]]} for row in contents["images"]],
        "categories": [{**row, "id": category[row["id"]]} for row in contents["categories"]],
        "annotations": [
            {**row, "image_id": image[row["image_id"]], "category_id": category[row["category_id"]]}
            for row in contents["annotations"]
        ],
    }


def guesses(dataset: detection_data.DetectionSet) -> list[dict]:
    """Rows of moved copies of all boxes, with equal scores among them and wrong classes, as a detector would give."""
    rng, rows = np.random.default_rng(0), []
    for i in range(len(dataset)):
        boxes = np.concatenate([dataset.boxes[i]] * 3)
        found = {
            "boxes": boxes + rng.uniform(-4, 4, boxes.shape).astype(np.float32),
            "scores": rng.integers(1, 4, len(boxes)).astype(np.float32) / 4,
            "classes": np.concatenate([dataset.classes[i]] * 2 + [1 - dataset.classes[i]]),
        }
        height, width = dataset.sizes[i]
        rows += detection_scores.to_rows(dataset, i, detection_data.letterbox(height, width, (height, width)), found)
    return json.loads(json.dumps(rows))  # as a file keeps them


@pytest.mark.parametrize("kind", IDS)
def test_ids_keep_their_kind_from_the_file_to_the_score(tmp_path, kind):
    plain = json.loads((write_set(tmp_path) / "a.json").read_text())
    lists = {"neg_category_ids": [4], "not_exhaustive_category_ids": []}
    results = []
    for image_ids, category_ids in (([1, 2, 3], [4, 9]), IDS[kind]):
        contents = renamed(plain, image_ids, category_ids)
        for row in contents["images"]:
            row |= lists | {"neg_category_ids": category_ids[:1]}
        for row in contents["categories"]:
            row["frequency"] = "f"
        (tmp_path / "b.json").write_text(json.dumps(contents))
        dataset = detection_data.load_set(tmp_path, "b.json", "images")
        assert dataset.image_ids == image_ids and dataset.category_ids == category_ids
        assert dataset.class_names == ["four", "nine"]
        rows, truth = guesses(dataset), detection_data.read_annotations(tmp_path / "b.json")
        assert {row["image_id"] for row in rows} == set(image_ids[:2])
        assert {row["category_id"] for row in rows} == set(category_ids)
        detection_data.check_sets(dataset, dataset)
        results.append([metric(truth, rows) for metric in detection_scores.METRICS.values()])
        detection_report.pictures(dataset, truth, rows, tmp_path / f"pictures{len(results)}", 3)
    assert results[0] == results[1] and 0 < results[0][0]["AP"] < 1 and results[0][0]["AP"] != results[0][1]["AP"]
    assert len(list((tmp_path / "pictures2").iterdir())) == 3


def test_perfect_detections_of_ids_in_digits_score_one(tmp_path):
    plain = json.loads((write_set(tmp_path) / "a.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(renamed(plain, *IDS["digits"])))
    truth = detection_data.read_annotations(tmp_path / "b.json")
    rows = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for row in truth["annotations"]
    ]
    assert detection_scores.coco_ap(truth, rows)["AP"] == pytest.approx(1)
    with pytest.raises(DataError, match="1 detections are of images that the annotations do not have, such as 1: "):
        detection_scores.coco_ap(truth, [rows[0] | {"image_id": 1}])


def test_null_is_not_known(tmp_path):
    write_set(tmp_path)
    contents = json.loads((tmp_path / "a.json").read_text())
    for row in contents["annotations"]:
        row |= dict.fromkeys(("area", "iscrowd", "segmentation", "attributes"))
    for row in contents["images"]:
        row |= dict.fromkeys(("coco_url", "flickr_url", "license", "date_captured"))
    contents["images"][1] |= {"file_name": None, "coco_url": "http://x.org/images/grey.png"}
    (tmp_path / "null.json").write_text(json.dumps(contents))
    sets = [detection_data.load_set(tmp_path, name, "images") for name in ("a.json", "null.json")]
    assert sets[0].files == sets[1].files and [c.tolist() for c in sets[1].classes] == [[1, 0], [0], []]
    truths = [detection_data.read_annotations(tmp_path / name)["annotations"] for name in ("a.json", "null.json")]
    assert [row["area"] for row in truths[1]] == [row["area"] for row in truths[0]] == [600, 6000, 600]
    assert [row["iscrowd"] for row in truths[1]] == [0, 0, 0]
    truth = detection_data.read_annotations(tmp_path / "null.json")
    rows = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for row in truth["annotations"]
    ]
    assert detection_scores.coco_ap(truth, rows)["AP"] == pytest.approx(1)
    for part, keys in (("images", "neg_category_ids"), ("categories", "frequency")):
        for row in truth[part]:
            row[keys] = None
    (tmp_path / "lvis.json").write_text(json.dumps(truth))
    with pytest.raises(DataError, match="lvis.json: its images have no 'neg_category_ids'"):
        detection_scores.check_truth("lvis", detection_data.read_annotations(tmp_path / "lvis.json"), "lvis.json")


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("annotations", {"area": "600"}, "the area of annotation 1 is '600', not a number of pixels"),
        ("annotations", {"area": float("nan")}, "the area of annotation 1 is nan"),
        ("annotations", {"iscrowd": "0"}, "iscrowd of annotation 1 is '0', neither 0 nor 1"),
        ("annotations", {"bbox": ["20", 10, 30, 20]}, "not four finite numbers"),
        ("annotations", {"bbox": None}, "1 entries lack what they need, such as: annotations need .*bbox"),
        ("annotations", {"image_id": [1]}, r"the image_id of annotation 1 is neither a number nor text: \[1\]"),
        ("annotations", {"image_id": "1"}, "not among its images, such as '1' in annotation 1; they have ids like 1"),
        ("images", {"id": {"$oid": "5f"}}, "the id of image .* is neither a number nor text"),
        ("images", {"height": "60"}, "height and width of image 1 are '60' and 100, not numbers of pixels"),
        ("images", {"width": 0}, "height and width of image 1 are 60 and 0"),
        ("images", {"height": None}, "images need id, height, width"),
        ("images", {"file_name": 1}, "the file_name of image 1 is no text: 1"),
        ("images", {"neg_category_ids": ["4"]}, "1 ids in neg_category_ids are '4' where categories have 4"),
        ("images", {"neg_category_ids": 4}, "the neg_category_ids of image 1 is no list of ids: 4"),
        ("categories", {"id": True}, "the id of category True is neither"),
        ("categories", {"name": None}, "categories need id, name"),
    ],
)
def test_values_that_cannot_be_used_are_named_before_the_training(tmp_path, part, changes, message):
    contents = json.loads((write_set(tmp_path) / "a.json").read_text())
    contents[part][0] |= changes
    (tmp_path / "a.json").write_text(json.dumps(contents))
    with pytest.raises(DataError, match=message) as error:
        detection_data.load_set(tmp_path, "a.json", "images")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_as_displayed_are_named_with_the_true_remedy(tmp_path, orientation):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    pixels.save(tmp_path / "images" / "x.jpg", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "images" / "x.jpg"))
    for width, height in {pixels.size, shown.size}:
        images = [{"id": 1, "file_name": "x.jpg", "height": height, "width": width}]
        write_set(tmp_path, images=images, annotations=[box(1, 1, 9, [1, 1, 9, 9])])
        if (width, height) == pixels.size:
            assert detection_data.read_image(detection_data.load_set(tmp_path, "a.json", "images"), 0).shape == (
                40,
                64,
                3,
            )
            continue
        with pytest.raises(
            DataError, match="1 of 1 images .* have the size that they are shown with.*auto-orient"
        ) as e:
            detection_data.load_set(tmp_path, "a.json", "images")
        assert "fetch" not in str(e.value) and "x.jpg is 64 x 40 pixels, annotated as 40 x 64" in str(e.value)
        shown.save(tmp_path / "images" / "x.jpg")  # what the message says to do
        assert len(detection_data.load_set(tmp_path, "a.json", "images")) == 1


def test_all_images_that_cannot_be_trained_on_are_said_at_once(tmp_path):
    write_set(tmp_path)
    (tmp_path / "images" / "red.png").write_bytes(b"no image")
    (tmp_path / "images" / "grey.png").write_bytes((tmp_path / "images" / "empty.png").read_bytes())
    with pytest.raises(DataError) as error:
        detection_data.load_set(tmp_path, "a.json", "images")
    assert re.search(r"1 of 3 .*another size.*grey.png is 30 x 30 pixels, annotated as 40 x 80", str(error.value))
    assert re.search(r"1 of 3 .*are damaged: fetch them again; such as .*red.png", str(error.value))
    assert "\n" not in str(error.value)


def test_images_are_found_whatever_system_wrote_their_names(tmp_path):
    write_set(tmp_path)
    names = {"red": "images\\red.png", "grey": unicodedata.normalize("NFD", "gré.png"), "empty": "empty.png"}
    (tmp_path / "images" / "grey.png").rename(tmp_path / "images" / unicodedata.normalize("NFC", "gré.png"))
    contents = json.loads((tmp_path / "a.json").read_text())
    for row in contents["images"]:
        row["file_name"] = names[row["file_name"].removesuffix(".png")]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(contents).encode())
    (tmp_path / "images" / "images").mkdir()
    (tmp_path / "images" / "red.png").rename(tmp_path / "images" / "images" / "red.png")
    assert len(detection_data.load_set(tmp_path, "a.json", "images")) == 3


def test_modules_by_their_former_names():
    with pytest.warns(DeprecationWarning, match="evaluation.detection_data is now evaluation.protocols.detection.data"):
        from evaluation import detection_data as former  # pyright: ignore
    assert former is detection_data
    with pytest.raises(ImportError):
        from evaluation import detection_date  # noqa: F401  # pyright: ignore
