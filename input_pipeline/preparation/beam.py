"""Preparation on many machines, as a pipeline of Apache Beam. It writes the same bytes as local.py."""

import concurrent.futures
import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import apache_beam as beam

from input_pipeline import storage, store
from input_pipeline.preparation import beam_runner, inputs, steps
from input_pipeline.preparation.local import DEFAULT, cannot_write
from input_pipeline.preparation.sandbox import Sandbox
from input_pipeline.preparation.steps import Settings
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
_READS_AT_A_TIME = 32
_TRIES = 3  # of a file whose decoder is killed from outside


class Shard(NamedTuple):
    """The work on one shard."""

    number: int
    count: int  # of all shards
    inputs: list[inputs.Input]


def prepare_with_beam(
    videos: str,
    out: str,
    options: list[str],
    settings: Settings = DEFAULT,
    *,
    labels: str = "",
    labelled_only: bool = False,
    only: str = "",
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
    videos, out = storage.absolute(videos), storage.absolute(out)
    plan = steps.make_plan(videos, out, settings, labels=labels, labelled_only=labelled_only, only=only)
    try:
        if steps.is_complete(out, plan):
            steps.remove_left(out)
            return False
        with steps.begin(out, plan) as partial:
            shards_of_plan = functools.partial(
                read_plan, root=inputs.root_of(videos), per_shard=settings.videos_per_shard
            )
            make_shard = MakeShard(out, settings, steps.software(), plan.id)
            beam_runner.run(
                beam_options,
                lambda pipeline: (
                    pipeline
                    | "Plan" >> beam.Create([steps.plan_path(partial)])
                    | "Shards" >> beam.FlatMap(shards_of_plan)
                    | "Spread" >> beam.Reshuffle()
                    | "Make" >> beam.ParDo(make_shard)
                ),
            )
            steps.finish(out, plan, _read_packed(out, plan))
    except OSError as e:
        raise DataError(cannot_write(out, e)) from e
    return True


def read_plan(path: str, *, root: str, per_shard: int) -> Iterator[Shard]:
    """The shards of a plan.json. A worker reads it, because a pipeline's own data are limited to a few MB."""
    plan = steps.unsealed(storage.read(path))
    if plan is None:
        raise DataError(f"{path} was changed while the preparation ran; run the same command again, it goes on")
    named = plan["inputs"]
    shards = steps.shards_of(store.parts_of(len(named), plan.get("grown", [])), per_shard)
    for number, members in enumerate(shards):
        yield Shard(
            number,
            len(shards),
            [inputs.Input(named[i][0], storage.join(root, named[i][0]), named[i][1]) for i in members],
        )


class MakeShard(beam.DoFn):
    """Makes a shard, unless it is there. Two workers may make the same one at once: they write the same bytes."""

    def __init__(self, out: str, settings: Settings, software: dict, plan_id: str):
        self._out, self._settings, self._software, self._plan_id = out, settings, software, plan_id

    def setup(self):
        if steps.software() != self._software:
            raise DataError(
                f"this worker has {steps.software()}, the command was started with {self._software}; "
                "their bytes would differ: use the same versions, in a container (launch/Dockerfile)"
            )
        self._sandbox = Sandbox(**self._settings.limits)

    def teardown(self):
        self._sandbox.close()

    def process(self, shard: Shard):
        partial = steps.partial_of(self._out)
        rows_path = steps.rows_path(partial, shard.number)
        if storage.exists(rows_path) and steps.unsealed_part(storage.read(rows_path), self._plan_id):
            return  # made by an earlier run, or another worker
        try:
            with tempfile.TemporaryDirectory(dir=None if storage.is_remote(self._out) else partial) as scratch:
                name = store.shard_name(shard.number, shard.count)
                packed = steps.pack(os.path.join(scratch, name), self._decoded(shard, scratch))
                storage.put(os.path.join(scratch, name), storage.join(self._out, name))
                storage.write(rows_path, steps.sealed_part(packed, self._plan_id))
        except OSError as e:
            raise DataError(cannot_write(self._out, e)) from e
        except steps.FramesDamaged as e:
            raise DataError(f"frames changed on the disk of a worker before they were packed ({self._out})") from e
        refused = sum(row["status"] == "refused" for row in packed["rows"])
        beam.metrics.Metrics.counter("prepare", "inputs").inc(len(packed["rows"]))
        beam.metrics.Metrics.counter("prepare", "refused").inc(refused)
        _LOG.info("shard %d of %d: %d inputs, %d refused", shard.number + 1, shard.count, len(packed["rows"]), refused)

    def _decoded(self, shard: Shard, scratch: str) -> Iterator[tuple[dict, str]]:
        """(row, its frame file) of each input; on disk there is one of them at a time."""
        frame_file = os.path.join(scratch, "frames")
        for file in shard.inputs:
            if not storage.is_remote(file.path):
                yield steps.decode(self._sandbox, file, file.path, frame_file, self._settings, tries=_TRIES), frame_file
                continue
            copy = os.path.join(scratch, "input" + os.path.splitext(file.path)[1])  # FFmpeg looks at the ending too
            try:
                storage.fetch(file.path, copy)
            except storage.Unreadable as e:
                row = {"input": file.name, "bytes": file.bytes, "status": "refused", "reason": f"unreadable: {e}"}
                yield row, frame_file
                continue
            yield steps.decode(self._sandbox, file, copy, frame_file, self._settings, tries=_TRIES), frame_file
            os.unlink(copy)


def _read_packed(out: str, plan: steps.Plan) -> Iterator[dict | None]:
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_A_TIME) as pool:
        yield from pool.map(functools.partial(steps.read_packed, out, plan), range(len(plan.shards)))
