"""Prepares millions of videos on many machines: prepare.py as a pipeline of Apache Beam, same flags, same bytes.

    python -m input_pipeline.prepare_beam --videos=gs://BUCKET/VIDEOS --out=gs://BUCKET/STORE --runner=NAME ...

Flags that are not prepare's are Beam's: --runner (DirectRunner by default) and the runner's own, for Dataflow, Flink or
Spark; launch/beam.sh fills them in. Paths may be local, or in a bucket. Started again after a kill, the same command
goes on where it was, and so does prepare.py where OUT is local.

    plan.json -> number and inputs of each shard -> spread over the workers
              -> worker: fetch, sandbox, shard, one video at a time; then OUT/.partial/rows-S.json
    all rows  -> ledger, index and meta, by the command itself

Only the names of inputs travel between the workers, never a frame. A worker that dies loses the shard it was at.
"""
import concurrent.futures
import functools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import apache_beam as beam
from absl import app, flags

from input_pipeline import beam_runner, files, inputs, preparation, prepare, store
from input_pipeline.preparation import Settings
from input_pipeline.sandbox import Sandbox
from input_pipeline.store import DataError

_LOG = logging.getLogger(__name__)
_READS_AT_A_TIME = 32


class Shard(NamedTuple):
    """The work on one shard."""
    number: int
    count: int  # of all shards
    inputs: list[inputs.Input]


def prepare_with_beam(videos: str, out: str, options: list[str], settings: Settings = prepare.DEFAULT, *,
                      labels: str = "", labelled_only: bool = False) -> bool:
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
            shards_of_plan = functools.partial(read_plan, root=inputs.root_of(videos),
                                               per_shard=settings.videos_per_shard)
            make_shard = MakeShard(out, settings, preparation.software())
            beam_runner.run(beam_options, lambda pipeline: (
                pipeline | "Plan" >> beam.Create([preparation.plan_path(partial)])
                | "Shards" >> beam.FlatMap(shards_of_plan) | "Spread" >> beam.Reshuffle()
                | "Make" >> beam.ParDo(make_shard)))
            preparation.finish(out, plan, _read_rows(partial, len(plan.shards)))
    except OSError as e:
        raise DataError(prepare.cannot_write(out, e)) from e
    return True


def read_plan(path: str, *, root: str, per_shard: int) -> Iterator[Shard]:
    """The shards of a plan.json. A worker reads it, because a runner takes a few MB with the pipeline at most."""
    named = json.loads(files.read(path))["inputs"]
    shards = preparation.shards_of(len(named), per_shard)
    for number, members in enumerate(shards):
        yield Shard(number, len(shards), [inputs.Input(named[i][0], files.join(root, named[i][0]), named[i][1])
                                          for i in members])


class MakeShard(beam.DoFn):
    """Makes a shard, unless it is there. Twice at the same time does no harm: the bytes are the same."""

    def __init__(self, out: str, settings: Settings, software: dict):
        self._out, self._settings, self._software = out, settings, software

    def setup(self):
        if preparation.software() != self._software:
            raise DataError(f"this worker has {preparation.software()}, the command was started with {self._software}; "
                            "their bytes would differ: use the same versions, in a container (launch/Dockerfile)")
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


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    started = time.monotonic()
    try:
        made = prepare_with_beam(values.videos, values.out, argv[1:], prepare.settings_of(values), labels=values.labels,
                                 labelled_only=values.labelled_only)
        print(prepare.summary(values.out))
        print(f"{values.out}: " + (f"written in {time.monotonic() - started:.0f} s" if made else
                                   "was complete already; nothing to do"))
    except DataError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again, it goes on")


def run() -> None:
    """The command."""
    prepare.define_flags()
    app.run(main, flags_parser=prepare.parse_known_flags)


if __name__ == "__main__":
    from input_pipeline import prepare_beam  # by its name: what is sent to the workers must not be of "__main__"
    prepare_beam.run()
