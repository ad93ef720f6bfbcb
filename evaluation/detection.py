"""Fine-tunes an encoder on object detection and scores its boxes: VITO's FCOS* on COCO and LVIS, or RetinaNet.

    python -m evaluation.detection --config=configs/detection.py:coco|lvis|retinanet --checkpoint=RUN_OR_FILE|none \\
        --data=DIR --workdir=DIR

--data holds images and annotation files in COCO's form: docs/detection.md. Each repeat trains in WORKDIR/repeat_N like
any run of vivi_jax.main: started again, the command goes on where it was. --checkpoint=none trains from random weights.
WORKDIR/repeat_N/detections.json holds the boxes in COCO's results format, so that any tool can score them; scores are
in WORKDIR/result.json and result.md, pictures of test images in WORKDIR/repeat_N/pictures.
"""

from evaluation.protocols import sweep
from evaluation.protocols.detection.evaluate import evaluate
from evaluation.protocols.detection.report import markdown
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
            config="configs/detection.py:coco",
            data="folder of images and annotations, see docs/detection.md",
            workdir="folder for runs, detections and scores",
        ),
        remote=["checkpoint"],
        copied=["data"],
    )
