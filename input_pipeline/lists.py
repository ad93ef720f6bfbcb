"""Lists and tables that people write by hand or by a program, on any system: names on lines, CSV and JSON files.

A byte-order mark, the line ends of any system, blank lines and spaces at the ends of lines and fields mean nothing.
Files may be in a bucket, see storage.py.
"""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from input_pipeline import storage
from vivi_jax.errors import DataError


def read_lines(path: str | os.PathLike[str], what: str = "list") -> list[str]:
    """The lines of a text file that are not blank.

    Bytes that are no UTF-8 become what they are in Python's file names, so that such names are found.

    Args:
      what: to say of a file that is not there, such as "the list of images of this split".

    Raises:
      DataError: it cannot be read, or is blank.
    """
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", _decoded(_read(path, what), "surrogateescape"))]
    if not any(lines):
        raise DataError(f"{path} is empty: {what}; copy it again")
    return [line for line in lines if line]


def read_table(path: str | os.PathLike[str], columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a CSV file, by the names of all its columns.

    Raises:
      DataError: it cannot be read, is no UTF-8, or lacks one of `columns`.
    """
    try:
        reader = csv.DictReader(io.StringIO(_decoded(_read(path, "table"), "strict").lstrip(), newline=""))
        names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if missing := [column for column in columns if column not in names]:
        raise DataError(
            f"{path} has no column {', '.join(missing)}: its first line must name the columns {','.join(columns)}; it "
            f"is {','.join(names)!r}"
        )
    return [row for row in rows if any(row.values())]


class Video(NamedTuple):
    """A video in a list, and its label."""

    place: str  # in the list, for messages: "line 3"
    names: tuple[str, ...]  # of its file, the likeliest first: without folders or ending where the list has none
    label: str  # "": the list gives none


_VIDEO_FORMS = (
    "CSV with columns video,label (path,label and the like too, also without that first line); Kinetics' CSV "
    "(label,youtube_id,time_start,time_end,split); Something-Something's JSON ([{id, template}]); lines 'path label', "
    "or 'folder frames label'"
)
_VIDEO_COLUMNS, _LABEL_COLUMNS = ("video", "path", "file", "filename", "video_path"), ("label", "class")
# A folder of frames, how many they are, and its label, as mmaction2 lists them.
_FRAMES_LINE, _FILE = re.compile(r"(\S.*?)\s+\d+\s+\d+"), re.compile(r".*\.\w{1,5}")


def read_videos(path: str | os.PathLike[str]) -> list[Video]:
    """The videos that a list names, in the form that its content shows: see _VIDEO_FORMS.

    Raises:
      DataError: it cannot be read, is blank, or has a line that does not fit its form.
    """
    text = _decoded(_read(path, "list of videos"), "surrogateescape")
    if not text.strip():
        raise DataError(f"{path} is empty: list of videos; copy it again")
    if text.lstrip()[0] in "[{":
        return list(_from_json(path, text))
    if "," in text.strip().splitlines()[0]:
        return list(_from_csv(path, text))
    return list(_from_lines(text))


def _unknown(path: str | os.PathLike[str], place: str, found: object) -> DataError:
    return DataError(f"{path}: {place} does not fit ({found!r:.80}); known forms of lists: {_VIDEO_FORMS}")


def _from_json(path: str | os.PathLike[str], text: str) -> Iterator[Video]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(entries, list):
        raise _unknown(path, "its JSON", next(iter(entries.items()), entries))  # such as SSv2's list of templates
    for number, entry in enumerate(entries, 1):
        video = entry.get("id") if isinstance(entry, dict) else None
        label = entry.get("template", entry.get("label", "")) if isinstance(entry, dict) else None
        if not isinstance(video, str | int) or not isinstance(label, str) or not str(video).strip():
            raise _unknown(path, f"entry {number}", entry)
        # Something-Something's label is a sentence of its own for each video, and the class is the template.
        yield Video(f"entry {number}", (str(video).strip(),), label.replace("[", "").replace("]", "").strip())


def _from_csv(path: str | os.PathLike[str], text: str) -> Iterator[Video]:
    reader = csv.reader(io.StringIO(text.lstrip(), newline=""))
    try:
        raw = dict((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from None
    rows = [(number, [field.strip() for field in row]) for number, row in raw.items() if any(map(str.strip, row))]
    head = [name.lower() for name in rows[0][1]]
    video = next((head.index(name) for name in _VIDEO_COLUMNS if name in head), None)
    label = next((head.index(name) for name in _LABEL_COLUMNS if name in head), None)
    clip = [head.index(name) for name in ("youtube_id", "time_start", "time_end") if name in head]
    if len(clip) == 3 or (video is not None and label is not None):
        rows = rows[1:]
    elif label is not None or len(head) != 2:
        raise _unknown(path, "line 1", ",".join(rows[0][1]))
    else:
        head, video, label = ["", ""], 0, 1
    for number, row in rows:
        place = f"line {number}"
        if len(row) < len(head) or (len(row) > len(head) and any(row[len(head) :])):
            raise _unknown(path, place, ",".join(row))
        if len(clip) == 3:
            name, *times = (row[column] for column in clip)
            try:
                start, stop = (int(float(time)) for time in times)
            except (ValueError, OverflowError):
                raise _unknown(path, place, ",".join(row)) from None
            names = (f"{name}_{start:06d}_{stop:06d}", name)  # as its two common downloads call the file
        else:
            assert video is not None
            names = (
                (row[video],) if any(head) else (",".join(raw[number]).strip(), row[video])
            )  # or it is a name with a comma
        if not names[-1]:
            raise _unknown(path, place, ",".join(row))
        yield Video(place, names, "" if label is None else row[label])


def _from_lines(text: str) -> Iterator[Video]:
    lines = [(number, line.strip()) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.strip()]
    folders = [
        found[1] for _, line in lines if (found := _FRAMES_LINE.fullmatch(line)) and not _FILE.fullmatch(found[1])
    ]
    for i, (number, line) in enumerate(lines):
        name, *label = line.split("\t", 1) if "\t" in line else line.rsplit(None, 1)
        names = (line, name.strip(), *(folders[i : i + 1] if len(folders) == len(lines) else ()))
        yield Video(f"line {number}", tuple(dict.fromkeys(names)), label[0].strip() if label else "")


def _read(path: str | os.PathLike[str], what: str) -> bytes:
    try:
        return storage.read(os.fspath(path))
    except FileNotFoundError:
        raise DataError(f"no {path}: {what}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _decoded(data: bytes, errors: str) -> str:
    """UTF-8, or UTF-16 that says so in its first bytes, as Windows' own programs write it."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="strict" if errors == "strict" else "replace")
    return data.decode("utf-8-sig", errors)
