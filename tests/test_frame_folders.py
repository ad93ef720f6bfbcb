"""Folders of numbered pictures, and animated pictures, are videos like any: order, rate, shots, labels and limits."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers.video_files import number, numbered, scenes
from input_pipeline import store
from input_pipeline.preparation import inputs
from input_pipeline.preparation.local import prepare
from input_pipeline.preparation.steps import Settings


def write(folder, pictures, name="f_{}.jpg", first=8):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / name.format(first + i), quality=95)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(videos, ledger by input, store) at 10 frames a second."""
    root = tmp_path_factory.mktemp("frames")
    videos = root / "videos"
    write(videos / "a/jpeg", numbered(4))  # 8 to 11: by name 10 comes before 8
    write(videos / "a/png", scenes([12, 14]), "{:03}.PNG")
    write(videos / "a/png/.cache", numbered(1))
    write(videos / "b/cut", np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8))
    cut = videos / "b/cut/f_9.jpg"
    cut.write_bytes(cut.read_bytes()[:2000])
    write(videos / "b/photos", [*numbered(2), *numbered(1, 64, 48)])
    write(videos / "b/many", numbered(30))
    write(videos / "b/mixed", numbered(2))
    (videos / "b/mixed/notes.txt").write_text("no frame")
    write(videos, numbered(2), "top_{}.jpg")
    first, *others = map(Image.fromarray, numbered(4))
    first.save(videos / "b/moving.gif", save_all=True, append_images=others, duration=200)
    settings = Settings(fps=10, max_frames=29)
    assert prepare(str(videos), str(root / "store"), settings, workers=1, labels="folder")
    rows = [json.loads(line) for line in (root / "store" / store.LEDGER).read_text().splitlines()]
    return videos, {row["input"]: row for row in rows}, store.FrameStore(root / "store")


def test_each_folder_is_one_input(prepared):
    _, rows, frames = prepared
    assert {name: row["reason"] or "ok" for name, row in rows.items()} == {
        "a/jpeg": "ok",
        "a/png": "ok",
        "b/cut": "truncated or damaged: f_9.jpg: Invalid data found when processing input",
        "b/many": "too many frames: more than 29 (--max_frames)",
        "b/mixed/notes.txt": "not a video: no container format fits, or its header is damaged",
        "b/moving.gif": "ok",
        "b/photos": "not a video: a folder of pictures of different sizes",
        **dict.fromkeys(
            ["b/mixed/f_8.jpg", "b/mixed/f_9.jpg", "top_8.jpg", "top_9.jpg"],
            "not a video: pictures, texts, playlists and unknown containers are not opened",
        ),
    }
    assert rows["a/jpeg"]["notes"] == ["folder of frames: 4 pictures, taken as 10 per second"]
    assert [frames.class_names[label] for label in frames.label] == ["a", "a", "b"]


def test_frames_are_the_pictures_in_the_order_of_their_numbers(prepared):
    _, rows, frames = prepared
    assert frames.num_frames.tolist() == [4, 26, 4] and np.allclose(frames.fps, [10, 10, 5])
    for video in (0, 2):
        pictures = [cv2.imdecode(np.frombuffer(f, np.uint8), 1) for f in frames.read_frames(video, np.arange(4))]
        assert [number(picture) for picture in pictures] == [0, 1, 2, 3]
    assert frames.shots(1).tolist() == [[0, 12], [12, 26]]


def test_a_folder_has_the_bytes_of_its_pictures_and_may_grow(prepared, capsys):
    videos, rows, frames = prepared
    assert rows["a/jpeg"]["bytes"] == sum(path.stat().st_size for path in (videos / "a/jpeg").iterdir())
    write(videos / "a/jpeg", numbered(5))
    write(videos / "c/new", numbered(3))
    settings = dataclasses.replace(Settings(), fps=10, max_frames=29)
    assert prepare(str(videos), frames.directory, settings, workers=1, labels="folder", grow=True)
    printed = capsys.readouterr().out
    assert "grow: 1 new files beside 11" in printed and "gone" not in printed
    assert "1 files have another size than then (such as a/jpeg)" in printed
    assert store.FrameStore(frames.directory).num_frames.tolist() == [4, 26, 4, 3]


def test_patterns_and_lists_find_folders(prepared, tmp_path):
    videos = prepared[0]
    assert [file.name for file in inputs.find(f"{videos}/*/jpeg", "")] == ["a/jpeg"]
    (tmp_path / "list").write_text("jpeg 4 7\nb/many 30 1\n")
    found = inputs.take_listed(inputs.find(str(videos), ""), str(tmp_path / "list"))
    assert [file.name for file in found] == ["a/jpeg", "b/many"]
