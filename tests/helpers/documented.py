"""Commands as README and the pages of docs/ show them, and what the code knows of their options."""

import ast
import functools
import importlib
import operator
import pathlib
import re
import shlex
from collections.abc import Iterator

from helpers.commands import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PACKAGES = ("vivi_jax", "evaluation", "input_pipeline", "benchmarks", "launch")
_STARTS = re.compile(r"(?:[A-Z_0-9]+=\S+ +)*(?:(?:\.venv/bin/)?python3? -m |bash (?:launch|\.ci)/)")


def commands(page: str) -> Iterator[list[str]]:
    """The words of each `python -m ...` and `bash launch/...` of a page's code blocks and lines, comments left out."""
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if _STARTS.match(line):
                yield shlex.split(line, comments=True)
    for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL)):
        if _STARTS.match(span):
            yield shlex.split(span.replace("\n", " "))


def file_of(module: str) -> pathlib.Path | None:
    """The file that `python -m MODULE` runs, if it is one of ours."""
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__main__.py") if p.is_file()), None)


@functools.cache
def options_of(file: pathlib.Path) -> frozenset[str]:
    """The names that a file defines as options: by add_argument, by absl's DEFINE_..., or by what does so for many."""
    tree = ast.parse(file.read_text())
    found: set[str] = set()
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    shorthand = {_name(node.targets[0]) for node in assigned if _name(node.value).startswith("DEFINE_")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGES):
            for alias in node.names:
                if alias.name == "flags":
                    found |= options_of(ROOT.joinpath(*node.module.split("."), "flags.py"))
        if not isinstance(node, ast.Call):
            continue
        called = _name(node.func)
        words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if called == "add_argument":
            found |= {word.lstrip("-") for word in words if word.startswith("-")}
        elif (called.startswith("DEFINE_") or called in shorthand) and words:
            found.add(words[0])
        elif called in ("protocol_flags", "define_config") and file.name != "command_line.py":
            found |= options_of(ROOT / "vivi_jax" / "command_line.py") if called == "protocol_flags" else {"config"}
    return frozenset(found)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def options_of_script(script: pathlib.Path) -> set[str]:
    """The options of a launcher: what it hands to `options` of launch/common.sh."""
    named = re.findall(r'^options "([^"]*)"', script.read_text(), re.MULTILINE)
    return {"dry_run", *(name for names in named for name in names.split())}


def configured(file: str, overrides: dict[str, str]):
    """The config of `FILE.py:ARGUMENT` with `--config.KEY=VALUE`; raises where one does not exist.

    A value in capitals stands for one of the reader's: its key must exist.
    """
    path, _, argument = file.partition(":")
    config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config(argument)
    for key, text in overrides.items():
        *sections, name = key.split(".")
        section = functools.reduce(operator.getitem, sections, config)
        old = section[name]  # KeyError: there is none
        if not isinstance(old, str) and not re.fullmatch(r"[A-Z_]+", text):
            section[name] = ast.literal_eval(text) if old is None else type(old)(ast.literal_eval(text))
        elif isinstance(old, str):
            section[name] = text
    return config
