"""The battery of benchmarks/faults: it runs, and its ways of counting find what is wrong."""

import json
import random
import subprocess
import sys

import pytest

from benchmarks.faults import damage
from benchmarks.faults.__main__ import ROWS, rows_named
from helpers.commands import ROOT, one_device
from vivi_jax.errors import CheckpointError


@pytest.mark.slow
def test_the_command_runs_a_row_and_keeps_its_figures(tmp_path):
    """One row that starts no training; all of --quick take longer than a test may."""
    command = [sys.executable, "-m", "benchmarks.faults", "--only=R20", f"--out={tmp_path / 'faults'}"]
    battery = subprocess.run(command, cwd=ROOT, env=one_device(), capture_output=True, text=True, timeout=1500)
    assert battery.returncode == 0, battery.stdout + battery.stderr
    row = json.loads((tmp_path / "faults" / "reliability.json").read_text())["values"]["rows"]["R20"]
    assert row["damages"] == 9 and not row["wrong"]


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

    right = bytes(range(256)).hex().__eq__
    assert len(damage.judge(20, 0, [path], careless, right)["wrong"]) > 15  # a file alone has nothing to swap with
    found = damage.judge(20, 0, [path], careful, right)
    assert not found["wrong"] and found["noticed"] + found["no difference"] == 20


@pytest.mark.parametrize(
    "only, rows",
    [
        ("R20", ["R20"]),  # not R2 as well
        ("R12,R1", ["R1", "R12 exports", "R12 stores", "R12 ledgers"]),
        ("R12 stores", ["R12 stores"]),
        ("", list(ROWS)),
    ],
)
def test_rows_are_chosen_by_their_whole_number(only, rows):
    assert rows_named(only) == rows


def test_a_row_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="no row R99"):
        rows_named("R1,R99")
