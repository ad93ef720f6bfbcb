"""VIVI: losses on frames, shots and videos, co-training with labelled images, and their baselines (arXiv:1912.02783).

    python -m input_pipeline.prepare --videos=VIDEOS --out=STORE
    python -m vivi_jax.main --config=configs/vivi.py:ex4 --config.data.path=STORE --workdir=RUN
    python -m vivi_jax.main --config=configs/vivi.py:ex4,co=10 --config.data.path=STORE \\
        --config.data.labelled_path=IMAGES --workdir=RUN

(`prepare --fps=1` keeps what the paper's 1 Hz needs; cuts are found among all pictures of a video all the same.)

The paper's run: 2048 shots a step, 16,384 frames of 224 pixels, for 120,000 steps; YT8M's videos must be fetched. One
device takes the same step with --config.micro_batches=64: exactly the same with GroupNorm (co-training has it, else
--config.encoder.norm=group), while BatchNorm sees one micro-batch at a time and needs --config.encoder.bn_groups=2.

PAPER below gives the argument of every row of the paper's tables and figures; the words, comma-separated, are
    ex4 ex2 order ex-s ex-f ex-images rot4 rot2 rot-f rot-images sup      the model, one of MODELS
    co=10|100       with 10 % or all of a labelled data set (sup: co=100)
    big             three times as wide
    aa              AutoAugment in place of the Inception colours: of the labelled images if there are some (§5.2)
    own             your own videos: batch and epochs follow their number; see own() below
    demo            two CPU cores, a few minutes: small network, images and batch
"""

import ml_collections

from configs import common

# Row of the paper -> argument of this file.
PAPER = {
    # Table 1
    "Ex-ImageNet": "ex-images",
    "VIVI-Ex(4)": "ex4",
    "VIVI-Ex(4)-Big": "ex4,big",
    "Semi-Ex-10%": "ex-images,co=10",
    "VIVI-Ex(4)-Co(10%)": "ex4,co=10",
    "Sup-100%": "sup,co=100",
    "Sup-Rot-100%": "rot-images,co=100",
    "VIVI-Ex(4)-Co(100%)": "ex4,co=100",
    "VIVI-Ex(4)-Co(100%)-Big": "ex4,co=100,big,aa",
    # Table 2, without and with AutoAugment
    "Ex-YT-F": "ex-f",
    "Ex-YT-F AA": "ex-f,aa",
    "Ex-YT-S": "ex-s",
    "Ex-YT-S AA": "ex-s,aa",
    "VIVI-Ex(4) AA": "ex4,aa",
    "VIVI-Ex(4)-Big AA": "ex4,big,aa",
    "Rot-YT-F": "rot-f",
    "Rot-YT-F AA": "rot-f,aa",
    "VIVI-Rot(4)": "rot4",
    "VIVI-Rot(4) AA": "rot4,aa",
    # Figures 2 to 4 show rows of the above and
    "Rot-ImageNet": "rot-images",
    # §5.1, with fewer shots and with order prediction
    "VIVI-Ex(2)": "ex2",
    "VIVI-Ex-Order": "order",
    "VIVI-Rot(2)": "rot2",
}

# Word -> the unlabelled data and the losses. Where the paper says nothing of K and M (single frames and images), K is 1
# and M 1 for rotations, and 8 crops for exemplars.
MODELS = {
    "ex4": dict(unlabelled="videos", shots=4, frames=8, shot_loss="triplet", video_loss="info_nce"),  # §4
    "ex2": dict(unlabelled="videos", shots=2, frames=8, shot_loss="triplet", video_loss="info_nce"),
    "order": dict(unlabelled="videos", shots=2, frames=8, shot_loss="triplet", video_loss="order"),
    "ex-s": dict(unlabelled="videos", shots=4, frames=8, shot_loss="triplet"),  # ex4 without its video loss
    "ex-f": dict(unlabelled="videos", shots=1, frames=8, sampler="single", shot_loss="triplet"),
    "ex-images": dict(unlabelled="images", shots=1, frames=8, shot_loss="triplet"),
    "rot4": dict(unlabelled="videos", shots=4, frames=4, frame_loss="rotation", video_loss="info_nce"),
    "rot2": dict(unlabelled="videos", shots=2, frames=4, frame_loss="rotation", video_loss="info_nce"),
    "rot-f": dict(unlabelled="videos", shots=1, frames=1, sampler="single", frame_loss="rotation"),
    "rot-images": dict(unlabelled="images", shots=1, frames=1, frame_loss="rotation"),
    "sup": dict(unlabelled="none", shots=0, frames=0),
}
# Exemplars and rotations of single images, by the training protocol of [33], its schedule stretched (VIVI §4).
BASELINES = ("ex-f", "ex-images", "rot-f", "rot-images")
SHOTS_PER_STEP = 2048  # NK, VIVI §4 "in all cases"


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    no_yes = ("no", "yes")
    config = common.expand(
        argument, variant_of, one_of=MODELS, co=("no", "10", "100"), big=no_yes, aa=no_yes, own=no_yes, demo=no_yes
    )
    config.name = "-".join(["vivi", *filter(None, argument.replace("=", "").split(","))])
    return config


def variant_of(variant: dict[str, str]) -> ml_collections.ConfigDict:
    if variant["variant"] == "sup" and variant["co"] == "no":
        raise ValueError("sup trains on labelled images alone: write sup,co=100, or sup,co=10 for a tenth of them")
    model, co, aa = MODELS[variant["variant"]], variant["co"], variant["aa"] == "yes"

    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = SHOTS_PER_STEP // max(model["shots"], 1)  # N, videos
    config.micro_batches = 1  # > 1: the same batch in the memory of one micro-batch
    config.reproducible = 0  # N: parts of a batch, whose bits are the same on all numbers of devices that divide N
    config.init_from = ""  # a run or a file of weights to start from, docs/weights.md; "": random weights

    config.encoder = ml_collections.ConfigDict(
        dict(
            name="resnet",
            depth=50,  # VIVI §4
            version=2,  # VIVI §4
            norm="batch",  # VIVI §4
            norm_decay=0.99,  # code of [33]
            norm_eps=1e-3,  # code of [33]
            kernel_init="tensorflow",  # code of [33]
            bn_groups=128,  # statistics per core, as in the code of [33]; the paper does not say how many cores
            weight_standardization=False,
            width=3.0 if variant["big"] == "yes" else 1.0,  # VIVI §4
            stem="imagenet",
            input_mean=(0.5, 0.5, 0.5),  # images in [-1, 1]: Inception's preprocessing in the code of [68]
            input_std=(0.5, 0.5, 0.5),
            dtype="bfloat16",  # of the computation; parameters are float32. Not in the paper
            remat=False,
        )
    )
    config.method = ml_collections.ConfigDict(method_section(model, co, aa))
    if co == "no" and variant["variant"] in ("ex-f", "ex-images"):  # exemplars of one image, in the code of [33]
        config.method.update(dict(grey_prob=0.66, standardize=True))
    config.data = ml_collections.ConfigDict(data_section(model, co))
    config.optimizer = ml_collections.ConfigDict(
        dict(
            name="sgd",  # VIVI §4
            weight_decay=1e-3 if co == "10" else 1e-4,  # not in the paper: [68]'s with 10 % of the labels, [33]'s
            momentum=0.9,  # VIVI §4
        )
    )
    config.ema = ml_collections.ConfigDict(dict(name="none"))  # there is no target network
    config.schedule = ml_collections.ConfigDict(schedule(co, variant["variant"] in BASELINES))
    config.evaluation = common.evaluation_section(image_size=224, batch_size=256)
    config.run = common.run_section()
    config.hosts = common.hosts_section()

    if co != "no" and model["unlabelled"] == "videos":  # GroupNorm with 32 groups and standardised weights: VIVI §4
        config.encoder.update(
            dict(norm="group", weight_standardization=True, norm_eps=1e-5, bn_groups=1)  # eps: BiT's code
        )
    elif co == "10":
        config.encoder.bn_groups = 16  # so that 16 labelled images share their statistics, and not 2
    if variant["own"] == "yes":
        if co != "no" or variant["demo"] == "yes":
            raise ValueError("own and co, or own and demo, exclude each other: choose one")
        own(config)
    if variant["demo"] == "yes":
        demo(config)
    return config


def data_section(model: dict, co: str) -> dict:
    """Only what the chosen streams read, as every other key would be an error."""
    data = dict(
        source="shots",
        unlabelled=model["unlabelled"],  # "videos", "images" or "none"
        path="",  # of the unlabelled data: a folder that input_pipeline.prepare wrote, or images
        image_size=224,  # code of [33] and [68]
        min_crop_area=0.08,  # [58], which VIVI §4 names; the code of [68] has 0.05
        labelled_batch_size=0,
    )
    if model["unlabelled"] != "none":
        data |= dict(
            shots=model["shots"],  # K, VIVI §4
            frames=model["frames"],  # M, VIVI §4
        )
    if model["unlabelled"] == "videos":
        data |= dict(
            frame_rate=1.0,  # Hz, VIVI §4
            # The paper does not say which shots it takes. A shot that is too short for `frames` of them ends a row of
            # consecutive ones; below this it is a flash and passed over.
            min_shot_seconds=0.32,
            sampler=model.get("sampler", "consecutive"),  # VIVI §4
        )
    if co != "no":
        data |= dict(
            labelled_path="",  # class folders, a prepared store with labels, or a TFDS name
            labelled_batch_size={"10": 256, "100": 2048}[co],  # not in the paper; 10 %: that of [68] at 100k steps
            labelled_fraction={"10": 0.1, "100": 1.0}[co],  # VIVI §4
        )
    return data


def method_section(model: dict, co: str, aa: bool) -> dict:
    return dict(
        name="vivi",
        frame_loss=model.get("frame_loss", "none"),  # VIVI §3.2
        shot_loss=model.get("shot_loss", "none"),  # VIVI §3.2; "batch_hard" is [68]'s
        video_loss=model.get("video_loss", "none"),  # VIVI §3.3
        triplet_margin=0.5,  # code of [33], which VIVI §3.2 follows
        triplet_groups=128,  # mined per core, as in that code; the paper does not say how many cores
        lambda_video=lambda_video(model, aa),
        gamma=1.0,  # swept over at most 4 values (VIVI §4), which the paper does not give
        exemplar_dim=1000,  # code of [33]
        shot_dim=512,  # not in the paper, whose pooling has no parameters
        predictor_hidden=256,  # VIVI §4, of the MLPs and of the LSTM
        predictor_out=128,  # of the MLPs; not in the paper
        lstm_layers=2,  # not in the paper
        order_hidden=512,  # VIVI §4
        num_classes=1000,  # of the labelled images: ImageNet's
        color="autoaugment" if aa and co == "no" else "inception",  # VIVI §4, [58]; Table 2
        labelled_color="autoaugment" if aa and co != "no" else "inception",  # VIVI §5.2
        hsv=co == "10",  # VIVI §4, for "a fraction of ImageNet": here read as less than all of it
        grey_prob=0.0,  # 0.66 for the exemplar baselines; of VIVI's own models the paper says nothing
        standardize=False,  # each image to mean 0 and deviation 1; as grey_prob
    )


def lambda_video(model: dict, aa: bool) -> float:
    """Weight of the video loss: swept over at most 4 values (VIVI §4), which the paper does not give."""
    if model.get("video_loss") == "info_nce" and model.get("shot_loss") == "triplet":
        return 0.02 if aa else 0.04
    return 0.2 if "video_loss" in model else 0.0


def schedule(co: str, baseline: bool) -> dict:
    """VIVI §4. For co-training it gives the number of steps only; with 10 % the rest is [68]'s for its exemplars."""
    if co == "no" and baseline:  # [33]: of 35 epochs 5 of warm-up, decays after 15 and 25
        return dict(
            name="piecewise",
            lr=0.8,
            total_steps=120_000,
            warmup_steps=17_143,
            boundaries=(51_429, 85_714),
            factor=0.1,
        )
    if co == "no":
        return dict(
            name="piecewise", lr=0.8, total_steps=120_000, warmup_steps=0, boundaries=(90_000, 110_000), factor=0.1
        )
    if co == "10":
        return dict(
            name="piecewise",
            lr=0.05,
            total_steps=100_000,
            warmup_steps=5_000,
            boundaries=(70_000, 80_000, 90_000),
            factor=0.1,
        )
    return dict(
        name="piecewise",
        lr=0.8,
        total_steps=100_000,
        warmup_steps=5_000,
        boundaries=(70_000, 85_000, 95_000),
        factor=0.1,
    )


def own(config: ml_collections.ConfigDict) -> None:
    """Your own videos, 20 or 200,000 of them, on one device: 300 passes over them. None of this is the paper's.

    The network, its losses and the size of the images stay. A batch of 8 videos has 256 frames with ex4, and BatchNorm
    and the triplets take them all; the frames of a shot are taken at a higher rate, as few videos have shots of 8 s.
    The decays come where the paper has them, after 75 % and 92 % of the run.
    """
    videos = max(256 // (config.data.shots * config.data.frames), 8)
    config.encoder.bn_groups = config.method.triplet_groups = 1
    if "frame_rate" in config.data:
        config.data.frame_rate = 4.0
    config.optimizer = ml_collections.ConfigDict(dict(name="adam", weight_decay=1e-4, b1=0.9, b2=0.999))
    config.schedule = ml_collections.ConfigDict(
        dict(
            name="piecewise",
            lr=3e-4,
            epochs=300.0,
            warmup_epochs=10.0,
            boundaries=(225.0, 275.0),
            factor=0.1,
        )
    )
    common.own(config, largest_batch=videos, paper="2048 shots a step, for 120,000 steps")
    config.run.update(dict(log_every=10, checkpoint_every=200))


def demo(config: ml_collections.ConfigDict) -> None:
    """Two CPU cores, a few minutes: a narrow ResNet-18 on rendered videos of several shots, 32 shots a step.

        python -m input_pipeline.synthetic --out=VIDEOS --videos=480 --shots=4 --seconds=8 --fps=10

    Half of the frames, Adam and a higher frame rate, as the paper's values are for a hundred times the steps and for
    longer shots. Crops of 40 % or more and stronger colours, because the classes are shapes: a small crop seldom holds
    one, and colours tell the shots of these videos apart.
    """
    config.batch_size //= SHOTS_PER_STEP // 32
    config.encoder.update(
        dict(depth=18, width=0.75 if config.encoder.width == 3 else 0.25, dtype="float32", bn_groups=1)
    )
    config.method.update(
        dict(
            triplet_groups=1,
            exemplar_dim=128,
            shot_dim=128,
            predictor_hidden=64,
            predictor_out=64,
            order_hidden=64,
            num_classes=10,
            hsv=True,
            grey_prob=0.2,
        )
    )
    data = config.data
    data.update(dict(image_size=48, min_crop_area=0.4, labelled_batch_size=min(data.labelled_batch_size, 32)))
    if "frames" in data:
        data.frames = (data.frames + 1) // 2
    if "frame_rate" in data:
        data.frame_rate = 2.0
    config.optimizer = ml_collections.ConfigDict(dict(name="adam", weight_decay=1e-4, b1=0.9, b2=0.999))
    config.schedule = ml_collections.ConfigDict(
        dict(name="piecewise", lr=0.002, total_steps=250, warmup_steps=20, boundaries=(170, 220), factor=0.1)
    )
    config.evaluation.update(dict(image_size=48, batch_size=120))
    config.run.update(dict(log_every=20, checkpoint_every=100))
