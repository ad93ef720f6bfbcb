"""The report: one page, whole without a network, that says what the run's files say and what is missing."""

import base64
import html.parser
import json
import pathlib
import re
import shutil

import cv2
import numpy as np
import pytest
import safetensors.numpy
from matplotlib.figure import Figure

from evaluation import report
from helpers.runs import make_run, make_store
from vivi_jax import metrics
from vivi_jax.errors import DataError
from vivi_jax.metrics import MetricWriter


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with an online evaluation, its store beside it."""
    root = tmp_path_factory.mktemp("project")
    store = make_store(root)
    run = make_run(root / "run", "demo", path=str(store / "train"), clip_seconds=0.8)
    config = json.loads((run / "config.json").read_text())
    config["evaluation"]["dataset"], config["batch_size"] = str(store), 6
    (run / "config.json").write_text(json.dumps(config))
    writer = MetricWriter(str(run), 0)
    writer.write(0, {"knn_top1": 0.25, "linear_top1": 0.5})
    for step in (2, 4, 6):
        writer.write(
            step,
            {
                "loss": 20.0 - step,
                "learning_rate": 0.01 * step,
                "embedding_std": 0.5 + step / 100,
                "embedding_effective_rank": 3.0 + step,
                "examples_per_second": 100.0 + step,
                "data_wait_share": 0.0,
            },
        )
    writer.write(7, {"knn_top1": 0.875, "linear_top1": 1.0})
    writer.close()
    (run / "summary.json").write_text("{}")
    (root / "encoder.safetensors").write_bytes(b"")  # says nothing of whose it is
    (run / "encoder.safetensors").write_bytes(b"")
    return run


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.open, self.described = [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            head, data = attributes["src"].split(",")
            assert head == "data:image/png;base64"
            self.described.append(attributes["alt"])
            self.images.append(cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR))
        if tag == "a":
            self.links.append(attributes["href"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def text_of(path: pathlib.Path) -> str:
    return re.sub(r"data:image/png;base64,[^\"]*", "", path.read_text())


def test_a_cut_metrics_file_goes_on_and_a_damaged_one_is_one_line(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    for text in (whole + '{"step": 3, "lo', whole + '{"step": 3, "loss": 1.0}\n'):  # cut, and past the checkpoint
        path.write_text(text)
        MetricWriter(str(tmp_path), 2).close()
        assert path.read_text() == whole
    for line in ('{"step": 1, "loss"\n', '{"loss": 2.0}\n', "[]\n", "\x00\n"):
        path.write_text(line + whole)
        with pytest.raises(DataError, match="metrics.jsonl: line 1 is damaged .* take it out"):
            MetricWriter(str(tmp_path), 2)
        assert path.read_text() == line + whole


def test_page_holds_everything_and_needs_nothing(run):
    path = report.write_report(run)
    page, text = Page(path.read_text()), text_of(path)
    assert len(page.images) == len(report.CHARTS) + 4 and all(picture.shape[0] > 100 for picture in page.images)
    assert all(page.described) and len(set(page.described)) == len(page.images)
    assert text.count('<div class="wide"><img') == 3  # what could not be read in a narrow window if it shrank
    assert not re.findall(r"https?:|<script|<link|url\(", text)
    assert "25.0% &rarr; 87.5%" in text and "50.0% &rarr; 100.0%" in text  # before and after
    for shown in ("14.000", "0.560", ">9.0<", "106"):  # the last loss, spread, rank, rate
        assert shown in text
    assert "step 7" in text and "not finished" not in text and "Left out" not in text
    assert "<td>encoder.width</td><td>0.0625</td>" in text
    assert "<td>jax</td>" in text
    for link in page.links:
        assert (run / link).exists()
    assert {"checkpoints/7", "encoder.safetensors", "metrics.jsonl"} <= set(page.links)


def test_neighbours_are_the_nearest_and_the_query_itself_comes_first(run):
    """With the training videos also held out, the nearest neighbour of each picture is the picture."""
    store = run.parent / "same"
    shutil.copytree(run.parent / "store" / "train", store / "train")
    shutil.copytree(run.parent / "store" / "train", store / "test")
    figure, searched = report.neighbours(str(run), str(store))
    assert searched == 6
    axes = np.array(figure.axes).reshape(2, 1 + report.NEIGHBOURS)  # a row for each of the two classes
    for row in axes:
        pictures = [axis.images[0].get_array() for axis in row[:7] if axis.images]
        assert len(pictures) == 7  # the query and all six training images
        np.testing.assert_array_equal(pictures[0], pictures[1])
        assert all((p != pictures[0]).any() for p in pictures[2:])


def test_every_chart_that_has_values_and_no_empty_one(run):
    figures = report.curves(metrics.read(run))
    assert list(figures) == [title for title, _ in report.CHARTS]
    loss = figures["Loss"].axes[0].lines[0]
    assert list(report.curves([{"step": 1, "loss": 2.0}])) == ["Loss"]
    np.testing.assert_array_equal(loss.get_xydata(), [(2, 18.0), (4, 16.0), (6, 14.0)])


def test_missing_parts_are_named(run, tmp_path):
    bare = tmp_path / "run<b>"
    bare.mkdir()
    (bare / "config.json").write_text((run / "config.json").read_text().replace("/train", "/gone"))
    path = report.write_report(bare)
    page, text = Page(path.read_text()), text_of(path)
    assert page.images == []
    assert "Left out: metrics.jsonl has no lines yet." in text
    assert text.count("Left out: no checkpoint in") == 1
    assert len(re.findall(r"Left out: [^<]*/gone\b", text)) == 3  # views, the time between them, attention
    assert "step 0 (not finished)" in text
    assert "run<b>" not in text and "run&lt;b&gt;" in text


def test_run_without_attention_and_without_labels(run, tmp_path):
    moclr = make_run(tmp_path, "demo,moclr", path=str(run.parent / "store" / "train"))
    text = text_of(report.write_report(moclr))
    assert "Left out: the run has no labelled images" in text
    assert "was configured without attention" in text


def test_no_run_and_damaged_metrics_are_one_line(run, tmp_path):
    with pytest.raises(SystemExit, match="^error: no .*config.json: is .* a run directory"):
        report.main([f"--workdir={tmp_path}"])
    shutil.copy(run / "config.json", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match="metrics.jsonl: line 2 is damaged"):
        report.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_live_run_s_metrics_are_read_as_far_as_they_go(run, tmp_path):
    shutil.copy(run / "config.json", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"st')
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]
    assert report.series(metrics.read(tmp_path), "loss") == ([1], [2.0])
    assert "step 2 (not finished)" in text_of(report.write_report(tmp_path))


def test_class_names_are_no_formulas():
    """Matplotlib reads what is between two $ as TeX, and fails where it is none."""
    figure = Figure()
    axis = figure.subplots()
    report._picture(axis, np.zeros((4, 4, 3), np.uint8), r"price $\frac{$ of $x", report.INK)
    report.image(figure, "")


def test_exports_of_other_runs_are_not_listed(run):
    """Of what lies beside the run only files that say they are of it; of what lies in it all."""
    others = {"mine": run.name, "theirs": "another_run"}
    for name, source in others.items():
        safetensors.numpy.save_file({"a": np.zeros(1)}, run.parent / f"{name}.safetensors", {"run": source})
    assert set(report.exports_of(run)) == {run / "encoder.safetensors", run.parent / "mine.safetensors"}
