"""Fine-tunes an encoder on semantic segmentation and scores it: VITO's protocol on PASCAL VOC and ADE20K.

    python -m evaluation.segmentation --config=configs/segmentation.py:voc|ade20k|own --checkpoint=RUN_OR_FILE|none \\
        --data=DIR --workdir=DIR

--data is the official folder of the data set, or one of own images and masks, see docs/segmentation.md; all masks are
read and checked before training. Each repeat trains in WORKDIR/repeat_N like any run of vivi_jax.main: started again,
the command goes on where it was. --checkpoint=none trains from random weights. The score is the mean over classes of
intersection over union (mIoU) on the validation images, averaged over the repeats: WORKDIR/result.json and result.md.
WORKDIR/repeat_N/predictions.png shows predictions over their images.
"""

from evaluation.protocols import sweep
from evaluation.protocols.segmentation.evaluate import evaluate
from evaluation.protocols.segmentation.report import markdown
from vivi_jax import command_line


def main(values: dict) -> None:
    result = sweep.evaluate(
        evaluate,
        values["config"],
        sweep=values["sweep"],
        source=values["checkpoint"],
        data=values["data"],
        workdir=values["workdir"],
    )
    print(markdown(result))


if __name__ == "__main__":
    command_line.run(
        main,
        command_line.protocol_flags(
            config="configs/segmentation.py:voc",
            data="VOC2012 (with SBD), ADEChallengeData2016, or own images/ and masks/",
            workdir="folder for runs, pictures and results",
        ),
        remote=["checkpoint"],
        copied=["data"],
    )
