"""Images with a class for every pixel: official folders of PASCAL VOC and ADE20K, own ones; checks, training batches.

A mask file holds a number for each pixel; `SegmentationSet.to_class` turns it into a class or into IGNORE. Training
example i is a pure function of (seed, i), as in sampling.py. Nothing here needs TensorFlow.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import cv2
import numpy as np
import scipy.io

from evaluation.protocols.parallel import batches_of, in_parallel
from input_pipeline.folders import IMAGE_SUFFIXES, Finder, files_in, same_form, walk
from input_pipeline.images import is_held_out
from input_pipeline.lists import read_lines
from input_pipeline.streams import sampling
from input_pipeline.streams.order import Order
from input_pipeline.streams.picture_size import opened
from vivi_jax.config import Chance, Count, Positive
from vivi_jax.errors import DataError
from vivi_jax.files import inside

cv2.setNumThreads(1)  # examples run in parallel, so the resize of one must not
IGNORE = 255  # class of pixels that neither train nor count
_UNKNOWN = 254  # what to_class says of a number that the data set does not have
VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
ADE20K_CLASSES = 150


@dataclasses.dataclass(frozen=True)
class SegmentationSet:
    """Images and masks, read one by one."""

    source: str  # for messages
    images: list[pathlib.Path]
    masks: list[pathlib.Path]
    class_names: tuple[str, ...]
    to_class: np.ndarray  # uint8[256]: number in the file -> index into class_names, IGNORE or _UNKNOWN

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> "SegmentationSet":
        """The images at the given places int[k] of this set."""
        images, masks = ([paths[row] for row in rows] for paths in (self.images, self.masks))
        return dataclasses.replace(self, images=images, masks=masks)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (uint8[H, W, 3] RGB, uint8[H, W] classes); grey images get three equal channels.

        Raises:
          DataError: a file that does not decode, or what `problem` finds.
        """
        try:
            with opened(self.images[i]) as image:  # EXIF orientation is left alone: the mask has none
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.images[i]} does not decode ({error}); replace it or take it off the list") from None
        mask = self.to_class[read_mask(self.masks[i])]
        if found := self.problem(i, mask, pixels.shape[:2]):
            raise DataError(found)
        return pixels, mask

    def problem(self, i: int, mask: np.ndarray, size: tuple[int, ...]) -> str | None:
        """What is wrong with a mask for an image of `size` (height, width), or None."""
        if mask.shape != size:
            return (
                f"{self.masks[i]} is {mask.shape[1]} x {mask.shape[0]} pixels, its image {self.images[i].name} "
                f"{size[1]} x {size[0]}"
            )
        if (mask == _UNKNOWN).any():
            numbers = np.unique(read_mask(self.masks[i])[mask == _UNKNOWN])
            return f"{self.masks[i]} holds {', '.join(map(str, numbers[:5]))}: no class of {self.source}"
        return None


def read_mask(path: pathlib.Path) -> np.ndarray:
    """uint8[H, W] numbers of an indexed or grey image file, or of SBD's .mat.

    Raises:
      DataError: missing, damaged, or a picture in colours instead of numbers.
    """
    try:
        if path.suffix == ".mat":
            return scipy.io.loadmat(path, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation
        with opened(path) as image:
            if image.mode not in ("P", "L"):
                raise DataError(f"{path} has the mode {image.mode}: a mask must be an indexed or 8-bit grey PNG")
            return np.asarray(image)
    except DataError:
        raise
    except Exception as error:  # Pillow's and SciPy's readers raise whatever the damage leads to
        raise DataError(f"{path} is no mask that can be read ({error})") from None


# ---- The data sets --------------------------------------------------------------------------------------------------
def load_voc(data: str) -> tuple[SegmentationSet, SegmentationSet]:
    """(train_aug, val) of PASCAL VOC 2012.

    train_aug is VOC's own train list and the images of SBD (Hariharan et al. 2011) that are not in VOC's val: 10,582
    images. SBD is read from its official folder (benchmark_RELEASE/dataset or dataset, with cls/*.mat), or from
    SegmentationClassAug/*.png, the copy with VOC's numbers that many people have.

    Args:
      data: VOC2012 (with JPEGImages), or a folder that has it as VOC2012 or VOCdevkit/VOC2012.
    """
    root = _first_folder(
        [pathlib.Path(data, name) for name in (".", "VOC2012", "VOCdevkit/VOC2012")],
        "JPEGImages",
        f"{data} holds no PASCAL VOC 2012: no JPEGImages, VOC2012 or VOCdevkit/VOC2012 in it",
    )
    numbers = _numbering({**{k: k for k in range(len(VOC_CLASSES))}, 255: IGNORE})
    lists = {split: _names(root / "ImageSets" / "Segmentation" / f"{split}.txt") for split in ("train", "val")}
    finder, held_out = Finder(root), set(lists["val"])

    def located(name: str) -> pathlib.Path:
        return finder.find(name) or root / name

    extra = {
        name: path
        for name, path in _sbd(root, pathlib.Path(data)).items()
        if name not in held_out and name not in set(lists["train"])
    }
    train = [(name, located(f"SegmentationClass/{name}.png")) for name in lists["train"]] + sorted(extra.items())
    val = [(name, located(f"SegmentationClass/{name}.png")) for name in lists["val"]]

    def of_pairs(split: str, pairs: list[tuple[str, pathlib.Path]]) -> SegmentationSet:
        images = [located(f"JPEGImages/{name}.jpg") for name, _ in pairs]
        return SegmentationSet(f"VOC 2012 {split}", images, [path for _, path in pairs], VOC_CLASSES, numbers)

    return of_pairs("train_aug", train), of_pairs("val", val)


def _sbd(root: pathlib.Path, data: pathlib.Path) -> dict[str, pathlib.Path]:
    """{image name: its mask} of SBD."""
    folders = [root / "SegmentationClassAug"]
    folders += [
        folder / "cls"
        for base in (root, data, data.parent, *([root.parent.parent] if root.parent.name == "VOCdevkit" else []))
        for folder in (base / "benchmark_RELEASE" / "dataset", base / "SBD" / "dataset", base / "dataset")
    ]
    for folder in folders:
        if masks := {same_form(path.stem): path for path in files_in(folder, {".png", ".mat"})}:
            return masks
    raise DataError(
        f"train_aug needs SBD beside {root}: put its benchmark_RELEASE folder (with dataset/cls/*.mat) or "
        f"SegmentationClassAug/*.png into {root}; or use VOC's own train list alone, with the config's variant own"
    )


def load_ade20k(data: str) -> tuple[SegmentationSet, SegmentationSet]:
    """(training, validation) of ADE20K's scene parsing benchmark, 150 classes; 0 in its masks is no class.

    Args:
      data: ADEChallengeData2016, or a folder that has it.
    """
    root = _first_folder(
        [pathlib.Path(data), pathlib.Path(data, "ADEChallengeData2016")],
        "annotations",
        f"{data} holds no ADE20K: neither annotations/ nor ADEChallengeData2016/ in it",
    )
    numbers = _numbering({0: IGNORE, **{k + 1: k for k in range(ADE20K_CLASSES)}})
    path = root / "objectInfo150.txt"
    if not path.is_file():
        raise DataError(f"no {path}: it comes with ADEChallengeData2016 and names the classes")
    names = tuple(line.split("\t")[-1].split(",")[0].strip() for line in read_lines(path)[1:])
    if len(names) != ADE20K_CLASSES:
        raise DataError(f"{path} names {len(names)} classes, not {ADE20K_CLASSES}")
    finder, sets = Finder(root), []

    def located(name: str) -> pathlib.Path:
        return finder.find(name) or root / name

    for split in ("training", "validation"):
        masks = files_in(root / "annotations" / split, {".png"})
        if not masks:
            raise DataError(f"no *.png in {root / 'annotations' / split}")
        sets.append(
            SegmentationSet(
                f"ADE20K {split}", [located(f"images/{split}/{m.stem}.jpg") for m in masks], masks, names, numbers
            )
        )
    return tuple(sets)


Pairs = list[tuple[pathlib.Path, pathlib.Path]]  # an image and its mask


def load_own(data: str) -> tuple[SegmentationSet, SegmentationSet]:
    """(training, validation) images of one's own; in masks, number k is class k, and 255 does not count.

    classes.txt in the folder names the classes, a line each, from number 0 on. Without it they are the numbers up to
    the largest that any mask has.

    Args:
      data: one of
        a folder with images/ and masks/, where an image and its mask have one name but for the suffix: both with train/
        and val/ (or validation/, test/) in them or around them; without these, one image in five is for validation,
        by a hash of its name;
        a folder in PASCAL VOC's layout, without SBD: JPEGImages, SegmentationClass, and train.txt and val.txt in
        ImageSets/Segmentation; or one that has it as VOC2012 or VOCdevkit/VOC2012.

    Raises:
      DataError: neither is there, an image or a mask without the other, or fewer than two classes.
    """
    root = pathlib.Path(data)
    if (root / "images").is_dir() or (root / "train" / "images").is_dir():
        train, val = _split_pairs(root)
    else:
        root = _first_folder(
            [root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"],
            "JPEGImages",
            f"{data} holds neither images/ and masks/ nor PASCAL VOC's JPEGImages/ and SegmentationClass/",
        )
        train, val = (_listed_pairs(root, split) for split in ("train", "val"))
    if not train or not val:
        raise DataError(f"{root} has {len(train)} images with masks for training and {len(val)} for validation")
    names_file = root / "classes.txt"
    if names_file.is_file():
        names = tuple(read_lines(names_file))
    else:
        numbers = [number for number in in_parallel(_largest, [mask for _, mask in train + val]) if number is not None]
        names = tuple(map(str, range(max(numbers, default=0) + 1)))
    if not 2 <= len(names) < _UNKNOWN:
        where = names_file if names_file.is_file() else f"the masks of {root}"
        raise DataError(f"{where}: {len(names)} classes; there must be 2 to {_UNKNOWN - 1}, with numbers from 0 on")
    numbering = _numbering({**{k: k for k in range(len(names))}, 255: IGNORE})
    train, val = (
        SegmentationSet(
            f"{data} ({split})", [image for image, _ in pairs], [mask for _, mask in pairs], names, numbering
        )
        for split, pairs in (("training", train), ("validation", val))
    )
    return train, val


def _split_pairs(root: pathlib.Path) -> tuple[Pairs, Pairs]:
    """(training, validation) of images/ and masks/."""

    def place(kind: str, splits: tuple[str, ...]) -> pathlib.Path:
        places = [folder for split in splits for folder in (root / kind / split, root / split / kind)]
        return next((folder for folder in places if folder.is_dir()), places[0])

    splits = ("train",), ("val", "validation", "test")
    if place("images", splits[0]).is_dir():
        train, val = (_pairs(place("images", names), place("masks", names)) for names in splits)
        return [pair for _, pair in train], [pair for _, pair in val]
    named = _pairs(root / "images", root / "masks")
    held = [is_held_out(name) for name, _ in named]
    return (
        [pair for (_, pair), test in zip(named, held, strict=True) if not test],
        [pair for (_, pair), test in zip(named, held, strict=True) if test],
    )


def _pairs(images: pathlib.Path, masks: pathlib.Path) -> list[tuple[str, tuple[pathlib.Path, pathlib.Path]]]:
    """(name without suffix, (image, mask)) of all in two folders, at any depth, in the order of the names."""
    found: list[dict[str, pathlib.Path]] = []
    for folder, suffixes in ((images, IMAGE_SUFFIXES), (masks, {".png"})):
        if not folder.is_dir():
            raise DataError(f"no folder {folder}: images and their masks lie in folders images/ and masks/ of one form")
        paths: dict[str, pathlib.Path] = {}
        for name in map(pathlib.PurePath, walk(folder)):
            key = same_form(str(name.with_suffix("")))
            if name.suffix.lower() in suffixes and paths.setdefault(key, folder / name) != folder / name:
                raise DataError(f"{paths[key]} and {folder / name} have one name but for the suffix: remove one")
        found.append(paths)
    alone = sorted(found[0].keys() ^ found[1].keys())
    if alone:
        raise DataError(
            f"{len(alone)} files of {images} and {masks} have no counterpart of the same name, with a mask's suffix "
            f".png: {', '.join(alone[:5])}"
        )
    return [(name, (found[0][name], found[1][name])) for name in sorted(found[0])]


def _listed_pairs(root: pathlib.Path, split: str) -> Pairs:
    """Of a list in VOC's layout; what is missing is for `check` to say."""
    images, masks = (
        {same_form(path.stem): path for path in files_in(root / folder, suffixes)}
        for folder, suffixes in (("JPEGImages", IMAGE_SUFFIXES), ("SegmentationClass", {".png"}))
    )
    return [
        (
            images.get(name) or inside(root / "JPEGImages", f"{name}.jpg"),
            masks.get(name) or root / "SegmentationClass" / f"{name}.png",  # of a name that no longer leads out
        )
        for name in _names(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    ]


def _largest(path: pathlib.Path) -> int | None:
    """The largest number in a mask that counts, None without one; `check` says what is wrong with a mask."""
    try:
        numbers = read_mask(path)
    except DataError:
        return None
    counted = numbers[numbers != 255]
    return int(counted.max()) if counted.size else None


DATASETS = {"voc": load_voc, "ade20k": load_ade20k, "own": load_own}


def _numbering(known: dict[int, int]) -> np.ndarray:
    table = np.full(256, _UNKNOWN, np.uint8)
    for number, class_index in known.items():
        table[number] = class_index
    return table


def _first_folder(candidates: list[pathlib.Path], child: str, message: str) -> pathlib.Path:
    for folder in candidates:
        if (folder / child).is_dir():
            return folder.resolve()
    raise DataError(message)


def _names(path: pathlib.Path) -> list[str]:
    return [same_form(name) for name in read_lines(path, "the list of images of this split")]


def check(dataset: SegmentationSet, threads: int | None = None) -> dict[str, int]:
    """Reads every mask and the header of every image: minutes saved from a failure after hours.

    Returns:
      {"images", "labelled_pixels", "classes": how many occur}.

    Raises:
      DataError: one line with everything that is wrong (the first five of it), or no labelled pixel in the whole set.
    """

    def look(i: int) -> str | np.ndarray:
        try:
            with opened(dataset.images[i]) as image:
                size = image.size[::-1]
        except FileNotFoundError:
            return f"{dataset.images[i]} is missing"
        except (OSError, ValueError) as error:
            return f"{dataset.images[i]} is no image that can be read ({error})"
        try:
            mask = dataset.to_class[read_mask(dataset.masks[i])]
        except DataError as error:
            return str(error)
        return dataset.problem(i, mask, size) or np.bincount(mask.ravel(), minlength=256)

    problems, counts = [], np.zeros(256, np.int64)
    for found in in_parallel(look, range(len(dataset)), threads):
        if isinstance(found, str):
            problems.append(found)
        else:
            counts += found
    if problems:
        raise DataError(
            f"{len(problems)} of {len(dataset)} images of {dataset.source} cannot be used: "
            + "; ".join(problems[:5])
            + ("; ..." if len(problems) > 5 else "")
        )
    labelled = counts[: len(dataset.class_names)]
    if not labelled.any():
        raise DataError(f"no pixel of the {len(dataset)} images of {dataset.source} has a class")
    return {"images": len(dataset), "labelled_pixels": int(labelled.sum()), "classes": int((labelled > 0).sum())}


# ---- Batches --------------------------------------------------------------------------------------------------------
def resized(
    image: np.ndarray, short_side: float, long_side: float, interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """At the largest size, of the same shape, whose sides are at most these two; bilinear, for masks INTER_NEAREST."""
    height, width = image.shape[:2]
    factor = min(short_side / min(height, width), long_side / max(height, width))
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    return cv2.resize(image, size, interpolation=interpolation)


def augmented(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    *,
    crop_size: int,
    short_side: int,
    long_side: int,
    scale: tuple[float, float],
    flip_prob: float,
    fill: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Random size, crop and flip: (uint8[crop, crop, 3], uint8[crop, crop]); what the image leaves empty is `fill`."""
    factor = rng.uniform(*scale)
    image = resized(image, short_side * factor, long_side * factor)
    mask = resized(mask, short_side * factor, long_side * factor, cv2.INTER_NEAREST)
    y, x = (int(rng.integers(max(side - crop_size, 0) + 1)) for side in mask.shape)
    image, mask = image[y : y + crop_size, x : x + crop_size], mask[y : y + crop_size, x : x + crop_size]
    if rng.random() < flip_prob:
        image, mask = image[:, ::-1], mask[:, ::-1]
    return on_canvas(image, (crop_size, crop_size), fill), on_canvas(mask, (crop_size, crop_size), IGNORE)


def on_canvas(image: np.ndarray, size: tuple[int, int], fill: int | tuple[int, int, int]) -> np.ndarray:
    """The image in the upper left corner of a canvas (height, width) of one colour."""
    canvas = np.empty((*size, *image.shape[2:]), np.uint8)
    canvas[:] = fill
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


def train_batches(
    dataset: SegmentationSet,
    first_step: int = 0,
    *,
    seed: int,
    batch_size: int,
    crop_size: Count,
    short_side: Count,
    long_side: Count,
    scale: tuple[Positive, Positive],
    flip_prob: Chance,
    fill: tuple[int, int, int],
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from any step on; every image once per epoch.

    Yields {"image": uint8[b, S, S, 3], "mask": uint8[b, S, S]}.

    Args:
      batch_size: of all processes together; this one's rows are [index * b, (index + 1) * b), b = batch_size / count.
      crop_size: S, pixels; short_side, long_side: of the size that `scale` (smallest, largest factor) multiplies.
      fill: RGB of padding.
      threads: examples prepared at a time; None: one per usable core.

    Raises:
      DataError: a batch that does not divide over the processes; while iterating, a file that does not decode.
    """
    order = Order(seed, batch_size, process_index, process_count)

    def example(i: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = dataset.read(sampling.pick(seed, i, len(dataset)))
        return augmented(
            image,
            mask,
            sampling.example_rng(seed, i),
            crop_size=crop_size,
            short_side=short_side,
            long_side=long_side,
            scale=scale,
            flip_prob=flip_prob,
            fill=fill,
        )

    batches = batches_of(example, order, first_step, threads=threads)
    return ({"image": images, "mask": masks} for images, masks in batches)
