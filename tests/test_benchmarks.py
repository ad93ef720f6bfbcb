"""Every benchmark with a smallest form runs to its end in it; the modules of the others run, so that none is stale."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import results
from benchmarks.all import TARGETS, gather
from helpers.commands import one_device

# Its arguments at its smallest. benchmarks.gpu has its own tests, in test_benchmarks_gpu.py.
SMALLEST = {
    "bucket": ("--quick",),
    "input": ("--quick",),
    "prepare": ("--quick",),
    "step": ("--quick", "--row=vivi", "--batch=1", "--size=32", "--rounds=1"),
    "vdim": ("--quick", "--table=small"),
    "shots": ("--quick",),
    "guards": ("--quick", "--batch=2", "--size=32", "--rounds=1", "--steps=1"),
}
# Full trainings, compilers of hours, or data sets: what they call has tests of its own.
IMPORTED = ("all", "bucket_kills", "davis", "learning", "plan", "protocols", "transfer", "vdim_learning", "vivi")
IMPORTED += ("vivi_learning", "vtab")
# No commands: what the others share.
SHARED = ("__init__", "config_reference", "gpu", "results", "same_work", "tables", "training")


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        capture_output=True,
        text=True,
        cwd=results.ROOT,
        env=one_device(),
        timeout=600,
    )


def test_every_benchmark_is_here():
    modules = {path.stem for path in pathlib.Path(results.ROOT, "benchmarks").glob("*.py")}
    assert {m for m in modules if not m.startswith("torch_")} == {*SMALLEST, *IMPORTED, *SHARED}


@pytest.mark.slow
@pytest.mark.parametrize("module", SMALLEST)
def test_it_runs_at_its_smallest_and_writes_nothing(module):
    before = {path: path.stat().st_mtime for path in results.RESULTS.iterdir()}
    done = run(module, *SMALLEST[module])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout
    assert {path: path.stat().st_mtime for path in results.RESULTS.iterdir()} == before


def test_a_target_is_met_missed_or_not_measured(tmp_path):
    values = {"rate_ratio_jax_over_torch": 1.3, "jax_peak_memory_mb": 3000.0, "torch_peak_memory_mb": 1500.0}
    source = {"command": "c", "date": "2026-01-01", "commit": "abc"}
    content = source | {"machine": {"cpu": "a processor"}, "values": values | {"jax_first_step_seconds": 25.0}}
    (tmp_path / "step.json").write_text(json.dumps(content))
    rows = {row["what"]: row for row in gather(tmp_path)}
    assert len(rows) == len(TARGETS)
    rate, memory, *times = (rows[t.what] for t in TARGETS if t.file == "step")
    assert (rate["figure"], rate["met"]) == (1.3, True) and rate["of"] == source | {"on": "a processor"}
    assert (memory["figure"], memory["met"]) == (2.0, False)  # at most 1
    assert times[0]["met"] and "figure" not in times[1]  # that one was not measured then
    assert all("figure" not in rows[t.what] for t in TARGETS if t.file != "step")


@pytest.mark.slow
def test_the_others_import():
    """In one process, as each would import the same frameworks."""
    code = "import runpy, sys\nfor module in sys.argv[1:]:\n    runpy.run_module(module, run_name='imported')"
    done = subprocess.run(
        [sys.executable, "-c", code, *(f"benchmarks.{module}" for module in IMPORTED)],
        capture_output=True,
        text=True,
        cwd=results.ROOT,
        env=one_device(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
