"""The arrows between packages and rooms, and what importing the core costs in modules."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("vivi_jax", "input_pipeline", "evaluation", "configs")
# Files of the core that import no JAX: the input side may use them.
GROUND = {"vivi_jax.errors", "vivi_jax.files", "vivi_jax.config", "vivi_jax.buckets.client", "vivi_jax.buckets.local"}
# The doors of the input side are commands, and one of them shows frames to a network.
DOORS = {
    f"input_pipeline.{name}"
    for name in ("check", "prepare", "prepare_beam", "curate", "synthetic", "synthetic_actions")
}
ALLOWED = {
    **dict.fromkeys(DOORS, {"vivi_jax.command_line"}),
    "input_pipeline.curation.local": {"evaluation.encoders"},
}
LIBRARIES = {  # package -> what it may not import
    "configs": {"jax", "tensorflow"},
    "vivi_jax": {"tensorflow", "tensorflow_datasets", "av", "cv2"},
    "input_pipeline": {"jax", "flax", "optax"},
    "evaluation": set(),
}


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(module: str, *, at_start: bool = False) -> set[str]:
    """Dotted names of what a module imports, our own down to the module; with `at_start` not what functions import."""
    names, tree = set(), ast.parse(FILES[module].read_text())
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if name in FILES} or {node.module}
    return names


def package_of(name: str) -> str:
    return name.split(".")[0]


def test_arrows_between_packages_point_down():
    """configs < ground of the core < input side < core's main; nothing in the core but main knows evaluation."""
    wrong = []
    for module in FILES:
        if module == "vivi_jax.main":  # joins everything
            continue
        for name in imported(module):
            package, target = package_of(module), package_of(name)
            crosses = package != target and target in PACKAGES
            fine = {
                "configs": False,
                "vivi_jax": False,
                "input_pipeline": name in GROUND,
                "evaluation": target != "configs",
            }[package]
            if (crosses and not fine and name not in ALLOWED.get(module, set())) or target in LIBRARIES[package]:
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_the_ground_imports_no_jax():
    assert {name for module in GROUND for name in imported(module) if package_of(name) in PACKAGES} <= GROUND
    code = (
        f"import sys, {', '.join(sorted(GROUND))}; print(sorted({{'jax', 'numpy', 'tensorflow'}} & set(sys.modules)))"
    )
    assert run(code) == "[]"


def test_the_input_side_needs_no_jax():
    """All its modules import where JAX, Flax and Optax cannot be: what it takes from the core is the ground."""
    modules = [module for module in FILES if package_of(module) == "input_pipeline"]
    if not importlib.util.find_spec("apache_beam"):  # an extra
        modules = [module for module in modules if "beam" not in module]
    blocked = "import sys; sys.modules |= dict.fromkeys(('jax', 'jaxlib', 'flax', 'optax'))"
    assert run(f"{blocked}; import {', '.join(modules)}; print(len(sys.modules) > 100)") == "True"


def test_rooms_of_protocols_know_only_themselves_and_what_is_shared():
    wrong = []
    for module in FILES:
        if module.startswith("evaluation.protocols.") and module.count(".") == 3:
            room = module.rsplit(".", 1)[0]
            wrong += [
                f"{module} imports {name}"
                for name in imported(module)
                if name.startswith("evaluation.protocols.") and name.count(".") == 3 and not name.startswith(f"{room}.")
            ]
    assert not wrong


def test_streams_and_preparation_do_not_know_each_other():
    for one, other in (("streams", "preparation"), ("preparation", "streams"), ("preparation", "curation")):
        for module in FILES:
            if module.startswith(f"input_pipeline.{one}."):
                assert not {n for n in imported(module) if n.startswith(f"input_pipeline.{other}")}, module


def test_no_import_circle():
    graph = {module: {name for name in imported(module, at_start=True) if name in FILES} for module in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in graph[module] - {module}:
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("package", ["vivi_jax", "input_pipeline", "evaluation"])
def test_no_folder_is_a_drawer(package):
    for folder in {path.parent for module, path in FILES.items() if package_of(module) == package}:
        assert len(list(folder.glob("*.py"))) <= 14, folder


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "modules, absent",
    [
        ("vivi_jax.train, vivi_jax.build, vivi_jax.export", {"tensorflow", "torch", "av", "cv2", "matplotlib"}),
        ("vivi_jax.main", {"orbax.checkpoint"}),  # what is wrong with a command is said before it
        ("evaluation.davis", {"sklearn", "tensorflow"}),
        ("evaluation.encoders", {"sklearn", "tensorflow"}),
        ("input_pipeline.curate", {"jax", "flax", "evaluation"}),  # loads no network before it is asked to
    ],
)
def test_what_an_import_does_not_load(modules, absent):
    assert run(f"import sys, {modules}; print(sorted({absent} & set(sys.modules)))") == "[]"


def test_writing_metrics_loads_no_tensorflow(tmp_path):
    code = (
        f"import sys; from vivi_jax import metrics; writer = metrics.MetricWriter({str(tmp_path)!r}, 0); "
        "writer.write(1, {'loss': 1.0}); writer.close(); print('tensorflow' in sys.modules)"
    )
    assert run(code) == "False"
