"""Labelled images, for training and evaluation: class folders, prepared videos, or a TFDS name, read in one way."""

import dataclasses
import difflib
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from input_pipeline import folders, tfds_sets
from input_pipeline.store import META, FrameStore
from input_pipeline.streams import sampling, tar_shards
from input_pipeline.streams.decode import Example, decode_any, decoded, image_height_width
from vivi_jax.buckets.client import ADDRESSES, Folder
from vivi_jax.buckets.local import copied
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
_TEST_FOLDERS = ("test", "val", "validation")
_HELD_OUT = 5  # one image in five is for testing, where a source has no test part


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Encoded images, read one by one, and their labels."""

    source: str  # where they come from, for messages
    labels: np.ndarray  # int32[N], index into class_names
    class_names: list[str]
    read: Callable[[int], bytes]  # index -> contents of an image file; safe to call from many threads
    name: Callable[[int], str]  # index -> what to call the image in a message
    ahead: int = 0  # images to begin before their turn, see FrameStore

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "LabelledImages":
        """The images of the given indices, in that order."""
        return dataclasses.replace(
            self,
            labels=self.labels[indices],
            read=lambda i: self.read(int(indices[i])),
            name=lambda i: self.name(int(indices[i])),
        )


def load_labelled(source: str, split: str, *, data_dir: str | None = None) -> LabelledImages:
    """Labelled images from a folder or a TFDS name.

    Args:
      source: one of
        a folder with train/ and test/ (or val/ or validation/), each with one folder of images per class, or each
        a frame store that input_pipeline.prepare wrote with labels: the middle frame of every labelled video;
        shards of WebDataset, in train/ and test/ or with these words in their names (tar_shards.py);
        one such folder or store alone: one image in five, chosen by a hash of its name, is held out for "test";
        any of these in gs:// or s3://: stores are read where they lie, all else is copied first (buckets/local.py);
        the name of a TFDS data set with an image and a label, e.g. "cifar10"; it is downloaded if needed, and its
        encoded images are kept in memory.
      split: "train" or "test".
      data_dir: where TFDS keeps its data; None = its default.

    Raises:
      DataError: source is none of these, or holds no labelled images.
    """
    if split not in ("train", "test"):
        raise DataError(f"no split {split!r}: use 'train' or 'test'")
    source, names = os.fspath(source), ("train", *_TEST_FOLDERS)
    if source.startswith(ADDRESSES):
        there = Folder(source).names()
        parts = [name for name in names if f"{name}/{META}" in there]
        if not parts and META not in there:
            return load_labelled(copied(source), split)
    elif not os.path.isdir(source):
        return _load_tfds(source, split, data_dir)
    else:
        parts = [name for name in names if os.path.isdir(os.path.join(source, name))]
    root = source.rstrip("/") or source
    if not parts and not source.startswith(ADDRESSES) and not os.path.isfile(os.path.join(root, META)):
        shards = tar_shards.by_part(tar_shards.shards_in(root))
        if shards:
            return _of_shards_by_part(root, shards, split)
    if "train" not in parts:
        return _hold_out(load_folder(root), split)
    train = load_folder(f"{root}/train")
    if split == "train":
        return train
    if not parts[1:]:
        raise DataError(f"{root} has train/ but none of {', '.join(f'{name}/' for name in _TEST_FOLDERS)}: add one")
    return with_classes_of(train, load_folder(f"{root}/{parts[1]}"))


def eval_batches(images: LabelledImages, *, batch_size: int, image_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All images once, in order, as BYOL evaluates: the central square of 7/8 (224/256) of the short side, resized.

    Returns:
      Iterator over {"image": uint8[b, image_size, image_size, 3] RGB, "label": int32[b]}, b = batch_size, the last one
      smaller.

    Raises:
      DataError: while iterating, an image that does not decode.
    """

    def example(i: int) -> Example:
        data, name = images.read(i), images.name(i)
        height, width = image_height_width(data, name)
        side = max(min(height, width) * 7 // 8, 1)
        plan = sampling.central_square(np.zeros(1, np.int64), height, width, side)
        return Example(np.array([data], object), plan, lambda _: name, {"label": images.labels[i]})

    return decoded(
        example,
        0,
        len(images),
        rows=batch_size,
        pictures={"image": ()},
        image_size=image_size,
        decode=decode_any,
        fields={"label": np.int32},
        ahead=images.ahead,
    )


def load_folder(root: str | os.PathLike) -> LabelledImages:
    """All labelled images of a frame store, also in a bucket, of a folder with one folder per class, at any depth, or
    of a folder of WebDataset's shards.

    Raises:
      DataError: there are none.
    """
    if os.fspath(root).startswith(ADDRESSES):
        return _middle_frames(FrameStore(root))
    root = pathlib.Path(root)
    if (root / META).is_file():
        return _middle_frames(FrameStore(root))
    if shards := tar_shards.shards_in(root):
        return _load_shards(str(root), shards)
    class_folders = folders.folders_in(root)
    class_names = sorted({folders.same_form(folder.name) for folder in class_folders})
    files, labels, others = [], [], []
    for folder in class_folders:
        for path in sorted(folder / name for name in folders.walk(folder, above=root)):
            if path.is_symlink() and not path.exists():
                raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; mend or remove it")
            if path.suffix.lower() in folders.IMAGE_SUFFIXES and path.is_file():
                files.append(path)
                labels.append(class_names.index(folders.same_form(folder.name)))
            else:
                others.append(path)
    if not files:
        raise DataError(
            f"no images in {root}: it must be a frame store of labelled videos, or hold one folder per "
            f"class with {', '.join(sorted(folders.IMAGE_SUFFIXES))} files, or shards of WebDataset (.tar)"
        )
    if others:
        _LOG.warning("%d files of %s are no images and not used (%s)", len(others), root, others[0])
    return LabelledImages(
        str(root),
        np.array(labels, np.int32),
        class_names,
        read=lambda i: files[i].read_bytes(),
        name=lambda i: str(files[i]),
    )


def _of_shards_by_part(root: str, shards: dict[str, list[pathlib.Path]], split: str) -> LabelledImages:
    """The images of a split, of shards that lie in one folder and have their part in their names."""
    tests = [name for name in _TEST_FOLDERS if name in shards]
    if "train" not in shards or not tests:
        raise DataError(
            f"{root} has shards of {', '.join(sorted(shards))} by their names: "
            f"it needs train and one of {', '.join(_TEST_FOLDERS)}"
        )
    train = _load_shards(root, shards["train"])
    return train if split == "train" else with_classes_of(train, _load_shards(root, shards[tests[0]]))


def _load_shards(root: str, shards: list[pathlib.Path]) -> LabelledImages:
    found = tar_shards.images_in(shards)
    if not found:
        raise DataError(f"no images in the shards of {root}: a sample is key.jpg beside key.cls or key.json")
    classes = sorted(
        {image.label for image in found}, key=lambda label: (len(label) if label.isdecimal() else 0, label)
    )
    number_of = {label: number for number, label in enumerate(classes)}
    return LabelledImages(
        root,
        np.array([number_of[image.label] for image in found], np.int32),
        classes,
        read=lambda i: found[i].read(),
        name=lambda i: found[i].where,
    )


def _middle_frames(store: FrameStore) -> LabelledImages:
    videos = np.flatnonzero(store.label >= 0)
    if not len(videos):
        raise DataError(f"no video of {store.directory} has a label; prepare them again with --labels=CSV")
    if len(videos) < len(store):
        _LOG.warning(
            "%d of %d videos of %s have no label and are not used",
            len(store) - len(videos),
            len(store),
            store.directory,
        )
    records = store.first_record[videos] + store.num_frames[videos] // 2
    return LabelledImages(
        store.directory,
        store.label[videos].astype(np.int32),
        store.class_names,
        read=lambda i: store.read(records[i]).item(),
        name=lambda i: f"{store.directory}: the middle frame of {store.videos[videos[i]]}",
        ahead=store.ahead,
    )


def with_classes_of(train: LabelledImages, test: LabelledImages) -> LabelledImages:
    """The test images, labelled by the class numbers of the training images."""
    number_of = {folders.same_form(name): label for label, name in enumerate(train.class_names)}
    unknown = sorted(name for name in test.class_names if folders.same_form(name) not in number_of)
    if unknown:
        raise DataError(f"{test.source} has classes that {train.source} lacks: {', '.join(unknown[:5])}")
    number = np.array([number_of[folders.same_form(name)] for name in test.class_names], np.int32)
    return dataclasses.replace(test, labels=number[test.labels], class_names=train.class_names)


def is_held_out(name: str) -> bool:
    """Whether a file, by its name in its folder, is one of those for testing where a source has no test part.

    It stays so when others are added or removed.
    """
    data = os.fsencode(folders.same_form(name))
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") % _HELD_OUT == 0


def _hold_out(images: LabelledImages, split: str) -> LabelledImages:
    """The images of a split."""

    def is_test(i: int) -> bool:
        return is_held_out(os.path.relpath(images.name(i), images.source))

    chosen = np.flatnonzero([is_test(i) == (split == "test") for i in range(len(images))])
    if not len(chosen):
        raise DataError(
            f"none of the {len(images)} images of {images.source} falls into {split!r}: give train/ and test/ folders"
        )
    _LOG.info(
        "%s has no train/ and test/: %s is %d of its %d images, by a hash of their names",
        images.source,
        split,
        len(chosen),
        len(images),
    )
    return images.take(chosen)


def _load_tfds(source: str, split: str, data_dir: str | None) -> LabelledImages:
    import tensorflow_datasets as tfds  # seconds to import, and only needed here

    names = tfds.list_builders(with_community_datasets=False)
    if source.split(":")[0].split("/")[0] not in names:
        folder = pathlib.Path(source).parent
        siblings = [str(folder / p.name) for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
        near = difflib.get_close_matches(source, [*siblings, *names], n=3, cutoff=0.6)
        raise DataError(
            f"{source!r} is neither a folder nor a TFDS data set" + (f"; nearest: {', '.join(near)}" if near else "")
        )
    try:
        builder = tfds_sets.builder(source, data_dir)
        features = dict(builder.info.features)
        image_key, label_key = builder.info.supervised_keys or ("", "")
        if not (
            isinstance(features.get(image_key), tfds.features.Image)
            and isinstance(features.get(label_key), tfds.features.ClassLabel)
        ):
            raise ValueError(f"it has no image with a class label but {', '.join(features)}")
        builder.download_and_prepare()
        tfds_sets.check_disjoint(builder)
        found = tfds_sets.examples(builder, split, encoded=(image_key,))
        examples = [(example[image_key], example[label_key]) for example in found]
    except DataError:
        raise
    except Exception as e:  # TFDS passes on what downloads, checksums, versions and splits raise
        raise DataError(f"TFDS cannot provide {split!r} of {source!r}: {' '.join(str(e).split())[:300]}") from e
    return LabelledImages(
        source,
        np.array([label for _, label in examples], np.int32),
        features[label_key].names,
        read=lambda i: examples[i][0],
        name=lambda i: f"image {i} of {source}, {split}",
    )
