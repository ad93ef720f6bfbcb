"""`python -m input_pipeline.check`: every damage of a store is a line, and what is done again is said."""

import json
import random
import shutil

import numpy as np
import pytest

from helpers.commands import assert_one_line_error, run_module
from helpers.video_files import numbered, scenes, write_video
from input_pipeline import check, store
from input_pipeline.preparation import steps
from input_pipeline.preparation.local import prepare, reopen
from input_pipeline.preparation.steps import Settings
from vivi_jax.errors import DataError

SMALL = Settings(videos_per_shard=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for v in range(4):
        write_video(folder / f"{v}.mp4", scenes([15], seed=v))
    write_video(folder / "4.mp4", numbered(5))
    return folder


@pytest.fixture(scope="module")
def good(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("good") / "store"
    assert prepare(str(videos), str(out), SMALL)
    return out


def problems(directory, capsys) -> list[str]:
    """The lines of a check that ends with an error."""
    with pytest.raises(DataError, match="problems in"):
        check.check(str(directory))
    return capsys.readouterr().out.splitlines()


def test_the_command(good, tmp_path):
    run = run_module("input_pipeline.check", good)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{good}: all is as it was written: 5 videos, 65 frames, id {store.FrameStore(good).id}\n"
    shutil.copytree(good, tmp_path / "bad")
    (tmp_path / "bad" / store.shard_name(0, 3)).unlink()
    run = run_module("input_pipeline.check", tmp_path / "bad")
    assert_one_line_error(run, f"1 problems in {tmp_path / 'bad'}")
    assert f"{store.shard_name(0, 3)} is missing" in run.stdout
    assert_one_line_error(run_module("input_pipeline.check", tmp_path), "is not a frame store")


def test_every_flip_of_every_file_is_found(good, tmp_path, capsys):
    """Also in the padding of a shard, which no reader sees."""
    rng = random.Random(0)
    for path in sorted(good.iterdir()):
        data = path.read_bytes()
        for position in [rng.randrange(8 * len(data)) for _ in range(20)]:
            shutil.copytree(good, tmp_path / "bad")
            flipped = bytearray(data)
            flipped[position // 8] ^= 1 << position % 8
            (tmp_path / "bad" / path.name).write_bytes(flipped)
            with pytest.raises(DataError) as caught:
                check.check(str(tmp_path / "bad"))
            assert path.name in capsys.readouterr().out + str(caught.value), position
            shutil.rmtree(tmp_path / "bad")


def test_all_problems_are_told_and_the_videos_named(good, tmp_path, capsys):
    shutil.copytree(good, tmp_path / "bad")
    one, two = tmp_path / "bad" / store.shard_name(0, 3), tmp_path / "bad" / store.shard_name(1, 3)
    data = bytearray(one.read_bytes())
    record = store.FrameStore(good).read(np.array([20])).item()  # of the second video
    data[data.index(record) + 50] ^= 1
    one.write_bytes(data)
    lines = problems(tmp_path / "bad", capsys)
    assert len(lines) == 2 and f"{one} is damaged" in lines[0]
    assert f"{tmp_path / 'bad'}: 1.mp4 has damaged frames" in lines[1]
    one.write_bytes(two.read_bytes())
    two.write_bytes((good / one.name).read_bytes())
    lines = problems(tmp_path / "bad", capsys)
    assert any(line.startswith(str(one)) for line in lines) and any(line.startswith(str(two)) for line in lines)
    (tmp_path / "bad" / store.LEDGER).unlink()
    assert f"{store.LEDGER} is missing" in problems(tmp_path / "bad", capsys)[0]


def test_of_a_store_without_hashes_all_records_are_read(good, tmp_path, capsys):
    shutil.copytree(good, tmp_path / "old")
    meta = json.loads((good / store.META).read_text())
    del meta["id"], meta["files"]
    for shard in meta["shards"]:
        del shard["sha256"], shard["checksums"]
    (tmp_path / "old" / store.META).write_text(json.dumps(meta | {"version": 2}))
    check.check(str(tmp_path / "old"))
    assert "version 2, without hashes: all records were read" in capsys.readouterr().out
    path = tmp_path / "old" / store.shard_name(1, 3)
    data = bytearray(path.read_bytes())
    data[data.index(store.FrameStore(good).read(np.array([31])).item()) + 50] ^= 1
    path.write_bytes(data)
    line, *others = problems(tmp_path / "old", capsys)
    assert not others, (line, others)
    assert f"{tmp_path / 'old'}: 2.mp4 has damaged frames" in line and path.name in line


def test_what_a_preparation_under_way_does_again(videos, good, tmp_path, capsys):
    out = tmp_path / "store"
    shutil.copytree(good, out)
    partial = out / store.PARTIAL
    partial.mkdir()
    plan = steps.make_plan(str(videos), str(out), SMALL, labels="", labelled_only=False)
    reopen(out, partial, plan, [4])
    (partial / "rows-00000.json").write_text("{")
    redone, kept = check.under_way(out)
    assert redone == [f"shard 0: {partial / 'rows-00000.json'} is missing or damaged"] and kept == ["shard 1", "4.mp4"]
    shutil.rmtree(out)
    shutil.copytree(good, out)
    partial.mkdir()
    reopen(out, partial, plan, [1])
    again_path = partial / "00000000.jpegs"
    again_path.write_bytes(again_path.read_bytes()[:-1])
    with pytest.raises(DataError, match="1 parts of .* are damaged: the command that made it does them again"):
        check.check(str(out))
    assert "to be done again: 0.mp4: its frames are damaged" in capsys.readouterr().out
    prepare(str(videos), str(out), SMALL)
    check.check(str(out))
    assert store.FrameStore(out).id == store.FrameStore(good).id
