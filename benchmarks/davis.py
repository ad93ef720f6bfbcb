"""What pretraining on rendered videos is worth for label propagation on real ones: DAVIS with three encoders.

    python -m benchmarks.davis --data=DAVIS [--seeds=0,1,2] [--short_side=96] [--out=runs/learning]

The encoders are those of benchmarks.transfer (VITO's runs are done here where they are not), the protocol is VFS's on
frames of a small short side, the sequences those of DAVIS's val.txt. `first mask kept` propagates nothing: the floor.
Writes docs/results/davis.json.
"""

import argparse
import json
import pathlib
import statistics

from benchmarks import learning, transfer
from benchmarks.results import record
from evaluation.protocols.davis import data as davis_data
from evaluation.protocols.davis import evaluate as davis
from evaluation.protocols.davis.metrics import overall, score_sequence

MEASURES = ("J&F", "J_mean", "F_mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="DAVIS, with masks of all frames")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--short_side", type=int, default=96)
    parser.add_argument("--out", default="runs/learning", help="folder for videos and runs")
    args = parser.parse_args()
    out, seeds = pathlib.Path(args.out), [int(seed) for seed in args.seeds.split(",")]
    learning.prepare(out)
    sequences = davis_data.load(args.data, None)

    kept = [objects for sequence in sequences for objects in score_sequence(sequence, lambda _, s=sequence: s.mask(0))]
    scores, seconds = {"first mask kept": [overall(kept)]}, []
    for seed in seeds:
        for kind, encoder, variables in transfer.encoders(out, seed):
            protocol = davis.choose_protocol("vfs", encoder, args.short_side)
            result = davis.evaluate(encoder, variables, sequences, protocol, out / "davis" / f"{kind}-{seed}")
            scores.setdefault(kind, []).append(result["scores"])
            seconds.append(result["seconds_per_frame"])
            print(json.dumps({"encoder": kind, "seed": seed, **result["scores"]}), flush=True)

    rows = [
        {
            "encoder": kind,
            "measure": measure,
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
        for kind, found in scores.items()
        for measure in MEASURES
        for values in [[score[measure] for score in found]]
    ]
    values = {
        "rows": rows,
        "short_side": args.short_side,
        "seconds_per_frame": statistics.median(seconds),
        "frames": {sequence.name: len(sequence.frames) for sequence in sequences},
    }
    path = record(
        "davis",
        values,
        seeds=seeds,
        command=f"python -m benchmarks.davis --data=DIR --seeds={args.seeds} --short_side={args.short_side}",
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
