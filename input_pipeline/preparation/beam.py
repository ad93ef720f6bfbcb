"""Preparation on many machines, as a pipeline of Apache Beam. It writes the same bytes as local.py."""

import concurrent.futures
import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import apache_beam as beam

from input_pipeline import beam_runner, store
from input_pipeline import remote_files as files
from input_pipeline.preparation import inputs
from input_pipeline.preparation import local as prepare
from input_pipeline.preparation import plan as preparation
from input_pipeline.preparation.plan import Settings
from input_pipeline.preparation.sandbox import Sandbox
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
_READS_AT_A_TIME = 32


class Shard(NamedTuple):
    """The work on one shard."""

    number: int
    count: int  # of all shards
    inputs: list[inputs.Input]


def prepare_with_beam(
    videos: str,
    out: str,
    options: list[str],
    settings: Settings = prepare.DEFAULT,
    *,
    labels: str = "",
    labelled_only: bool = False,
) -> bool:
    """prepare.prepare, done by the workers of a Beam runner.

    Args:
      options: Beam's, see beam_runner.parse.

    Returns:
      False if the store was complete already.

    Raises:
      DataError: as prepare.prepare; a bucket that does not let us; an option that Beam does not know.
    """
    beam_options = beam_runner.parse(options)
    videos, out = files.absolute(videos), files.absolute(out)
    plan = preparation.make_plan(videos, out, settings, labels=labels, labelled_only=labelled_only)
    try:
        if preparation.is_complete(out, plan):
            return False
        with preparation.begin(out, plan) as partial:
            shards_of_plan = functools.partial(
                read_plan, root=inputs.root_of(videos), per_shard=settings.videos_per_shard
            )
            make_shard = MakeShard(out, settings, preparation.software())
            beam_runner.run(
                beam_options,
                lambda pipeline: (
                    pipeline
                    | "Plan" >> beam.Create([preparation.plan_path(partial)])
                    | "Shards" >> beam.FlatMap(shards_of_plan)
                    | "Spread" >> beam.Reshuffle()
                    | "Make" >> beam.ParDo(make_shard)
                ),
            )
            preparation.finish(out, plan, _read_rows(partial, len(plan.shards)))
    except OSError as e:
        raise DataError(prepare.cannot_write(out, e)) from e
    return True


def read_plan(path: str, *, root: str, per_shard: int) -> Iterator[Shard]:
    """The shards of a plan.json. A worker reads it, because a runner takes a few MB with the pipeline at most."""
    named = json.loads(files.read(path))["inputs"]
    shards = preparation.shards_of(len(named), per_shard)
    for number, members in enumerate(shards):
        yield Shard(
            number,
            len(shards),
            [inputs.Input(named[i][0], files.join(root, named[i][0]), named[i][1]) for i in members],
        )


class MakeShard(beam.DoFn):
    """Makes a shard, unless it is there. Twice at the same time does no harm: the bytes are the same."""

    def __init__(self, out: str, settings: Settings, software: dict):
        self._out, self._settings, self._software = out, settings, software

    def setup(self):
        if preparation.software() != self._software:
            raise DataError(
                f"this worker has {preparation.software()}, the command was started with {self._software}; "
                "their bytes would differ: use the same versions, in a container (launch/Dockerfile)"
            )
        self._sandbox = Sandbox(**self._settings.limits)

    def teardown(self):
        self._sandbox.close()

    def process(self, shard: Shard):
        partial = preparation.partial_of(self._out)
        rows_path = preparation.rows_path(partial, shard.number)
        if files.exists(rows_path):  # by an earlier run, or another worker
            return
        try:
            with tempfile.TemporaryDirectory(dir=None if files.is_remote(self._out) else partial) as scratch:
                name = store.shard_name(shard.number, shard.count)
                packed = preparation.pack(os.path.join(scratch, name), self._decoded(shard, scratch))
                files.put(os.path.join(scratch, name), files.join(self._out, name))
                files.write(rows_path, json.dumps(packed).encode())
        except OSError as e:
            raise DataError(prepare.cannot_write(self._out, e)) from e
        refused = sum(row["status"] == "refused" for row in packed["rows"])
        beam.metrics.Metrics.counter("prepare", "inputs").inc(len(packed["rows"]))
        beam.metrics.Metrics.counter("prepare", "refused").inc(refused)
        _LOG.info("shard %d of %d: %d inputs, %d refused", shard.number + 1, shard.count, len(packed["rows"]), refused)

    def _decoded(self, shard: Shard, scratch: str) -> Iterator[tuple[dict, str]]:
        """(row, spool) of each input; on disk there is one of them at a time."""
        spool = os.path.join(scratch, "spool")
        for file in shard.inputs:
            if not files.is_remote(file.path):
                yield preparation.decode(self._sandbox, file, file.path, spool, self._settings), spool
                continue
            copy = os.path.join(scratch, "input" + os.path.splitext(file.path)[1])  # FFmpeg looks at the ending too
            try:
                files.fetch(file.path, copy)
            except files.Unreadable as e:
                row = {"input": file.name, "bytes": file.bytes, "status": "refused", "reason": f"unreadable: {e}"}
                yield row, spool
                continue
            yield preparation.decode(self._sandbox, file, copy, spool, self._settings), spool
            os.unlink(copy)


def _read_rows(partial: str, count: int) -> Iterator[dict]:
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_A_TIME) as pool:
        for data in pool.map(files.read, (preparation.rows_path(partial, shard) for shard in range(count))):
            yield json.loads(data)
