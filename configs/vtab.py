"""VTAB: 19 tasks with 1000 training images each (arXiv:1910.04867; VIVI §4 for its use there).

    python -m evaluation.vtab --checkpoint=RUN_OR_FILE --tasks=all --protocol=v1 --data=DIR --workdir=DIR

A ResNet-50 takes 4 trial runs and 3 final ones per task: with the settings below 25,000 to 55,000 steps of 512 images
at 224 px, hours on an accelerator for each task; --shard=i/n divides the tasks over machines. `configs/vtab.py:demo` is
for a laptop and small class folders: it checks no split sizes, and its scores are not VTAB's.
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    variant = common.parse_argument(argument, demo=("no", "yes"))
    config = ml_collections.ConfigDict(
        dict(
            seed=0,  # of the order of the training images
            image_size=224,  # task_adaptation/data_loader.py: resize to 224, bilinear, aspect ignored
            batch_size=512,  # task_adaptation/README.md, the TPU example
            learning_rates=(0.1, 0.01),  # 0.01: README's example; 0.1: from memory, makes the "4 settings" of VIVI §4
            steps=(2500, 10000),  # 2500: README's example; 10000: from memory, as above
            decay_at=(0.3, 0.6, 0.9),  # of the steps: README's 750, 1500, 2250 of 2500
            decay_factor=0.1,  # task_adaptation/adapt_and_eval.py
            momentum=0.9,  # task_adaptation/adapt_and_eval.py
            repeats=3,  # VIVI §4: the median of three
            shuffle_buffer=10000,  # task_adaptation/adapt_and_eval.py; only --protocol=full has more images than memory
            check_sizes=True,  # split sizes must be those of the table in evaluation/protocols/vtab/tasks.py
            # Of --checkpoint=none; a run has its own. VIVI §4's encoder, VTAB's From-Scratch baseline.
            encoder=dict(name="resnet", depth=50, version=2, norm="batch", width=1.0, stem="imagenet"),
        )
    )
    if variant["demo"] == "yes":
        config.update(dict(image_size=32, batch_size=64, steps=(20, 40), check_sizes=False))
        config.encoder.update(dict(depth=18, width=0.25))
    return config
