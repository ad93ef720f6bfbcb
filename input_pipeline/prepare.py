"""Prepares videos for training: decodes them once, finds their shots, writes a frame store.

    python -m input_pipeline.prepare --videos=DIR_OR_GLOB --out=DIR [--labels=CSV] [--workers=N] [--contact_sheet]

Every file under DIR (hidden ones apart) is an input, and every input has one line in OUT/ledger.jsonl: ok, or refused
and why; its `notes` say what is unusual, such as a variable rate with pauses, or untagged colours. Started again after
a kill, a crash or a full disk, the same command goes on where it was. A complete store it leaves as it is, unless
--grow is given and there are new files, or --retry, and the ledger has files for another try. The files written do not
depend on the number of workers or of interruptions (a file near its time limit may).

    inputs -> sandbox.Sandbox: frames of one video in OUT/.partial/I.jpegs, then its row in I.json
           -> a shard for each `videos_per_shard` inputs, in sorted order, then its rows in .partial/rows-S.json
           -> ledger, index and meta; .partial goes

For many machines, or paths into a bucket: prepare_beam.py, which takes the same flags and writes the same bytes.
"""

import time

from absl import app, flags

from input_pipeline import store
from input_pipeline.preparation import flags as shared_flags
from input_pipeline.preparation.local import prepare, summary
from vivi_jax import command_line, files
from vivi_jax.errors import DataError

BY_BEAM = "python -m input_pipeline.prepare_beam takes the same flags, also with paths in buckets"


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    started = time.monotonic()
    if len(argv) > 1:
        raise DataError(f"unexpected argument {argv[1]}; quote the pattern: --videos='DIR/*.mp4'")
    for name in ("videos", "out", "labels", "only"):
        files.refuse_remote(f"--{name}", values[name].value, BY_BEAM)
    made = prepare(
        values.videos,
        values.out,
        shared_flags.settings_of(values),
        labels=values.labels,
        labelled_only=values.labelled_only,
        only=values.only,
        workers=values.workers,
        retry=values.retry,
        grow=values.grow,
    )
    print(summary(values.out))
    if values.contact_sheet:
        from input_pipeline.preparation import contact_sheet

        print(f"contact sheet: {contact_sheet.write(values.out)}")
    print(
        f"{values.out}: "
        + (f"written in {time.monotonic() - started:.0f} s" if made else "was complete already; nothing to do")
    )
    prepared = store.FrameStore(values.out)  # refuses a store without a single video
    if prepared.shots_may_hold_cuts:
        print(f"{values.out}: {store.OLD_SHOTS}, into another --out")


if __name__ == "__main__":
    shared_flags.define_flags()
    flags.DEFINE_integer("workers", None, "files decoded at a time; default: one per core", lower_bound=1)
    flags.DEFINE_bool(
        "retry",
        False,
        "of a complete store, decode the files that are for another try; it becomes another store, with another id",
    )
    flags.DEFINE_bool(
        "grow",
        False,
        "add to a complete store the files that it lacks; it becomes another store, with another id",
    )
    flags.DEFINE_bool("contact_sheet", False, "also write OUT/contact_sheet.png, a picture of the shots found")
    command_line.ended(lambda: app.run(main), resumes=True)
