"""Preparing a directory: every file accounted for, the same bytes for any workers and kills, clear words when not."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
import unicodedata

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers.commands import assert_one_line_error, children, run_module, start_module
from helpers.folders import LITTER, digests
from helpers.video_files import loop_video, numbered, scenes, write_video
from input_pipeline import store
from input_pipeline.preparation import inputs, steps
from input_pipeline.preparation.local import how_to_retry, prepare, reopen, summary
from input_pipeline.preparation.steps import Settings
from vivi_jax.errors import DataError

run_prepare = functools.partial(run_module, "input_pipeline.prepare")
SMALL = Settings(videos_per_shard=3)
STARVED = dataclasses.replace(SMALL, wall_s=0.001)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Ten files: seven videos, three that are none; and two hidden ones, which do not count."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("cats", "dogs", "cats/.cache"):
        (folder / name).mkdir()
    write_video(folder / "cats/a.mp4", scenes([15, 20], seed=1))
    write_video(folder / "cats/b.mkv", numbered(20))
    write_video(folder / "dogs/a.mp4", scenes([30], seed=2), fps=10)
    write_video(folder / "dogs/c.avi", numbered(12), codec="mjpeg", pix_fmt="yuvj420p")
    write_video(folder / "tall.webm", numbered(25, 90, 50), codec="libvpx-vp9", pix_fmt="yuv420p")
    write_video(folder / "ü, 文.ts", scenes([40, 30, 50], seed=3))
    write_video(folder / "z.mp4", numbered(40))
    (folder / "empty.mp4").touch()
    (folder / "notes.txt").write_text("no video\n")
    (folder / "dogs/cut.mp4").write_bytes((folder / "dogs/a.mp4").read_bytes()[:2000])
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "cats/.cache/x.mp4").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def reference(videos, tmp_path_factory):
    """The store made by one worker without interruption."""
    out = tmp_path_factory.mktemp("reference") / "store"
    assert prepare(str(videos), str(out), SMALL, workers=1)
    return out


def ledger(out):
    return [json.loads(line) for line in (out / store.LEDGER).read_text().splitlines()]


# --- the result -----------------------------------------------------------------------------------------------------


def test_every_input_is_accounted_for(videos, reference):
    rows = ledger(reference)
    assert [row["input"] for row in rows] == sorted(row["input"] for row in rows)
    reasons = {row["input"]: row["reason"] for row in rows if row["status"] == "refused"}
    assert set(reasons) == {"empty.mp4", "notes.txt", "dogs/cut.mp4"} and all(reasons.values())
    assert {row["input"]: row["frames"] for row in rows if row["status"] == "ok"} == {
        "cats/a.mp4": 35,
        "cats/b.mkv": 20,
        "dogs/a.mp4": 30,
        "dogs/c.avi": 12,
        "tall.webm": 25,
        "z.mp4": 40,
        "ü, 文.ts": 120,
    }
    meta = json.loads((reference / store.META).read_text())
    assert (meta["inputs"], meta["videos"], meta["refused"], meta["frames"], meta["shots"]) == (10, 7, 3, 282, 16)
    assert sorted(digests(reference)) == [
        "checksums.crc32",
        "frames-00000-of-00004.array_record",
        "frames-00001-of-00004.array_record",
        "frames-00002-of-00004.array_record",
        "frames-00003-of-00004.array_record",
        "index.npz",
        "ledger.jsonl",
        "meta.json",
    ]


def test_the_store_holds_the_frames(reference):
    frames = store.FrameStore(reference)
    video = frames.videos.tolist().index("z.mp4")
    for k, jpeg in enumerate(frames.read(frames.first_record[video] + np.arange(40))):
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (48, 64, 3) and abs(picture.mean() - (10 + 6 * k)) < 3
    assert frames.fps.tolist() == [25, 25, 10, 25, 25, 25, 25]
    tall = frames.videos.tolist().index("tall.webm")
    assert (frames.height[tall], frames.width[tall]) == (90, 50)
    assert frames.shots(0).tolist() == [[0, 15], [15, 35]]
    assert frames.shots(6).tolist() == [[0, 40], [40, 70], [70, 120]]
    assert frames.shots(video).tolist() == [[0, 9], [9, 20], [20, 31], [31, 40]]  # grey level 64, 128, 192: other bins


@pytest.mark.parametrize("workers", [2, 5])
def test_same_bytes_for_any_number_of_workers(videos, reference, tmp_path, workers):
    before = set(children(os.getpid()))
    prepare(str(videos), str(tmp_path / "store"), SMALL, workers=workers)
    assert digests(tmp_path / "store") == digests(reference)
    assert set(children(os.getpid())) <= before  # no decoder is left


@pytest.mark.parametrize("steps", [(2, 3), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_same_bytes_when_killed_again_and_again(videos, reference, tmp_path, steps):
    out = tmp_path / "store"
    flags = f"--videos={videos}", f"--out={out}", "--workers=2", "--videos_per_shard=3"
    rng, kills = random.Random(0), 0
    while True:
        process = start_module("input_pipeline.prepare", *flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = files_done(out) + rng.choice(steps)
        while process.poll() is None and files_done(out) < until:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        servers = children(process.pid)
        process.kill()
        process.wait()
        kills += 1
        assert gone(servers)  # no decoder outlives its preparation
    assert kills >= 1  # more, as a rule; on a fast machine the second start may finish before it is killed
    assert digests(out) == digests(reference)


def files_done(out):
    """Input files of an unfinished preparation whose rows are written."""
    names = []
    with contextlib.suppress(FileNotFoundError):  # its folder goes away at the end
        names = [name for name in os.listdir(out / store.PARTIAL) if name.endswith(".json")]
    packed = [int(name[5:10]) for name in names if name.startswith("rows-")]
    single = [int(name[:8]) for name in names if name[0].isdigit() and int(name[:8]) // 3 not in packed]
    return len(single) + sum(min(3, 10 - 3 * shard) for shard in packed)


def gone(pids):
    deadline = time.monotonic() + 10
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)


def test_full_disk_keeps_what_is_done(videos, reference, tmp_path):
    out = tmp_path / "store"
    largest = max(path.stat().st_size for path in reference.iterdir())
    flags = f"--videos={videos}", f"--out={out}", "--videos_per_shard=3", "--workers=1"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1))

    run = run_prepare(*flags, preexec_fn=limit)  # the largest shard, the last one, cannot be written
    assert_one_line_error(run, f"cannot write to {out}")
    assert "File too large" in run.stderr and "what is done is kept" in run.stderr
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert kept
    assert run_prepare(*flags).returncode == 0
    assert digests(out) == digests(reference)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())  # not made again


def test_what_is_unusual_is_noted(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    write_video(source / "usual.mp4", numbered(20))
    write_video(source / "pause.mp4", numbered(20), times_ms=[40 * k + 5000 * (k > 9) for k in range(20)])
    write_video(source / "large.mp4", numbered(5, 720, 1280), pix_fmt="yuv420p")
    parts = [write_video(tmp_path / f"{name}.ts", numbered(20)).read_bytes() for name in "ab"]
    (source / "joined.ts").write_bytes(b"".join(parts))
    run = run_prepare(f"--videos={source}", f"--out={tmp_path / 'store'}", "--untagged_matrix=bt709")
    assert run.returncode == 0, run.stderr
    for line in (
        "1 noted: variable rate (such as pause.mp4)",
        "1 noted: untagged colours (such as large.mp4)",
        "1 noted: joined recordings (such as joined.ts)",
        f"why each file was refused or noted: {tmp_path / 'store' / store.LEDGER}",
    ):
        assert line in run.stdout
    notes = {row["input"]: row.get("notes") for row in ledger(tmp_path / "store")}
    assert notes["usual.mp4"] is None and notes["large.mp4"] == ["untagged colours: 1280 x 720, read as BT.709"]
    assert "pictures stand up to 5.0 s" in notes["pause.mp4"][0]
    assert store.FrameStore(tmp_path / "store").meta["settings"]["untagged_matrix"] == "bt709"
    run = run_prepare(f"--videos={source}", f"--out={tmp_path / 'store'}")
    assert_one_line_error(run, "was begun with untagged_matrix=bt709, this run has untagged_matrix=bt601")


def test_a_store_from_before_a_setting_is_complete(videos, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "store")
    meta = json.loads((reference / store.META).read_text())
    del meta["settings"]["untagged_matrix"]
    meta["id"] = store.identity_of(meta)
    (tmp_path / "store" / store.META).write_text(json.dumps(meta))
    assert not prepare(str(videos), str(tmp_path / "store"), SMALL)
    with pytest.raises(DataError, match="was begun with untagged_matrix=bt601, this run has untagged_matrix=bt709"):
        prepare(str(videos), str(tmp_path / "store"), dataclasses.replace(SMALL, untagged_matrix="bt709"))


def decoders_of(server: int, path: pathlib.Path) -> list[int]:
    """The decoding processes of a decoder server that have a file open."""
    found = []
    with contextlib.suppress(OSError):
        for child in children(server):
            with contextlib.suppress(OSError):
                names = [os.readlink(f"/proc/{child}/fd/{fd}") for fd in os.listdir(f"/proc/{child}/fd")]
                found += [child] * (str(path) in names)
    return found


@contextlib.contextmanager
def attack(process: subprocess.Popen, path: pathlib.Path, what: int, times: int):
    """Sends a signal to the first decoders of a file; yields the list of processes that got it."""
    hit, over = [], threading.Event()

    def watch():
        while not over.is_set() and len(hit) < times:
            for server in children(process.pid) if process.poll() is None else []:
                for child in set(decoders_of(server, path)) - set(hit):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, what)
                        hit.append(child)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield hit
    over.set()
    watcher.join()


@pytest.fixture(scope="module")
def many(videos, tmp_path_factory):
    """Eight videos; the last takes a while to decode."""
    folder = tmp_path_factory.mktemp("many")
    for k in range(7):
        shutil.copy(videos / "z.mp4", folder / f"{k}.mp4")
    short = write_video(folder / "short.mp4", numbered(8, 720, 1280), pix_fmt="yuv420p", gop=1)
    loop_video(folder / "victim.mp4", short, 60)
    short.unlink()
    return folder


@pytest.fixture(scope="module")
def undisturbed(many, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    assert prepare(str(many), str(out), SMALL, workers=2)
    return out


def prepare_under_attack(source, out, what, times, *more):
    """(what it printed, its errors) of a preparation that ends well, though decoders of one video get a signal."""
    flags = f"--videos={source}", f"--out={out}", "--workers=2", "--videos_per_shard=3", *more
    process = start_module("input_pipeline.prepare", *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with attack(process, source / "victim.mp4", what, times) as hit:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and len(hit) == times, errors
    return output, errors


@pytest.mark.parametrize("what, times", [(signal.SIGKILL, 2), (signal.SIGSEGV, 1)])
def test_a_decoder_killed_from_outside_is_tried_again_in_the_same_run(many, undisturbed, tmp_path, what, times):
    """As the system does when memory runs out; a crash may be of a moment too."""
    prepare_under_attack(many, tmp_path / "store", what, times)
    assert digests(tmp_path / "store") == digests(undisturbed)


@pytest.mark.slow
def test_a_decoder_that_stands_still_is_tried_again(many, undisturbed, tmp_path):
    """As on a machine too busy to run it: the wall time passes, the CPU time does not."""
    output, _ = prepare_under_attack(many, tmp_path / "store", signal.SIGSTOP, 1, "--wall_s=8")
    assert "8 ok" in output
    a, b = ({n: d for n, d in digests(out).items() if n != store.META} for out in (tmp_path / "store", undisturbed))
    assert a == b


@pytest.mark.slow
def test_what_was_killed_at_every_try_is_tried_again_on_request(many, undisturbed, tmp_path):
    out = tmp_path / "store"
    output, _ = prepare_under_attack(many, out, signal.SIGKILL, 3)
    assert "1 refused: killed from outside" in output
    assert "1 of them for another try (such as victim.mp4): give input_pipeline.prepare the same flags and --" in output
    assert [row["status"] for row in ledger(out)] == ["ok"] * 7 + ["refused"] and len(store.FrameStore(out)) == 7
    before = {name: (out / name).stat().st_mtime_ns for name in digests(out)}
    prepare_under_attack(many, out, signal.SIGKILL, 2, "--retry")  # again: the store is left as it is
    assert {name: (out / name).stat().st_mtime_ns for name in digests(out)} == before
    assert not prepare(str(many), str(out), SMALL)
    assert {name: (out / name).stat().st_mtime_ns for name in digests(out)} == before
    assert prepare(str(many), str(out), SMALL, retry=True)
    assert digests(out) == digests(undisturbed)
    changed = {name for name, time in before.items() if (out / name).stat().st_mtime_ns != time}
    assert "frames-00000-of-00003.array_record" not in changed and "frames-00002-of-00003.array_record" in changed
    assert not prepare(str(many), str(out), SMALL, retry=True)


@pytest.fixture(scope="module")
def starved(tmp_path_factory):
    """(videos, store): no file had the time to be decoded, so all are for another try."""
    folder = tmp_path_factory.mktemp("starved")
    (folder / "videos").mkdir()
    write_video(folder / "videos/a.mp4", numbered(5))
    assert prepare(str(folder / "videos"), str(folder / "store"), STARVED, workers=1)
    assert [row.get("retry") for row in ledger(folder / "store")] == [True]
    return folder / "videos", folder / "store"


def test_a_complete_store_is_tried_again_on_request_only(starved):
    """Not a file is made in it otherwise, not even for a moment: evaluations call prepare at every start."""
    source, out = starved
    before, written = digests(out), out.stat().st_mtime_ns
    assert not prepare(str(source), str(out), STARVED) and out.stat().st_mtime_ns == written
    assert not prepare(str(source), str(out), STARVED, retry=True) and out.stat().st_mtime_ns > written
    assert digests(out) == before and not (out / store.PARTIAL).exists()


def test_the_work_of_another_retry_stays(starved, tmp_path):
    source, out = starved[0], tmp_path / "store"
    shutil.copytree(starved[1], out)
    partial = out / store.PARTIAL
    partial.mkdir()
    with steps.locked(str(out), str(partial)):
        (partial / "00000000.jpegs").touch()
        assert not prepare(str(source), str(out), STARVED)
        with pytest.raises(DataError, match="another preparation is writing to"):
            prepare(str(source), str(out), STARVED, retry=True)
        assert sorted(path.name for path in partial.iterdir()) == ["00000000.jpegs", "lock"]
    assert not prepare(str(source), str(out), STARVED) and not partial.exists()


def test_a_retry_is_named_only_where_it_works(starved, tmp_path):
    """With other software it would do nothing."""
    out = tmp_path / "store"
    shutil.copytree(starved[1], out)
    assert "1 of them for another try (such as a.mp4): give input_pipeline.prepare the same" in summary(str(out))
    meta = json.loads((out / store.META).read_text())
    meta["settings"]["software"]["av"] = "1.0"
    assert how_to_retry(str(out), meta) == "prepare it anew, into another --out"


def test_a_crash_at_every_try_is_the_videos_own(many, tmp_path):
    output, _ = prepare_under_attack(many, tmp_path / "store", signal.SIGSEGV, 2)
    assert "1 refused: crashed the decoder, twice" in output and "another try" not in output
    assert ledger(tmp_path / "store")[-1]["reason"] == "crashed the decoder, twice: SIGSEGV"


def test_decoder_servers_that_are_killed(videos, reference, tmp_path):
    """They are started again, and the files they were at are decoded by others."""
    source, out = tmp_path / "many", tmp_path / "store"
    source.mkdir()
    for k in range(40):
        shutil.copy(videos / "ü, 文.ts", source / f"{k:02d}.ts")
    flags = f"--videos={source}", f"--out={out}", "--workers=2", "--videos_per_shard=3"
    process = start_module("input_pipeline.prepare", *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and len(list((out / store.PARTIAL).glob("0*.json"))) < 2:
        time.sleep(0.005)
    for server in children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert [row["status"] for row in ledger(out)] == ["ok"] * 40


# --- damage to what is under way --------------------------------------------------------------------------------------


def damage(path: pathlib.Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[len(data.rstrip(b"\0")) * 2 // 3] ^= 4
    path.write_bytes(b"" if how == "emptied" else data)


@pytest.mark.parametrize("how", ["cut", "flipped", "emptied"])
@pytest.mark.parametrize("which", ["*0.jpegs", "00000000.json", "rows-00002.json", "plan.json", "frames-00003*"])
def test_what_was_damaged_before_a_restart_is_done_again(videos, reference, unfinished, tmp_path, which, how):
    shutil.copytree(unfinished, tmp_path / "store")
    (path,) = [*(tmp_path / "store").glob(which), *(tmp_path / "store" / store.PARTIAL).glob(which)]
    damage(path, how)
    if path.suffix == ".array_record" and how == "flipped":  # its size is right: the checksums of its records tell
        prepare(str(videos), str(tmp_path / "store"), SMALL, workers=1)
        with pytest.raises(DataError, match="is damaged|is not the one"):
            frames = store.FrameStore(tmp_path / "store")
            frames.read(np.arange(frames.first_record[-1] + frames.num_frames[-1]))
        return
    prepare(str(videos), str(tmp_path / "store"), SMALL, workers=1)
    assert digests(tmp_path / "store") == digests(reference)


@pytest.fixture(scope="module")
def unfinished(videos, reference, tmp_path_factory):
    """A preparation killed after its first files: two of the first shard are decoded, the other shards are made."""
    out = tmp_path_factory.mktemp("unfinished") / "store"
    shutil.copytree(reference, out)
    (out / store.PARTIAL).mkdir()
    plan = steps.make_plan(str(videos), str(out), SMALL, labels="", labelled_only=False)
    reopen(out, out / store.PARTIAL, plan, [2])
    (out / store.PARTIAL / "00000002.json").unlink()
    (out / store.PARTIAL / "00000001.json").unlink()
    (out / store.PARTIAL / "00000001.jpegs").unlink()
    (out / store.PARTIAL / "00000002.jpegs").unlink()
    for name in (store.INDEX, store.LEDGER, store.CHECKSUMS, store.shard_name(0, 4)):
        (out / name).unlink()
    return out


@pytest.mark.parametrize("change", [lambda t: t[:-20], lambda t: t.replace(b"true", b"false"), lambda t: b"[]\n"])
def test_a_changed_ledger_of_a_complete_store_is_one_line(videos, reference, tmp_path, change):
    shutil.copytree(reference, tmp_path / "store")
    path = tmp_path / "store" / store.LEDGER
    path.write_bytes(change(path.read_bytes().replace(b'"shots": 2', b'"shots": true')))
    run = run_prepare(f"--videos={videos}", f"--out={tmp_path / 'store'}", "--videos_per_shard=3")
    assert_one_line_error(run, f"{path} was cut or changed since it was written; training does not need it")
    store.FrameStore(tmp_path / "store")


# --- what a file may cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit, reason",
    [
        (dict(max_frames=100), "too many frames: more than 100 (--max_frames)"),
        (dict(max_expansion=2.0), "too large when decoded: more than"),
        (dict(max_mb=1, short_side=720), "too large when decoded: more than 1,048,576 bytes"),
    ],
)
def test_a_small_file_does_not_become_a_large_one(tmp_path, monkeypatch, limit, reason):
    """A picture that stands for two minutes by its time stamp is 3,000 equal frames."""
    monkeypatch.setattr(steps, "_FREE_BYTES", 100_000)
    (tmp_path / "videos").mkdir()
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (14, 240, 320, 3), np.uint8)
    write_video(tmp_path / "videos/pause.mkv", pictures, times_ms=[*range(0, 520, 40), 120_000])
    write_video(tmp_path / "videos/usual.mp4", numbered(20))
    prepare(str(tmp_path / "videos"), str(tmp_path / "store"), dataclasses.replace(SMALL, **limit), workers=1)
    pause, usual = ledger(tmp_path / "store")
    assert pause["status"] == "refused" and pause["reason"].startswith(reason) and usual["status"] == "ok"
    assert sum(path.stat().st_size for path in (tmp_path / "store").iterdir()) < 500_000


# --- again, or otherwise ----------------------------------------------------------------------------------------------


def test_complete_store_is_left_alone(videos, reference):
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    assert not prepare(str(videos), str(reference), SMALL)
    assert {path: path.stat().st_mtime_ns for path in reference.iterdir()} == before
    with pytest.raises(DataError, match="was begun with fps=25.0, this run has fps=12.0"):
        prepare(str(videos), str(reference), Settings(videos_per_shard=3, fps=12.0))
    with pytest.raises(DataError, match="was begun with labels=, this run has labels="):
        prepare(str(videos), str(reference), SMALL, labels="folder")


@pytest.mark.parametrize("complete", [True, False])
def test_changed_inputs_are_noticed(tmp_path, complete):
    source, out = tmp_path / "videos", tmp_path / "store"
    source.mkdir()
    for name in "abc":
        write_video(source / f"{name}.mp4", numbered(5))
    prepare(str(source), str(out), SMALL)
    if not complete:  # as if killed before the last step
        (out / store.META).unlink()
        (out / store.PARTIAL).mkdir()
        files = [[file.name, file.bytes] for file in inputs.find(str(source), str(out))]
        plan = {
            "settings": dataclasses.asdict(SMALL) | {"labels": ""},
            "software": steps.software(),
            "inputs": files,
        }
        (out / store.PARTIAL / "plan.json").write_bytes(steps.sealed(plan))
    (source / "a.mp4").unlink()
    write_video(source / "b.mp4", numbered(9))
    write_video(source / "d.mp4", numbered(5))
    with pytest.raises(DataError, match=r"1 new, 1 gone, 1 of another size \(such as d.mp4\)"):
        prepare(str(source), str(out), SMALL)


def test_foreign_directory_is_not_written_to(videos, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="neither empty nor a frame store"):
        prepare(str(videos), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_at_once(videos, tmp_path):
    (tmp_path / store.PARTIAL).mkdir()
    with open(tmp_path / store.PARTIAL / "lock", "w") as lock:  # as the other preparation holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another preparation is writing"):
            prepare(str(videos), str(tmp_path))


def test_ctrl_c(videos, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    video = max(videos.iterdir(), key=lambda path: path.stat().st_size)
    for copy in range(100):  # enough work that it cannot be over before the signal
        shutil.copy(video, many / f"{copy}{video.suffix}")
    process = start_module(
        "input_pipeline.prepare",
        f"--videos={many}",
        "--workers=1",
        f"--out={tmp_path / 'store'}",
        stderr=subprocess.PIPE,
        # A shell's background jobs, and all they start, ignore Ctrl-C otherwise.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not (tmp_path / "store" / store.PARTIAL / "plan.json").exists():
        time.sleep(0.01)
    servers = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "interrupted; run the same command again" in errors
    assert "Traceback" not in errors and gone(servers)


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_find_inputs(videos, tmp_path, monkeypatch):
    def names(pattern, out="/nowhere"):
        return [file.name for file in inputs.find(str(pattern), str(out))]

    everything = names(videos)
    assert len(everything) == 10 and names(videos / "**/*") == everything
    assert names(videos / "*.mp4") == ["empty.mp4", "z.mp4"]
    assert names(videos / "*/a.mp4") == ["cats/a.mp4", "dogs/a.mp4"] and names(videos / "z.mp4") == ["z.mp4"]
    assert names(videos / "c*") == ["cats/a.mp4", "cats/b.mkv"]  # a folder that matches is searched
    assert names(videos, videos / "cats") == [name for name in everything if not name.startswith("cats/")]
    assert names(videos / "**/*", videos / "cats") == names(videos, videos / "cats")
    monkeypatch.chdir(videos)
    assert names("*.mp4") == ["empty.mp4", "z.mp4"] and names(".") == everything
    (tmp_path / "link").symlink_to(videos)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.mp4").symlink_to(tmp_path / "none")
    assert names(tmp_path) == ["broken.mp4", *(f"link/{name}" for name in everything)]


def test_odd_names_and_files_that_are_no_files(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    write_video(source / "good.mp4", numbered(3))
    os.rename(write_video(source / "x.mp4", numbered(3)), os.fsencode(source) + b"/\xff.mp4")
    (source / "broken.mp4").symlink_to(source / "none")
    os.mkfifo(source / "pipe.mp4")
    prepare(str(source), str(tmp_path / "store"), SMALL)
    assert [(row["status"], row["reason"][:30]) for row in ledger(tmp_path / "store")] == [
        ("refused", "unreadable: No such file or di"),
        ("ok", ""),
        ("refused", "empty file"),
        ("ok", ""),
    ]
    names = store.FrameStore(tmp_path / "store").videos.tolist()
    assert [os.fsencode(name) for name in names] == [b"good.mp4", b"\xff.mp4"]


def labelled(videos, tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return inputs.read_labels(str(path), [file.name for file in inputs.find(str(videos), "")])


def test_labels_reach_the_index(videos, tmp_path, capsys):
    path = tmp_path / "labels.csv"
    path.write_text("video,label\nz.mp4,zebra\ncats/a.mp4,cat\ndogs/a.mp4,dog\nb.mkv,cat\ngone.mp4,cat\n")
    prepare(str(videos / "**/*.m*"), str(tmp_path / "store"), SMALL, labels=str(path))
    frames = store.FrameStore(tmp_path / "store")
    assert frames.class_names == ["cat", "dog", "zebra"]
    assert dict(zip(frames.videos.tolist(), frames.label.tolist(), strict=True)) == {
        "cats/a.mp4": 0,
        "cats/b.mkv": 0,
        "dogs/a.mp4": 1,
        "z.mp4": 2,
    }
    printed = capsys.readouterr().out
    assert "4 of 6 files have one of 3 classes, 2 have none" in printed
    assert "1 of 5 lines" in printed and "gone.mp4" in printed


def test_only_the_videos_of_a_list_are_used(tmp_path, capsys):
    """A data set as UCF-101 is laid out: pretraining on its first split takes no test video."""
    videos, out = tmp_path / "UCF101", tmp_path / "store"
    train, test = ["a/v_a_g08_c01.avi", "a/v_a_g09_c01.avi", "b/v_b_g08_c01.avi"], ["a/v_a_g01_c01.avi"]
    for v, name in enumerate(train + test):
        (videos / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(videos / "videos" / name, numbered(3 + v), codec="mjpeg", pix_fmt="yuvj420p")
    (videos / "lists").mkdir()
    (videos / "lists/trainlist01.txt").write_text("".join(f"{name} 1\r\n" for name in [*train, "b/v_gone.avi"]))
    (videos / "lists/testlist01.txt").write_text("".join(f"{name}\n" for name in test))
    run = run_prepare(f"--videos={videos}", f"--out={out}", f"--only={videos}/lists/trainlist01.txt")
    assert run.returncode == 0, run.stderr
    assert store.FrameStore(out).videos.tolist() == [f"videos/{name}" for name in train]
    assert "only: 3 of 6 files are named in" in run.stdout
    assert "only: 1 of its 4 lines name no input file (such as b/v_gone.avi)" in run.stdout
    with pytest.raises(DataError, match="3 gone"):  # resumed without the list it would take other files
        prepare(str(videos), str(out), Settings(), only=str(videos / "lists/testlist01.txt"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("x/1.avi\n", ["v/x/1.avi"]),
        ("./x/1.avi 12\n", ["v/x/1.avi"]),
        ("v/x/1.avi\ny/2.mp4 2\n\n", ["v/x/1.avi", "v/y/2.mp4"]),
        ("Y/2.AVI 2\n", ["v/y/2.mp4"]),
        ("y/a b.mp4\n", ["v/y/a b.mp4"]),
        ("y/a b.mp4 7\n", ["v/y/a b.mp4"]),
        ("\ufeff2.mp4\n", ["v/y/2.mp4"]),
        ("1.avi\n", "1.avi may be v/x/1.avi or v/y/1.avi; write more of its path"),
        ("z/9.avi 1\n", "none of its 1 lines names an input file; names are like v/x/1.avi"),
        ("", "list.txt is empty"),
    ],
)
def test_lines_of_a_list_name_inputs_by_the_end_of_their_path(tmp_path, text, expected):
    found = [inputs.Input(name, f"/{name}", 1) for name in ("v/x/1.avi", "v/y/1.avi", "v/y/2.mp4", "v/y/a b.mp4")]
    (tmp_path / "list.txt").write_text(text)
    if isinstance(expected, list):
        assert [file.name for file in inputs.take_listed(found, str(tmp_path / "list.txt"))] == expected
    else:
        with pytest.raises(DataError, match=expected):
            inputs.take_listed(found, str(tmp_path / "list.txt"))


def test_labels_by_folder(videos):
    names = ["cats/a.mp4", "x/cats/b.mp4", "dogs/c.mp4", "top.mp4"]
    assert inputs.read_labels("folder", names)[:2] == ([0, 0, 1, -1], ["cats", "dogs"])
    assert inputs.read_labels("", names) == ([-1] * 4, [])


def test_what_systems_leave_behind_is_no_input(videos, tmp_path):
    expected = [file.name for file in inputs.find(str(videos), "")]
    shutil.copytree(videos, tmp_path / "videos")
    for folder in (tmp_path / "videos", tmp_path / "videos" / "cats"):
        for name in LITTER:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
    for pattern in ("", "/**/*", "/*", "/[!q]*"):
        assert [file.name for file in inputs.find(f"{tmp_path}/videos{pattern}", "")] == expected


@pytest.mark.parametrize("encoding, form", [("utf-8-sig", "NFD"), ("utf-16", "NFC"), ("utf-8", "NFD")])
def test_labels_of_any_system_reach_their_files(tmp_path, encoding, form):
    names = [unicodedata.normalize("NFC", name) for name in ("é/vidéo.mp4", "é/b c.mp4", "z.mp4")]
    lines = ["video , label", "vidéo.mp4,chien ", "", " é/b c.mp4,chat", "  ,", "z.mp4,chat"]
    path = tmp_path / "labels.csv"
    path.write_bytes(unicodedata.normalize(form, "\r\n".join(lines)).encode(encoding))
    assert inputs.read_labels(str(path), names)[:2] == ([1, 0, 0], ["chat", "chien"])
    assert inputs.read_labels("folder", names)[:2] == ([0, 0, -1], ["é"])


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "clip,label\nz.mp4,x\n",
            r"line 1 does not fit \('clip,label'\); known forms of lists: CSV with columns video,",
        ),
        ("", "labels.csv is empty"),
        ("video,label\na.mp4,x\n", "line 2: a.mp4 may be cats/a.mp4 or dogs/a.mp4; write more of its path"),
        ("video,label\nz.mp4,x\nz.mp4,y\n", "z.mp4 has two labels, x and y"),
        ("video,label\nz.mp4,\ncats/a.mp4,x\n", "z.mp4 has an empty label"),
        ("video,label\nq.mp4,x\n", "none of its 1 lines names"),
    ],
)
def test_bad_labels(videos, tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        labelled(videos, tmp_path, text)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_line(videos, reference, tmp_path):
    run = run_prepare(f"--videos={videos}", f"--out={tmp_path / 'store'}", "--videos_per_shard=3", "--contact_sheet")
    assert run.returncode == 0
    for line in ("10 inputs", "7 ok", "1 refused: empty file", "282 frames, 13 s of video", "16 shots"):
        assert line in run.stdout
    sheet = np.asarray(Image.open(tmp_path / "store/contact_sheet.png"))
    assert sheet.shape[1] == 1680 and sheet.shape[0] > 7 * 100 and 100 < sheet.mean() < 254
    (tmp_path / "store/contact_sheet.png").unlink()
    assert digests(tmp_path / "store") == digests(reference)
    again = run_prepare(f"--videos={videos}", f"--out={tmp_path / 'store'}", "--videos_per_shard=3")
    assert again.returncode == 0 and "was complete already; nothing to do" in again.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--videos={tmp}/none"], "no such directory: {tmp}/none"),
        (["--videos={tmp}/hollow"], "no files in {tmp}/hollow"),
        (["--videos={tmp}/texts"], "holds no video: none of the files could be used"),
        (["--videos={tmp}/texts", "--fps=nan"], "fps=nan: give a positive number"),
        (["--videos={tmp}/texts", "--fps=0"], "fps=0.0: give a positive number"),
        (["--videos={tmp}/texts", "more"], "unexpected argument more"),
    ],
)
def test_one_clear_line(tmp_path, flags, message):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.mp4").write_text("no video")
    run = run_prepare(*(flag.format(tmp=tmp_path) for flag in flags), f"--out={tmp_path / 'store'}")
    assert_one_line_error(run, message.format(tmp=tmp_path))


@pytest.mark.slow
def test_sample_videos(sample_data, tmp_path):
    source = sample_data / "videos"
    prepare(str(source), str(tmp_path / "store"))
    rows = {row["input"]: row["status"] for row in ledger(tmp_path / "store")}
    assert set(rows) == {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {name for name, status in rows.items() if status == "refused"} == {"shots.json", "codec/corrupted.mp4"}
