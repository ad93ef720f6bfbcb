"""Results say how to repeat them, and the docs show what was measured."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks import results, tables


def test_a_result_says_how_to_repeat_it(tmp_path):
    path = results.record(
        "speed", {"views_per_second": 12.5}, command="python -m benchmarks.x", seeds=[0, 1], directory=tmp_path
    )
    assert path == tmp_path / "speed.json" and [p.name for p in tmp_path.iterdir()] == ["speed.json"]
    result = json.loads(path.read_text())
    assert result["values"] == {"views_per_second": 12.5} and result["seeds"] == [0, 1]
    assert (result["name"], result["command"]) == ("speed", "python -m benchmarks.x")
    head = subprocess.run(["git", "-C", str(results.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert re.fullmatch(head.stdout.strip() + r"(\+dirty)?", result["commit"])
    assert result["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert result["versions"]["jax"] == importlib.metadata.version("jax")
    assert result["machine"]["cores"] == os.cpu_count() and result["machine"]["memory_gb"] > 0.1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])


def test_a_value_that_is_no_number_leaves_the_old_result(tmp_path):
    path = results.record("speed", {"a": 1.0}, command="c", seeds=[], directory=tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        results.record("speed", {"a": float("nan")}, command="c", seeds=[], directory=tmp_path)
    assert path.read_bytes() == before


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.setattr(
        tables,
        "TABLES",
        {
            "t": ("speed", lambda r: f"| a |\n| --- |\n| {r['values']['a']} |"),
            "t.a": ("speed", lambda r: r["values"]["a"]),
            "absent": ("absent", str),
        },
    )
    results.record("speed", {"a": "7"}, command="c", seeds=[], directory=tmp_path)
    return tmp_path


def test_figures_go_between_the_markers_and_nothing_else_changes(measured):
    text = "x <!-- table:t.a -->old<!-- /table:t.a --> y\n<!-- table:t -->\n<!-- /table:t -->\nend <!-- comment -->\n"
    filled = tables.fill(text, measured)
    assert filled == (
        "x <!-- table:t.a -->7<!-- /table:t.a --> y\n<!-- table:t -->\n| a |\n| --- |\n| 7 |\n"
        "<!-- /table:t -->\nend <!-- comment -->\n"
    )
    assert tables.fill(filled, measured) == filled


@pytest.mark.parametrize(
    "text,message",
    [
        ("<!-- table:u -->1<!-- /table:u -->", "no table 'u'; .* has absent, t, t.a"),
        ("<!-- table:t -->1<!-- /table:t.a -->", "<!-- table:t --> has no partner"),
        ("<!-- table:absent -->1<!-- /table:absent -->", "needs .*absent.json: measure it first"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_named(measured, text, message):
    with pytest.raises(tables.TableError, match=message):
        tables.fill(text, measured)


def test_the_docs_show_the_recorded_results():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables", "--check"], cwd=results.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_check_refuses_a_file_out_of_date_and_writing_mends_it(measured):
    results_folder = measured / "docs" / "results"
    results_folder.mkdir(parents=True)
    (measured / "speed.json").rename(results_folder / "speed.json")
    for name in ("README.md", "docs/figures.md"):
        (measured / name).write_text("<!-- table:t.a -->6<!-- /table:t.a -->\n")
    with pytest.raises(SystemExit, match=r"out of date: README\.md, docs/figures\.md; run python -m benchmarks.tables"):
        tables.main(["--check"], measured)
    assert "6" in (measured / "README.md").read_text()
    tables.main([], measured)
    assert (measured / "docs/figures.md").read_text() == "<!-- table:t.a -->7<!-- /table:t.a -->\n"
    tables.main(["--check"], measured)
    (measured / "README.md").write_text("<!-- table:u -->6<!-- /table:u -->\n")
    with pytest.raises(SystemExit, match=r"README\.md: no table 'u'"):
        tables.main([], measured)
