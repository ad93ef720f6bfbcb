"""VITO: contrast between frames of a clip, with multi-scale attention pooling (arXiv:2210.06433).

    python -m input_pipeline.prepare --videos=VIDEOS --out=STORE
    python -m vivi_jax.main --config=configs/vito.py --config.data.path=STORE --workdir=RUN

The paper's run: 128 TPU v3 cores, batch 4096, 300 epochs of 1.28 M clips; VideoNet is not public. One device runs the
same batch with --config.micro_batches=32. `configs/vito.py:demo` is a two-core laptop's version of a few minutes.

Variants, comma-separated after a colon; one that others leave without effect is an error, such as crop beside images:
    own                             your own videos: batch and epochs follow their number; see own() below
    demo                            small network, images and batch; used by launch/demo.sh
    encoder=resnet50|swin_t|swin_s  VITO §4.3 has "Swin transformers" too, and not which or how trained
    moclr                           MoCLR baseline: views of one frame, one scale, average pooling (VITO §4.1)
    images                          labelled or unlabelled images instead of videos, crops down to 8 % (VITO A.1)
    scales=2|1, pooling=attention|average             the ablation cells of VITO §4.2
    sampler=marginal|fixed_delay|uniform_chunks       the temporal samplers of VITO Fig. A.2
    crop=0.4|0.08                                     minimum crop area, VITO Fig. 4 left
    clip=2.56|1.28|3.2                                seconds, VITO Fig. 4 centre
    views=3|2                                         2 in Fig. 3, else 3; the demo's default is 2
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    config = common.expand(
        argument,
        variant_of,
        beside={"demo": {"views": "2"}},  # a third would take half as long again
        demo=("no", "yes"),
        own=("no", "yes"),
        encoder=("resnet50", "swin_t", "swin_s"),
        moclr=("no", "yes"),
        images=("no", "yes"),
        scales=("2", "1"),
        pooling=("attention", "average"),
        sampler=("marginal", "fixed_delay", "uniform_chunks"),
        crop=("0.4", "0.08"),
        clip=("2.56", "1.28", "3.2"),
        views=("3", "2"),
    )
    config.name = "-".join(["vito", *filter(None, argument.replace("=", "").split(","))])
    return config


def variant_of(variant: dict[str, str]) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 4096  # VITO A.2
    config.micro_batches = 1  # > 1: the same batch in the memory of one micro-batch
    config.reproducible = 0  # N: parts of a batch, whose bits are the same on all numbers of devices that divide N
    config.init_from = ""  # a run or a file of weights to start from, docs/weights.md; "": random weights

    config.encoder = ml_collections.ConfigDict(
        dict(
            name="resnet",
            depth=50,  # VITO §3
            version=1,  # BYOL's code
            norm="batch",  # over the global batch: BYOL's code
            norm_decay=0.9,  # BYOL's code
            norm_eps=1e-5,  # BYOL's code
            last_scale=0.0,  # haiku's BlockV1, which BYOL's code uses: a bottleneck starts as its shortcut
            kernel_init="haiku",  # BYOL's code
            bn_groups=1,  # > 1: of so many equal parts of it, for batches beyond the paper's
            width=1.0,
            stem="imagenet",
            dtype="bfloat16",  # of the computation; parameters are float32. Not in the paper
            remat=False,
        )
    )
    config.method = ml_collections.ConfigDict(
        dict(
            name="vito",
            stages=("stage3", "stage4")[2 - int(variant["scales"]) :],  # S = 2: VITO §3.1
            pooling=variant["pooling"],  # VITO §3.1
            attention_hidden=512,  # not in the paper: 4 % of ResNet-50's work, fitting its "lightweight"
            projector_hidden=4096,  # BYOL's code; the paper says "two-layer MLP"
            projector_out=256,  # BYOL's code
            temperature=0.1,  # VITO §3.1
        )
    )
    # Of the target network. BYOL's preset for 300 epochs, whose other values VITO A.2 gives.
    config.ema = ml_collections.ConfigDict(dict(name="cosine", base=0.99))
    config.data = ml_collections.ConfigDict(
        dict(
            source="video",  # or "images"
            path="",  # a folder that input_pipeline.prepare wrote
            views=int(variant["views"]),  # VITO §4.2
            image_size=224,  # VITO A.1
            sampler=variant["sampler"],  # VITO §3.1, "marginal sampling"
            clip_seconds=float(variant["clip"]),  # VITO §3.1
            delay_seconds=1.0,  # of fixed_delay only; not in the paper
            min_crop_area=float(variant["crop"]),  # VITO A.1
        )
    )
    config.optimizer = ml_collections.ConfigDict(
        dict(
            name="lars",  # VITO A.2
            weight_decay=1e-6,  # VITO A.2
            momentum=0.9,  # BYOL's code
            trust_coefficient=1e-3,  # BYOL's code
        )
    )
    config.schedule = ml_collections.ConfigDict(
        dict(
            name="cosine",  # VITO A.2
            base_lr=0.3,  # VITO A.2, per 256 examples: 4.8 at batch 4096
            epochs=300.0,  # VITO §4.2; 200 in Table 1
            warmup_epochs=10.0,  # BYOL's code
            examples_per_epoch=1_281_167,  # an "ImageNet-equivalent epoch", whatever the data: VITO §4.1
        )
    )
    config.evaluation = common.evaluation_section(image_size=224, batch_size=256)
    config.run = common.run_section()
    config.hosts = common.hosts_section()

    if variant["encoder"] != "resnet50":
        config.encoder = swin(variant["encoder"])
    if variant["moclr"] == "yes":
        moclr(config)
    if variant["images"] == "yes":
        config.data.source = "images"
        config.data.min_crop_area = 0.08  # VITO A.1, for ImageNet
        for key in ("sampler", "clip_seconds", "delay_seconds"):  # of videos
            del config.data[key]
    if variant["own"] == variant["demo"] == "yes":
        raise ValueError("own and demo exclude each other: choose one")
    if variant["own"] == "yes":
        own(config)
    if variant["demo"] == "yes":
        demo(config)
    return config


def swin(name: str) -> ml_collections.ConfigDict:
    """VITO's second backbone (§4.3); sizes and stochastic depth of Swin (arXiv:2103.14030, §3.3 and A2.1).

    The paper gives no number of this training. The optimizer, its rate and the two scales stay as with the
    ResNet; stochastic depth is that of Swin's supervised training, and not in the target network (models/swin.py).
    """
    return ml_collections.ConfigDict(
        dict(
            name="swin",
            width=96,  # Swin §3.3
            depths=(2, 2, 6, 2) if name == "swin_t" else (2, 2, 18, 2),  # Swin §3.3
            heads=(3, 6, 12, 24),  # 32 channels a head: Swin §3.3
            window=7,  # Swin §3.3
            patch=4,  # Swin §3.1
            stochastic_depth=0.2 if name == "swin_t" else 0.3,  # Swin A2.1
            dtype="bfloat16",  # of the computation; parameters are float32. Not in the paper
            remat=False,
        )
    )


def moclr(config: ml_collections.ConfigDict) -> None:
    """The baseline on video frames (VITO §4.1)."""
    config.data.sampler = "single"  # all views from one frame
    config.data.min_crop_area = 0.08  # BYOL's, MoCLR's
    config.method.stages = ("stage4",)
    config.method.pooling = "average"


def own(config: ml_collections.ConfigDict) -> None:
    """Your own videos, 20 or 200,000 of them, on one device: 300 passes over them. None of this is the paper's.

    The network, the views and their size stay; Adam's rate goes with the batch, as that of LARS does.
    """
    common.own(config, largest_batch=256, paper="batches of 4096, and 384 million clips of 1.28 million videos")
    config.optimizer = ml_collections.ConfigDict(dict(name="adam", weight_decay=1e-4, b1=0.9, b2=0.999))
    config.schedule.base_lr = 1e-3  # per 256 examples
    config.ema.base = 0.95  # 0.99 would hold the target where it began in a run of some hundred steps
    config.run.update(dict(log_every=10, checkpoint_every=200))


def demo(config: ml_collections.ConfigDict) -> None:
    """Two CPU cores, a few minutes: a narrow ResNet-18 (or Swin) on 64-pixel views of rendered videos.

    Adam and a fast target, because LARS and a decay of 0.99 are made for runs a hundred times longer than this one.
    """
    config.batch_size = 64
    if config.encoder.name == "swin":
        # Maps of 32, 16, 8 and 4 places at 64 px, in windows of 4.
        depths = (1, 2, config.encoder.depths[2] // 3, 1)
        small = dict(width=24, depths=depths, heads=(1, 2, 4, 8), window=4, patch=2, stochastic_depth=0.1)
        config.encoder.update(small | dict(dtype="float32"))
    else:
        config.encoder.update(dict(depth=18, width=0.25, dtype="float32"))
    config.method.update(dict(attention_hidden=64, projector_hidden=256, projector_out=64))
    config.ema.base = 0.8
    config.data.image_size = 64
    config.optimizer = ml_collections.ConfigDict(dict(name="adam", weight_decay=1e-4, b1=0.9, b2=0.999))
    config.schedule.update(dict(base_lr=0.032, epochs=30.0, warmup_epochs=2.0, examples_per_epoch=640))
    config.evaluation.update(dict(image_size=64, batch_size=120))
    config.run.update(dict(log_every=20, checkpoint_every=100))
