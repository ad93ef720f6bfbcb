"""Labelled videos for action recognition: UCF-101 and HMDB-51 with their official splits, class folders, frame stores.

    DATA/train, DATA/test                         two frame stores of labelled videos, or two folders of class folders
    DATA/**/{train,test}list0N.txt, classInd.txt  UCF-101's lists, beside its videos anywhere under DATA
    DATA/**/CLASS_test_splitN.txt                 HMDB-51's lists, likewise
    DATA/CLASS/*, or DATA a frame store           one in five of each class, by a hash of its name, is for testing
    DATA = "ucf101", and no such folder           UCF-101 as TensorFlow Datasets has prepared it, with its three splits

Videos are decoded once, by input_pipeline.prepare, into frame stores. Their ledger.jsonl says which files were refused
and why.
"""

import dataclasses
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Callable

import numpy as np

from evaluation.protocols.action import tfds_videos
from input_pipeline import folders
from input_pipeline.lists import read_lines
from input_pipeline.preparation.local import prepare
from input_pipeline.preparation.steps import Settings
from input_pipeline.store import LEDGER, META, FrameStore
from vivi_jax import files
from vivi_jax.config import Chance, Count, Positive
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
_HELD_OUT = 5
_TRAIN, _TEST = "1", "2"  # in HMDB-51's lists; 0 is in neither
_CONTAINERS = re.compile(r"(\.(avi|mp4|m4v|mkv|webm|mov|mpg|mpeg|ts|wmv))+$")


@dataclasses.dataclass(frozen=True)
class Part:
    """Some videos of a frame store and their classes."""

    store: FrameStore
    videos: np.ndarray  # int64[n], numbers in the store
    labels: np.ndarray  # int32[n], index into ActionSplit.class_names

    def take(self, rows: np.ndarray) -> "Part":
        """The videos at the given places int[k] of this part."""
        return dataclasses.replace(self, videos=self.videos[rows], labels=self.labels[rows])

    def take_per_class(self, count: int, seed: int) -> "Part":
        """`count` videos of each class (all, where there are fewer), drawn by `seed`."""
        order = np.random.default_rng(seed).permutation(len(self.labels))
        chosen = [order[self.labels[order] == label][:count] for label in set(self.labels)]
        return self.take(np.sort(np.concatenate(chosen)))


@dataclasses.dataclass(frozen=True)
class ActionSplit:
    train: Part
    test: Part
    class_names: list[str]


def load_splits(
    data: str, splits: str, out: str, *, max_missing: Chance, fps: Positive, short_side: Count
) -> dict[str, ActionSplit]:
    """Reads a data set of labelled videos, decoding it first where that was not done before.

    Args:
      data: one of the layouts above.
      splits: "1", "2", "3" or "all"; data without official lists have only "1".
      out: folder for the frame stores of videos; not used if `data` is frame stores already.
      max_missing: share of the videos of a list that may be missing or refused; they are named in OUT/missing.txt.
      fps, short_side: of preparation.steps.Settings.

    Returns:
      {"1": ..., ...}.

    Raises:
      DataError: no such layout, lists that contradict each other, too many missing videos, a class without a video.
    """
    decoding = dict(fps=fps, short_side=short_side)
    root = pathlib.Path(data)
    numbers = ("1", "2", "3") if splits == "all" else (splits,)
    if data == tfds_videos.NAME and not root.is_dir():
        return {n: _from_tfds(n, pathlib.Path(out), decoding) for n in numbers}
    if not root.is_dir():
        raise DataError(
            f"no such directory: {data}; give a folder of videos with their split lists, with train/ and "
            f"test/, or with one folder per class, or {tfds_videos.NAME} for that of TFDS"
        )
    lists = read_lists(root)
    if lists:
        unknown = [n for n in numbers if n not in lists]
        if unknown and splits != "all":
            raise DataError(f"{data} has lists of the splits {', '.join(lists)}, not of {unknown[0]}")
        chosen = {n: lists[n] for n in numbers if n in lists}
        file_of = _matched(root, chosen, pathlib.Path(out), max_missing)
        store = _prepared(root, pathlib.Path(out, "all"), decoding)
        return {n: _by_list(store, chosen[n], file_of[n], _missing_path(out, n), max_missing) for n in chosen}
    if splits not in ("1", "all"):
        raise DataError(f"{data} has no split lists (trainlist01.txt or CLASS_test_split1.txt): only --split=1")
    if (root / "train").is_dir():
        if not (root / "test").is_dir():
            raise DataError(f"{root} has train/ but no test/: add it")
        return {"1": _two_parts(root, pathlib.Path(out), decoding)}
    return {"1": _held_out(_labelled(_prepared(root, pathlib.Path(out, "all"), decoding)))}


def _from_tfds(number: str, out: pathlib.Path, decoding: dict) -> ActionSplit:
    videos = out / f"{tfds_videos.NAME}_{number}" / "videos"
    tfds_videos.write_videos(number, videos)
    return _two_parts(videos, videos.parent, decoding)


def _two_parts(root: pathlib.Path, out: pathlib.Path, decoding: dict) -> ActionSplit:
    """ROOT/train and ROOT/test."""
    return _joined(*(_labelled(_prepared(root / part, out / part, decoding)) for part in ("train", "test")))


def _prepared(videos: pathlib.Path, out: pathlib.Path, decoding: dict) -> FrameStore:
    if (videos / META).is_file():
        return FrameStore(videos)
    out.parent.mkdir(parents=True, exist_ok=True)
    prepare(str(videos), str(out), Settings(**decoding), labels="folder")
    return FrameStore(out)


# ---- Official lists -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lists:
    """One official split: videos as CLASS/FILE, CLASS as in class_names."""

    train: list[str]
    test: list[str]
    class_names: list[str]


def read_lists(root: pathlib.Path) -> dict[str, Lists]:
    """The official splits under a folder, {} if there are none.

    Raises:
      DataError: a list contradicts another, or one of a pair is missing.
    """
    paths = [root / name for name in folders.walk(root)]
    ucf = {path.stem[-1]: path for path in paths if re.fullmatch(r"trainlist0\d\.txt", path.name)}
    if ucf:
        return {number: _read_ucf(ucf[number]) for number in sorted(ucf)}
    hmdb = [path for path in paths if re.fullmatch(r".+_test_split\d\.txt", path.name)]
    numbers = sorted({path.stem[-1] for path in hmdb})
    splits = {number: _read_hmdb([path for path in hmdb if path.stem[-1] == number]) for number in numbers}
    for number, lists in splits.items():
        _same_classes(
            lists.class_names,
            splits[numbers[0]].class_names,
            f"HMDB-51's lists of split {number}",
            f"those of split {numbers[0]}",
        )
    return splits


def _read_ucf(train_path: pathlib.Path) -> Lists:
    test_path = train_path.with_name(train_path.name.replace("train", "test"))
    index_path = train_path.with_name("classInd.txt")
    for path in (test_path, index_path):
        if not path.is_file():
            raise DataError(f"{train_path} is there but {path.name} is not; copy all of UCF-101's lists beside it")
    index = {number: name for number, name in (line.split(maxsplit=1) for line in _lines(index_path, 2))}
    class_names = [name for _, name in sorted(index.items(), key=lambda item: int(item[0]))]
    # UCF-101's archives and lists write one class HandstandPushups or HandStandPushups.
    class_name = {_letters(name): name for name in class_names} | {name: name for name in class_names}
    train, wrong = [], []
    for video, number in (line.rsplit(maxsplit=1) for line in _lines(train_path, 2)):
        name = class_name.get(_class_of(video)) or class_name.get(_letters(_class_of(video)))
        if name is None or index.get(number) != name:
            wrong.append(f"{video} has class {number}, which is {index.get(number)} in {index_path}")
        train.append(f"{name}/{_file_of(video)}")
    if wrong:
        raise DataError(f"{train_path}: {wrong[0]} ({len(wrong)} such lines): the two lists are not of one data set")
    test, unknown = [], []
    for video in (re.sub(r"\s+\d+$", "", line) for line in _lines(test_path, 1)):
        name = class_name.get(_class_of(video)) or class_name.get(_letters(_class_of(video)))
        test.append(f"{name}/{_file_of(video)}")
        if name is None:
            unknown.append(_class_of(video))
    if unknown:
        raise DataError(f"{test_path} has videos of {', '.join(sorted(set(unknown)))}, which is not in {index_path}")
    return Lists(train, test, class_names)


def _read_hmdb(paths: list[pathlib.Path]) -> Lists:
    chosen, class_names = {_TRAIN: [], _TEST: []}, []
    for path in sorted(paths, key=lambda path: path.name):
        class_name = re.sub(r"_test_split\d\.txt$", "", path.name)
        class_names.append(class_name)
        for video, part in (line.rsplit(maxsplit=1) for line in _lines(path, 2)):
            if part not in ("0", _TRAIN, _TEST):
                raise DataError(f"{path}: {video} is in part {part!r}; 1 is train, 2 is test, 0 is neither")
            if part in chosen:
                chosen[part].append(f"{class_name}/{video}")
    return Lists(chosen[_TRAIN], chosen[_TEST], class_names)


def _lines(path: pathlib.Path, words: int) -> list[str]:
    """The lines that are not blank; DataError if one has fewer words."""
    lines = read_lines(path)
    if wrong := [line for line in lines if len(line.split()) < words]:
        raise DataError(f"{path}: the line {wrong[0]!r} has fewer than {words} words; copy the list again")
    return lines


def _file_of(video: str) -> str:
    return video.replace("\\", "/").split("/")[-1]


def _class_of(video: str) -> str:
    return video.replace("\\", "/").split("/")[0]


def _letters(name: str) -> str:
    """Letters and digits of a name, in small letters: what is left where lists and folders spell it differently."""
    return re.sub(r"[\W_]", "", folders.same_form(name).casefold())


def _same_classes(a: list[str], b: list[str], a_name: str, b_name: str) -> None:
    if different := sorted(set(a) ^ set(b)):
        raise DataError(
            f"{a_name} and {b_name} have different classes: {', '.join(different[:5])} "
            f"({len(different)} in all) are in only one of them"
        )


# From the strictest: which names of files may mean the same as a list's, both as CLASS/FILE.
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    folders.same_form,
    lambda name: _CONTAINERS.sub("", folders.same_form(name).casefold()),  # .mp4 for .avi, HandstandPushups
    lambda name: "/".join(_letters(part) for part in _CONTAINERS.sub("", name.casefold()).split("/")),
    lambda name: _CONTAINERS.sub("", folders.same_form(name).casefold()).split("/")[-1],  # all in one folder
)


def _missing_path(out: str | pathlib.Path, number: str) -> pathlib.Path:
    return pathlib.Path(out, f"missing_{number}.txt")


def _write_names(path: pathlib.Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(f"{name}\n" for name in names))


def _matched(
    root: pathlib.Path, splits: dict[str, Lists], out: pathlib.Path, max_missing: float
) -> dict[str, dict[str, str]]:
    """Of each split {video of its lists: name of its file, below the root or in the store that it is}.

    Raises:
      DataError: all that is wrong with the lists and files, before anything is decoded.
    """
    if (root / META).is_file():
        there = [str(name) for name in FrameStore(root).videos]
    else:
        there = folders.walk(root, leave_out=out / "all")
    short = {name: "/".join(pathlib.PurePath(name).parts[-2:]) for name in there}
    tables = []
    for spelling in _SPELLINGS:
        table: dict[str, list[str]] = {}
        for name in there:
            table.setdefault(spelling(short[name]), []).append(name)
        tables.append(table)

    def candidates(listed: list[str]) -> dict[str, list[str]]:
        """Files that a video may be; those of a stricter spelling are no longer there for another."""
        found, taken = {}, set()
        for spelling, table in zip(_SPELLINGS, tables, strict=True):
            of_video = {video: table.get(spelling(video), []) for video in listed if video not in found}
            free = {video: [name for name in names if name not in taken] for video, names in of_video.items()}
            found |= {video: names for video, names in free.items() if names}
            taken.update(*free.values())
        return found

    result, problems = {}, []
    for number, lists in splits.items():
        listed = lists.train + lists.test
        names = candidates(listed)
        unclear = [f"{video} may be {' or '.join(found[:2])}" for video, found in names.items() if len(found) > 1]
        file_of = {video: found[0] for video, found in names.items() if len(found) == 1}
        video_of: dict[str, str] = {}
        for video in listed:
            if (name := file_of.get(video)) and video_of.setdefault(name, video) != video:
                unclear.append(f"{name} may be {video} or {video_of[name]}")
        both = [f"{video} is for training and for testing" for video in sorted(set(lists.train) & set(lists.test))]
        for found in (unclear, both):
            if found:
                problems.append(f"split {number}: {len(found)} videos are not clear, such as: {found[0]}")
        missing = [video for video in listed if video not in names]
        if len(missing) > max_missing * len(listed):
            path = _missing_path(out, number)
            _write_names(path, missing)
            problems.append(
                f"split {number}: {len(missing)} of {len(listed)} videos in the lists are not below {root} (such as "
                f"{', '.join(missing[:3])}; all in {path}): more than config.max_missing={max_missing:g} allows"
            )
        empty = sorted(set(lists.class_names) - {_class_of(video) for video in lists.train if video in file_of})
        if empty and len(missing) < len(listed):
            problems.append(f"split {number}: {len(empty)} classes have no training video ({', '.join(empty[:3])})")
        other = [(video, name) for video, name in file_of.items() if short[name] != video]
        if other:
            _LOG.warning(
                "split %s: %d of %d videos have other names than in the lists, such as %s for %s",
                number,
                len(other),
                len(listed),
                other[0][1],
                other[0][0],
            )
        result[number] = file_of
    if problems:
        raise DataError("; ".join(problems))
    return result


def _by_list(
    store: FrameStore, lists: Lists, file_of: dict[str, str], missing_path: pathlib.Path, max_missing: float
) -> ActionSplit:
    place = {str(name): v for v, name in enumerate(store.videos)}
    number = {video: place[name] for video, name in file_of.items() if name in place}
    listed = lists.train + lists.test
    missing = [video for video in listed if video not in number]
    if missing:
        _write_names(missing_path, missing)
        text = (
            f"{len(missing)} of {len(listed)} videos in the lists are missing or could not be decoded (such as "
            f"{', '.join(missing[:3])}); all are named in {missing_path}, refusals in "
            f"{pathlib.Path(store.directory) / LEDGER}"
        )
        if len(missing) > max_missing * len(listed):
            raise DataError(f"{text}: more than config.max_missing={max_missing:g} allows")
        _LOG.warning("%s", text)

    def part(videos: list[str]) -> Part:
        there = [video for video in videos if video in number]
        return Part(
            store,
            np.array([number[video] for video in there], np.int64),
            np.array([lists.class_names.index(_class_of(video)) for video in there], np.int32),
        )

    return _checked(ActionSplit(part(lists.train), part(lists.test), lists.class_names))


# ---- Class folders and frame stores ---------------------------------------------------------------------------------


def _labelled(store: FrameStore) -> Part:
    videos = np.flatnonzero(store.label >= 0)
    if len(videos) < len(store):
        _LOG.warning(
            "%d of %d videos of %s have no label and are not used",
            len(store) - len(videos),
            len(store),
            store.directory,
        )
    return Part(store, videos, store.label[videos])


def _names(part: Part) -> list[str]:
    return [part.store.class_names[label] for label in part.labels]


def _joined(train: Part, test: Part) -> ActionSplit:
    class_names = sorted(set(_names(train)))
    _same_classes(sorted(set(_names(test))), class_names, test.store.directory, train.store.directory)
    return _checked(ActionSplit(_numbered(train, class_names), _numbered(test, class_names), class_names))


def _numbered(part: Part, class_names: list[str]) -> Part:
    """Labels by the given names; those of a store include folders without a usable video."""
    return dataclasses.replace(part, labels=np.array([class_names.index(name) for name in _names(part)], np.int32))


def _held_out(part: Part) -> ActionSplit:
    """Of each class the fifth (rounded down, at least one) whose names have the smallest hashes is for testing."""
    part = _numbered(part, sorted(set(_names(part))))
    digest = [
        hashlib.sha256(os.fsencode(folders.same_form(str(part.store.videos[v])))).hexdigest() for v in part.videos
    ]
    test = []
    for label in np.unique(part.labels):
        members = sorted(np.flatnonzero(part.labels == label), key=lambda i: digest[i])
        test += members[: max(len(members) // _HELD_OUT, 1)]
    train = np.setdiff1d(np.arange(len(part.videos)), test)
    _LOG.info(
        "%s has no train/ and test/: %d of its %d videos are for testing, by a hash of their names",
        part.store.directory,
        len(test),
        len(part.videos),
    )
    return _checked(ActionSplit(part.take(train), part.take(np.sort(test)), sorted(set(_names(part)))))


def _checked(split: ActionSplit) -> ActionSplit:
    counts = np.bincount(split.train.labels, minlength=len(split.class_names))
    if len(split.class_names) < 2 or not counts.all() or not len(split.test.videos):
        empty = [name for name, count in zip(split.class_names, counts, strict=True) if not count]
        raise DataError(
            f"{split.train.store.directory}: {len(split.class_names)} classes, {len(empty)} of them "
            f"without a training video ({', '.join(empty[:3])}), {len(split.test.videos)} test videos; it "
            "takes two classes, each with videos to train on, and some to test on"
        )
    return split
