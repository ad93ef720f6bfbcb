"""Lists and tables that people write by hand or by a program, on any system: names on lines, and CSV files.

A byte-order mark, the line ends of any system, blank lines and spaces at the ends of lines and fields mean nothing.
Files may be in a bucket, see storage.py.
"""

import codecs
import csv
import io
import os
import re
from collections.abc import Sequence

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
