"""Runs a Beam pipeline: its options are checked first, and a worker's DataError becomes the command's."""

import logging
import re
from collections.abc import Callable

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from vivi_jax.errors import DataError

# Beam's DirectRunner first tries to fetch an executable (Prism) from the net, and to run the pipeline there; where that
# fails it goes on with its FnApiRunner. Here it is the FnApiRunner from the start: nothing is fetched.
DIRECT_RUNNERS, FETCHES_NOTHING = {"direct", "directrunner", "switchingdirectrunner"}, "FnApiRunner"
_OURS = re.compile(r"(?:DataError|Unreadable): (.*?)(?: \[while running '.*)?$", re.MULTILINE)


def parse(options: list[str]) -> PipelineOptions:
    """Options for a pipeline, such as ["--runner=DirectRunner", "--direct_num_workers=4"].

    DirectRunner, which is the default, means that workers are threads or processes of this machine.

    Raises:
      DataError: one that Beam does not know.
    """
    parsed = PipelineOptions(options)
    known = parsed.get_all_options()
    if unknown := sorted(parsed.get_all_options(retain_unknown_options=True).keys() - known.keys()):
        raise DataError(f"unknown option --{unknown[0]}: it is neither this command's nor one of Beam's")
    standard = parsed.view_as(StandardOptions)
    if (standard.runner or "direct").lower() in DIRECT_RUNNERS:
        standard.runner = FETCHES_NOTHING
    return parsed


def run(options: PipelineOptions, build: Callable[[beam.Pipeline], object]) -> None:
    """Runs the pipeline that `build` fills, to its end.

    Raises:
      DataError: a worker's; other errors of workers are raised as Beam raises them.
    """
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # its stack traces would hide the line that counts
    try:
        with beam.Pipeline(options=options) as pipeline:
            build(pipeline)
    except Exception as e:
        text = f"DataError: {e}" if isinstance(e, DataError) else str(e)
        if found := _OURS.findall(text):
            raise DataError(found[-1]) from e
        raise
