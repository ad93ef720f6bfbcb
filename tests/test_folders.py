"""Which files are data, how names are found and lists read: alike for everything that reads folders."""

import codecs
import os
import pathlib
import unicodedata

import numpy as np
import pytest

from helpers.folders import LITTER
from input_pipeline import folders, lists
from vivi_jax import files
from vivi_jax.errors import DataError


def write(root: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_what_systems_and_editors_leave_is_no_data(tmp_path):
    mine = ("a.jpg", "#20_clap.avi", "b/c.jpg", "b/Thumbs/d.jpg", "b/x~y.jpg")
    write(tmp_path, *mine, *LITTER, *(f"b/{name}" for name in LITTER))
    assert folders.walk(tmp_path) == sorted(mine)
    assert [path.name for path in folders.files_in(tmp_path / "b", {".jpg"})] == ["c.jpg", "x~y.jpg"]
    assert [path.name for path in folders.folders_in(tmp_path)] == ["b"]
    assert folders.files_in(tmp_path / "none", {".jpg"}) == folders.folders_in(tmp_path / "none") == []


def test_links_are_followed_but_not_in_circles(tmp_path):
    data = write(tmp_path / "data", "cat/1.jpg", "dog/2.jpg", "dog/old/3.jpg")
    other = write(tmp_path / "other", "4.jpg", "deep/5.jpg")
    (data / "dog" / "more").symlink_to(other, target_is_directory=True)
    (data / "dog" / "6.jpg").symlink_to(other / "4.jpg")
    expected = ["2.jpg", "6.jpg", "more/4.jpg", "more/deep/5.jpg", "old/3.jpg"]
    assert folders.walk(data / "dog", above=data) == expected
    for link, target in (
        ("dog/again", "dog"),  # to itself
        ("dog/root", "."),  # all the data: cats are no dogs
        ("dog/all", ".."),
        ("dog/old/up", "dog"),
    ):
        (data / link).symlink_to(data / target, target_is_directory=True)
    (other / "back").symlink_to(data, target_is_directory=True)
    (other / "deep" / "round").symlink_to(other, target_is_directory=True)
    assert folders.walk(data / "dog", above=data) == expected
    # As a whole, each file counts once under its own name, links to files apart.
    assert folders.walk(data) == sorted(["cat/1.jpg", *(f"dog/{name}" for name in expected)])
    # A link inside the folder to another part of it changes no name.
    (data / "dog" / "a").symlink_to(data / "dog" / "old", target_is_directory=True)
    assert folders.walk(data / "dog", above=data) == expected
    assert folders.walk(data, leave_out=data / "dog") == ["cat/1.jpg"]
    with pytest.raises(DataError, match="cannot read the folder .*none"):
        folders.walk(data / "none")


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, "a/1.jpg")
    (tmp_path / "a").chmod(0)
    with pytest.raises(DataError, match="cannot read the folder .*/a: Permission denied"):
        folders.walk(tmp_path)


def test_names_are_found_in_either_unicode_form_and_with_windows_slashes(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "Café/vidéo é.jpg") for form in ("NFC", "NFD"))
    assert nfc != nfd
    write(tmp_path / "nfc", nfc)
    write(tmp_path / "nfd", nfd)
    for name in (nfc, nfd, nfc.replace("/", "\\")):
        assert folders.Finder(tmp_path / "nfc").find(name) == tmp_path / "nfc" / nfc
        assert folders.Finder(tmp_path / "nfd").find(name) == tmp_path / "nfd" / nfd
    top = write(tmp_path / "top", unicodedata.normalize("NFD", "é.jpg"))
    assert folders.Finder(top).find("é.jpg") == top / unicodedata.normalize("NFD", "é.jpg")
    both = write(tmp_path / "both", "é.jpg", unicodedata.normalize("NFD", "é.jpg"))
    for form in ("NFC", "NFD"):  # two files: each is found by its own name
        name = unicodedata.normalize(form, "é.jpg")
        assert folders.Finder(both).find(name) == both / name
    assert folders.Finder(tmp_path / "nfc").find("Cafe/vidéo é.jpg") is None
    assert folders.Finder(tmp_path / "none").find("a.jpg") is None


@pytest.mark.parametrize(
    "data",
    [
        "one\ntwo words\nçà".encode(),
        codecs.BOM_UTF8 + "one\r\ntwo words\r\nçà\r\n".encode(),
        "\n\none  \n \t\n two words\t\nçà\n\n\n".encode(),
        "one\rtwo words\rçà".encode(),
        "one\r\ntwo words\r\nçà\r\n".encode("utf-16"),
        codecs.BOM_UTF16_BE + "one\ntwo words\nçà".encode("utf-16-be"),
    ],
)
def test_lists_are_read_however_they_were_written(tmp_path, data):
    (tmp_path / "list.txt").write_bytes(data)
    assert lists.read_lines(tmp_path / "list.txt") == ["one", "two words", "çà"]


def test_a_list_names_files_that_no_encoding_fits(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(name, "wb"):
        pass
    [line] = lists.read_lines(tmp_path / "list.txt")
    found = folders.Finder(tmp_path).find(line)
    assert found and os.fsencode(found) == name


def test_lists_that_are_no_lists_get_one_line(tmp_path):
    with pytest.raises(DataError, match="no .*list.txt: the list of things"):
        lists.read_lines(tmp_path / "list.txt", "the list of things")
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF8 + b"\r\n \r\n")
    with pytest.raises(DataError, match="list.txt is empty"):
        lists.read_lines(tmp_path / "list.txt")
    with pytest.raises(DataError, match="cannot read"):
        lists.read_lines(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"video,label\na b.mp4,x\nc.mp4,y\n",
        codecs.BOM_UTF8 + b"video,label\r\na b.mp4,x\r\nc.mp4,y\r\n",
        b'\n label , video\nx, a b.mp4 \n\n  ,  \n"y",c.mp4\n',
        "video,label\r\na b.mp4,x\r\nc.mp4,y\r\n".encode("utf-16"),
    ],
)
def test_tables_are_read_however_they_were_written(tmp_path, data):
    (tmp_path / "table.csv").write_bytes(data)
    rows = lists.read_table(tmp_path / "table.csv", ("video", "label"))
    assert rows == [{"video": "a b.mp4", "label": "x"}, {"video": "c.mp4", "label": "y"}]
    with pytest.raises(DataError, match="has no column title: its first line must name the columns video,title"):
        lists.read_table(tmp_path / "table.csv", ("video", "title"))


OUTSIDE = ("../x", "a/../../x", "/etc/x", "..", ".", "", " ", "..\\x", "a\\..\\..\\x", "\\x", "a\0b", "x" * 300)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    for look in (files.inside, lambda folder, name: folders.Finder(folder).find(name)):
        with pytest.raises(DataError, match="is no name of anything in .*: names must not lead out of their folder"):
            look(tmp_path, name)


@pytest.mark.parametrize("name", ["a.jpg", "a/b.jpg", "./a.jpg", "a..b/c", ".hidden", "é/ a", "a\\b.jpg", "C:a"])
def test_names_inside_are_joined(tmp_path, name):
    assert files.inside(tmp_path, name) == tmp_path / name


def test_a_zip_that_unpacks_to_more_than_is_taken_is_refused_unread(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, zeros=np.zeros(100_000, np.uint8))
    assert path.stat().st_size < 1000
    files.check_unpacked(path, 101_000)
    with pytest.raises(DataError, match="a.npz unpacks to 100,128 bytes, more than the 100,000 that are taken"):
        files.check_unpacked(path, 100_000)
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match="a.npz is damaged"):
        files.check_unpacked(path, 100_000)
