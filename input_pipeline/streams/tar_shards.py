"""Labelled images in tar files, as WebDataset has them: key.jpg beside key.cls or key.json, many to a shard.

Members are found once, by their headers; then an image is read from its place in the shard, in any order.
"""

import json
import pathlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import tqdm

from input_pipeline import folders
from vivi_jax.errors import DataError

SUFFIX = ".tar"
MAX_LABEL_BYTES = 2**20  # of key.cls and key.json, which are read while looking for members
LABEL_KEYS = ("label", "cls")  # of key.json, the first of these
_PARTS = re.compile(r"(?:^|[-_.])(train|test|val|validation)(?=[-_.])")
_BLOCK = tarfile.BLOCKSIZE


class Image(NamedTuple):
    """An image in a shard: where its bytes are, and the label as it is written."""

    shard: pathlib.Path
    name: str
    start: int
    size: int
    label: str

    @property
    def where(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        """Safe to call from many threads.

        Raises:
          DataError: the shard is shorter now.
        """
        with open(self.shard, "rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) < self.size:
            raise DataError(f"{self.shard} is cut off within {self.name}: it has changed since this began")
        return data


def shards_in(folder: folders.Path) -> list[pathlib.Path]:
    """The shards right in a folder without folders, sorted: beside class folders, archives are what these came from.

    Raises:
      DataError: there are compressed ones, in which nothing can be found without reading all that is before it.
    """
    if folders.folders_in(folder):
        return []
    compressed = folders.files_in(folder, {".tgz", ".gz", ".bz2", ".xz", ".zst"})
    if wrong := [path for path in compressed if path.suffix == ".tgz" or path.stem.endswith(SUFFIX)]:
        raise DataError(
            f"{wrong[0]} is compressed: unpack it to a {SUFFIX} file, whose images can be read in any order"
        )
    return folders.files_in(folder, {SUFFIX})


def by_part(shards: Sequence[pathlib.Path]) -> dict[str, list[pathlib.Path]]:
    """The shards of train, test, val and validation, by their names; {} if no name has one of these words.

    Raises:
      DataError: only some have.

    >>> by_part([pathlib.Path("in-val-000.tar"), pathlib.Path("in-train-000.tar"), pathlib.Path("in-train-001.tar")])
    {'val': [PosixPath('in-val-000.tar')], 'train': [PosixPath('in-train-000.tar'), PosixPath('in-train-001.tar')]}
    >>> by_part([pathlib.Path("a_000.tar")])
    {}
    """
    parts: dict[str, list[pathlib.Path]] = {}
    for shard in shards:
        found = _PARTS.search(shard.name.lower())
        parts.setdefault(found[1] if found else "", []).append(shard)
    if len(parts) > 1 and "" in parts:
        raise DataError(
            f"{parts[''][0]}: its name has none of train, test, val, and that of other shards beside it has"
        )
    return {} if "" in parts else parts


def images_in(shards: Sequence[pathlib.Path]) -> list[Image]:
    """Every labelled image, in the order of the shards and of their members.

    Raises:
      DataError: a shard that is damaged, a sample without a label or with two images, labels of two kinds.
    """
    found = [image for shard in tqdm.tqdm(shards, desc="shards", disable=len(shards) < 2) for image in _of_shard(shard)]
    numbers = [image for image in found if image.label.isdecimal()]
    if numbers and len(numbers) < len(found):
        text = next(image for image in found if not image.label.isdecimal())
        raise DataError(
            f"{text.where} has the label {text.label!r}, and {numbers[0].where} the number {numbers[0].label}: "
            "give all labels as numbers, or all as names"
        )
    return found


def _of_shard(shard: pathlib.Path) -> Iterator[Image]:
    """The labelled images of one shard; what else is in it is passed over."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in _files_of(shard, archive):
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                ending = ending.lower()
                if ending in sample:
                    raise DataError(f"{shard} holds {member.name} twice")
                sample[ending] = member
            for key, sample in samples.items():
                yield from _of_sample(shard, key, sample, archive)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shard} is no tar file, or a damaged one: {error}") from None


def _files_of(shard: pathlib.Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members that are data files.

    Raises:
      DataError: the shard does not end as a tar file does (tarfile takes a damaged header for the end), or holds a
        link, a sparse file, or a name that no line can show.
    """
    end, last = 0, "its beginning"
    for member in archive:
        if not member.name.isprintable():
            raise DataError(f"{shard} holds a member whose name has control characters: {member.name!r}")
        end, last = archive.offset, member.name
        if member.isdir() or not all(map(folders.is_data, member.name.removeprefix("./").split("/"))):
            continue
        if not member.isreg() or member.issparse():
            raise DataError(f"{shard}: {member.name} is a link or the like, not a file: write the shard without")
        yield member
    with open(shard, "rb") as file:
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise DataError(f"{shard} is cut off or damaged behind {last}: fetch it again")


def _of_sample(
    shard: pathlib.Path, key: str, sample: dict[str, tarfile.TarInfo], archive: tarfile.TarFile
) -> Iterator[Image]:
    """The image of a sample; none, if it has no image."""
    images = [member for ending, member in sample.items() if f".{ending}" in folders.IMAGE_SUFFIXES]
    if not images:
        return
    if len(images) > 1:
        raise DataError(f"{shard}: {images[0].name} and {images[1].name} are two images of one sample, {key}")
    labels = [ending for ending in ("cls", "json") if ending in sample]
    if not labels:
        raise DataError(f"{shard}: {images[0].name} has no label: there is neither {key}.cls nor {key}.json beside it")
    member = sample[labels[0]]
    if member.size > MAX_LABEL_BYTES:
        raise DataError(f"{shard}: {member.name} has {member.size} bytes, too many for a label")
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    label = _label(f"{shard}: {member.name}", file.read(), labels[0])
    yield Image(shard, images[0].name, images[0].offset_data, images[0].size, label)


def _label(where: str, data: bytes, ending: str) -> str:
    """A class by its name, or by its number in decimal digits.

    Raises:
      DataError: it is neither.
    """
    try:
        value = data.decode("utf-8").strip() if ending == "cls" else json.loads(data)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise DataError(f"{where} is no {'text' if ending == 'cls' else 'JSON'}") from None
    if ending == "json":
        found = [value[name] for name in LABEL_KEYS if name in value] if isinstance(value, dict) else []
        if not found:
            raise DataError(f"{where} has no {' or '.join(map(repr, LABEL_KEYS))}")
        value = found[0]
    label = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(label, str) and re.fullmatch(r"[0-9]{1,9}", label):
        return str(int(label))
    if isinstance(label, str) and label.isprintable() and re.search(r"[^-+.0-9]", label):
        return folders.same_form(label)
    raise DataError(f"{where} has the label {str(value)[:40]!r}: neither a number from 0 on nor a name")
