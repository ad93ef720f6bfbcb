"""The arrows between the parts, and what importing the core costs in modules."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
FORBIDDEN = {  # package -> what its modules may not import, main.py apart, which joins everything
    "configs": {"vivi_jax", "input_pipeline", "evaluation", "jax", "tensorflow"},
    "vivi_jax": {"input_pipeline", "evaluation", "tensorflow", "tensorflow_datasets", "av", "cv2", "configs"},
    "input_pipeline": {"vivi_jax", "evaluation", "jax", "flax", "configs"},
    "evaluation": {"configs"},
}
# The command that shows frames to a network loads it in one function; the rest of the input pipeline knows none.
ALLOWED = {"input_pipeline/curate.py": {"evaluation", "vivi_jax"}}


def imported(path: pathlib.Path) -> set[str]:
    """Top-level names of all packages a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_nothing_points_back():
    wrong = []
    for package, forbidden in FORBIDDEN.items():
        files = [path for path in (ROOT / package).rglob("*.py") if path != ROOT / "vivi_jax" / "main.py"]
        assert files
        wrong += [
            f"{path.relative_to(ROOT)} imports {name}"
            for path in files
            for name in imported(path) & forbidden - ALLOWED.get(str(path.relative_to(ROOT)), set())
        ]
    assert not wrong


def test_curation_loads_no_network_before_it_is_asked_to():
    code = "import sys, input_pipeline.curate; print(sorted({'jax', 'flax', 'evaluation'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_the_core_loads_no_tensorflow():
    code = (
        "import sys, vivi_jax.train, vivi_jax.build, vivi_jax.export; "
        "print(sorted({'tensorflow', 'torch', 'av', 'cv2', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
