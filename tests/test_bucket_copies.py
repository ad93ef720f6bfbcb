"""Copies of folders in buckets, and what commands read and write there: as local ones, and every failure is one line.

Against real servers of gs:// and s3:// on this machine, behind a proxy that injects faults.
"""

import argparse
import hashlib
import importlib.util
import io
import os
import pathlib
import shutil

import numpy as np
import pytest

from benchmarks.faults import buckets
from evaluation import attention, davis, report
from evaluation.all.__main__ import main as all_main
from helpers.frame_stores import jpeg, write_store
from helpers.runs import make_run
from input_pipeline import images
from vivi_jax import checkpoint, command_line
from vivi_jax.buckets import client, local
from vivi_jax.checkpoint.__main__ import main as checkpoint_main
from vivi_jax.errors import DataError
from vivi_jax.export import initial
from vivi_jax.export.__main__ import main as export_main

SERVERS = all(importlib.util.find_spec(name) for name in ("moto", "flask_cors", "gcp_storage_emulator"))


@pytest.fixture(scope="module", params=client.SCHEMES)
def server(request):
    if not SERVERS:
        pytest.skip("servers")
    with pytest.MonkeyPatch.context() as patch, buckets.serving(request.param) as proxy:
        for name, value in buckets.environment(proxy.scheme, proxy.url).items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture(autouse=True)
def _clean(request, tmp_path, monkeypatch):
    """A cache of each test's own, few and quick tries, and no faults left behind."""
    monkeypatch.setenv("VIVI_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "TRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"})
    if "server" in request.fixturenames:
        request.getfixturevalue("server").fault = lambda method, path: None


def upload(server, folder: pathlib.Path, name: str) -> str:
    """All files below a folder, as BUCKET/NAME/...; returns the address."""
    for path in sorted(filter(pathlib.Path.is_file, folder.rglob("*"))):
        buckets.put(server, f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"{server.scheme}://{buckets.BUCKET}/{name}"


def content(folder: pathlib.Path | str) -> dict[str, bytes]:
    folder = pathlib.Path(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> pathlib.Path:
    """Twelve images of two classes, without train/ and test/."""
    root, rng = tmp_path_factory.mktemp("local") / "classes", np.random.default_rng(0)
    for name in ("a b", "c#%"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            (root / name / f"{i}.jpg").write_bytes(jpeg(rng.integers(0, 256, (24, 32, 3), np.uint8)))
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", "demo")


# ---- Copies ---------------------------------------------------------------------------------------------------------


def test_a_copy_is_what_is_there_now_and_only_what_changed_is_read(server, classes):
    address, expected = upload(server, classes, "copied"), content(classes)
    client.Folder(address).write("empty/", b"-")  # as consoles mark folders
    here = pathlib.Path(local.copied(address))
    assert content(here) == expected and here.name == "copied" and local.copied(f"{address}/") == str(here)
    times = {path: path.stat().st_mtime_ns for path in here.rglob("*.jpg")}

    (here / "a b/0.jpg").write_bytes(b"damaged here")
    (here / "a b/1.jpg").unlink()
    client.Folder(address).write("a b/2.jpg", b"another there")
    client.Folder(address).remove("a b/3.jpg")
    expected |= {"a b/2.jpg": b"another there"}
    del expected["a b/3.jpg"]
    assert content(local.copied(address)) == expected
    again = {path for path, time in times.items() if not path.exists() or path.stat().st_mtime_ns != time}
    assert {path.relative_to(here).as_posix() for path in again} == {f"a b/{i}.jpg" for i in range(4)}

    for damaged in ("[]", '{"a b/0.jpg": 3}', "{"):  # its notes: all is read again
        (notes,) = (here.parents[2] / ".notes").glob("*.json")
        notes.write_text(damaged)
        assert content(local.copied(address)) == expected


def test_a_file_alone_and_what_is_not_there(server):
    buckets.put(server, "alone/x.npz", b"npz")
    there = f"{server.scheme}://{buckets.BUCKET}"
    assert pathlib.Path(local.copied(f"{there}/alone/x.npz")).read_bytes() == b"npz"
    assert local.copied("some/folder") == "some/folder"
    for missing in ("nothing", "alone/y.npz"):
        with pytest.raises(DataError, match=f"there is no {there}/{missing}; check the names"):
            local.copied(f"{there}/{missing}")
    client.Folder(f"{there}/alone").remove("x.npz")
    with pytest.raises(DataError, match=f"there is no {there}/alone/x.npz; check the names"):
        local.copied(f"{there}/alone/x.npz")


def test_a_copy_that_is_cut_off_goes_on(server, classes):
    address, asked = upload(server, classes, "cut"), []

    def break_down(method, path):
        asked.append(path)
        return buckets.Fault(status=503) if "c#%/5" in path else None

    server.fault = break_down
    with pytest.raises(DataError, match=r"cannot read .*c#%/5.jpg: 503 .* at each of 3 tries .*it goes on"):
        local.copied(address)
    server.fault = lambda method, path: None
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(os.environ["VIVI_JAX_CACHE"]).rglob("*.jpg")}
    assert content(local.copied(address)) == content(classes)
    assert before and all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("server", ["gs"], indirect=True)  # this knows no schemes
def test_names_that_lead_out_and_disks_without_room(server, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="names must not lead out of their folder"):
        local._bring(client.Folder("gs://films/out"), tmp_path / "here", ["a/../../up"], tmp_path / "notes")
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIVI_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot keep a copy of gs://films/out .*set VIVI_JAX_CACHE"):
        local.copied("gs://films/out")


def test_what_is_written_goes_there_whole_or_not_at_all(server):
    there = f"{server.scheme}://{buckets.BUCKET}/outs"
    with local.written(f"{there}/folder") as out:
        (pathlib.Path(out) / "deeper").mkdir(parents=True)
        (pathlib.Path(out) / "deeper" / "x").write_bytes(b"1")
        (pathlib.Path(out) / "y").write_bytes(b"2")
    with pytest.raises(ZeroDivisionError), local.written(f"{there}/file") as out:
        pathlib.Path(out).write_bytes(b"half")
        _ = 1 / 0
    folder = client.Folder(there)
    assert folder.names() == {"folder/deeper/x", "folder/y"} and folder.read("folder/deeper/x") == b"1"
    begun = []
    with pytest.raises(DataError, match="no-such-bucket"), local.written(f"{server.scheme}://no-such-bucket/x") as out:
        begun.append(out)
    assert not begun


# ---- Data -----------------------------------------------------------------------------------------------------------


def test_class_folders_in_a_bucket_are_the_local_ones(server, classes, tmp_path):
    def shown(source: str, split: str):
        found = images.load_labelled(source, split)
        return found.labels.tolist(), found.class_names, [found.read(i) for i in range(len(found))]

    address = upload(server, classes, "classes")
    assert shown(address, "train") == shown(str(classes), "train")
    assert shown(address, "test") == shown(str(classes), "test")
    shutil.copytree(classes, tmp_path / "parts" / "train")
    shutil.copytree(classes / "a b", tmp_path / "parts" / "val" / "a b")
    address = upload(server, tmp_path / "parts", "parts")
    for split in ("train", "test"):
        assert shown(address, split) == shown(str(tmp_path / "parts"), split)
    with pytest.raises(DataError, match=f"no images in .*/data/{server.scheme}/films/parts/val/a b: it must be"):
        images.load_labelled(f"{address}/val/a b", "train")


def test_pictures_of_attention_take_folders_and_stores_there(server, classes, tmp_path):
    rng = np.random.default_rng(0)
    videos = [{"frames": 8, "fps": 2.0, "height": 24, "width": 32, "label": 0}]
    frames = [jpeg(rng.integers(0, 256, (24, 32, 3), np.uint8)) for _ in range(8)]
    write_store(tmp_path / "store", videos, frames, class_names=("a",))
    for folder in (classes, tmp_path / "store"):
        address = upload(server, folder, f"attention-{folder.name}")
        there, here = (attention.load_images(source, count=2, size=16)[0] for source in (address, str(folder)))
        np.testing.assert_array_equal(there, here)


def test_options_that_are_copied(server, classes):
    """A command with such an option gets a local path; a scheme that is no bucket's, or nothing there, is one line."""
    address, seen = upload(server, classes, "options"), []
    parser = command_line.Parser("a.command", "")
    parser.add_argument("--data")

    def command(data: str) -> None:
        command_line.run_parser(lambda options: seen.append(options.data), parser, [f"--data={data}"], copied=["data"])

    command(address)
    command("local")
    assert content(seen[0]) == content(classes) and seen[1] == "local"
    with pytest.raises(SystemExit, match="error: --data=hdfs://h/x: this command reads and writes local files only"):
        command("hdfs://h/x")
    with pytest.raises(SystemExit, match=f"error: there is no {server.scheme}://films/nothing; check the names"):
        davis.main([f"--data={server.scheme}://films/nothing", "--results=.", "--workdir=unused"])
    assert not pathlib.Path("unused").exists()


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("server", ["s3"], indirect=True)  # of gs:// runs are read in test_runs_in_buckets.py
def test_commands_about_a_run_there(server, run, tmp_path, capsys):
    """verify, report and export, and weights to start from."""
    address = upload(server, run, "run")
    checkpoint_main(["verify", address])
    assert capsys.readouterr().out == f"{address}/checkpoints/7: good\n"

    report.report(argparse.Namespace(checkpoint=address))
    assert capsys.readouterr().out == f"wrote {address}/report.html\n"
    page = client.Folder(address).read("report.html").decode()
    assert f"{address}, step 0 (not finished)" in page and "Left out" in page

    for out in (f"{server.scheme}://films/exports/e.npz", str(tmp_path / "e.npz")):
        export_main([f"--checkpoint={address}", "--format=npz", f"--out={out}"])
        assert f"wrote {out} and {out}.sha256" in capsys.readouterr().out
    exports = client.Folder(f"{server.scheme}://films/exports")
    assert exports.names() == {"e.npz", "e.npz.sha256"}
    assert exports.read("e.npz.sha256").decode() == f"{hashlib.sha256(exports.read('e.npz')).hexdigest()}  e.npz\n"
    there, here = np.load(io.BytesIO(exports.read("e.npz"))), np.load(tmp_path / "e.npz")
    assert str(there["sha256"]) == str(here["sha256"]) and set(there) == set(here)

    (there, step), (here, _) = (
        (parts, step) for _, parts, step in (initial.read(r, "vito") for r in (address, str(run)))
    )
    assert step == 7 and checkpoint.state_sha256(there) == checkpoint.state_sha256(here) and len(there) > 1
    with pytest.raises(DataError, match=f"there is no {server.scheme}://films/none; check the names"):
        initial.read(f"{server.scheme}://films/none", "vito")

    (tmp_path / "data").mkdir()
    everything = [f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}", f"--checkpoint={address}"]
    with pytest.raises(SystemExit, match=f"error: nothing to do with {tmp_path / 'data'}: .*not found: looked for"):
        all_main(everything)
    with pytest.raises(SystemExit, match="error: --data=s3://films/x: this command reads and writes local files only"):
        all_main([*everything, "--data=s3://films/x"])

    damaged = client.Folder(f"{address}/checkpoints/7")
    largest = max(damaged.names(), key=lambda name: len(damaged.read(name)))
    data = bytearray(damaged.read(largest))
    data[len(data) // 2] ^= 4
    damaged.write(largest, bytes(data))
    with pytest.raises(SystemExit):
        checkpoint_main(["verify", address])
    assert f"{address}/checkpoints/7: the content of {largest} has changed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"no checkpoint in {address}-none/checkpoints: is .* a run directory"):
        checkpoint_main(["verify", f"{address}-none"])
