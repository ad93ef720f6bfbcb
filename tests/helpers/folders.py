"""What is in a folder, to compare it with another."""

import hashlib
import pathlib


def contents(folder: str | pathlib.Path) -> dict[str, bytes]:
    """{path below the folder: content} of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()
    }


def digests(folder: str | pathlib.Path, ending: str = "") -> dict[str, str]:
    """{path below the folder: SHA-256} of every file whose name has the ending."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items() if name.endswith(ending)}
