"""The files a preparation starts from, and their labels."""

import collections
import glob
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from input_pipeline import folders, lists, storage
from vivi_jax.errors import DataError


class Input(NamedTuple):
    name: str  # path relative to the directory given, or to the part of the pattern before its first wildcard
    path: str
    bytes: int  # of a folder of frames, of all of them; -1: neither that nor a regular file


def find(videos: str, out: str) -> list[Input]:
    """All files under a directory, or matched by a glob pattern ("**" for any depth), sorted by name.

    A file is recognised as a video by opening it later, not by its name. A folder below the directory that holds
    numbered pictures and nothing else is one input, see folders.frames_among; in a bucket it is not.

    What is no data (see folders.is_data) and everything under `out` are skipped. Links are followed. Both may be in a
    bucket, see storage.py.

    Raises:
      DataError: nothing there, or a folder that cannot be read.
    """
    if storage.is_remote(videos):
        return _find_remote(videos, out)
    videos = os.path.expanduser(videos)
    root = root_of(videos)
    if os.path.isdir(videos):
        found = _files(videos, out)
    elif glob.has_magic(videos):
        inside_out = os.path.join(os.path.realpath(out), "")
        found = [
            path
            for match in glob.glob(videos, recursive=True)
            for path in (_files(match, out) if os.path.isdir(match) else [match])
            if not os.path.realpath(path).startswith(inside_out) and _is_data(os.path.relpath(path, root or "."))
        ]
    elif os.path.isfile(videos):
        found = [videos]
    else:
        raise DataError(f"no such directory: {videos}; give a directory, or a quoted pattern such as 'DIR/**/*.mp4'")
    path_of = {os.path.relpath(path, root or "."): path for path in found}
    if not path_of:
        raise DataError(f"no files in {videos}; give a directory, or a quoted pattern such as 'DIR/**/*.mp4'")
    of_folder = collections.defaultdict(list)
    for name in path_of:
        of_folder[os.path.dirname(name)].append(os.path.basename(name))
    for folder, names in of_folder.items():
        if folder and folders.frames_among(names):
            path_of[folder] = os.path.dirname(path_of[os.path.join(folder, names[0])])
            for name in names:
                del path_of[os.path.join(folder, name)]
    return [Input(name, path, size_of(path)) for name, path in sorted(path_of.items())]


def size_of(path: str) -> int:
    """Bytes of a local input, see Input."""
    if os.path.isdir(path):
        return sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path) if folders.is_data(name))
    return os.path.getsize(path) if os.path.isfile(path) else -1


def root_of(videos: str) -> str:
    """The directory that the names of inputs are relative to; "" is the current one."""
    if storage.is_remote(videos):
        fixed = re.split(r"[*?\[]", videos, maxsplit=1)[0]
        return videos.rstrip("/") if fixed == videos else fixed.rsplit("/", 1)[0]
    videos = os.path.expanduser(videos)
    if os.path.isdir(videos):
        return videos
    return os.path.dirname(re.split(r"[*?\[]", videos, maxsplit=1)[0])


def _find_remote(videos: str, out: str) -> list[Input]:
    root = root_of(videos)
    wanted = re.compile(_glob_regex(videos[len(root) + 1 :]) if videos.rstrip("/") != root else ".*")
    inputs = []
    for path, size in storage.listing(root):
        name = path[len(root) + 1 :]
        if name and _is_data(name) and wanted.fullmatch(name) and not path.startswith(out.rstrip("/") + "/"):
            inputs.append(Input(name, path, size))
    if not inputs:
        raise DataError(
            f"no files in {videos}; give a folder of a bucket, or a quoted pattern such as 'gs://BUCKET/DIR/**/*.mp4'"
        )
    return sorted(inputs)


def _glob_regex(pattern: str) -> str:
    """A glob pattern with "/" and "**" as a regular expression; a folder that matches is searched."""
    parts = []
    for token in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", pattern):
        parts.append(
            {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(
                token, token.replace("[!", "[^") if token.startswith("[") else re.escape(token)
            )
        )
    return "".join(parts) + "(?:/.*)?"


def _files(root: str, out: str) -> list[str]:
    return [os.path.join(root, name) for name in folders.walk(root, leave_out=out)]


def _is_data(name: str) -> bool:
    return all(folders.is_data(part) for part in name.split("/") if part != "..")


class _Names:
    """Finds inputs by what lists call them: by their whole name or its end, folder by folder.

    Where none is called so, endings do not matter, so that a video that was converted to another container is found;
    and then neither does upper case. Accents may be written in any way.
    """

    def __init__(self, names: list[str]):
        self.names = names
        self._whole = {folders.same_form(name): [number] for number, name in enumerate(names)}
        self._ends, self._stems, self._loose = (collections.defaultdict(list) for _ in range(3))
        for number, name in enumerate(map(folders.same_form, names)):
            parts = name.split("/")
            for depth in range(len(parts)):
                end = "/".join(parts[depth:])
                stem = os.path.splitext(end)[0]
                self._ends[end].append(number)
                self._stems[stem].append(number)
                self._loose[stem.casefold()].append(number)

    def find(self, video: lists.Video, path: str) -> int | None:
        """Number of the input that is meant, None: there is none.

        Raises:
          DataError: it may be one of two.
        """
        called = [folders.same_form(name.replace("\\", "/").removeprefix("./")) for name in video.names]
        tails = [  # of absolute paths, which may be of another machine: an input's name must be the end of one
            name.split("/", depth)[-1]
            for name in called
            if name.startswith("/")
            for depth in range(1, name.count("/") + 1)
        ]
        stems = [stem for name in called for stem in dict.fromkeys((name, os.path.splitext(name)[0]))]
        for table, keys in (
            (self._whole, called),
            (self._ends, called),
            (self._whole, tails),
            (self._stems, stems),
            (self._loose, [stem.casefold() for stem in stems]),
        ):
            if fits := next((table[key] for key in keys if key in table), None):
                if len(fits) > 1:
                    raise DataError(
                        f"{path}, {video.place}: {video.names[-1]} may be {self.names[fits[0]]} or "
                        f"{self.names[fits[1]]}; write more of its path"
                    )
                return fits[0]
        return None


def take_listed(found: list[Input], path: str) -> list[Input]:
    """The inputs that a list names, in any form of lists.read_videos: UCF-101's trainlist01.txt, Kinetics' train.csv.

    Raises:
      DataError: an unreadable list, a line that names two inputs, or a list of which no line names one.
    """
    videos, names = lists.read_videos(path), _Names([file.name for file in found])
    fits = [names.find(video, path) for video in videos]
    chosen = {number for number in fits if number is not None}
    unknown = [video.names[-1] for video, number in zip(videos, fits, strict=True) if number is None]
    if not chosen:
        raise DataError(f"{path}: none of its {len(videos)} lines names an input file; names are like {found[0].name}")
    print(f"only: {len(chosen)} of {len(found)} files are named in {path}")
    if unknown:
        print(f"only: {len(unknown)} of its {len(videos)} lines name no input file (such as {unknown[0]})")
    return [found[number] for number in sorted(chosen)]


def read_labels(labels: str, names: list[str], known: Mapping[str, str] = {}) -> tuple[list[int], list[str]]:
    """Labels of the inputs.

    Args:
      labels: "" (no labels), "folder" (the folder a file is in; files at the top have no label), or the path of a list
        in any form of lists.read_videos, which names inputs as _Names.find takes them.
      names: of the inputs.
      known: name -> class, for inputs that `labels` says nothing of.

    Returns:
      Label of each input (-1: none), and class names (sorted; numbers by their value).

    Raises:
      DataError: an unreadable or contradictory list, or one of which no line names an input.
    """
    if not labels:
        return [-1] * len(names), []
    if labels == "folder":
        folder_of = {name: os.path.basename(os.path.dirname(name)) for name in names}
        label_of = {name: folders.same_form(folder) for name, folder in folder_of.items() if folder}
        if not label_of:
            raise DataError("--labels=folder, but all files are at the top; put each into a folder of its class")
    else:
        label_of = _read_list(labels, names)
    label_of = {**known, **label_of}
    classes = sorted(set(label_of.values()))
    if all(re.fullmatch("[0-9]{1,9}", name) for name in classes):
        classes.sort(key=int)
    number_of = {name: number for number, name in enumerate(classes)}
    numbers = [number_of[label_of[name]] if name in label_of else -1 for name in names]
    without = [name for name in names if name not in label_of]
    print(
        f"labels: {len(label_of)} of {len(names)} files have one of {len(classes)} classes, {len(without)} have none"
        + (f" (such as {without[0]})" if without else "")
    )
    return numbers, classes


def labels_digest(numbers: list[int], classes: list[str]) -> str:
    """Of what read_labels returned."""
    return hashlib.sha256(json.dumps([numbers, classes]).encode()).hexdigest()[:16]


def _read_list(path: str, names: list[str]) -> dict[str, str]:
    videos, inputs = lists.read_videos(path), _Names(names)
    if not any(video.label for video in videos):
        raise DataError(f"{path} has no labels, only names of videos: give the list that has both")
    label_of, unknown = {}, []
    for video in videos:
        number = inputs.find(video, path)
        if number is None:
            unknown.append(video.names[-1])
        elif not video.label:
            raise DataError(f"{path}, {video.place}: {video.names[-1]} has an empty label; write one, or take it out")
        elif label_of.setdefault(names[number], video.label) != video.label:
            name = names[number]
            raise DataError(f"{path}, {video.place}: {name} has two labels, {label_of[name]} and {video.label}")
    if not label_of:
        raise DataError(f"{path}: none of its {len(videos)} lines names an input file; names are like {names[0]}")
    if unknown:
        print(f"labels: {len(unknown)} of {len(videos)} lines of {path} name no input file (such as {unknown[0]})")
    return label_of
