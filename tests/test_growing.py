"""A store that grows: what it had stays as it was, for readers and runs too, and a kill at any moment harms nothing."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from helpers.commands import ROOT, assert_one_line_error, one_device, run_module
from helpers.folders import digests
from helpers.video_files import numbered, write_video
from input_pipeline import check, store
from input_pipeline.preparation import steps
from input_pipeline.preparation.local import prepare, reopen
from input_pipeline.preparation.steps import Settings
from input_pipeline.streams import sources
from vivi_jax.errors import DataError

SMALL = Settings(videos_per_shard=2)


def frames_of(frames: store.FrameStore) -> dict[str, list[bytes]]:
    return {
        str(v): frames.read_frames(i, np.arange(frames.num_frames[i])).tolist() for i, v in enumerate(frames.videos)
    }


def write(folder: pathlib.Path, **lengths: int) -> None:
    """Videos d/NAME.mp4, named d_NAME, of so many pictures."""
    for name, length in lengths.items():
        path = folder / f"{name.replace('_', '/')}.mp4"
        path.parent.mkdir(exist_ok=True, parents=True)
        write_video(path, numbered(length))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder of three videos and a text, its store in two shards)"""
    folder = tmp_path_factory.mktemp("small")
    write(folder / "videos", cats_a=4, cats_b=5, rats_a=6)
    (folder / "videos/notes.txt").write_text("no video")
    assert prepare(str(folder / "videos"), str(folder / "store"), SMALL, workers=1, labels="folder")
    return folder / "videos", folder / "store"


@pytest.fixture
def copied(small, tmp_path):
    shutil.copytree(small[0], tmp_path / "videos")
    shutil.copytree(small[1], tmp_path / "store")
    return tmp_path / "videos", tmp_path / "store"


def grow(videos, out, settings=SMALL, labels="folder", **options):
    return prepare(str(videos), str(out), settings, workers=1, labels=labels, grow=True, **options)


def test_new_files_follow_and_all_else_stays(copied, small, tmp_path, capsys):
    videos, out = copied
    data = {"path": str(out)}
    sources.claim(tmp_path / "run", sources.identities(data))
    former, before = store.FrameStore(out), digests(out)
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("frames-*")}
    (videos / "cats/a.mp4").unlink()
    write(videos, cats_b=9, dogs_a=7, dogs_b=8, dogs_c=9, pigs_a=3)
    flags = (f"--videos={videos}", f"--out={out}", "--videos_per_shard=2", "--labels=folder")
    refused = run_module("input_pipeline.prepare", *flags)
    assert_one_line_error(refused, "4 new, 1 gone, 1 of another size")
    assert "--grow adds what is new, and keeps what the store has of the others" in refused.stderr
    assert digests(out) == before
    done = run_module("input_pipeline.prepare", *flags, "--grow")
    assert done.returncode == 0, done.stderr
    for line in (
        "grow: 4 new files beside 4",
        "grow: 1 files are gone (such as cats/a.mp4); the store keeps what it has of them",
        "grow: 1 files have another size than then (such as cats/b.mp4); the store keeps what it has of them",
        "8 inputs",
        "7 ok",
    ):
        assert line in done.stdout
    grown = store.FrameStore(out)
    assert grown.videos.tolist() == [*former.videos, "dogs/a.mp4", "dogs/b.mp4", "dogs/c.mp4", "pigs/a.mp4"]
    assert grown.num_frames.tolist() == [4, 5, 6, 7, 8, 9, 3] and grown.meta["inputs"] == 8
    assert [grown.class_names[label] for label in grown.label] == ["cats"] * 2 + ["rats"] + ["dogs"] * 3 + ["pigs"]
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written  # nothing was written again
    assert sorted(path.name for path in out.glob("frames-*")) == [
        *sorted(written),
        "frames-00002-of-00004.array_record",
        "frames-00003-of-00004.array_record",
    ]
    assert frames_of(former) == frames_of(store.FrameStore(small[1]))  # it reads for the first time now
    anew = tmp_path / "anew"
    prepare(str(videos), str(anew), SMALL, workers=1)
    expected = frames_of(store.FrameStore(anew)) | frames_of(store.FrameStore(small[1]))
    assert frames_of(grown) == expected and not (out / store.PARTIAL).exists()
    assert list(check.problems_of(out)) == []
    with pytest.raises(
        DataError, match="store has grown since .*run was begun, from 4 files to 8: use another --workd"
    ):
        sources.claim(tmp_path / "run", sources.identities(data))
    assert not grow(videos, out)
    write(videos, apes_a=2)
    capsys.readouterr()
    assert grow(videos, out)
    assert "grow: 1 new files beside 8" in capsys.readouterr().out
    again = store.FrameStore(out)
    assert again.class_names == ["apes", "cats", "dogs", "pigs", "rats"] and again.label.tolist()[-2:] == [3, 0]
    assert store.parts_of(again.meta["inputs"], again.meta["grown"]) == [4, 4, 1]
    assert frames_of(again) == expected | {"apes/a.mp4": frames_of(again)["apes/a.mp4"]}
    assert list(check.problems_of(out)) == []
    with pytest.raises(DataError, match="from 4 files to 9"):
        sources.claim(tmp_path / "run", sources.identities(data))
    (tmp_path / "run/data.json").unlink()  # as the message says
    sources.claim(tmp_path / "run", sources.identities(data))
    sources.claim(tmp_path / "run", sources.identities(data))


def test_what_does_not_fit_is_not_added(copied, monkeypatch):
    videos, out = copied
    before = digests(out)
    write(videos, dogs_a=7)
    with pytest.raises(DataError, match="was begun with fps=25.0, this run has fps=12.0"):
        grow(videos, out, dataclasses.replace(SMALL, fps=12.0))
    with pytest.raises(DataError, match="was begun with labels=[0-9a-f]+, this run has labels=;"):
        grow(videos, out, labels="")
    (videos.parent / "labels.csv").write_text("video,label\ncats/a.mp4,cats\ncats/b.mp4,lions\nrats/a.mp4,rats\n")
    with pytest.raises(DataError, match=r"other labels: of 1 of its videos \(such as cats/b.mp4, cats then, lions now"):
        grow(videos, out, labels=str(videos.parent / "labels.csv"))
    monkeypatch.setattr(steps, "PREPARATION_VERSION", steps.PREPARATION_VERSION + 1)
    with pytest.raises(DataError, match="was begun with preparation="):
        grow(videos, out)
    assert digests(out) == before


def test_labels_of_files_that_are_gone_stay(copied):
    videos, out = copied
    (videos / "cats/a.mp4").unlink()
    write(videos, dogs_a=7)
    labels = videos.parent / "labels.csv"
    labels.write_text("video,label\ncats/b.mp4,cats\nrats/a.mp4,rats\ndogs/a.mp4,dogs\n")
    assert grow(videos, out, labels=str(labels))
    grown = store.FrameStore(out)
    assert [grown.class_names[label] for label in grown.label] == ["cats", "cats", "rats", "dogs"]


# A process that kills itself at a rename: the n-th one, counted from 1; it makes a copy of the store for each of them.
KILLED_AT_A_RENAME = """
import os, shutil, signal, sys
from input_pipeline.preparation.local import prepare
from input_pipeline.preparation.steps import Settings

videos, out, folder = sys.argv[1:]
for n in range(1, 100):
    copy = f"{folder}/{n}"
    shutil.copytree(out, copy)
    child = os.fork()
    if not child:
        renames, replace = 0, os.replace
        def dying(*names):
            global renames
            renames += 1
            if renames == n:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)
        os.replace = dying
        prepare(videos, copy, Settings(videos_per_shard=2), workers=1, labels="folder", grow=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


@pytest.mark.slow
def test_a_kill_at_any_rename_leaves_a_store_that_is_whole(copied, tmp_path):
    """Before the rename of meta.json it is the former one, from then on the larger one; and the growth goes on."""
    videos, out = copied
    write(videos, dogs_a=7)
    (tmp_path / "killed").mkdir()
    arguments = [sys.executable, "-c", KILLED_AT_A_RENAME, str(videos), str(out), str(tmp_path / "killed")]
    subprocess.run(arguments, cwd=ROOT, env=one_device(), check=True, timeout=300, stdout=subprocess.DEVNULL)
    *killed, undisturbed = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    assert len(killed) == 12  # plan, frames, shard, rows, the four files of a store; then meta and the others move
    former, larger = frames_of(store.FrameStore(out)), frames_of(store.FrameStore(undisturbed))
    assert set(larger) - set(former) == {"dogs/a.mp4"}
    for path in killed:
        assert frames_of(store.FrameStore(path)) == (larger if int(path.name) > 9 else former), path.name
        assert list(check.problems_of(path)) == []
        assert grow(videos, path) == (int(path.name) <= 9)
        assert digests(path) == digests(undisturbed)


def test_a_growth_that_was_killed_may_go_on_with_other_files(copied, tmp_path):
    """What was made of files that are no longer there goes."""
    videos, out = copied
    before = digests(out)
    write(videos, dogs_a=7)
    plan = steps.make_plan(str(videos), str(out), SMALL, labels="folder", labelled_only=False, grow=True)
    with steps.begin(str(out), plan) as partial:
        (pathlib.Path(partial) / "00000004.jpegs").write_bytes(b"x")
    (out / "frames-00002-of-00003.array_record").write_bytes(b"x")
    shutil.copytree(out, tmp_path / "other")
    shutil.move(videos / "dogs", tmp_path / "dogs")
    assert not grow(videos, out)
    assert digests(out) == before
    write(videos, pigs_a=3, pigs_b=3, pigs_c=3)
    assert grow(videos, tmp_path / "other")
    assert store.FrameStore(tmp_path / "other").videos.tolist()[3:] == ["pigs/a.mp4", "pigs/b.mp4", "pigs/c.mp4"]
    names = {path.name for path in (tmp_path / "other").glob("frames-*")}
    assert names == {shard["file"] for shard in store.FrameStore(tmp_path / "other").meta["shards"]}


def test_of_two_growths_at_once_the_second_begins_anew(copied):
    videos, out = copied
    write(videos, dogs_a=7)
    plan = steps.make_plan(str(videos), str(out), SMALL, labels="folder", labelled_only=False, grow=True)
    assert grow(videos, out)  # by another
    with pytest.raises(DataError, match="another preparation has changed .* meanwhile"):
        with steps.begin(str(out), plan):
            pass


def test_a_grown_store_is_tried_again_as_any(copied):
    """What --retry does of it: one file is decoded again, and its shard made again, in the order that it has."""
    videos, out = copied
    write(videos, ants_a=7)
    assert grow(videos, out)
    grown = frames_of(store.FrameStore(out))
    (videos / "cats/a.mp4").unlink()
    plan = steps.make_plan(str(videos), str(out), SMALL, labels="folder", labelled_only=False, grow=True)
    (out / store.PARTIAL).mkdir()
    reopen(out, out / store.PARTIAL, plan, [4])
    assert prepare(str(videos), str(out), SMALL, workers=1, labels="folder")
    again = store.FrameStore(out)
    assert frames_of(again) == grown and again.videos.tolist()[-1] == "ants/a.mp4"
    assert store.parts_of(again.meta["inputs"], again.meta["grown"]) == [4, 1]
    assert list(check.problems_of(out)) == []
