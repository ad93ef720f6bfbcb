"""Preparing with Beam: the same bytes as the local command, also from buckets and through kills; clear words."""

import contextlib
import functools
import json
import random
import shutil
import socket
import subprocess
import sys
import time

import pytest

from helpers.commands import ROOT, assert_one_line_error, one_device, run_module, start_module
from helpers.folders import contents
from helpers.video_files import numbered, scenes, write_video
from input_pipeline import storage, store
from input_pipeline.preparation import inputs, steps
from input_pipeline.preparation.local import prepare, summary
from input_pipeline.preparation.steps import Settings
from vivi_jax.errors import DataError

pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install -e '.[beam]'")
from helpers.fake_bucket import FakeBucket
from input_pipeline.preparation import beam as prepare_beam
from input_pipeline.preparation import beam_runner

run_prepare = functools.partial(run_module, "input_pipeline.prepare_beam")
SMALL = Settings(videos_per_shard=3)
DIRECT = ["--runner=DirectRunner"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven files: four videos of several containers, three that are none; and a hidden one."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("cats", "dogs"):
        (folder / name).mkdir()
    write_video(folder / "cats/a.mp4", scenes([15, 20], seed=1))
    write_video(folder / "cats/b.mkv", numbered(20))
    write_video(folder / "dogs/c.avi", numbered(12), codec="mjpeg", pix_fmt="yuvj420p")
    write_video(folder / "ü, 文.ts", scenes([40, 30], seed=3))
    (folder / "empty.mp4").touch()
    (folder / "notes.txt").write_text("no video\n")
    (folder / "dogs/cut.mp4").write_bytes((folder / "cats/a.mp4").read_bytes()[:2000])
    (folder / ".DS_Store").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def reference(videos, tmp_path_factory):
    """The store of the local command."""
    out = tmp_path_factory.mktemp("reference") / "store"
    assert prepare(str(videos), str(out), SMALL, workers=2)
    return contents(out)


@pytest.fixture
def fake_bucket(videos, tmp_path, monkeypatch):
    """A bucket shelf://b with the videos below shelf://b/in."""
    root = tmp_path / "fake_bucket"
    root.mkdir()
    for path in videos.rglob("*"):
        if path.is_file():
            shutil.copy(path, root / ("b%in%" + str(path.relative_to(videos)).replace("/", "%")))
    monkeypatch.setattr(FakeBucket, "root", root, raising=False)
    monkeypatch.setattr(FakeBucket, "forbidden", ())
    return root


def test_same_bytes_as_the_local_command(videos, reference, tmp_path):
    assert prepare_beam.prepare_with_beam(str(videos), str(tmp_path / "store"), DIRECT, SMALL)
    assert contents(tmp_path / "store") == reference
    rows = [json.loads(line) for line in (tmp_path / "store" / store.LEDGER).read_text().splitlines()]
    assert [row["input"] for row in rows] == [file.name for file in inputs.find(str(videos), "")]  # each once
    assert not prepare_beam.prepare_with_beam(str(videos), str(tmp_path / "store"), DIRECT, SMALL)
    with pytest.raises(DataError, match="was begun with fps=25.0, this run has fps=5.0"):
        prepare_beam.prepare_with_beam(
            str(videos), str(tmp_path / "store"), DIRECT, Settings(videos_per_shard=3, fps=5.0)
        )


@pytest.mark.slow
def test_same_bytes_from_a_bucket_to_a_bucket(fake_bucket, reference):
    assert prepare_beam.prepare_with_beam("shelf://b/in/", "shelf://b/out", DIRECT, SMALL)
    made = {path.name.removeprefix("b%out%"): path.read_bytes() for path in fake_bucket.glob("b%out%*")}
    assert made == reference  # nothing more: no work in progress is left
    assert not prepare_beam.prepare_with_beam("shelf://b/in", "shelf://b/out", DIRECT, SMALL)
    assert "4 ok" in summary("shelf://b/out") and "1 refused: empty file" in summary("shelf://b/out")


@pytest.mark.slow
def test_goes_on_where_either_command_was(videos, reference, tmp_path, monkeypatch):
    """Half by the local command, which then fails; the other half by Beam, which does not touch what is there."""
    out = tmp_path / "store"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "finish", lambda root, plan, packed: stop(next(packed)))
        with pytest.raises(KeyboardInterrupt):
            prepare(str(videos), str(out), SMALL, workers=1)
    first = out / "frames-00000-of-00003.array_record"
    written = first.stat().st_mtime_ns
    assert prepare_beam.prepare_with_beam(str(videos), str(out), DIRECT, SMALL)
    assert contents(out) == reference and first.stat().st_mtime_ns == written


@pytest.mark.slow
def test_same_bytes_when_killed_again_and_again(videos, reference, tmp_path):
    out = tmp_path / "store"
    flags = f"--videos={videos}", f"--out={out}", "--videos_per_shard=3"
    rng, kills = random.Random(0), 0
    while True:
        process = start_module(
            "input_pipeline.prepare_beam", *flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = len(list((out / store.PARTIAL).glob("rows-*"))) + 1
        while process.poll() is None and len(list((out / store.PARTIAL).glob("rows-*"))) < until:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills >= 1
    assert contents(out) == reference


@pytest.mark.parametrize("runner", [[], DIRECT, ["--runner=direct"]])
def test_the_direct_runner_fetches_nothing(videos, tmp_path, runner):
    """All that would go out goes to a proxy that takes note."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        code = (
            "from input_pipeline.preparation.beam import prepare_with_beam;"
            f"assert prepare_with_beam({str(videos / 'cats')!r}, {str(tmp_path / 'store')!r}, {runner!r})"
        )
        environment = one_device() | {"HOME": str(tmp_path), "https_proxy": address, "http_proxy": address}
        environment |= {"no_proxy": "localhost,127.0.0.1"}
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        proxy.settimeout(0.1)
        asked = 0
        while process.poll() is None:
            with contextlib.suppress(TimeoutError):
                proxy.accept()[0].close()
                asked += 1
        assert process.communicate()[0] is not None and process.returncode == 0
    assert asked == 0


@pytest.mark.slow
def test_command_line(videos, reference, tmp_path):
    """Two worker processes; then what is wrong, in one line."""
    flags = f"--videos={videos}", f"--out={tmp_path / 'store'}", "--videos_per_shard=3"
    run = run_prepare(*flags, "--direct_num_workers=2", "--direct_running_mode=multi_processing")
    assert run.returncode == 0, run.stderr
    for line in ("7 inputs", "4 ok", "1 refused: empty file"):
        assert line in run.stdout
    assert contents(tmp_path / "store") == reference
    run = run_prepare(*flags, "--rnner=DirectRunner")
    assert_one_line_error(run, "unknown option --rnner")
    run = run_prepare(f"--videos={tmp_path / 'none'}", f"--out={tmp_path / 'other'}")
    assert_one_line_error(run, "no such directory")


@pytest.mark.slow
def test_labelled_only(videos, tmp_path):
    (tmp_path / "labels.csv").write_text("video,label\ncats/a.mp4,cat\ndogs/c.avi,dog\n")
    prepare(str(videos), str(tmp_path / "store"), SMALL, labels=str(tmp_path / "labels.csv"), labelled_only=True)
    assert store.FrameStore(tmp_path / "store").videos.tolist() == ["cats/a.mp4", "dogs/c.avi"]
    with pytest.raises(DataError, match="--labelled_only without a labelled file"):
        prepare(str(videos), str(tmp_path / "other"), SMALL, labelled_only=True)


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_find_in_a_bucket(fake_bucket, videos):
    def names(pattern, out="shelf://b/out"):
        return [file.name for file in inputs.find(pattern, out)]

    assert names("shelf://b/in") == [file.name for file in inputs.find(str(videos), "")]
    for pattern in ("**/*", "*.mp4", "*/a.mp4", "**/*.mp4", "c*", "[!d]*/*", "?ogs"):
        expected = [file.name for file in inputs.find(f"{videos}/{pattern}", "")]
        assert names(f"shelf://b/in/{pattern}") == expected, pattern
    assert "cats/a.mp4" not in names("shelf://b/in", "shelf://b/in/cats")
    with pytest.raises(DataError, match="no files in shelf://b/none"):
        names("shelf://b/none")


@pytest.mark.parametrize(
    "forbidden, message",
    [
        ("shelf://b/in", "cannot list shelf://b/in: 403"),
        ("shelf://b/out", "cannot look for shelf://b/out/meta.json: 403"),
        pytest.param("shelf://b/out/frames", "cannot write shelf://b/out/frames-0000", marks=pytest.mark.slow),
    ],
)
def test_a_bucket_without_permission(fake_bucket, monkeypatch, forbidden, message):
    """The last: writing is refused to the workers only, so the line comes through Beam."""
    monkeypatch.setattr(FakeBucket, "forbidden", (forbidden,))
    with pytest.raises(DataError, match="give the account this runs as the right to list, read and write there") as e:
        prepare_beam.prepare_with_beam("shelf://b/in", "shelf://b/out", DIRECT, SMALL)
    assert str(e.value).startswith(message) and "\n" not in str(e.value) and "while running" not in str(e.value)


@pytest.mark.slow
def test_a_video_that_may_not_be_read_is_refused(fake_bucket, reference, monkeypatch):
    monkeypatch.setattr(FakeBucket, "forbidden", ("shelf://b/in/cats/b.mkv",))
    prepare_beam.prepare_with_beam("shelf://b/in", "shelf://b/out", DIRECT, SMALL)
    rows = {row["input"]: row for row in map(json.loads, storage.read("shelf://b/out/ledger.jsonl").splitlines())}
    assert len(rows) == 7 and rows["cats/b.mkv"]["reason"].startswith("unreadable: cannot read shelf://b/in/cats/b.mkv")
    assert sum(row["status"] == "ok" for row in rows.values()) == 3


def test_local_command_names_the_other(tmp_path):
    with pytest.raises(DataError, match="use python -m input_pipeline.prepare_beam"):
        prepare("gs://bucket/videos", str(tmp_path))


def test_a_bucket_of_an_unknown_kind():
    with pytest.raises(DataError, match="cannot list nowhere://b/in: Unable to get filesystem"):
        inputs.find("nowhere://b/in", "nowhere://b/out")


def test_other_versions_on_a_worker_are_refused(videos, tmp_path, monkeypatch):
    maker = prepare_beam.MakeShard(str(tmp_path), SMALL, {"av": "0.1"}, "id")
    with pytest.raises(DataError, match="this worker has .* the command was started with {'av': '0.1'}"):
        maker.setup()


def test_options():
    assert beam_runner.parse(["--runner=FlinkRunner", "--flink_master=host:8081"]).get_all_options()["runner"]
    with pytest.raises(DataError, match="unknown option --flink_mster"):
        beam_runner.parse(["--runner=FlinkRunner", "--flink_mster=host:8081"])
