"""DAVIS 2017's folders: sequences, their checks, and result masks as the official tool reads them.

DAVIS/JPEGImages/480p/SEQUENCE/00000.jpg ...    DAVIS/Annotations/480p/SEQUENCE/00000.png ...
DAVIS/ImageSets/2017/val.txt                    results: SEQUENCE/00000.png ...
"""

import dataclasses
import logging
import pathlib

import numpy as np
from PIL import Image

from evaluation.protocols.masks import palette
from evaluation.protocols.parallel import in_parallel
from input_pipeline.folders import Finder, files_in
from input_pipeline.lists import read_lines
from input_pipeline.streams.picture_size import opened
from vivi_jax import files
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
RESOLUTION = "480p"
LISTS = ("ImageSets/2017/val.txt", "val.txt")
_VOID = 255


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Frames of a video, and masks of the objects in them."""

    name: str
    frames: list[pathlib.Path]
    masks: list[pathlib.Path]  # of all frames, or of the first only (then nothing can be scored)
    objects: int  # the largest number in the first mask
    size: tuple[int, int]  # height, width
    binary: bool = False  # DAVIS 2016's masks: 255 is the one object

    @property
    def scored(self) -> bool:
        return len(self.masks) == len(self.frames)

    def frame(self, i: int) -> np.ndarray:
        """uint8[H, W, 3] RGB; grey frames get three equal channels."""
        try:
            with opened(self.frames[i]) as image:
                return np.array(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.frames[i]} does not decode ({error}); replace it") from None

    def mask(self, i: int) -> np.ndarray:
        """uint8[H, W] object numbers; numbers that the first frame does not have count as background, as officially."""
        mask = read_objects(self.masks[i], binary=self.binary)
        return np.where(mask > self.objects, 0, mask)


def read_objects(path: pathlib.Path, *, binary: bool = False) -> np.ndarray:
    """uint8[H, W] object numbers, 0 = background, of a result or annotation file.

    An indexed PNG holds the numbers themselves, with 255 for pixels that belong to nothing. A grey one with only 0 and
    255 is DAVIS 2016's: there 255 is the one object.

    Args:
      binary: it is the one object in an indexed PNG too, if that has only 0 and 255.

    Raises:
      DataError: missing, damaged, or a picture in colours instead of numbers.
    """
    mode, mask = _numbers(path)
    if (mode == "L" or binary) and _only_void(mask):
        return (mask == _VOID).astype(np.uint8)
    return np.where(mask == _VOID, 0, mask)


def _numbers(path: pathlib.Path) -> tuple[str, np.ndarray]:
    """Pillow's mode, and uint8[H, W] as they stand in the file."""
    try:
        with opened(path) as image:
            mode, mask = image.mode, np.array(image).astype(np.uint8)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no mask that can be read ({error})") from None
    if mode not in ("P", "L", "1"):
        raise DataError(f"{path} has the mode {mode}: a mask must be an indexed or grey PNG")
    return mode, mask


def _only_void(mask: np.ndarray) -> bool:
    return bool(np.isin(mask, (0, _VOID)).all())


def write_objects(path: pathlib.Path, mask: np.ndarray) -> None:
    """Writes uint8[H, W] object numbers as an indexed PNG in DAVIS' colours."""
    image = Image.fromarray(mask)
    image.putpalette(palette().tobytes())  # makes it indexed
    image.save(path)


def load(data: str, names: list[str] | None = None) -> list[Sequence]:
    """The sequences of DAVIS' validation list, or those named, with every frame and mask checked.

    Raises:
      DataError: no DAVIS there; or one line with everything that is wrong with its sequences.
    """
    root = pathlib.Path(data)
    if not (root / "JPEGImages" / RESOLUTION).is_dir():
        raise DataError(f"{data} holds no DAVIS: no JPEGImages/{RESOLUTION} in it")
    if names is None:
        lists = [root / name for name in LISTS if (root / name).is_file()]
        if not lists:
            raise DataError(f"no {root / LISTS[0]}: the list of sequences; or give --sequences=NAME,NAME")
        names = read_lines(lists[0], "list of sequences")
    for name in names:  # they become names of folders that are written and emptied
        if files.inside(root, name).parent != root:
            raise DataError(f"{name!r} is no name of a sequence: it must be that of one folder")
    found, problems = [], []
    for sequence, wrong in in_parallel(lambda name: _look(root, name), names):
        found.append(sequence)
        problems += wrong
    if problems or not found:
        raise DataError(
            f"{len(problems)} problems in the {len(names)} sequences of {data}: "
            + "; ".join(problems[:5])
            + ("; ..." if len(problems) > 5 else "")
        )
    return found


def _look(root: pathlib.Path, name: str) -> tuple[Sequence | None, list[str]]:
    """(the sequence, what is wrong with it)."""
    folders = {part: Finder(root / part / RESOLUTION).find(name) for part in ("JPEGImages", "Annotations")}
    frames = files_in(folders["JPEGImages"], {".jpg", ".jpeg", ".png"}) if folders["JPEGImages"] else []
    annotations = folders["Annotations"] or root / "Annotations" / RESOLUTION / name
    if not frames:
        return None, [f"{name} has no frames"]
    wrong = []
    if not all(path.stem.isdigit() for path in frames):
        return None, [f"{name}: frames must be numbered, as 00000.jpg"]
    numbers = [int(path.stem) for path in frames]
    if missing := sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers)):
        wrong.append(f"{name}: frame {missing[0]:05d} is missing")
    mask_of = {path.stem: path for path in files_in(annotations, {".png"})}
    there = mask_of.keys() & {path.stem for path in frames}
    if frames[0].stem not in there:
        return None, [*wrong, f"{name}: no mask of the first frame, {annotations / frames[0].stem}.png"]
    lacking = [path.stem for path in frames if path.stem not in there]
    if lacking and len(there) > 1:
        wrong.append(f"{name}: {len(lacking)} frames have no mask, the first {lacking[0]}")
    if not lacking and len(frames) < 3:
        wrong.append(f"{name}: {len(frames)} frames; the first and the last are not scored, so there must be 3 or more")
    masks = [mask_of[path.stem] for path in frames if path.stem in there]
    sequence, more = _read(name, frames, masks)
    return sequence, wrong + more


def _read(name: str, frames: list[pathlib.Path], masks: list[pathlib.Path]) -> tuple[Sequence | None, list[str]]:
    wrong, sizes = [], []
    for path in frames:
        try:
            with opened(path) as image:
                sizes.append(image.size[::-1])
        except (OSError, ValueError) as error:
            wrong.append(f"{path} is no image that can be read ({error})")
            sizes.append(None)
    size = sizes[0]
    wrong += [
        f"{path} is {other[1]} x {other[0]} pixels, the first frame {size[1]} x {size[0]}"
        for path, other in zip(frames, sizes, strict=True)
        if size and other and other != size
    ]
    objects, unknown, binary = 0, [], False
    for path in masks:
        try:
            if path == masks[0]:  # where there is nothing else to follow, 255 is an object
                binary = _only_void(_numbers(path)[1])
            mask = read_objects(path, binary=binary)
        except DataError as error:
            wrong.append(str(error))
            continue
        if size and mask.shape != size:
            wrong.append(f"{path} is {mask.shape[1]} x {mask.shape[0]} pixels, its frame {size[1]} x {size[0]}")
        if path == masks[0]:
            objects = int(mask.max())
            if not objects:
                wrong.append(f"{path} has no object: there is nothing to follow")
        elif mask.max() > objects:
            unknown.append(path.stem)
    if unknown and objects:
        _LOG.warning(
            "%s: %d masks (the first %s) have objects that the first does not; they count as background, as "
            "in the official tool",
            name,
            len(unknown),
            unknown[0],
        )
    return (Sequence(name, frames, masks, objects, size, binary) if not wrong else None), wrong
