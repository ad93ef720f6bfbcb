"""Fine-tunes an encoder on action recognition and scores it: VDIM's protocol, or VITO's for image encoders.

    python -m evaluation.action --config=configs/action.py:ucf101_vdim --checkpoint=RUN_OR_FILE|none --data=DIR \\
        --split=1|2|3|all --workdir=DIR

--data is videos with UCF-101's or HMDB-51's official lists among them, class folders, frame stores, or the word ucf101
for TFDS's: see evaluation/protocols/action/data.py. Videos are decoded once, into WORKDIR/store. Each split trains in
WORKDIR/split_N like any run of vivi_jax.main: started again, the command goes on where it was. --checkpoint=none trains
from random weights.
The score is the share of test videos whose class has the largest probability, averaged over the windows of the video:
WORKDIR/result.json and result.md.
"""

import functools
import pathlib

from absl import flags

from evaluation.protocols import sweep
from evaluation.protocols.action.evaluate import evaluate, markdown
from vivi_jax import command_line


def main(values: dict) -> None:
    result = sweep.evaluate(
        functools.partial(evaluate, store=str(pathlib.Path(values["workdir"], "store"))),
        values["config"],
        sweep=values["sweep"],
        source=values["checkpoint"],
        data=values["data"],
        splits=values["split"],
        workdir=values["workdir"],
    )
    print(markdown(result))


if __name__ == "__main__":
    command_line.run(
        main,
        command_line.protocol_flags(
            config="configs/action.py:ucf101_vdim",
            data="videos with split lists, class folders, or frame stores",
            workdir="folder for frame stores, runs and results",
        )
        | {"split": flags.DEFINE_enum("split", "1", ("1", "2", "3", "all"), "which official split")},
        remote=["checkpoint"],
        copied=["data"],
    )
