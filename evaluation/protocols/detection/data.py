"""COCO and LVIS annotation files -> batches of images of one size with their boxes, in NumPy and OpenCV.

Example i is a pure function of (seed, i), as in input_pipeline: a run resumes by starting at another step. `load_set`
checks the whole data set before anything is trained.
"""

import collections
import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np

from evaluation.protocols.detection.targets import CROWD, NO_BOX
from evaluation.protocols.parallel import batches_of, in_parallel
from input_pipeline.folders import Finder
from input_pipeline.streams import sampling
from input_pipeline.streams.order import Order
from input_pipeline.streams.picture_size import opened, tiff_without_opacity
from vivi_jax.config import Chance, Count, Positive
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
PAD = (124, 116, 104)  # RGB of padding: the ImageNet mean, which encoders subtract
Id = int | float | str  # of an image or category, as it stands in the file
_OF_LVIS = ("neg_category_ids", "not_exhaustive_category_ids")  # of an image
_NEEDED = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values for width and height changed over
_MIN_SIDE = 1.0  # pixels of the network's input: smaller remains of a cropped box are no objects


@dataclasses.dataclass(frozen=True)
class DetectionSet:
    """N images with boxes and K classes."""

    source: str  # the annotation file
    image_ids: list[Id]  # N, as in the file
    files: list[str]
    sizes: np.ndarray  # int32[N, 2], (height, width) in pixels
    boxes: list[np.ndarray]  # float32[n, 4] each, (x0, y0, x1, y1) in pixels of the image
    classes: list[np.ndarray]  # int32[n] each, in [0, K) or CROWD
    category_ids: list[Id]  # class -> id in the file
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: np.ndarray) -> "DetectionSet":
        """The images at the given places int[k] of this set."""
        files, boxes, classes = ([values[row] for row in rows] for values in (self.files, self.boxes, self.classes))
        return dataclasses.replace(
            self,
            image_ids=[self.image_ids[i] for i in rows],
            sizes=self.sizes[rows],
            files=files,
            boxes=boxes,
            classes=classes,
        )


# ---- Files ----------------------------------------------------------------------------------------------------------


def read_annotations(path: str | os.PathLike) -> dict:
    """Contents of a COCO or LVIS file, without segmentations; "iscrowd" and "area" are filled in where they lack.

    A value that is null is one that is not known: its key is left out.

    Raises:
      DataError: no such file, or not of that form.
    """
    path = pathlib.Path(path)
    try:
        contents = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"no {path}; docs/detection.md says where the annotations go") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON or is cut off ({error}); fetch it again") from None
    if not isinstance(contents, dict) or not all(
        isinstance(contents.get(part), list) for part in ("images", "annotations", "categories")
    ):
        raise DataError(f"{path} is no COCO annotation file: it needs lists of images, annotations and categories")
    for part in _NEEDED:
        contents[part] = [_known(row) if isinstance(row, dict) else row for row in contents[part]]
    wrong = [
        f"{part} need {', '.join(keys)}: {str(row)[:200]}"
        for part, keys in _NEEDED.items()
        for row in contents[part]
        if not isinstance(row, dict) or not row.keys() >= set(keys)
    ]
    if wrong:
        raise DataError(f"{path}: {len(wrong)} entries lack what they need, such as: {wrong[0]}")
    for annotation in contents["annotations"]:
        annotation.pop("segmentation", None)
        box = annotation["bbox"]
        if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
            annotation.setdefault("area", box[2] * box[3])
        annotation.setdefault("iscrowd", 0)
    if wrong := [problem for part in _NEEDED for row in contents[part] if (problem := _problem(part, row))]:
        raise DataError(f"{path}: {len(wrong)} entries cannot be used, such as: {wrong[0]}")
    _check_references(path, contents)
    return contents


def _known(row: dict) -> dict:
    return {key: value for key, value in row.items() if value is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_length(value: Any) -> bool:
    return _is_number(value) and value >= 1 and value == int(value)


def _problem(part: str, row: dict) -> str | None:
    """What is wrong with the values of an entry that has all it needs."""
    which = f"{part[:-1] if part != 'categories' else 'category'} {row['id']!r}"
    for key in ("id", "image_id", "category_id"):
        if key in row and not (isinstance(row[key], str) or _is_number(row[key])):
            return f"the {key} of {which} is neither a number nor text: {row[key]!r}"
    if part == "images":
        if not (_is_length(row["height"]) and _is_length(row["width"])):
            return f"height and width of {which} are {row['height']!r} and {row['width']!r}, not numbers of pixels"
        for key in _OF_LVIS:
            ids = row.get(key, [])
            if not (isinstance(ids, list) and all(isinstance(i, str) or _is_number(i) for i in ids)):
                return f"the {key} of {which} is no list of ids: {str(ids)[:100]}"
        for key in ("file_name", "coco_url"):
            if not isinstance(row.get(key, ""), str):
                return f"the {key} of {which} is no text: {row[key]!r}"
    if part == "annotations":
        box = row["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            return f"the box of {which} is {box!r}, not four finite numbers"
        if not _is_number(row["area"]):
            return f"the area of {which} is {row['area']!r}, not a number of pixels; leave it out for that of the box"
        if row["iscrowd"] not in (0, 1):
            return f"iscrowd of {which} is {row['iscrowd']!r}, neither 0 nor 1"
    return None


def in_order(ids: Iterable[Id]) -> list[Id]:
    """Numbers before text, each in its own order: as COCO's code sorts ids that are all of one kind."""
    return sorted(ids, key=lambda i: (isinstance(i, str), i))


def numbered(truth: dict, rows: list[dict]) -> tuple[dict, list[dict]]:
    """Copies of an annotation file and of detections with whole numbers from 1 on as ids, in the order of the ids.

    Scorers sort, hash and make arrays of ids, which goes wrong for text among numbers, for 0, and above 2**53.
    Detections of a category that is not in the file are left out, as in pycocotools.

    Raises:
      DataError: detections of an image that is not in the file.
    """
    number = {
        part: {i: n for n, i in enumerate(in_order(row["id"] for row in truth[part]), 1)}
        for part in ("images", "categories")
    }

    def of_row(row: dict, i: int) -> dict:
        image, category = number["images"][row["image_id"]], number["categories"][row["category_id"]]
        return {**row, "id": i, "image_id": image, "category_id": category}

    if strays := [row["image_id"] for row in rows if row["image_id"] not in number["images"]]:
        raise DataError(
            f"{len(strays)} detections are of images that the annotations do not have, such as {strays[0]!r}: of "
            "others, or of an earlier version of this program; remove their file to detect again"
        )
    rows = [row for row in rows if row["category_id"] in number["categories"]]
    images = [{**row, "id": number["images"][row["id"]]} for row in truth["images"]]
    for row in images:
        for key in _OF_LVIS:
            if key in row:
                row[key] = [number["categories"][i] for i in row[key] if i in number["categories"]]
    return {
        "images": images,
        "categories": [{**row, "id": number["categories"][row["id"]]} for row in truth["categories"]],
        "annotations": [of_row(row, i) for i, row in enumerate(truth["annotations"], 1)],
    }, [of_row(row, i) for i, row in enumerate(rows, 1)]


def only_images(contents: dict, image_ids: list[Id]) -> dict:
    """An annotation file's contents with these images, and the annotations in them, alone."""
    kept = set(image_ids)
    return contents | {
        "images": [row for row in contents["images"] if row["id"] in kept],
        "annotations": [row for row in contents["annotations"] if row["image_id"] in kept],
    }


def _check_references(path: pathlib.Path, contents: dict) -> None:
    for part in ("images", "annotations", "categories"):
        ids = collections.Counter(row["id"] for row in contents[part])
        if repeated := [i for i, count in ids.items() if count > 1]:
            raise DataError(f"{path}: {len(repeated)} ids of {part} occur more than once, such as {repeated[0]!r}")
    for key, part in (("image_id", "images"), ("category_id", "categories")):
        known = {row["id"] for row in contents[part]}
        if strays := [row for row in contents["annotations"] if row[key] not in known]:
            raise DataError(
                f"{path}: {len(strays)} annotations have a {key} that is not among its {part}, such as "
                f"{strays[0][key]!r} in annotation {strays[0]['id']!r}; they have ids like {next(iter(known), None)!r}"
            )

    # A part of LVIS may lack categories of these lists, but the same ones of another kind would not be found.
    known = {row["id"] for row in contents["categories"]}
    of_text = {str(i): i for i in known}
    listed = [(key, i) for row in contents["images"] for key in _OF_LVIS for i in row.get(key, ())]
    if wrong := [(key, i) for key, i in listed if i not in known and str(i) in of_text]:
        key, i = wrong[0]
        raise DataError(f"{path}: {len(wrong)} ids in {key} are {i!r} where categories have {of_text[str(i)]!r}")


def load_set(root: str | os.PathLike, annotations: str, images: str) -> DetectionSet:
    """A data set of COCO's form.

    Args:
      root: the folder that both others are in.
      annotations: the annotation file.
      images: the folder of the images; one that is not in it is looked for as its "coco_url" ends, in
        train2017/ or val2017/ (images of LVIS's val come from both).

    Raises:
      DataError: what read_annotations says, images are missing, or have another size than the annotations say.
    """
    root = pathlib.Path(root)
    path = root / annotations
    contents = read_annotations(path)
    if not contents["images"]:
        raise DataError(f"{path} lists no images")
    in_folder, in_root = Finder(root / images), Finder(root)
    found = [find_image(in_folder, in_root, row) for row in contents["images"]]
    if missing := [row for row, file in zip(contents["images"], found, strict=True) if file is None]:
        name = missing[0].get("file_name") or missing[0].get("coco_url") or missing[0]["id"]
        raise DataError(
            f"{len(missing)} of the {len(found)} images of {path} are not in {root / images}, such as "
            f"{name}; docs/detection.md says where they go"
        )

    named = {row["id"]: row["name"] for row in contents["categories"]}
    category_ids = in_order(named)
    class_of = {i: k for k, i in enumerate(category_ids)}
    position = {row["id"]: i for i, row in enumerate(contents["images"])}
    sizes = np.array([(row["height"], row["width"]) for row in contents["images"]], np.int32)
    _check_sizes(path, [str(file) for file in found], sizes)
    boxes, classes, degenerate = [[] for _ in found], [[] for _ in found], []
    for row in contents["annotations"]:
        i = position[row["image_id"]]
        x, y, width, height = row["bbox"]
        box = clip(np.array([[x, y, x + width, y + height]], np.float32), sizes[i])[0]
        if (box[2:] <= box[:2]).any():
            degenerate.append(row["id"])
            continue
        boxes[i].append(box)
        classes[i].append(CROWD if row["iscrowd"] else class_of[row["category_id"]])
    if degenerate:
        _LOG.warning(
            "%s: %d boxes have no area inside their image and teach nothing (annotation %s)",
            path,
            len(degenerate),
            degenerate[0],
        )
    return DetectionSet(
        str(path),
        [row["id"] for row in contents["images"]],
        [str(file) for file in found],
        sizes,
        [np.array(b, np.float32).reshape(-1, 4) for b in boxes],
        [np.array(c, np.int32) for c in classes],
        category_ids,
        [named[i] for i in category_ids],
    )


def find_image(in_folder: Finder, in_root: Finder, row: dict) -> pathlib.Path | None:
    """Where an image is, by its file name in its folder, or by its address in the data set's; None: nowhere.

    Raises:
      DataError: a name that leads out of there.
    """
    if "file_name" in row and (found := in_folder.find(row["file_name"])):
        return found
    return in_root.find("/".join(row["coco_url"].split("/")[-2:])) if "coco_url" in row else None


def _check_sizes(path: pathlib.Path, files: list[str], sizes: np.ndarray) -> None:
    """Reads the header of every image: minutes saved from a failure after hours."""

    def look(i: int) -> tuple[str, str] | None:
        try:
            with opened(files[i]) as image:
                width, height = image.size
                orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception as error:  # Pillow's readers raise whatever the damage leads to
            return "unreadable", f"{files[i]} is no image that can be read ({error})"
        annotated = (int(sizes[i][0]), int(sizes[i][1]))
        if (height, width) == annotated:
            return None
        text = f"{files[i]} is {width} x {height} pixels, annotated as {annotated[1]} x {annotated[0]}"
        return ("turned" if orientation in _TURNED and (width, height) == annotated else "other"), text

    found = [problem for problem in in_parallel(look, range(len(files))) if problem]
    remedies = {
        "turned": "have the size that they are shown with, after the rotation that their files ask for (EXIF), and "
        "annotations are taken to be of the pixels as stored: turn the pixels themselves (mogrify -auto-orient, or "
        "exiftran -a -i)",
        "other": "have another size than their files: take the images that belong to the annotations",
        "unreadable": "are damaged: fetch them again",
    }
    told = []
    for kind, remedy in remedies.items():
        if texts := [text for k, text in found if k == kind]:
            told.append(f"{len(texts)} of {len(files)} images of {path} {remedy}; such as {texts[0]}")
    if told:
        raise DataError("; ".join(told))


def check_sets(train: DetectionSet, test: DetectionSet) -> None:
    """Raises DataError unless the two have the same classes and there is something to learn."""
    if train.category_ids != test.category_ids:
        different = in_order(set(train.category_ids) ^ set(test.category_ids))
        raise DataError(f"{train.source} and {test.source} have different categories, such as id {different[0]!r}")
    objects = sum(int((classes >= 0).sum()) for classes in train.classes)
    if not objects:
        raise DataError(f"{train.source} has no box that is not degenerate or a crowd: nothing to train on")
    empty = sum(not (classes >= 0).any() for classes in train.classes)
    _LOG.info(
        "%s: %d images, %d objects of %d classes, %d images without an object (they teach background)",
        train.source,
        len(train),
        objects,
        len(train.class_names),
        empty,
    )


# ---- Geometry: pure functions ---------------------------------------------------------------------------------------


def clip(boxes: np.ndarray, height_width: np.ndarray) -> np.ndarray:
    """[n, 4] cut to the image."""
    height, width = height_width
    return np.clip(boxes, 0, np.array([width, height, width, height], boxes.dtype))


@dataclasses.dataclass(frozen=True)
class Placement:
    """How an image lies in the network's input: resized to `size`, mirrored, then shifted up and left by `offset`."""

    size: tuple[int, int]  # (height, width) in pixels
    scale: tuple[float, float]  # x, y: pixels of the input per pixel of the image
    offset: tuple[int, int]  # x, y: pixels cut off at the left and top
    flip: bool

    def to_input(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes float32[n, 4] of the image -> of the input; they may reach beyond it."""
        boxes = boxes * np.tile(np.array(self.scale, np.float32), 2)
        if self.flip:
            width = np.float32(self.size[1])
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        return boxes - np.tile(np.array(self.offset, np.float32), 2)

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """The inverse; only for images that are not mirrored."""
        return (boxes + np.tile(np.array(self.offset, np.float32), 2)) / np.tile(np.array(self.scale, np.float32), 2)


def letterbox(
    height: int,
    width: int,
    image_size: tuple[int, int],
    *,
    scale: float = 1.0,
    flip: bool = False,
    shift: tuple[float, float] = (0.0, 0.0),
) -> Placement:
    """An image at `scale` times the largest size that fits; where it does not fit, `shift` in [0, 1) says which part.

    VITO A.2: the largest size that fits for testing; times a random factor, then cropped or padded, for training.
    """
    fit = scale * min(image_size[0] / height, image_size[1] / width)
    size = max(round(height * fit), 1), max(round(width * fit), 1)
    spare_x, spare_y = max(size[1] - image_size[1], 0), max(size[0] - image_size[0], 0)
    offset = int(shift[0] * (spare_x + 1)), int(shift[1] * (spare_y + 1))
    return Placement(size, (size[1] / width, size[0] / height), offset, flip)


def render(image: np.ndarray, place: Placement, image_size: tuple[int, int]) -> np.ndarray:
    """uint8[h, w, 3] -> uint8[*image_size, 3]; what the image does not cover, below and to the right, is PAD."""
    resized = cv2.resize(image, place.size[::-1], interpolation=cv2.INTER_LINEAR)
    if place.flip:
        resized = resized[:, ::-1]
    x, y = place.offset
    part = resized[y : y + image_size[0], x : x + image_size[1]]
    result = np.empty((*image_size, 3), np.uint8)
    result[:] = PAD
    result[: part.shape[0], : part.shape[1]] = part
    return result


def read_image(dataset: DetectionSet, i: int) -> np.ndarray:
    """uint8[height, width, 3], RGB; grey images get three equal channels, opacity is dropped.

    Raises:
      DataError: it cannot be read, does not decode, or does not have the size its annotations say.
    """
    try:
        data = pathlib.Path(dataset.files[i]).read_bytes()
    except OSError as error:
        raise DataError(f"{dataset.files[i]} cannot be read ({error.strerror})") from None
    image = _rgb(data)
    if image is None:
        raise DataError(f"{dataset.files[i]} is damaged and does not decode; fetch it again")
    if image.shape[:2] != tuple(dataset.sizes[i]):
        raise DataError(
            f"{dataset.files[i]} is {image.shape[1]} x {image.shape[0]} pixels, {dataset.source} says "
            f"{dataset.sizes[i][1]} x {dataset.sizes[i][0]}; it was changed since this run began"
        )
    return image


def _rgb(data: bytes) -> np.ndarray | None:
    """The picture of an image file, uint8[height, width, 3]; None: it does not decode."""
    try:
        image = tiff_without_opacity(data)
    except ValueError:
        return None
    if image is None and data:
        # Annotations are of the pixels as stored, so an orientation noted in the file must not turn them.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        image = None if image is None else np.ascontiguousarray(image[:, :, ::-1])
    return image


# ---- Batches --------------------------------------------------------------------------------------------------------


def train_batches(
    dataset: DetectionSet,
    first_step: int,
    *,
    seed: int,
    batch_size: int,
    image_size: tuple[Count, Count],
    scale: tuple[Positive, Positive],
    flip_prob: Chance,
    max_boxes: Count,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches of this process, from step `first_step`; every image once per epoch.

    Args:
      scale: bounds of u, by which the fitting size is multiplied; flip_prob: chance of mirroring.
      max_boxes: G; of an image with more boxes the largest are kept.

    Returns:
      Iterator over {"image": uint8[b, H, W, 3], "boxes": float32[b, G, 4], "classes": int32[b, G]}, see
      targets.py.

    Raises:
      DataError: at once, for impossible values; while iterating, what read_image says.
    """
    if not (len(scale) == 2 and 0 < scale[0] <= scale[1] and 0 <= flip_prob <= 1 and max_boxes > 0):
        raise DataError(
            f"scale={scale}, flip_prob={flip_prob}, max_boxes={max_boxes}: sizes need 0 < low <= high, a "
            "chance is in [0, 1], and there must be room for a box"
        )
    order = Order(seed, batch_size, process_index, process_count)

    def example(i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return training_example(
            dataset,
            sampling.pick(seed, i, len(dataset)),
            sampling.example_rng(seed, i),
            image_size=image_size,
            scale=scale,
            flip_prob=flip_prob,
            max_boxes=max_boxes,
        )

    batches = batches_of(example, order, first_step, threads=threads)
    return ({"image": images, "boxes": boxes, "classes": classes} for images, boxes, classes in batches)


def training_example(
    dataset: DetectionSet,
    index: int,
    rng: np.random.Generator,
    *,
    image_size: tuple[int, int],
    scale: tuple[float, float],
    flip_prob: float,
    max_boxes: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image uint8[H, W, 3], boxes float32[G, 4], classes int32[G]) of one image, resized, mirrored and cropped by rng.

    Boxes are cut to what is seen; those that leave less than a pixel in width or height are dropped.
    """
    height, width = dataset.sizes[index]
    place = letterbox(
        height, width, image_size, scale=rng.uniform(*scale), flip=rng.random() < flip_prob, shift=tuple(rng.random(2))
    )
    image = render(read_image(dataset, index), place, image_size)
    seen = clip(place.to_input(dataset.boxes[index]), np.array(image_size))
    kept = np.flatnonzero((seen[:, 2:] - seen[:, :2] >= _MIN_SIDE).all(axis=1))
    if len(kept) > max_boxes:
        areas = (seen[kept, 2:] - seen[kept, :2]).prod(axis=1)
        kept = np.sort(kept[np.argsort(-areas, kind="stable")[:max_boxes]])
    boxes, classes = np.zeros((max_boxes, 4), np.float32), np.full(max_boxes, NO_BOX, np.int32)
    boxes[: len(kept)], classes[: len(kept)] = seen[kept], dataset.classes[index][kept]
    return image, boxes, classes


def scoring_batches(
    dataset: DetectionSet,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """All images once, in order: {"image": uint8[b, H, W, 3], "index": int32[b]}; the last batch ends with index -1."""
    order = Order(0, batch_size, process_index, process_count)

    def example(i: int) -> tuple[np.ndarray, np.int32]:
        if i >= len(dataset):
            return np.zeros((*image_size, 3), np.uint8), np.int32(-1)
        height, width = dataset.sizes[i]
        return render(read_image(dataset, i), letterbox(height, width, image_size), image_size), np.int32(i)

    batches = batches_of(example, order, 0, -(-len(dataset) // batch_size), threads=threads)
    return ({"image": images, "index": index} for images, index in batches)
