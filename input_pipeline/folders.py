"""Which files of a folder are data, and which file a name means: one answer for everything that reads folders.

Imports neither TensorFlow nor JAX.
"""

import os
import pathlib
import re
import unicodedata
from collections.abc import Collection

from vivi_jax.errors import DataError
from vivi_jax.files import inside

Path = str | os.PathLike[str]

# Of the kinds of image files that streams.decode decodes.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff"}

# A picture of a video that was unpacked to pictures: all of them have one beginning, and one ending.
_FRAME = re.compile(r"(?P<begin>.*?)(?P<number>[0-9]+)(?P<end>\.jpe?g|\.png)", re.IGNORECASE)

# What systems leave in folders, beside hidden files (._x and .DS_Store of macOS, .ipynb_checkpoints, .x.swp, .git).
_LEFT_BEHIND = {
    "__macosx",
    "icon\r",
    "thumbs.db",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "@eadir",  # previews that Synology's disk stations keep of pictures, with the suffixes of pictures
    "#recycle",
}


def is_data(name: str) -> bool:
    """Whether a file or folder of this name is data, and not left there by a system, a notebook or an editor.

    >>> [is_data(name) for name in ("a.jpg", "._a.jpg", ".ipynb_checkpoints", "Thumbs.db", "a.txt~", "#a.txt#")]
    [True, False, False, False, False, False]
    >>> is_data("#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi")  # of HMDB-51
    True
    """
    of_an_editor = name.startswith("~$") or name.endswith("~") or (len(name) > 1 and name[0] == name[-1] == "#")
    return not (name.startswith(".") or of_an_editor or name.lower() in _LEFT_BEHIND)


def walk(root: Path, *, above: Path | None = None, leave_out: Path | None = None) -> list[str]:
    """Names, relative to `root`, of all data files at any depth below it, sorted.

    Links are followed, but not to a folder that they lie in; a folder that is reached twice counts once, where it lies
    if it lies below `root`. Links to nothing, pipes and the like are among the files: what to say of them is the
    caller's to know.

    Args:
      above: a folder that `root` lies in as part of a data set: a link back to it is not followed either.
      leave_out: a folder whose files do not count.

    Raises:
      DataError: a folder that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}")

    root, found = os.fspath(root), []
    seen = {os.path.realpath(leave_out)} if leave_out else set()
    linked = [(root, (os.path.realpath(above),) if above else ())]  # folders, and the real ones that each lies in
    for top, outer in linked:  # grows: links come after all that lies here
        if any(_lies_in(folder, os.path.realpath(top)) for folder in outer):
            continue
        for folder, folders, files in os.walk(top, onerror=unreadable):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(filter(is_data, folders))
            paths = [os.path.join(folder, name) for name in folders]
            linked += [(path, (*outer, real)) for path in paths if os.path.islink(path)]
            found += [os.path.join(folder, name) for name in files if is_data(name)]
    return sorted(os.path.relpath(path, root) for path in found)


def _lies_in(folder: str, other: str) -> bool:
    """Whether a real path is another, or below it."""
    return folder == other or folder.startswith(os.path.join(other, ""))


def files_in(folder: Path, suffixes: Collection[str]) -> list[pathlib.Path]:
    """The data files right in a folder whose suffix, in small letters, is one of these, sorted; [] without the folder.

    Raises:
      DataError: a folder that cannot be read.
    """
    return [path for path in _entries(folder) if path.suffix.lower() in suffixes and not path.is_dir()]


def frames_among(names: Collection[str]) -> list[str]:
    """Names of all the files in a folder in the order of their numbers, if they are the frames of a video; else [].

    >>> frames_among(["img_2.jpg", "img_10.jpg", "img_1.jpg"])
    ['img_1.jpg', 'img_2.jpg', 'img_10.jpg']
    >>> [frames_among(names) for names in (["a1.jpg", "b2.jpg"], ["1.jpg", "2.png"], ["1.jpg"], ["1.jpg", "a.mp4"])]
    [[], [], [], []]
    """
    found = [one for name in names if (one := _FRAME.fullmatch(name))]
    if not 2 <= len(found) == len(names) or len({(one["begin"], one["end"]) for one in found}) > 1:
        return []
    return [one[0] for one in sorted(found, key=lambda one: int(one["number"]))]


def folders_in(folder: Path) -> list[pathlib.Path]:
    """The folders right in a folder, and links to folders, that are data, sorted; [] without the folder.

    Raises:
      DataError: a folder that cannot be read.
    """
    return [path for path in _entries(folder) if path.is_dir()]


def _entries(folder: Path) -> list[pathlib.Path]:
    folder = pathlib.Path(folder)
    try:
        return sorted(folder / name for name in os.listdir(folder) if is_data(name)) if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None


def same_form(name: str) -> str:
    """A name in one Unicode form: macOS writes "é" as two characters (NFD), others mostly as one (NFC)."""
    return unicodedata.normalize("NFC", name)


class Finder:
    """Finds the files below a folder that lists name, however the list or the disk spells an accent or a slash.

    A folder is listed once, so this is for looking up many files, and for folders that do not change meanwhile.
    """

    def __init__(self, root: Path):
        self._root = pathlib.Path(root)
        self._listings: dict[pathlib.Path, dict[str, str]] = {}

    def find(self, name: str) -> pathlib.Path | None:
        """The file or folder of a name relative to the root, with the name it has on disk; None: it is not there.

        Raises:
          DataError: a name that leads out of the root.
        """
        exact = inside(self._root, name)
        if self._names(exact.parent).get(exact.name) == exact.name:
            return exact
        for spelling in {name: None, name.replace("\\", "/"): None}:  # written on Windows
            path: pathlib.Path | None = self._root
            for part in pathlib.PurePath(spelling).parts:
                names = self._names(path)
                there = names.get(part) or names.get(same_form(part))
                path = path / there if there else None
                if path is None:
                    break
            if path is not None and path != self._root:
                return path
        return None

    def _names(self, folder: pathlib.Path) -> dict[str, str]:
        """As written, and in one form -> as it is on disk."""
        if folder not in self._listings:
            names = os.listdir(folder) if folder.is_dir() else []
            self._listings[folder] = {same_form(name): name for name in names} | {name: name for name in names}
        return self._listings[folder]
