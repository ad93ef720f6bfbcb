"""Semantic segmentation with an FCN, on PASCAL VOC 2012, ADE20K (VITO, arXiv:2210.06433 §3.2, A.2) or own images.

    python -m evaluation.segmentation --config=configs/segmentation.py:voc --checkpoint=RUN --data=VOC2012 \\
        --workdir=DIR

VITO's paper prints differences only; docs/segmentation.md lists them, the sources of the other values, and
the estimated cost. None of this has been run at this size here.

VITO A.2 gives batch, rate, decay and epochs; what it calls "an FCN after He et al. 2020" is read from the public
configuration of that network, SlotCon's transfer/segmentation/configs (fcn_d6_r50-d16_513x513_30k_voc12aug_moco),
named "SlotCon" below.

Variants: voc, ade20k, or own, which has voc's values for images and masks of one's own; demo makes each small enough
for a laptop, its scores are not the benchmarks'.
"""

import ml_collections

from configs import common

VARIANTS = ("voc", "ade20k", "own")


def get_config(argument: str = "voc") -> ml_collections.ConfigDict:
    chosen = common.parse_argument(argument, one_of=VARIANTS, demo=("yes",))
    if chosen["variant"] is None:
        raise ValueError(f"give one variant of {', '.join(VARIANTS)}, not {argument!r}")
    config = voc()
    config.name = chosen["variant"]
    if chosen["variant"] == "ade20k":
        config.data.update(dict(crop_size=512, short_side=512, long_side=2048))  # mmsegmentation's for ADE20K
        config.test.update(dict(short_side=512, long_side=2048))
        config.schedule.epochs = 60.0  # VITO A.2
    if chosen["demo"] == "yes":
        demo(config)
    return config


def voc() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the first repeat; the others count on from it
    config.repeats = 5  # VITO A.2: the mean of 5 runs
    config.batch_size = 16  # VITO A.2
    config.micro_batches = 1  # > 1: less memory, BatchNorm per micro-batch
    config.encoder = ml_collections.ConfigDict(
        dict(  # of --checkpoint=none; a run has its own
            name="resnet", depth=50, version=1, norm="batch", width=1.0, stem="imagenet", dtype="bfloat16", remat=False
        )
    )
    config.method = ml_collections.ConfigDict(
        dict(
            output_stride=16,  # SlotCon: conv5 without stride, dilation 2
            channels=256,  # SlotCon
            dilation=6,  # SlotCon
        )
    )
    config.data = ml_collections.ConfigDict(
        dict(
            crop_size=513,  # SlotCon
            short_side=513,  # SlotCon: scales are relative to the largest size within 2049 x 513
            long_side=2049,
            scale=(0.5, 2.0),  # SlotCon
            flip_prob=0.5,  # SlotCon
        )
    )
    config.test = ml_collections.ConfigDict(
        dict(
            short_side=513,  # SlotCon: the whole image at this size, once
            long_side=2049,
        )
    )
    config.optimizer = ml_collections.ConfigDict(
        dict(
            name="sgd",  # VITO A.2
            weight_decay=0.005,  # VITO A.2
            momentum=0.9,  # not in the paper
        )
    )
    config.schedule = ml_collections.ConfigDict(
        dict(
            name="poly",
            epochs=45.0,  # VITO A.2
            lr=0.04,  # VITO A.2
            power=0.9,  # (1 - n / N)^0.9. VITO A.2: "decayed exponentially with 0.9^n", which would end after 200 steps
        )
    )
    config.pictures = 6  # predictions drawn over images
    config.sweep = ml_collections.ConfigDict(
        dict(  # of --sweep. VITO A.2 has one for models from elsewhere, without its values
            lr=(0.04, 0.01, 0.003),  # the first is VITO A.2's, the last MoCo's (SlotCon)
            weight_decay=(0.005, 1e-4),  # the same two's
            held_out=0.1,  # share of the training images that the setting is chosen on
        )
    )
    config.run = common.run_section()
    return config


def demo(config: ml_collections.ConfigDict) -> None:
    """Two CPU cores, minutes: a small ResNet-18 on images of 96 pixels, one repeat."""
    config.repeats = 1
    config.batch_size = 4
    config.encoder.update(dict(depth=18, width=0.25, dtype="float32"))
    config.method.update(dict(output_stride=8, channels=32, dilation=2))
    config.data.update(dict(crop_size=97, short_side=97, long_side=385))
    config.test.update(dict(short_side=97, long_side=385))
    config.optimizer.weight_decay = 1e-4
    config.schedule.epochs = 20.0
    config.run.update(dict(log_every=20, checkpoint_every=100))
