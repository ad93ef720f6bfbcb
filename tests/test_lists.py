"""The lists of videos that people have: each form is known by its content, and names the files that it means."""

import json

import pytest

from input_pipeline import lists
from input_pipeline.preparation import inputs
from vivi_jax.errors import DataError

NAMES = [
    "train/archery/-3B32lodo2M_000059_000069.mp4",
    "train/archery/AbCdEfGhIjK.mp4",
    "train/dancing ballet/abcdefghijk.mp4",
    "v/78687.webm",
    "v/42326.webm",
    "w/78687 x.webm",
]
TEMPLATES = [
    {"id": "78687", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]},
    {"id": 42326, "label": "pushing a pen", "template": "Pushing [something] from left to right"},
    {"id": "1", "label": "", "template": "Holding [something]"},
]


@pytest.mark.parametrize(
    "text, expected",
    [
        (  # Kinetics: with the times in the name, or the bare id, whose case counts
            "label,youtube_id,time_start,time_end,split\narchery,-3B32lodo2M,59,69,train\n"
            '"dancing, ballet",abcdefghijk,0.0,10.0,train\narchery,AbCdEfGhIjK,5,15,train\n',
            {0: "archery", 1: "archery", 2: "dancing, ballet"},
        ),
        (json.dumps(TEMPLATES), {3: "Holding something", 4: "Pushing something from left to right"}),
        (json.dumps([{"id": "78687", "label": "a"}]), {3: "a"}),
        ("v/78687.webm 10\nv/42326.webm 2\nw/78687 x.webm 10\n", {3: "10", 4: "2", 5: "10"}),  # mmaction2
        ("v/78687 163 10\nv/42326 20 2\n", {3: "10", 4: "2"}),  # mmaction2's folders of frames
        ("/elsewhere/k400/v/78687.webm 1\n/data/v/42326.webm 0\n", {3: "1", 4: "0"}),
        ("path,label\n78687.webm,a b\nv\\42326.webm,c\n", {3: "a b", 4: "c"}),
        ("\ufeffv/78687.avi,a b\r\n\r\n42326.webm,c\r\n", {3: "a b", 4: "c"}),  # no header; converted since
        ("42326.webm\ta b\n78687 x.webm\tc\n", {4: "a b", 5: "c"}),
        ("class,filename,fold\nc,42326.webm,1\n", {4: "c"}),
    ],
)
def test_every_form_gives_its_labels(tmp_path, text, expected, capsys):
    path = tmp_path / "list"
    path.write_text(text)
    labels, classes = inputs.read_labels(str(path), NAMES)
    assert {i: classes[label] for i, label in enumerate(labels) if label >= 0} == expected
    without = len(NAMES) - len(expected)
    assert f"{len(classes)} classes, {without} have none (such as " in capsys.readouterr().out
    found = [inputs.Input(name, name, 1) for name in NAMES]
    assert [file.name for file in inputs.take_listed(found, str(path))] == [NAMES[i] for i in expected]


def test_numbers_are_classes_in_the_order_of_their_value(tmp_path):
    (tmp_path / "list").write_text("v/78687.webm 10\nv/42326.webm 2\n")
    assert inputs.read_labels(str(tmp_path / "list"), NAMES) == ([-1, -1, -1, 1, 0, -1], ["2", "10"])


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "video,label\nv/78687.webm,a\nv/42326.webm\n",
            r"line 3 does not fit \('v/42326.webm'\); known forms of lists",
        ),
        ("v/78687.webm,a\nv/42326.webm,b,c\n", r"line 2 does not fit \('v/42326.webm,b,c'\); known forms"),
        ("a,b,c\n1,2,3\n", r"line 1 does not fit \('a,b,c'\); known forms of lists: CSV with columns video,label"),
        ("label,youtube_id,time_start,time_end\na,x,zero,1\n", r"line 2 does not fit \('a,x,zero,1'\)"),
        (json.dumps([*TEMPLATES, {"video": "3"}]), "entry 4 does not fit"),
        (json.dumps({"Holding something": "0"}), r"its JSON does not fit \(\('Holding something', '0'\)\); known"),
        ("[{", "cannot read .*list: Expecting"),
        (json.dumps([{"id": "78687"}]), "list has no labels, only names of videos"),
        ("v/78687.webm\nv/42326.webm\n", "list has no labels, only names of videos"),
        ("v/78687.webm 1\nv/42326.webm\n", "line 2: v/42326.webm has an empty label"),
        ("78687.webm 1\nv/78687.avi 2\n", "line 2: v/78687.webm has two labels, 1 and 2"),
        ("youtube_id,time_start,time_end\nABCDEFGHIJK,0,1\n", "no labels"),
        ("ABCDEFGHIJK 1\n", "line 1: ABCDEFGHIJK may be train/archery/AbCdEfGhIjK.mp4 or train/dancing ballet/abcd"),
        ("/data/x/78687.webm,a\nq.mp4,b\n", "none of its 2 lines names an input file"),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_it(tmp_path, text, message):
    (tmp_path / "list").write_text(text)
    with pytest.raises(DataError, match=message):
        inputs.read_labels(str(tmp_path / "list"), NAMES)


def test_a_name_with_a_comma_is_a_name(tmp_path):
    (tmp_path / "list").write_text("a, b.mp4\na,c.mp4\n")
    found = [inputs.Input(name, name, 1) for name in ("a,c.mp4", "z/a, b.mp4")]
    assert [file.name for file in inputs.take_listed(found, str(tmp_path / "list"))] == ["a,c.mp4", "z/a, b.mp4"]


def test_a_list_in_windows_own_encoding(tmp_path):
    (tmp_path / "list").write_bytes("path,label\r\nv/78687.webm,ä\r\n".encode("utf-16"))
    assert lists.read_videos(tmp_path / "list") == [lists.Video("line 2", ("v/78687.webm",), "ä")]
