"""Curation by the workers of a Beam runner; see steps.py.

manifest -> chunks of its lines -> spread over the workers -> worker: fetch, sandbox, classifier, chunk-C
"""

import logging
from collections.abc import Callable, Iterator

import apache_beam as beam

from input_pipeline import storage
from input_pipeline.curation import steps
from input_pipeline.curation.steps import Line
from input_pipeline.preparation import beam_runner
from input_pipeline.preparation.sandbox import Sandbox
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)


def decide(manifest: str, out: str, task: dict, load: Callable, classifier_sha256: str, options: list[str]) -> None:
    """Writes the chunks of decisions that are not there yet.

    Args:
      task: keyword arguments of steps.decide that are the same for all lines.
      load: () -> evaluation.encoders.FrameClassifier, called once by each worker.
      classifier_sha256: the beginning of what its `sha256` must be.
      options: Beam's, see beam_runner.parse.

    Raises:
      DataError: a worker's.
    """
    decide_chunk = DecideChunk(out, task, load, classifier_sha256)
    beam_runner.run(
        beam_runner.parse(options),
        lambda pipeline: (
            pipeline
            | "Manifest" >> beam.Create([manifest])
            | "Chunks" >> beam.FlatMap(read_chunks)
            | "Spread" >> beam.Reshuffle()
            | "Decide" >> beam.ParDo(decide_chunk)
        ),
    )


def read_chunks(manifest: str) -> Iterator[tuple[int, list[Line]]]:
    """Numbered chunks of a manifest. A worker reads it, because a pipeline's own data are limited to a few MB."""
    yield from enumerate(steps.chunks_of(steps.read_manifest(manifest)))


class DecideChunk(beam.DoFn):
    """Decides on a chunk of lines, unless that is done. Two workers may do the same one: they write the same bytes."""

    def __init__(self, out: str, task: dict, load: Callable, classifier_sha256: str):
        self._out, self._task, self._load, self._sha256 = out, task, load, classifier_sha256

    def setup(self):
        model = self._load()
        if not model.sha256.startswith(self._sha256):
            raise DataError(
                "this worker loaded another classifier than the command: give a path at which all workers "
                "find the same file"
            )
        self._top1, self._sandbox = model.top1, Sandbox(**self._task["rule"].limits)

    def teardown(self):
        self._sandbox.close()

    def process(self, numbered: tuple[int, list[Line]]):
        number, lines = numbered
        path = steps.chunk_path(self._out, number)
        if storage.exists(path):
            return
        decisions = [steps.decide(line, **self._task, sandbox=self._sandbox, top1=self._top1) for line in lines]
        storage.write(path, steps.as_lines(decisions))
        kept = sum(decision["status"] == "kept" for decision in decisions)
        beam.metrics.Metrics.counter("curate", "lines").inc(len(decisions))
        beam.metrics.Metrics.counter("curate", "kept").inc(kept)
        _LOG.info("chunk %d: %d lines, %d kept", number + 1, len(decisions), kept)
