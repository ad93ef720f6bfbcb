"""MoCo v3 with a vision transformer (arXiv:2104.02057): the worked example of docs/extending.md.

    python -m vivi_jax.main --config=configs/moco_v3.py --config.data.path=IMAGES --workdir=RUN

The paper's run: ViT-S/16, batch 4096, 300 epochs of ImageNet. One device runs the same batch with
--config.micro_batches=32 (the heads' BatchNorm then sees one micro-batch at a time). "code" below is the authors'.

Variants, comma-separated after a colon:
    video                           two frames of a clip instead of two crops of an image; not in the paper
    demo                            a narrow ViT on 64-pixel frames of rendered videos, for a laptop; implies video
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    config = common.expand(argument, variant_of, demo=("no", "yes"), video=("no", "yes"))
    config.name = "-".join(["moco_v3", *filter(None, argument.split(","))])
    return config


def variant_of(variant: dict[str, str]) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 4096  # code
    config.micro_batches = 1
    config.reproducible = 0  # N: parts of a batch, whose bits are the same on all numbers of devices that divide N
    config.init_from = ""  # a run or a file of weights to start from, docs/weights.md; "": random weights

    config.encoder = ml_collections.ConfigDict(
        dict(
            name="vit",
            patch=16,  # ViT-S/16; code
            width=384,
            depth=12,
            heads=12,
            freeze_patches=True,  # the paper's remedy for unstable training
            image_size=224,  # code
            dtype="bfloat16",  # of the computation; parameters are float32. Not in the paper
        )
    )
    config.method = ml_collections.ConfigDict(
        dict(
            name="moco_v3",
            hidden=4096,  # code
            out=256,  # code
            temperature=0.2,  # code
        )
    )
    config.ema = ml_collections.ConfigDict(dict(name="cosine", base=0.99))  # code
    config.data = ml_collections.ConfigDict(
        dict(
            source="images",
            path="",  # class folders or the name of a TFDS data set; labels are not used
            views=2,  # Algorithm 1
            image_size=224,  # code
            min_crop_area=0.08,  # code
        )
    )
    config.optimizer = ml_collections.ConfigDict(
        dict(
            name="adam",  # AdamW; code. It decays all parameters; here biases, norms and the token are left out
            weight_decay=0.1,  # code
            b1=0.9,  # the code's defaults
            b2=0.999,
        )
    )
    config.schedule = ml_collections.ConfigDict(
        dict(
            name="cosine",  # code
            base_lr=1.5e-4,  # code, per 256 examples
            epochs=300.0,  # code
            warmup_epochs=40.0,  # code
            examples_per_epoch=1_281_167,  # ImageNet
        )
    )
    config.evaluation = common.evaluation_section(image_size=224, batch_size=256)
    config.run = common.run_section()
    config.hosts = common.hosts_section()

    if "yes" in (variant["video"], variant["demo"]):
        config.data.update(
            dict(source="video", sampler="marginal", clip_seconds=2.56, delay_seconds=1.0, min_crop_area=0.4)  # VITO's
        )
    if variant["demo"] == "yes":
        demo(config)
    return config


def demo(config: ml_collections.ConfigDict) -> None:
    """One CPU core, ten minutes, on the videos that launch/demo.sh renders. None of this is the paper's.

    The crops are large, as the frames of a clip differ enough, and the target follows fast, as the run is short.
    """
    config.batch_size = 64
    config.encoder.update(dict(width=96, depth=4, heads=4, freeze_patches=False, image_size=64, dtype="float32"))
    config.method.update(dict(hidden=256, out=64, temperature=0.1))
    config.ema.base = 0.9
    config.data.update(dict(image_size=64, min_crop_area=0.8))
    config.optimizer.weight_decay = 1e-4
    config.schedule.update(dict(base_lr=8e-3, epochs=60.0, warmup_epochs=3.0, examples_per_epoch=640))
    config.evaluation.update(dict(image_size=64, batch_size=120))
    config.run.update(dict(log_every=20, checkpoint_every=100))
