"""One file per measurement, docs/results/NAME.json, with all it takes to repeat it.

The tables in README.md and docs/ are made from these files: see tables.py.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorflow",
    "tensorflow-cpu",
    "array-record",
    "av",
    "opencv-python-headless",
    "torch",
    "triton",
)


def record(
    name: str, values: dict, *, command: str, seeds: list[int], directory: pathlib.Path = RESULTS
) -> pathlib.Path:
    """Writes DIRECTORY/NAME.json and returns its path; an earlier measurement of that name is replaced.

    Args:
      name: names the file; the tables of benchmarks/tables.py find it by this.
      values: what was measured, JSON values; units belong into the keys, e.g. "views_per_second".
      command: what to type to measure it again.
      seeds: of the runs behind the values; [] where nothing is random.
    """
    path = directory / f"{name}.json"
    result = {
        "name": name,
        "command": command,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": _versions(),
        "machine": _machine(),
        "seeds": seeds,
        "values": values,
    }
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)
    return path


def commit() -> str:
    """The commit checked out, "+dirty" if files it tracks have been changed (results themselves aside).

    Where there is no git the environment variable COMMIT says it.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/results", ":!README.md", ":!docs/*.md"
        )
        return git("rev-parse", "HEAD").strip() + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "not a git checkout")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def _machine() -> dict:
    cpu = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    machine = {
        "system": platform.system(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }
    if "jax" in sys.modules:  # only a benchmark that uses JAX pays for asking it
        devices = sys.modules["jax"].devices()
        machine["accelerators"] = f"{len(devices)} x {devices[0].device_kind}"
    return machine
