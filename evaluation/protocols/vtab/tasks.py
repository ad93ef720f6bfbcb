"""VTAB's 19 tasks as one table: where the images are, how the splits are cut, and what the label is.

Everything here is as in the code that made the published numbers (google-research/task_adaptation, data/*.py), whose
TFDS builders, slices and label functions this table restates. Sizes are of the full splits; a data set that has others
is refused (data.py).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vivi_jax.errors import ConfigError, lookup

GROUPS = ("natural", "specialized", "structured")
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)  # metres
KITTI_VEHICLES = 3  # types 0, 1, 2: Car, Van, Truck
NO_VEHICLE = 1000.0  # metres: falls into KITTI's last class


# ---- Labels: one decoded TFDS example (NumPy values) -> class number ------------------------------------------------
def plain_label(example: dict) -> int:
    return int(example["label"])


def clevr_count(example: dict) -> int:
    """3 to 10 objects -> 0 to 7."""
    return len(example["objects"]["size"]) - 3


def clevr_distance(example: dict) -> int:
    """Distance of the nearest object in six bins."""
    return distance_class(np.min(example["objects"]["pixel_coords"][:, 2]), CLEVR_DISTANCES)


def kitti_distance(example: dict) -> int:
    """Distance of the nearest vehicle in three bins; 3 = no vehicle."""
    vehicles = np.asarray(example["objects"]["type"]) < KITTI_VEHICLES
    metres = np.asarray(example["objects"]["location"])[vehicles, 2]
    return distance_class(min([*metres, NO_VEHICLE]), KITTI_DISTANCES)


def distance_class(distance: float, thresholds: tuple[float, ...]) -> int:
    """Index of the last threshold that is below the distance: strictly, so one that is equal does not count."""
    return int(np.flatnonzero(np.asarray(thresholds) < distance).max())


def dsprites_x(example: dict) -> int:
    """32 positions -> 16 classes."""
    return int(example["label_x_position"] // 2)


def dsprites_orientation(example: dict) -> int:
    """40 orientations -> 16 classes of two or three."""
    return int(example["label_orientation"] // 2.5)


def smallnorb_azimuth(example: dict) -> int:
    return int(example["label_azimuth"])  # TFDS has halved the file's even numbers: 0 to 17


def smallnorb_elevation(example: dict) -> int:
    return int(example["label_elevation"])


# ---- The table ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Task:
    """One row. `train`, `val` and `test` are TFDS split strings; the last slice of a split has no upper end, so that a
    data set of another size shows in the counts."""

    name: str
    group: str  # one of GROUPS
    builder: str  # TFDS name
    classes: int
    sizes: tuple[int, int, int]  # examples of train, val, test
    train: str
    val: str
    test: str = "test"
    label: Callable[[dict], int] = plain_label
    needs: tuple[str, ...] = ("label",)  # what `label` reads; "objects/size" is a field of a sequence
    scale: int = 1  # factor of the pixel values
    manual: str = ""  # what to download by hand first

    def split(self, name: str) -> str:
        """TFDS split string of "train", "val", "trainval", "test", "train1000", "train800", "val200", "train800val200".

        train1000 is the V1 training set: the first 1000 of trainval, which are the first 1000 of train.
        val200 is the first 200 of val.
        """
        source, _, bounds = self.val.partition("[")
        first = int(bounds.split(":")[0] or 0) if bounds else 0
        val200 = f"{source}[{first}:{first + 200}]"
        splits = {
            "train": self.train,
            "val": self.val,
            "trainval": f"{self.train}+{self.val}",
            "test": self.test,
            "train1000": "train[:1000]",
            "train800": "train[:800]",
            "val200": val200,
            "train800val200": f"train[:800]+{val200}",
        }
        return splits[name]

    def size(self, split: str) -> int:
        """Examples that `split` must have."""
        train, val, test = self.sizes
        return {
            "train": train,
            "val": val,
            "trainval": train + val,
            "test": test,
            "train1000": 1000,
            "train800": 800,
            "val200": 200,
            "train800val200": 1000,
        }[split]


def cut(train: int, val_stop: int | str = "") -> dict[str, Any]:
    """Splits of a task whose val follows on train within TFDS's train; with `val_stop` the test set follows on that."""
    splits = {"train": f"train[:{train}]", "val": f"train[{train}:{val_stop}]"}
    return splits | ({"test": f"train[{val_stop}:]"} if val_stop else {})


OFFICIAL: dict[str, Any] = {"train": "train", "val": "validation"}
_CLEVR: dict[str, Any] = dict(
    group="structured", builder="clevr", sizes=(63000, 7000, 15000), **cut(63000), test="validation"
)
_DSPRITES: dict[str, Any] = dict(
    group="structured", builder="dsprites", classes=16, sizes=(589824, 73728, 73728), **cut(589824, 663552), scale=255
)  # its images are 0 and 1
_SMALLNORB: dict[str, Any] = dict(
    group="structured",
    builder="smallnorb",
    sizes=(24300, 12150, 12150),
    train="train",
    val="test[0:12150]",
    test="test[12150:]",
)

TASKS = {
    task.name: task
    for task in (
        Task("caltech101", "natural", "caltech101", 102, (2754, 306, 6084), **cut(2754)),
        Task("cifar100", "natural", "cifar100", 100, (45000, 5000, 10000), **cut(45000)),
        Task("dtd", "natural", "dtd", 47, (1880, 1880, 1880), **OFFICIAL),
        Task("flowers102", "natural", "oxford_flowers102", 102, (1020, 1020, 6149), **OFFICIAL),
        Task("pets", "natural", "oxford_iiit_pet", 37, (2944, 736, 3669), **cut(2944)),
        Task("sun397", "natural", "sun397/tfds", 397, (76128, 10875, 21750), **OFFICIAL),
        Task("svhn", "natural", "svhn_cropped", 10, (65931, 7326, 26032), **cut(65931)),
        Task("eurosat", "specialized", "eurosat/rgb", 10, (16200, 5400, 5400), **cut(16200, 21600)),
        Task(
            "resisc45",
            "specialized",
            "resisc45",
            45,
            (18900, 6300, 6300),
            **cut(18900, 25200),
            manual="NWPU-RESISC45.rar",
        ),
        Task("patch_camelyon", "specialized", "patch_camelyon", 2, (262144, 32768, 32768), **OFFICIAL),
        Task(
            "retinopathy",
            "specialized",
            "diabetic_retinopathy_detection/btgraham-300",
            5,
            (35126, 10906, 42670),
            **OFFICIAL,
            manual="the train and test images and labels of Kaggle's diabetic-retinopathy-detection",
        ),
        Task("clevr_count", classes=8, label=clevr_count, needs=("objects/size",), **_CLEVR),
        Task("clevr_dist", classes=6, label=clevr_distance, needs=("objects/pixel_coords",), **_CLEVR),
        Task("dmlab", "structured", "dmlab", 6, (65550, 22628, 22735), **OFFICIAL),
        Task(
            "kitti_dist",
            "structured",
            "kitti",
            4,
            (6347, 423, 711),
            **OFFICIAL,
            label=kitti_distance,
            needs=("objects/type", "objects/location"),
        ),
        Task("dsprites_loc", label=dsprites_x, needs=("label_x_position",), **_DSPRITES),
        Task("dsprites_orient", label=dsprites_orientation, needs=("label_orientation",), **_DSPRITES),
        Task("smallnorb_azim", classes=18, label=smallnorb_azimuth, needs=("label_azimuth",), **_SMALLNORB),
        Task("smallnorb_elev", classes=9, label=smallnorb_elevation, needs=("label_elevation",), **_SMALLNORB),
    )
}


# The user's own classes: no row of the table. Sizes and classes are those of the data.
OWN = Task("own", "own", "", 0, (0, 0, 0), "", "")


def select(names: str) -> list[Task]:
    """The tasks of "all", of groups and of names, comma-separated, each once and in the table's order; or "own" alone.

    Raises:
      ConfigError: a name that is neither; the message has the nearest one. "own" among others.
    """
    if names == OWN.name:
        return [OWN]
    if OWN.name in names.split(","):
        raise ConfigError(f"--tasks={names}: own stands alone, as --data is then the folder of the classes itself")
    known = {
        "all": list(TASKS),
        **{group: [t.name for t in TASKS.values() if t.group == group] for group in GROUPS},
        **{name: [name] for name in TASKS},
    }
    chosen = {task for word in filter(None, names.split(",")) for task in lookup("--tasks", word, known)}
    if not chosen:
        raise ConfigError("--tasks names no task; for example --tasks=all")
    return [task for name, task in TASKS.items() if name in chosen]
