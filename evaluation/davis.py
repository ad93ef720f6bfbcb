"""Scores an encoder on DAVIS 2017 by label propagation (VITO §3.2, A.2: VFS's procedure), or scores saved masks.

    python -m evaluation.davis --checkpoint=RUN_OR_FILE --data=DAVIS --protocol=vfs|crw --out=DIR
    python -m evaluation.davis --results=MASKS --data=DAVIS --out=DIR

The encoder is used as it is, nothing is trained. DIR/masks/SEQUENCE/00000.png are the results in the official layout,
DIR/videos/SEQUENCE.mp4 shows them over the frames, DIR/davis.json and .md hold J and F with their recall and decay.
A sequence that is done is not done again, so the command may be killed and started again. Sequences of which only the
first frame has a mask (test-dev) get results and no score.
"""

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import sys

from evaluation import encoders
from evaluation.protocols.davis import data as davis_data
from evaluation.protocols.davis.evaluate import choose_protocol, evaluate, markdown, score, summary
from evaluation.protocols.davis.propagate import PROTOCOLS
from evaluation.transfer import claim, write
from vivi_jax import checkpoint
from vivi_jax.errors import CheckpointError, ConfigError, DataError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.davis", description=__doc__.split("\n")[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--checkpoint", help="run directory, or .safetensors file")
    given.add_argument("--results", help="folder of masks in the official layout, to be scored only")
    parser.add_argument("--data", required=True, help="DAVIS, with JPEGImages, Annotations and ImageSets")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="vfs")
    parser.add_argument("--out", required=True, help="folder for masks, videos and scores")
    parser.add_argument("--sequences", help="names, comma-separated; by default ImageSets/2017/val.txt")
    parser.add_argument(
        "--short_side", type=int, help="pixels of the frames' short side, other than the protocol's: for a quick look"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("evaluation.davis").setLevel(logging.INFO)
    try:
        result = run(args)
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    out = pathlib.Path(args.out)
    write(out / "davis.json", json.dumps(result, indent=1) + "\n")
    write(out / "davis.md", markdown(result))
    print(markdown(result))


def run(args: argparse.Namespace) -> dict:
    """The content of davis.json."""
    names = args.sequences.split(",") if args.sequences else None
    out, source = pathlib.Path(args.out), args.checkpoint or args.results
    if args.results:
        sequences = davis_data.load(args.data, names)
        out.mkdir(parents=True, exist_ok=True)
        found = summary(
            {sequence.name: score(sequence, pathlib.Path(args.results, sequence.name)) for sequence in sequences}
        )
        return {"source": source, "protocol": "saved masks", "data": args.data, **found}
    encoder, variables, _ = encoders.load_encoder(args.checkpoint)
    sequences = davis_data.load(args.data, names)
    protocol = choose_protocol(args.protocol, encoder, args.short_side)
    claim(
        out,
        {
            "config": dataclasses.asdict(protocol),
            "data": os.path.realpath(args.data),
            "encoder_sha256": checkpoint.state_sha256(variables),
        },
    )
    found = evaluate(encoder, variables, sequences, protocol, out)
    return {
        "source": source,
        "protocol": args.protocol,
        "settings": dataclasses.asdict(protocol),
        "data": args.data,
        **found,
    }


if __name__ == "__main__":
    main()
