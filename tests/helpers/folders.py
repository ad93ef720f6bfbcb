"""What is in a folder, to compare it with another."""

import hashlib
import pathlib

# What macOS, Windows, Jupyter, editors and disk stations leave in folders.
LITTER = (
    "._a.jpg",
    ".DS_Store",
    "__MACOSX/cat/._a.jpg",
    "Icon\r",
    "Thumbs.db",
    "desktop.ini",
    "$RECYCLE.BIN/a.jpg",
    ".ipynb_checkpoints/a-checkpoint.jpg",
    "a.jpg~",
    ".a.jpg.swp",
    "#a.jpg#",
    ".#a.jpg",
    "~$a.jpg",
    "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
    ".Trash-1000/files/a.jpg",
)


def contents(folder: str | pathlib.Path) -> dict[str, bytes]:
    """{path below the folder: content} of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()
    }


def digests(folder: str | pathlib.Path, ending: str = "") -> dict[str, str]:
    """{path below the folder: SHA-256} of every file whose name has the ending."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items() if name.endswith(ending)}
