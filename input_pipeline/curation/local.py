"""Curation: decides on every line of a manifest, on one machine or by a Beam runner, and writes the report."""

import collections
import functools
import json
import os
import tempfile
from collections.abc import Callable

from input_pipeline import storage
from input_pipeline.curation import steps
from input_pipeline.curation.steps import Line, Rule
from input_pipeline.preparation.local import cannot_write, pool, progress
from input_pipeline.preparation.sandbox import Sandbox
from vivi_jax.errors import DataError

DEFAULT = Rule()


def load_classifier(weights: str, batch_size: int):
    """The classifier of evaluation.encoders; the input pipeline needs a network nowhere else.

    Raises:
      DataError: it cannot be loaded.
    """
    from evaluation import encoders
    from vivi_jax.errors import CheckpointError, ConfigError

    try:
        if not storage.is_remote(weights):
            return encoders.load_frame_classifier(weights, batch_size=batch_size)
        with tempfile.TemporaryDirectory() as scratch:
            copy = os.path.join(scratch, os.path.basename(weights))
            storage.fetch(weights, copy)
            return encoders.load_frame_classifier(copy, batch_size=batch_size)
    except (CheckpointError, ConfigError) as e:
        raise DataError(str(e)) from e


def curate(
    manifest: str,
    classes: str,
    classifier: str,
    out: str,
    *,
    videos: str = "",
    rule: Rule = DEFAULT,
    workers: int | None = None,
    beam_options: list[str] | None = None,
) -> bool:
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
    lines, known = steps.read_manifest(manifest), steps.read_classes(classes)
    model = load_classifier(classifier, rule.frames)
    if model.num_classes != len(known.names):
        raise DataError(
            f"{classifier} has {model.num_classes} classes, {classes} names {len(known.names)}; they must "
            "be the same, in the same order"
        )
    plan = steps.make_plan(rule, manifest=manifest, classes=classes, classifier_sha256=model.sha256)
    manifest, classifier, out = map(storage.absolute, (manifest, classifier, out))
    root = storage.absolute(videos) if videos else os.path.dirname(manifest)
    task = {"root": root, "classes": known, "rule": rule}
    try:
        if not steps.begin(out, plan):
            return False
        if beam_options is None:
            _decide_here(lines, out, task, model.top1, workers or len(os.sched_getaffinity(0)))
        else:
            from input_pipeline.curation import beam as curate_beam

            curate_beam.decide(
                manifest,
                out,
                task,
                functools.partial(load_classifier, classifier, rule.frames),
                plan["classifier"],
                beam_options,
            )
        decisions = [
            json.loads(line)
            for chunk in range(len(steps.chunks_of(lines)))
            for line in storage.read(steps.chunk_path(out, chunk)).splitlines()
        ]
        steps.finish(out, plan, known, decisions)
    except OSError as e:
        raise DataError(cannot_write(out, e)) from e
    return True


def _decide_here(lines: list[Line], out: str, task: dict, top1: Callable, workers: int) -> None:
    """Writes the chunks that are not there yet."""
    waiting = collections.deque()  # chunks under way; two, so that one long video does not hold up the others
    with pool(workers, task["rule"].limits) as submit, progress(len(lines)) as done:
        for number, chunk in enumerate([*steps.chunks_of(lines), None]):
            if chunk:
                path = steps.chunk_path(out, number)
                skip = storage.exists(path)  # by an earlier run
                waiting.append(
                    (
                        path,
                        len(chunk),
                        None if skip else [submit(_decide_one, line, task, top1, done) for line in chunk],
                    )
                )
            while waiting and (len(waiting) > 1 or not chunk):
                path, count, futures = waiting.popleft()
                if futures is None:
                    done(count)
                else:
                    storage.write(path, steps.as_lines([future.result() for future in futures]))


def _decide_one(sandbox: Sandbox, line: Line, task: dict, top1: Callable, done: Callable) -> dict:
    decision = steps.decide(line, **task, sandbox=sandbox, top1=top1)
    done(1)
    return decision
