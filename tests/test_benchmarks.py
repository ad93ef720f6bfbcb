"""Every benchmark with a smallest form runs to its end in it; the modules of the others run, so that none is stale."""

import pathlib
import subprocess
import sys

import pytest

from benchmarks import results
from helpers.commands import one_device

# Its arguments at its smallest. benchmarks.gpu has its own tests, in test_benchmarks_gpu.py.
SMALLEST = {
    "step": ("--quick", "--batch=4", "--size=32", "--rounds=1"),
    "vdim": ("--quick", "--table=small"),
}
# Full trainings, compilers of hours, or data sets: what they call has tests of its own.
IMPORTED = ("davis", "input", "learning", "plan", "prepare", "protocols", "transfer", "vdim_learning", "vivi")
IMPORTED += ("vivi_learning", "vtab")
# No commands: what the others share.
SHARED = ("__init__", "config_reference", "gpu", "results", "same_work", "tables")


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
    assert "jax" in done.stdout
    assert {path: path.stat().st_mtime for path in results.RESULTS.iterdir()} == before


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
