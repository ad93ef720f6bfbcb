"""The wheel: what is in it, and that its console scripts run from any folder without the checkout."""

import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from packaging.version import Version

from helpers.commands import ROOT, one_device

SCRIPTS = ("vivi-train", "vivi-prepare", "vivi-eval", "vivi-embed", "vivi-export")


def test_every_lower_bound_is_a_version_that_was_tried():
    """docs/install.md says how: with constraints-oldest.txt."""
    required = (ROOT / "setup.py").read_text().partition("install_requires=[")[2].partition("extras_require")[0]
    bounds = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?(?:>=([\w.]+))?', required))
    assert bounds.pop("tensorflow") == bounds["tensorflow-cpu"] and bounds.pop("importlib-resources") == ""
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    tried = {name.replace("_", "-"): Version(version) for name, version in pins}
    assert {name: Version(bound) for name, bound in bounds.items()} == {name: tried[name] for name in bounds}


@pytest.mark.slow
def test_console_scripts_of_the_wheel_run_from_another_folder(tmp_path):
    """The libraries are those of this environment; vivi_jax itself is the wheel's alone."""
    source = tmp_path / "source"
    packages = ("vivi_jax", "input_pipeline", "evaluation", "configs")
    for name in packages:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path / "dist", source]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("vivi_jax-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=300)
    python = tmp_path / "venv" / "bin" / "python"
    site = tmp_path / "venv" / pathlib.Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True, timeout=300)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = subprocess.run(
        [python, "-c", "import vivi_jax; print(vivi_jax.__file__)"], cwd=elsewhere, capture_output=True, text=True
    )
    assert where.stdout.strip() == str(site / "vivi_jax" / "__init__.py"), where.stderr
    assert all((site / name / "py.typed").is_file() for name in packages[:3])

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [python.parent / script, *arguments]
        return subprocess.run(
            command, cwd=elsewhere, env=one_device(), capture_output=True, text=True, timeout=300, check=False
        )

    for script, arguments, says in (
        ("vivi-train", ["--config=nowhere.py"], "nowhere"),
        ("vivi-prepare", ["--videos=nowhere", "--out=store"], "no such directory: nowhere"),
        ("vivi-eval", ["probe", "--checkpoint=nowhere", "--data=nowhere"], "nowhere"),
        ("vivi-eval", ["prob"], "not 'prob'"),
        ("vivi-embed", ["nowhere", "--checkpoint=nowhere", "--out=a.npz"], "no files in nowhere"),
        ("vivi-export", ["--checkpoint=nowhere", "--out=a"], "nowhere"),
    ):
        done = run(script, *arguments)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list(elsewhere.iterdir()) == []
