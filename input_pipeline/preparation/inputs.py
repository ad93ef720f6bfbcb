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
    bytes: int  # -1: not a regular file


def find(videos: str, out: str) -> list[Input]:
    """All files under a directory, or matched by a glob pattern ("**" for any depth), sorted by name.

    A file is recognised as a video by opening it later, not by its name. What is no data (see folders.is_data) and
    everything under `out` are skipped. Links are followed. Both may be in a bucket, see storage.py.

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
    return [
        Input(name, path, os.path.getsize(path) if os.path.isfile(path) else -1)
        for name, path in sorted(path_of.items())
    ]


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


def take_listed(found: list[Input], path: str) -> list[Input]:
    """The inputs that a list names, one a line: "Archery/v_Archery_g08_c01.avi 3" in UCF-101's trainlist01.txt.

    A line may go on behind the name, after a space. It names the input whose name ends in it, folder by folder; where
    there is none, another ending of the file (.mp4 for .avi) and other capitals will do.

    Raises:
      DataError: an unreadable list, a line that names two inputs, or a list of which no line names one.
    """
    try:
        lines = [line.strip() for line in storage.read(path).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot read {path}: {e}") from e
    exact, loose = collections.defaultdict(list), collections.defaultdict(list)
    for number, file in enumerate(found):
        parts = file.name.split("/")
        for depth in range(len(parts)):
            end = "/".join(parts[depth:])
            exact[end].append(number)
            loose[os.path.splitext(end)[0].casefold()].append(number)
    chosen, unknown = set(), []
    for line in lines:
        names = [line.removeprefix("./"), line.removeprefix("./").rsplit(None, 1)[0]]
        fits = next((exact[name] for name in names if name in exact), None) or next(
            (loose[key] for name in names if (key := os.path.splitext(name)[0].casefold()) in loose), []
        )
        if len(fits) > 1:
            raise DataError(
                f"{path}: {names[-1]} may be {found[fits[0]].name} or {found[fits[1]].name}; write more of its path"
            )
        chosen.update(fits)
        if not fits:
            unknown.append(names[-1])
    if not chosen:
        raise DataError(f"{path}: none of its {len(lines)} lines names an input file; names are like {found[0].name}")
    print(f"only: {len(chosen)} of {len(found)} files are named in {path}")
    if unknown:
        print(f"only: {len(unknown)} of its {len(lines)} lines name no input file (such as {unknown[0]})")
    return [found[number] for number in sorted(chosen)]


def read_labels(labels: str, names: list[str], known: Mapping[str, str] = {}) -> tuple[list[int], list[str]]:
    """Labels of the inputs.

    Args:
      labels: "" (no labels), "folder" (the folder a file is in; files at the top have no label), or the path of a CSV
        file with columns "video" (an input's name, or its file name alone where that is unique) and "label".
      names: of the inputs.
      known: name -> class, for inputs that `labels` says nothing of.

    Returns:
      Label of each input (-1: none), and class names (sorted).

    Raises:
      DataError: an unreadable or contradictory CSV file, or one of which no line names an input.
    """
    if not labels:
        return [-1] * len(names), []
    if labels == "folder":
        folder_of = {name: os.path.basename(os.path.dirname(name)) for name in names}
        label_of = {name: folders.same_form(folder) for name, folder in folder_of.items() if folder}
        if not label_of:
            raise DataError("--labels=folder, but all files are at the top; put each into a folder of its class")
    else:
        label_of = _read_csv(labels, names)
    label_of = {**known, **label_of}
    classes = sorted(set(label_of.values()))
    numbers = [classes.index(label_of[name]) if name in label_of else -1 for name in names]
    print(
        f"labels: {len(label_of)} of {len(names)} files have one of {len(classes)} classes, "
        f"{len(names) - len(label_of)} have none"
    )
    return numbers, classes


def labels_digest(numbers: list[int], classes: list[str]) -> str:
    """Of what read_labels returned."""
    return hashlib.sha256(json.dumps([numbers, classes]).encode()).hexdigest()[:16]


def _read_csv(path: str, names: list[str]) -> dict[str, str]:
    rows = [(line["video"], line["label"]) for line in lists.read_table(path, ("video", "label"))]
    of_file_name = collections.defaultdict(list)
    for name in names:
        of_file_name[folders.same_form(os.path.basename(name))].append(name)
    known = {folders.same_form(name): name for name in names} | {name: name for name in names}
    label_of, unknown = {}, []
    for video, label in rows:
        name = known.get(video) or known.get(folders.same_form(video))
        candidates = [name] if name else of_file_name.get(folders.same_form(video), [])
        if len(candidates) > 1:
            raise DataError(f"{path}: {video} may be {candidates[0]} or {candidates[1]}; write the whole name")
        if not candidates:
            unknown.append(video)
        elif not label:
            raise DataError(f"{path}: {video} has an empty label; write one, or take the line out")
        elif label_of.setdefault(candidates[0], label) != label:
            raise DataError(f"{path}: {video} has two labels, {label_of[candidates[0]]} and {label}")
    if not label_of:
        raise DataError(f"{path}: none of its {len(rows)} lines names an input file; names are like {names[0]}")
    if unknown:
        print(f"labels: {len(unknown)} of {len(rows)} lines of {path} name no input file (such as {unknown[0]})")
    return label_of
