"""VDIM: InfoNCE between local and global features of two views of a clip (arXiv:2007.13278).

    python -m input_pipeline.prepare --videos=UCF101 --only=UCF101/trainlist01.txt --out=STORE --short_side=146 --fps=60
    python -m vivi_jax.main --config=configs/vdim.py --config.data.path=STORE --workdir=RUN
    python -m evaluation.action --config=configs/action.py:ucf101_vdim_split1 --checkpoint=RUN --data=UCF101 \\
        --split=1 --workdir=DIR

The paper's best run on UCF-101 (74.1 % on split 1 after fine-tuning): 50,000 steps on the 9,537 training videos of
split 1, which --only keeps apart from those that the network is tested on. The one on Kinetics-600 (79.7 % UCF-101,
49.2 % HMDB-51): 16 GPUs, 361,080 videos, 100,000 steps. The paper gives training times for neither. One device runs the
same batch with --config.micro_batches=16 (BatchNorm per micro-batch then).
`configs/vdim.py:demo` is a two-core laptop's version of a few minutes.

Variants, comma-separated after a colon:
    data=ucf101|kinetics600     the steps; Kinetics begins with difference=no (VDIM §4.3)
    layers=568|68|8             layers of the loss (VDIM §4.2 item 1; 8 is its "9")
    color=jitter|lab            colour jitter and grey, or Lab with a channel dropped (item 2)
    rotate                      quarter turns of each view (item 3)
    offset=0|32                 frames from the start of view 1 to that of view 2 (item 4)
    difference=yes|no           temporal difference of view 2's features (item 5)
    down=2|1|3                  down-sampling of view 2 (item 6)
    own                         your own videos: batch and epochs follow their number; see own() below
    demo                        small network, clips and batch; begins with difference=no,down=1,offset=32
"""

import ml_collections

from configs import common

# Cells of the ablation that differ from the paper's best on UCF-101, unless they are given.
KINETICS = dict(difference="no")  # VDIM §4.3, "because of unrelated hardware issues"
# The rendered actions are cycles: two halves of a view hold the same one, and their difference nothing of it. What the
# views share is to be the motion, so the second begins after the first, when colours and background have moved on.
DEMO = dict(difference="no", down="1", offset="32")
LAYERS = {"568": ("local1", "local2", "global"), "68": ("local2", "global"), "8": ("global",)}


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    config = common.expand(
        argument,
        variant_of,
        beside={"data=kinetics600": KINETICS, "demo": DEMO},
        data=("ucf101", "kinetics600"),
        layers=tuple(LAYERS),
        color=("jitter", "lab"),
        rotate=("no", "yes"),
        offset=("0", "32"),
        difference=("yes", "no"),
        down=("2", "1", "3"),
        own=("no", "yes"),
        demo=("no", "yes"),
    )
    config.name = "-".join(["vdim", *filter(None, argument.replace("=", "").split(","))])
    return config


def variant_of(variant: dict[str, str]) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 240  # VDIM §4.3, for Kinetics; not given for UCF-101
    config.micro_batches = 1  # > 1: the same batch in the memory of one micro-batch
    config.reproducible = 0  # N: parts of a batch, whose bits are the same on all numbers of devices that divide N
    config.init_from = ""  # a run or a file of weights to start from, docs/weights.md; "": random weights

    config.encoder = ml_collections.ConfigDict(
        dict(
            name="vdim",
            table="paper",  # VDIM Table 1
            width=1.0,
            frames=32,  # VDIM §4
            norm="batch",  # VDIM §4: on the encoder's output and in phi
            input_mean=(0.485, 0.456, 0.406),  # ImageNet's: AMDIM's code
            input_std=(0.229, 0.224, 0.225),
            dtype="bfloat16",  # of the computation; parameters are float32. Not in the paper
        )
    )
    config.method = ml_collections.ConfigDict(
        dict(
            name="vdim",
            layers=LAYERS[variant["layers"]],  # VDIM §4
            embed_dim=512,  # VDIM §4
            color={"jitter": "jitter_grey", "lab": "lab"}[variant["color"]],  # VDIM §4.2, best model
            clip_score=20.0,  # AMDIM's code; the paper does not mention the three tricks of losses.deep_infomax_nce
            score_penalty=0.05,  # AMDIM's code
        )
    )
    config.data = ml_collections.ConfigDict(
        dict(
            source="windows",
            path="",  # a folder that input_pipeline.prepare wrote
            frames=32,  # VDIM §4
            offset=int(variant["offset"]),  # VDIM §4.2, best model
            downsample=int(variant["down"]),  # VDIM §4.2, best model
            difference=variant["difference"] == "yes",  # VDIM §4.2, best model
            image_size=128,  # VDIM §4
            min_crop_area=0.3,  # AMDIM's code
            flip_prob=0.0,  # VDIM §3.1 lists no flips
            rotate=variant["rotate"] == "yes",  # VDIM §4.2, best model
        )
    )
    config.optimizer = ml_collections.ConfigDict(
        dict(
            name="adam",  # VDIM §4
            weight_decay=0.0,  # not mentioned; AMDIM's code: 1e-5
            b1=0.9,  # not mentioned; AMDIM's code: 0.8
            b2=0.999,
        )
    )
    config.ema = ml_collections.ConfigDict(dict(name="none"))  # there is no target network
    config.schedule = ml_collections.ConfigDict(
        dict(
            name="piecewise",  # constant: VDIM §4
            lr=2e-4,  # VDIM §4
            total_steps=50_000,  # VDIM §4.2
            warmup_steps=0,  # not mentioned; AMDIM's code: 500
            boundaries=(),
            factor=1.0,
        )
    )
    config.evaluation = common.evaluation_section(image_size=128, batch_size=64)  # each image is encoded as 32 frames
    config.run = common.run_section()
    config.hosts = common.hosts_section()

    if variant["color"] == "lab":  # comes normalised from augment_vdim
        config.encoder.update(dict(input_mean=(0.0, 0.0, 0.0), input_std=(1.0, 1.0, 1.0)))
    if variant["data"] == "kinetics600":
        config.schedule.total_steps = 100_000  # VDIM §4.3
    if variant["own"] == variant["demo"] == "yes":
        raise ValueError("own and demo exclude each other: choose one")
    if variant["own"] == "yes":
        own(config)
    if variant["demo"] == "yes":
        demo(config)
    return config


def own(config: ml_collections.ConfigDict) -> None:
    """Your own videos, 20 or 200,000 of them, on one device: 300 passes over them. None of this is the paper's.

    The network, the clips and their size stay, and Adam with its rate; a short warm-up is added.
    """
    config.schedule = ml_collections.ConfigDict(
        dict(name="piecewise", lr=2e-4, epochs=300.0, warmup_epochs=3.0, boundaries=(), factor=1.0)
    )
    common.own(config, largest_batch=32, paper="batches of 240, and 50,000 steps on 9,537 videos")
    config.run.update(dict(log_every=10, checkpoint_every=200))


def demo(config: ml_collections.ConfigDict) -> None:
    """Two CPU cores, a few minutes: the small table on 8 frames of 48 pixels of rendered action clips.

    A higher learning rate, because this run is over a hundred times shorter than the paper's.
    """
    config.batch_size = 32
    config.encoder.update(dict(table="small", frames=8, dtype="float32"))
    config.method.embed_dim = 128
    config.data.update(dict(frames=8, image_size=48, offset=config.data.offset * 8 // 32))
    config.schedule.update(dict(lr=1e-3, total_steps=450, warmup_steps=20))
    config.evaluation.image_size = 48
    config.run.update(dict(log_every=20, checkpoint_every=100))
