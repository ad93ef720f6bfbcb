"""Scores an encoder on DAVIS 2017 by label propagation (VITO §3.2, A.2: VFS's procedure), or scores saved masks.

    python -m evaluation.davis --checkpoint=RUN_OR_FILE --data=DAVIS --protocol=vfs|crw --workdir=DIR
    python -m evaluation.davis --results=MASKS --data=DAVIS --workdir=DIR

Nothing is trained. DIR/masks/SEQUENCE/00000.png are the results in the official layout,
DIR/videos/SEQUENCE.mp4 shows them over the frames, DIR/davis.json and .md hold J and F with their recall and decay.
A sequence that is done is not done again, so the command may be killed and started again. Sequences of which only the
first frame has a mask (test-dev) get results and no score.
"""

import argparse
import dataclasses
import os
import pathlib

from evaluation import encoders
from evaluation.protocols.davis import data as davis_data
from evaluation.protocols.davis.evaluate import choose_protocol, evaluate, markdown, score, summary
from evaluation.protocols.davis.propagate import PROTOCOLS
from input_pipeline.folders import Finder
from vivi_jax import checkpoint, command_line, files, lock


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("evaluation.davis", __doc__)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--checkpoint", help="run directory, or file of weights")
    given.add_argument("--results", help="folder of masks in the official layout, to be scored only")
    parser.add_argument("--data", required=True, help="DAVIS, with JPEGImages, Annotations and ImageSets")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="vfs")
    # --out: its name in 0.1.0, for one more release
    parser.add_argument("--workdir", "--out", required=True, help="folder for masks, videos and scores")
    parser.add_argument("--sequences", help="names, comma-separated; by default ImageSets/2017/val.txt")
    parser.add_argument(
        "--short_side", type=int, help="pixels of the frames' short side, other than the protocol's: for a quick look"
    )
    command_line.run_parser(run, parser, argv, remote=["checkpoint"], copied=["data", "results"])


def run(options: argparse.Namespace) -> None:
    """Writes and prints the scores, after propagating the masks unless they are given."""
    workdir = pathlib.Path(options.workdir)
    with lock.hold(options.workdir):
        result = score_results(options) if options.results else propagate(options, workdir)
        files.write_json(workdir / "davis.json", result)
        files.write_text(workdir / "davis.md", markdown(result))
    print(markdown(result))


def load_sequences(options: argparse.Namespace) -> list[davis_data.Sequence]:
    return davis_data.load(options.data, options.sequences.split(",") if options.sequences else None)


def score_results(options: argparse.Namespace) -> dict:
    """The content of davis.json for saved masks."""
    masks = Finder(options.results)
    found = {
        sequence.name: score(sequence, masks.find(sequence.name) or pathlib.Path(options.results, sequence.name))
        for sequence in load_sequences(options)
    }
    return {"source": options.results, "protocol": "saved masks", "data": options.data, **summary(found)}


def propagate(options: argparse.Namespace, workdir: pathlib.Path) -> dict:
    """The content of davis.json for an encoder."""
    encoder, variables, _ = encoders.load_encoder(options.checkpoint)
    sequences = load_sequences(options)
    protocol = choose_protocol(options.protocol, encoder, options.short_side)
    settings = dataclasses.asdict(protocol)
    identity = {
        "config": settings,
        "data": os.path.realpath(options.data),
        "encoder_sha256": checkpoint.state_sha256(variables),
    }
    files.claim(workdir / "evaluation.json", identity)
    found = evaluate(encoder, variables, sequences, protocol, workdir)
    return {
        "source": options.checkpoint,
        "protocol": options.protocol,
        "settings": settings,
        "data": options.data,
        **found,
    }


if __name__ == "__main__":
    main()
