"""Prepares millions of videos on many machines: prepare.py as a pipeline of Apache Beam, same flags, same bytes.

    python -m input_pipeline.prepare_beam --videos=gs://BUCKET/VIDEOS --out=gs://BUCKET/STORE --runner=NAME ...

Flags that are not prepare's are Beam's: --runner (DirectRunner by default) and the runner's own, for Dataflow, Flink or
Spark; launch/beam.sh fills them in. Paths may be local, or in a bucket. Started again after a kill, the same command
goes on where it was, and so does prepare.py where OUT is local.

    plan.json -> number and inputs of each shard -> spread over the workers
              -> worker: fetch, sandbox, shard, one video at a time; then OUT/.partial/rows-S.json
    all rows  -> ledger, index and meta, by the command itself

Only the names of inputs travel between the workers, never a frame. A worker that dies loses the shard it was making.
"""

import time

from absl import app, flags

from input_pipeline.preparation import flags as shared_flags
from input_pipeline.preparation.beam import prepare_with_beam
from input_pipeline.preparation.local import summary
from vivi_jax import command_line


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    started = time.monotonic()
    made = prepare_with_beam(
        values.videos,
        values.out,
        argv[1:],
        shared_flags.settings_of(values),
        labels=values.labels,
        labelled_only=values.labelled_only,
        only=values.only,
    )
    print(summary(values.out))
    print(
        f"{values.out}: "
        + (f"written in {time.monotonic() - started:.0f} s" if made else "was complete already; nothing to do")
    )


if __name__ == "__main__":
    shared_flags.define_flags()
    command_line.ended(lambda: app.run(main, flags_parser=shared_flags.parse_known_flags), resumes=True)
