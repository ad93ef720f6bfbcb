"""Curates videos as VITO's VideoNet: those whose title names a class and of which a classifier sees that class.

    python -m input_pipeline.curate --manifest=CSV --classes=CSV --classifier=WEIGHTS --out=DIR [--videos=DIR]
                                    [--workers=N | --runner=BEAM_RUNNER ...]

CSV files: the manifest has the columns video,title and, if the videos were searched for by class, class; the classes,
one a line in the order of the classifier's outputs, class,names with synonyms between semicolons. WEIGHTS is a ResNet
with a classifier: a .safetensors file in torchvision's or timm's names, or a run. The rule is curation.Rule.

OUT/decisions.jsonl says of every line of the manifest whether its video is kept, or why not; OUT/kept.csv is for
prepare: --videos=DIR --labels=OUT/kept.csv --labelled_only. Report: OUT/report.json, .md and .png. Started again after
a kill, the same command goes on where it was. With --runner the work is done by an Apache Beam runner, and flags that
are not this command's are Beam's. The result is the same, byte for byte.
"""
import collections
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable

from absl import app, flags

from input_pipeline import curation, files, prepare
from input_pipeline.curation import Line, Rule
from input_pipeline.sandbox import Sandbox
from input_pipeline.store import DataError

DEFAULT = Rule()


def load_classifier(weights: str, batch_size: int):
    """The one place where the input pipeline reaches for a network; returns evaluation.frame_classifier's.

    Raises:
      DataError: it cannot be loaded.
    """
    from evaluation import frame_classifier  # this loads JAX: only the command and its workers do so
    from vivi_jax.errors import CheckpointError, ConfigError

    try:
        if not files.is_remote(weights):
            return frame_classifier.load(weights, batch_size=batch_size)
        with tempfile.TemporaryDirectory() as scratch:
            copy = os.path.join(scratch, os.path.basename(weights))
            files.fetch(weights, copy)
            return frame_classifier.load(copy, batch_size=batch_size)
    except (CheckpointError, ConfigError) as e:
        raise DataError(str(e)) from e


def curate(manifest: str, classes: str, classifier: str, out: str, *, videos: str = "", rule: Rule = DEFAULT,
           workers: int | None = None, beam_options: list[str] | None = None) -> bool:
    """Decides on every line of a manifest, and writes decisions, kept videos and the report to `out`.

    Args:
      videos: what paths in the manifest are relative to; "" is the folder it is in.
      workers: files decoded at a time, without Beam; default: the cores this process may use.
      beam_options: let the workers of a Beam runner decide; None: this machine does, without Beam.

    Returns:
      False if all was there already.

    Raises:
      DataError: a manifest, class list or classifier that cannot be used, or `out` holds something else.
    """
    lines, known = curation.read_manifest(manifest), curation.read_classes(classes)
    model = load_classifier(classifier, rule.frames)
    if model.num_classes != len(known.names):
        raise DataError(f"{classifier} has {model.num_classes} classes, {classes} names {len(known.names)}; they must "
                        "be the same, in the same order")
    plan = curation.make_plan(rule, manifest=manifest, classes=classes, classifier_sha256=model.sha256)
    manifest, classifier, out = map(files.absolute, (manifest, classifier, out))
    root = files.absolute(videos) if videos else os.path.dirname(manifest)
    task = {"root": root, "classes": known, "rule": rule}
    try:
        if not curation.begin(out, plan):
            return False
        if beam_options is None:
            _decide_here(lines, out, task, model.top1, workers or len(os.sched_getaffinity(0)))
        else:
            from input_pipeline import curate_beam  # Beam: only where asked for
            curate_beam.decide(manifest, out, task, functools.partial(load_classifier, classifier, rule.frames),
                               plan["classifier"], beam_options)
        decisions = [json.loads(line) for chunk in range(len(curation.chunks_of(lines)))
                     for line in files.read(curation.chunk_path(out, chunk)).splitlines()]
        curation.finish(out, plan, known, decisions)
    except OSError as e:
        raise DataError(prepare.cannot_write(out, e)) from e
    return True


def _decide_here(lines: list[Line], out: str, task: dict, top1: Callable, workers: int) -> None:
    """Writes the chunks that are not there yet."""
    waiting = collections.deque()  # chunks in work; a second one, so that one long video stops nobody
    with prepare.pool(workers, task["rule"].limits) as submit, prepare.progress(len(lines)) as done:
        for number, chunk in enumerate([*curation.chunks_of(lines), None]):
            if chunk:
                path = curation.chunk_path(out, number)
                skip = files.exists(path)  # by an earlier run
                waiting.append((path, len(chunk), None if skip else [
                    submit(_decide_one, line, task, top1, done) for line in chunk]))
            while waiting and (len(waiting) > 1 or not chunk):
                path, count, futures = waiting.popleft()
                if futures is None:
                    done(count)
                else:
                    files.write(path, curation.as_lines([future.result() for future in futures]))


def _decide_one(sandbox: Sandbox, line: Line, task: dict, top1: Callable, done: Callable) -> dict:
    decision = curation.decide(line, **task, sandbox=sandbox, top1=top1)
    done(1)
    return decision


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    try:
        if values.runner is None and argv[1:]:
            raise DataError(f"unexpected argument {argv[1]}; options of Beam need --runner")
        rule = Rule(**{field.name: values[field.name].value for field in dataclasses.fields(Rule)})
        made = curate(values.manifest, values.classes, values.classifier, values.out, videos=values.videos, rule=rule,
                      workers=values.workers,
                      beam_options=None if values.runner is None else [f"--runner={values.runner}", *argv[1:]])
        report = json.loads(files.read(files.join(values.out, curation.REPORT)))
        print(f"{report['lines']:>9,} lines\n{report['kept']:>9,} kept")
        for reason, count in report["reasons"].items():
            print(f"{count:>9,} dropped: {curation.REASONS[reason]}")
        print(f"{values.out}: " + ("written" if made else "was complete already; nothing to do")
              + "; report.md has the classes, decisions.jsonl every line")
    except DataError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again, it goes on")


def run() -> None:
    """The command."""
    flags.DEFINE_string("manifest", None, "CSV file with columns video,title and perhaps class", required=True)
    flags.DEFINE_string("classes", None, "CSV file with columns class,names", required=True)
    flags.DEFINE_string("classifier", None, "run directory or .safetensors file of a ResNet", required=True)
    flags.DEFINE_string("out", None, "directory to write to", required=True)
    flags.DEFINE_string("videos", "", "what the manifest's paths are relative to; default: the folder it is in")
    flags.DEFINE_integer("workers", None, "files decoded at a time; default: one per core", lower_bound=1)
    flags.DEFINE_string("runner", None, "a runner of Apache Beam, such as DirectRunner; default: do it without Beam")
    for field in dataclasses.fields(Rule):
        define = flags.DEFINE_float if field.type in (float, "float") else flags.DEFINE_integer
        define(field.name, getattr(DEFAULT, field.name), "see curation.Rule")
    app.run(main, flags_parser=prepare.parse_known_flags)


if __name__ == "__main__":
    from input_pipeline import curate  # by its name: what is sent to Beam's workers must not be of "__main__"
    curate.run()
