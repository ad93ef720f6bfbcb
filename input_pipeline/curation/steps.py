"""VideoNet's rule (VITO, section 3.3): videos whose title names a class and of which a classifier sees that class.

A decision depends on one line of the manifest, its video, the classes, the classifier and the rule only. So any process
may make it, in any order, and more than once. Decisions are written in chunks:

    OUT/.partial/plan.json      written first; another plan is refused
    OUT/.partial/chunk-C.jsonl  decisions on consecutive lines of the manifest; present means complete
    decisions, kept.csv and the report: made of all chunks, report.json last; .partial goes
"""

import collections
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from input_pipeline import lists, storage
from input_pipeline.preparation.sandbox import Sandbox
from input_pipeline.preparation.steps import partial_of, plan_path, software
from input_pipeline.store import PARTIAL
from vivi_jax import files
from vivi_jax.errors import DataError

DECISIONS, KEPT, REPORT = "decisions.jsonl", "kept.csv", "report.json"
ROWS_PER_CHUNK = 64
# Reason -> what it says of a video; a reason is the first word of a decision's text.
REASONS = {
    "class": "the manifest names a class that is not in the list",
    "again": "the same video is kept for an earlier line",
    "title": "the title does not name the class",
    "video": "the video does not open or decode",
    "short": "the video is too short",
    "classifier": "too few of the first frames show the class",
}
_TRIES = 3  # of a video whose decoder is killed from outside, or waits for a processor


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a video must satisfy, and how its frames are shown to the classifier."""

    frames: int = 100  # VITO 3.3: "the first 100 frames"
    min_votes: int = 1  # VITO 3.3: the class is top-1 "for any of the frames"
    min_seconds: float = 10.0  # VITO 3.3
    short_side: int = 256  # not in the paper; the usual one for ResNets on ImageNet, as image_size
    image_size: int = 224
    memory_mb: int = 2048  # limits per file, as prepare's
    cpu_s: int = 600
    wall_s: float = 1200.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise DataError(f"{field.name}={getattr(self, field.name)}: give a positive number")
        if self.image_size > self.short_side:
            raise DataError(
                f"image_size={self.image_size} is cut out of a picture whose short side is "
                f"{self.short_side}: lower it, or raise short_side"
            )

    @property
    def limits(self) -> dict:
        """Arguments of sandbox.Sandbox."""
        return {name: getattr(self, name) for name in ("memory_mb", "cpu_s", "wall_s")}


class Classes(NamedTuple):
    """The classifier's classes, in the order of its outputs."""

    names: list[str]
    of_words: dict[tuple[str, ...], list[int]]  # the words of a name or synonym -> its classes
    longest: int  # words in a name

    def named_in(self, title: str) -> list[int]:
        """Classes of which the title has a name, whole words in a row, in any case; ascending.

        The paper says "included the category's name or a synonym"; whole words are our reading.
        """
        words = _words(title)
        runs = (tuple(words[i : i + n]) for i in range(len(words)) for n in range(1, self.longest + 1))
        return sorted({k for run in runs for k in self.of_words.get(run, ())})


class Line(NamedTuple):
    """A line of the manifest."""

    number: int  # from 0
    video: str
    title: str
    label: str  # "" where the manifest has no column class


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def read_classes(path: str) -> Classes:
    """Reads a CSV file with the columns class (the name, each once) and names (synonyms between semicolons).

    Raises:
      DataError: a missing column, a class without a name, or one that is there twice.
    """
    names, of_words, lines = [], collections.defaultdict(list), {}
    for number, row in enumerate(lists.read_table(path, ("class", "names")), 2):
        name = row["class"].strip()
        if not _words(name):
            raise DataError(f"{path}: line {number} has no class")
        if name in lines:
            raise DataError(
                f"{path}: {name} is on line {lines[name]} and on line {number}; a class must stand once, "
                "on the line of its place among the classifier's outputs"
            )
        lines[name] = number
        for words in {tuple(_words(synonym)) for synonym in [name, *row["names"].split(";")]} - {()}:
            of_words[words].append(len(names))
        names.append(name)
    if not names:
        raise DataError(f"{path} names no class")
    return Classes(names, dict(of_words), max(map(len, of_words)))


def read_manifest(path: str) -> list[Line]:
    """Reads a CSV file with the columns video, title and, if the videos were searched for by class, class.

    Raises:
      DataError: a missing column, a line without a video, or no line.
    """
    lines = []
    for number, row in enumerate(lists.read_table(path, ("video", "title"))):
        if not row["video"]:
            raise DataError(f"{path}: line {number + 2} names no video")
        if not storage.is_remote(row["video"]):
            files.inside("the folder of the videos", row["video"])
        lines.append(Line(number, row["video"], row["title"], row.get("class", "").strip()))
    if not lines:
        raise DataError(f"{path} names no video")
    return lines


def make_plan(rule: Rule, *, manifest: str, classes: str, classifier_sha256: str) -> dict:
    """What must not change between two starts of a curation."""

    def digest(path: str) -> str:
        return hashlib.sha256(storage.read(path)).hexdigest()[:16]

    return {
        "rule": dataclasses.asdict(rule),
        "manifest": digest(manifest),
        "classes": digest(classes),
        "classifier": classifier_sha256[:16],
        "software": software(),
    }


def begin(root: str, plan: dict) -> bool:
    """Claims OUT for a plan; returns False where all is done.

    Raises:
      DataError: it was begun with another plan, or holds something else.
    """
    report, path = storage.join(root, REPORT), plan_path(partial_of(root))
    found = json.loads(storage.read(report))["plan"] if storage.exists(report) else None
    if found is None and storage.exists(path):
        found = json.loads(storage.read(path))
    if found is None:
        if storage.names(root) - {PARTIAL}:
            raise DataError(f"{root} is neither empty nor a curation; give a new directory as --out")
        storage.make_folder(partial_of(root))
        storage.write(path, json.dumps(plan).encode())
    elif changed := [key for key in plan if found.get(key) != plan[key]]:
        raise DataError(
            f"{root} was begun with another {changed[0]}: {found.get(changed[0])} there, "
            f"{plan[changed[0]]} here; give another --out, or delete the old one"
        )
    return not storage.exists(report)


def chunk_path(root: str, chunk: int) -> str:
    return storage.join(partial_of(root), f"chunk-{chunk:06d}.jsonl")


def chunks_of(lines: list[Line]) -> list[list[Line]]:
    return [lines[start : start + ROWS_PER_CHUNK] for start in range(0, len(lines), ROWS_PER_CHUNK)]


def as_lines(decisions: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in decisions).encode()


def decide(
    line: Line, *, root: str, classes: Classes, rule: Rule, sandbox: Sandbox, top1: Callable[[np.ndarray], np.ndarray]
) -> dict:
    """The decision on one line.

    Args:
      root: what a relative path in the manifest is relative to.
      top1: uint8[N, H, W, 3] RGB -> int[N], the classifier's most probable class of each frame.

    Returns:
      {"line", "video", "title", "status": "kept" or "dropped", "reason": "" or "WORD: details", WORD of REASONS,
       "candidates": names of the classes in question, "class": "" or the one it is kept for, "votes": frames that
       show the class (of all candidates the most), "frames": looked at, "seconds": length of the video}
    """
    named = classes.named_in(line.title)
    candidates = [classes.names[k] for k in named]
    if line.label:
        candidates = [line.label] if line.label in candidates else []
    decision = {
        "line": line.number + 1,
        "video": line.video,
        "title": line.title,
        "status": "dropped",
        "reason": "",
        "candidates": candidates,
        "class": "",
        "votes": 0,
        "frames": 0,
        "seconds": 0.0,
    }
    if line.label and line.label not in classes.names:
        return decision | {"reason": f"class: {line.label} is not in the list"}
    if not candidates:
        return decision | {"reason": "title: it does not name " + (line.label or "any class")}
    head, frames_NxSxSx3 = _look(
        storage.join(root, line.video) if not storage.is_remote(line.video) else line.video, sandbox, rule
    )
    if head["status"] == "refused":
        return decision | {"reason": f"video: {head['reason']}"}
    decision |= {"frames": head["frames"], "seconds": round(head["seconds"], 3)}
    if head["seconds"] < rule.min_seconds:
        return decision | {"reason": f"short: {head['seconds']:.1f} s"}
    votes = np.bincount(top1(frames_NxSxSx3), minlength=len(classes.names))
    winner = max(candidates, key=lambda name: votes[classes.names.index(name)])  # the first of equals
    decision["votes"] = int(votes[classes.names.index(winner)])
    if decision["votes"] < rule.min_votes:
        return decision | {
            "reason": f"classifier: {decision['votes']} of {head['frames']} frames show {winner}, "
            f"{votes.max()} {classes.names[votes.argmax()]}"
        }
    return decision | {"status": "kept", "class": winner}


def _look(path: str, sandbox: Sandbox, rule: Rule) -> tuple[dict, np.ndarray]:
    """(what sandbox.decode says, uint8[N, S, S, 3] the first frames).

    Raises:
      DataError: the decoder was killed from outside or starved, again and again.
    """
    with tempfile.TemporaryDirectory() as scratch:
        frame_file = os.path.join(scratch, "frames")
        if storage.is_remote(path):
            copy = os.path.join(scratch, "video" + os.path.splitext(path)[1])
            try:
                storage.fetch(path, copy)
            except storage.Unreadable as e:
                return {"status": "refused", "reason": f"unreadable: {e}"}, np.empty(0)
            path = copy
        head = {"retry": True}
        for _ in range(_TRIES):
            if head.get("retry"):
                head = sandbox.decode(
                    path,
                    frame_file,
                    function="decode_head",
                    frames=rule.frames,
                    short_side=rule.short_side,
                    image_size=rule.image_size,
                )
        if head.get("retry"):  # no fault of the video: it must not be dropped for good
            raise DataError(
                f"{path}: {head['reason']}, {_TRIES} times; what is done is kept: run the same command again, with "
                "fewer workers if memory or time is short"
            )
        pixels = np.fromfile(frame_file, np.uint8) if head["status"] == "ok" else np.empty(0, np.uint8)
    return head, pixels.reshape(-1, rule.image_size, rule.image_size, 3)


def drop_repeats(decisions: list[dict]) -> list[dict]:
    """The same decisions, but a video is kept once: for the first of its lines that would keep it."""
    first, once = {}, []
    for row in decisions:
        if row["status"] == "kept" and (line := first.setdefault(row["video"], row["line"])) != row["line"]:
            row = row | {"status": "dropped", "class": "", "reason": f"again: kept for line {line}"}
        once.append(row)
    return once


def finish(root: str, plan: dict, classes: Classes, decisions: list[dict]) -> None:
    """Writes decisions, kept videos and the report of all of them, in the order of the manifest."""
    from input_pipeline.curation import report as curation_report

    decisions = drop_repeats(decisions)
    kept = io.StringIO()
    writer = csv.writer(kept, lineterminator="\n")
    writer.writerow(["video", "label"])
    writer.writerows((row["video"], row["class"]) for row in decisions if row["status"] == "kept")
    report = {"plan": plan} | curation_report.summarise(decisions, classes.names)
    made = {
        DECISIONS: as_lines(decisions),
        KEPT: kept.getvalue().encode(),
        "report.md": curation_report.markdown(report, REASONS).encode(),
        "report.png": curation_report.picture(report),
        REPORT: (json.dumps(report, indent=1) + "\n").encode(),  # last: its presence means that all is there
    }
    with tempfile.TemporaryDirectory(dir=None if storage.is_remote(root) else partial_of(root)) as scratch:
        for name, data in made.items():
            files.write_bytes(os.path.join(scratch, name), data)
            storage.put(os.path.join(scratch, name), storage.join(root, name))
    storage.remove_tree(partial_of(root))
