"""VTAB's images and labels, from TFDS or from class folders: preprocessing, order, and checks.

Preprocessing is the official one: the whole image to image_size x image_size, bilinear, aspect ignored, nothing
smoothed, no augmentation. It differs in one thing: results are rounded to uint8 here, floats there.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np

from evaluation.protocols.vtab.tasks import OWN, Task
from input_pipeline import images, tfds_sets
from input_pipeline.streams.decode import decode_whole
from input_pipeline.streams.picture_size import TooLarge
from vivi_jax.errors import DataError

DAMAGED_SHOWN = 5
FOLDER_VAL = 5  # one training image in five, where a class folder has no val/


@dataclasses.dataclass(frozen=True)
class Examples:
    """One split of one task: encoded images and labels, in a fixed order."""

    source: str  # for messages
    size: int
    classes: int
    read: Callable[[], Iterable[tuple[bytes, int]]]  # all examples, from the first
    name: Callable[[int], str]  # index -> what to call the example in a message
    scale: int = 1  # factor of the pixel values


class Absent(DataError):
    """A task whose data are not there; the message is the step that brings them."""


def find(task: Task, data_dir: str, *, check_sizes: bool) -> Callable[[str], Examples]:
    """Returns split name (see Task.split) -> Examples.

    Args:
      data_dir: holds class folders (DATA_DIR/TASK/train/CLASS/*.png and test/, perhaps val/) or TFDS data sets; where
        it has both, the folders are used.
        Of OWN it is itself what images.load_labelled takes.
      check_sizes: compare all splits, and the number of classes, with the table, and of parts that TFDS draws at random
        that they share no image. Only off for trials on small data; OWN has none to compare.

    Raises:
      Absent: neither is there.
      DataError: sizes or classes that are not the table's; of OWN, too few images or classes.
    """
    if task is OWN:
        return _own_splits(data_dir)
    folder = pathlib.Path(data_dir) / task.name
    if (folder / "train").is_dir():
        load = _folder_splits(folder)
    else:
        load = _tfds_splits(task, data_dir)
        if check_sizes:
            tfds_sets.check_disjoint(tfds_sets.builder(task.builder, data_dir))
    if check_sizes:
        _check(task, load)
    return load


def _check(task: Task, load: Callable[[str], Examples]) -> None:
    for split in ("train", "val", "test"):
        found = load(split)
        for what, expected, got in (
            ("examples", task.size(split), found.size),
            ("classes", task.classes, found.classes),
        ):
            if expected != got:
                raise DataError(
                    f"{task.name}: expected {expected} {what} in {split!r}, found {got} in {found.source}; "
                    "prepare the set again, or take another version of it"
                )


# ---- Sources --------------------------------------------------------------------------------------------------------
def _tfds_splits(task: Task, data_dir: str) -> Callable[[str], Examples]:
    builder = tfds_sets.builder(task.builder, data_dir)
    if not builder.is_prepared():
        first = f"put {task.manual} into {os.path.join(data_dir, 'downloads', 'manual')}, then " if task.manual else ""
        raise Absent(
            f"{task.name}: no data in {builder.data_dir}; {first}run: {tfds_sets.command(task.builder, data_dir)}"
        )
    wanted: dict[str, Any] = {"image": True}
    for need in task.needs:
        field, _, inner = need.partition("/")
        wanted[field] = {**wanted.get(field, {}), inner: True} if inner else True

    def load(split: str) -> Examples:
        cuts = task.split(split)

        def read() -> Iterator[tuple[bytes, int]]:
            # In the order on disk: it says which examples are the first 800.
            for example in tfds_sets.examples(builder, cuts, wanted, encoded=("image",)):
                yield example["image"], task.label(example)

        try:
            size = sum(builder.info.splits[part].num_examples for part in cuts.split("+"))
        except ValueError as error:
            raise DataError(
                f"{task.name}: {builder.data_dir} has too few examples for {cuts} ({' '.join(str(error).split())}); "
                "prepare the set again, or take another version of it"
            ) from None
        return Examples(
            f"{builder.data_dir}, {cuts}",
            size,
            task.classes,
            read,
            lambda i: f"example {i} of {task.builder}, {cuts}",
            task.scale,
        )

    return load


def _own_splits(data: str) -> Callable[[str], Examples]:
    load = _folder_splits(pathlib.Path(data))
    train, val = load("trainval"), load("val")
    if train.classes < 2:
        raise DataError(f"{data} has one class: fine-tuning needs two or more, a folder each")
    if not val.size or val.size == train.size:
        raise DataError(
            f"{data} has {train.size} training images, of which {val.size} are held out to choose the settings by: "
            f"give {FOLDER_VAL} or more, or a folder val/ beside train/ and test/"
        )
    return load


def _folder_splits(folder: pathlib.Path) -> Callable[[str], Examples]:
    """Training images are put into one random order first: a folder's own order goes class by class."""
    train, test = (images.load_labelled(str(folder), split) for split in ("train", "test"))
    train = train.take(np.random.default_rng(0).permutation(len(train)))
    if (folder / "val").is_dir() and (folder / "test").is_dir():
        val = images.with_classes_of(train, images.load_folder(folder / "val"))
        val = val.take(np.random.default_rng(0).permutation(len(val)))
    else:
        held_out = len(train) // FOLDER_VAL
        val, train = train.take(np.arange(held_out)), train.take(np.arange(held_out, len(train)))

    def parts(split: str) -> list[images.LabelledImages]:
        return {
            "train": [train],
            "val": [val],
            "trainval": [train, val],
            "test": [test],
            "train1000": [_first(train, 1000)],
            "train800": [_first(train, 800)],
            "val200": [_first(val, 200)],
            "train800val200": [_first(train, 800), _first(val, 200)],
        }[split]

    def load(split: str) -> Examples:
        chosen = parts(split)
        members = [(part, i) for part in chosen for i in range(len(part))]
        return Examples(
            f"{folder} ({split})",
            len(members),
            len(train.class_names),
            lambda: ((part.read(i), int(part.labels[i])) for part, i in members),
            lambda n: members[n][0].name(members[n][1]),
        )

    return load


def _first(labelled: images.LabelledImages, count: int) -> images.LabelledImages:
    return labelled.take(np.arange(min(count, len(labelled))))


# ---- Pixels ---------------------------------------------------------------------------------------------------------
def preprocess(data: bytes, image_size: int, scale: int = 1) -> np.ndarray:
    """Encoded image -> uint8[image_size, image_size, 3] RGB; grey becomes three equal channels.

    OpenCV's bilinear kernel has TensorFlow's sample positions (half-pixel centres) and is several times as fast.

    Raises:
      ValueError: the image does not decode.
    """
    pixels = decode_whole(data)
    return cv2.resize(pixels * np.uint8(scale), (image_size, image_size), interpolation=cv2.INTER_LINEAR)


def batches(examples: Examples, *, batch_size: int, image_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All examples once, in order; the last batch may be smaller.

    Yields:
      {"image": uint8[b, image_size, image_size, 3], "label": int32[b]}.

    Raises:
      DataError: a label outside the classes; or, once all have been read, images that do not decode: how many there
        are, and the names of the first.
    """
    yield from _decoded(enumerate(examples.read()), examples, batch_size, image_size)


def load_all(examples: Examples, *, batch_size: int, image_size: int) -> dict[str, np.ndarray]:
    """The whole split: {"image": uint8[N, image_size, image_size, 3], "label": int32[N]}. Raises as `batches`."""
    parts = list(batches(examples, batch_size=batch_size, image_size=image_size))
    return {key: np.concatenate([part[key] for part in parts]) for key in ("image", "label")}


def shuffled_stream(
    examples: Examples, *, batch_size: int, image_size: int, buffer: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches of a split too large for memory, shuffled within `buffer` encoded examples.

    Raises:
      DataError: as `batches`, at the end of the first pass.
    """
    rng = np.random.Generator(np.random.Philox(seed))

    def mixed() -> Iterator[tuple[int, tuple[bytes, int]]]:
        held = []
        for item in itertools.chain.from_iterable(enumerate(examples.read()) for _ in itertools.count()):
            if len(held) < buffer:
                held.append(item)
                continue
            i = rng.integers(buffer)
            item, held[i] = held[i], item
            yield item

    return _decoded(mixed(), examples, batch_size, image_size)


def _decoded(
    items: Iterator[tuple[int, tuple[bytes, int]]], examples: Examples, batch_size: int, image_size: int
) -> Iterator[dict[str, np.ndarray]]:
    damaged, done = {}, 0

    def pixels(item: tuple[int, tuple[bytes, int]]) -> np.ndarray:
        index, (data, _) = item
        try:
            return preprocess(data, image_size, examples.scale)
        except TooLarge as error:
            raise DataError(f"{examples.name(index)}: {error}") from None
        except ValueError:
            damaged[index] = examples.name(index)
            return np.zeros((image_size, image_size, 3), np.uint8)  # of a batch that ends in the error below

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # decoding and resizing release Python's lock
        while chunk := list(itertools.islice(items, batch_size)):
            labels = np.array([label for _, (_, label) in chunk], np.int32)
            outside = np.flatnonzero((labels < 0) | (labels >= examples.classes))
            if len(outside):
                raise DataError(
                    f"{examples.name(chunk[outside[0]][0])} has label {labels[outside[0]]}, outside the "
                    f"{examples.classes} classes"
                )
            yield {"image": np.stack(list(pool.map(pixels, chunk))), "label": labels}
            done += len(chunk)
            if damaged and done >= examples.size:
                break
    if damaged:
        raise DataError(
            f"{len(damaged)} of {examples.size} images of {examples.source} are damaged and do not decode: "
            f"{', '.join(itertools.islice(damaged.values(), DAMAGED_SHOWN))}; replace them, or prepare the "
            "set again"
        )
