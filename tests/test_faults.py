"""The battery of benchmarks/faults: a row of each kind goes well, and its ways of counting find what is wrong."""

import json
import random
import subprocess
import sys
import textwrap

import pytest

from benchmarks import tables
from benchmarks.faults import __main__ as faults
from benchmarks.faults import damage
from benchmarks.faults.__main__ import ROWS, rows_named
from helpers.commands import ROOT, one_device
from vivi_jax.errors import CheckpointError

# A kill, a kill inside a save, damage, videos, two jobs, an earlier version; all of --quick take longer. Signals are in
# test_resume.py.
OF_EACH_KIND = "R1 vito,R1 vivi,R2 vito,R11,R12 exports,R12 stores,R15,R16,R20,R24,R26"


@pytest.mark.slow
def test_a_row_of_each_kind_goes_well_and_keeps_its_figures(tmp_path):
    command = [sys.executable, "-m", "benchmarks.faults", f"--only={OF_EACH_KIND}", f"--out={tmp_path / 'faults'}"]
    battery = subprocess.run(command, cwd=ROOT, env=one_device(), capture_output=True, text=True, timeout=1800)
    assert battery.returncode == 0, battery.stdout + battery.stderr
    rows = json.loads((tmp_path / "faults" / "reliability.json").read_text())["values"]["rows"]
    assert list(rows) == OF_EACH_KIND.split(",") and not any(row["wrong"] for row in rows.values())
    assert rows["R1 vito"]["faults"] == 2 and rows["R20"]["damages"] == 9 and rows["R15"]["files"] == 300
    assert sum(rows["R15"]["outcomes"].values()) == 300


def test_every_kind_of_damage_changes_a_file_and_is_put_back(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.bin").write_bytes(random.Random(name).randbytes(5000))
    files = sorted(tmp_path.iterdir())
    before = [path.read_bytes() for path in files]

    def now() -> list[bytes]:
        return [path.read_bytes() for path in files if path.exists()]

    for kind in set(damage.KINDS):
        with damage.damaged(files, kind, random.Random(1)):
            assert now() != before, kind
        assert now() == before, kind


def test_a_reader_that_does_not_look_is_found_out(tmp_path):
    path = tmp_path / "numbers.bin"
    path.write_bytes(bytes(range(256)))

    def careless() -> str:
        return path.read_bytes().hex() if path.exists() else ""

    def careful() -> str:
        if careless() != bytes(range(256)).hex():
            raise CheckpointError("damaged")
        return careless()

    right = {bytes(range(256)).hex(): "no difference"}
    assert len(damage.judge(20, [path], careless, right)["wrong"]) > 15  # a file alone has nothing to swap with
    found = damage.judge(20, [path], careful, right)
    assert not found["wrong"] and found["noticed"] + found["no difference"] == 20


@pytest.mark.slow
def test_rows_side_by_side_each_in_an_empty_folder_and_one_that_dies_is_wrong(tmp_path):
    code = """
        import json, pathlib, sys
        from benchmarks.faults.__main__ import side_by_side
        def good(own):
            assert not list(own.iterdir())
            (own / "left").touch()
            return {"cases": 1, "wrong": []}
        def bad(own):
            raise RuntimeError("no answer")
        rows = {"R1 vito": good, "R2": bad, "R3": lambda own: {"wrong": ["x"]}}
        print(json.dumps([dict(side_by_side(rows, pathlib.Path(sys.argv[1]))) for _ in range(2)]))
    """  # the battery forks, which the tests' own process, with threads of JAX, must not
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=one_device(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        assert found.keys() == {"R1 vito", "R2", "R3"} and found["R1 vito"]["wrong"] == []
        assert "the row ended with 1" in found["R2"]["wrong"][0] and "no answer" in found["R2"]["wrong"][0]
        assert found["R3"]["wrong"] == ["x"]
    assert not (tmp_path / "R1-vito").exists() and (tmp_path / "R3").exists()  # whose logs may say why


def test_what_this_commit_has_measured_is_left_out():
    row = {"commit": "abc", "size": "--full", "wrong": []}
    assert faults.measured(row, "abc", "--full")
    assert not faults.measured({}, "abc", "--full") and not faults.measured(row | {"wrong": ["x"]}, "abc", "--full")
    assert not faults.measured(row, "abc", "--quick") and not faults.measured(row, "def", "--full")
    assert not faults.measured(row | {"commit": "abc+dirty"}, "abc+dirty", "--full")  # it may have changed since


def test_the_page_says_of_every_row_whether_it_is_measured():
    row = {"what": "", "size": "--full", "commit": "abcdef012", "date": "2026-01-02", "seconds": 3, "wrong": []}
    hostile = {"files": 7, "children_peak_mb": 70.2, "limit_mb": 1024, "decoder crashes, contained": 0}
    rows = {"R1 vito": row | {"faults": 1234}, "R11": row | {"damages": 5, "wrong": ["a|b"]}, "R15": row | hostile}
    result = {"values": {"rows": rows}, "versions": {"jax": "1.2"}, "command": "c", "date": "d"}
    text = tables.reliability_table(result | {"machine": {"cores": 2, "cpu": "p"}})
    assert (
        "| R1 vito | SIGKILL at any moment of a VITO run | 1,234 faults | nothing | 3 s | 2026-01-02, abcdef0 |" in text
    )
    assert "| 5 damages | a/b |" in text and "1,234 kills and signals, 5 damages of files and 7 damaged videos" in text
    assert "at most 70 MiB" in text and "jax 1.2" in text
    assert text.count("not measured") == len(ROWS) - 3
    nothing = tables.reliability_table(tables.NOTHING_MEASURED["reliability"])
    assert nothing.count("not measured") == len(ROWS)


@pytest.mark.parametrize(
    "only, rows",
    [
        ("R20", ["R20"]),  # not R2 as well
        ("R12,R1", ["R1 vito", "R1 vivi", "R1 vdim", "R12 exports", "R12 stores", "R12 ledgers"]),
        ("R12 stores", ["R12 stores"]),
        ("", list(ROWS)),
    ],
)
def test_rows_are_chosen_by_their_whole_number(only, rows):
    assert rows_named(only) == rows


def test_a_row_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="no row R99"):
        rows_named("R1,R99")
