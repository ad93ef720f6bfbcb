"""Says of every checkpoint of a run whether it is good; exits with code 1 if one is not.

    python -m vivi_jax.checkpoint verify RUN

Good: every file is as the manifest says, and all values are finite. Nothing is changed. RUN may be in a bucket; each
checkpoint is then copied to a temporary folder.
"""

import argparse
import pathlib
import sys
import tempfile

import jax

from vivi_jax import command_line
from vivi_jax.buckets.places import InBucket
from vivi_jax.checkpoint import copies, manifest, states
from vivi_jax.errors import CheckpointError


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("vivi_jax.checkpoint", __doc__)
    parser.add_argument("action", choices=("verify",))
    parser.add_argument("run", help="run directory")
    command_line.run_parser(verify, parser, argv, remote=["run"])


def verify(options: argparse.Namespace) -> None:
    """Prints a line per checkpoint."""
    jax.config.update("jax_platforms", "cpu")  # the accelerator may be a running training's
    directory = states.directory_of(options.run)
    steps = manifest.steps(directory)
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}: is {options.run} a run directory?")
    problems = {step: problem_of(directory, step) for step in steps}
    for step, problem in problems.items():
        print(f"{directory / str(step)}: {problem or 'good'}")
    if any(problems.values()):
        sys.exit(1)


def problem_of(directory: pathlib.Path | InBucket, step: int) -> str | None:
    if isinstance(directory, InBucket):
        with tempfile.TemporaryDirectory(prefix="vivi_jax_verify_") as scratch:
            return copies.copy_step(directory, pathlib.Path(scratch), step) or problem_of(pathlib.Path(scratch), step)
    problem = manifest.verify(directory / str(step))
    if problem is None and not states.all_finite(states.read(directory, step)):
        return "it holds values that are not finite"
    return problem


if __name__ == "__main__":
    main()
