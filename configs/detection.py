"""Fine-tuning on object detection: VITO's FCOS* on COCO and LVIS (arXiv:2210.06433 A.2), and VIVI's RetinaNet on COCO.

    python -m evaluation.detection --config=configs/detection.py:coco --checkpoint=RUN --data=COCO --workdir=DIR

Variants, one of:
    coco        FCOS* on train2017, scored on val2017. VITO, ResNet-50, 200 epochs of VideoNet: AP 44.0 (mean of 5)
    lvis        FCOS* on LVIS v1. VITO: AP 25.7
    retinanet   RetinaNet on COCO; VIVI names the network (references); its appendix with numbers we could not consult
and `demo` with any of them: 128 x 160 px, for two CPU cores and a folder of some images (docs/detection.md).
None has been run at this size here; docs/detection.md estimates the cost.
"""

import ml_collections

from configs import common

VARIANTS = ("coco", "lvis", "retinanet")


def get_config(argument: str = "coco") -> ml_collections.ConfigDict:
    if common.parse_argument(argument, one_of=VARIANTS, demo=("no", "yes"))["variant"] is None:
        raise ValueError(f"give one variant of {', '.join(VARIANTS)}, not {argument!r}")
    config = common.expand(argument, variant_of, one_of=VARIANTS, demo=("no", "yes"))
    config.name = argument
    return config


def variant_of(variant: dict[str, str]) -> ml_collections.ConfigDict:
    config = fcos()
    if variant["variant"] == "lvis":
        lvis(config)
    if variant["variant"] == "retinanet":
        retinanet(config)
    if variant["demo"] == "yes":
        demo(config)
    return config


def fcos() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the first repeat; the others count on from it
    config.repeats = 5  # VITO A.2: mean of five
    config.batch_size = 128  # VITO A.2, over 16 workers
    config.micro_batches = 1  # > 1: less memory, BatchNorm per micro-batch
    config.metric = "coco"
    config.pictures = 8  # test images of each repeat that are drawn with their boxes
    config.encoder = ml_collections.ConfigDict(
        dict(  # of --checkpoint=none; a run or file has its own
            name="resnet", depth=50, version=1, norm="batch", width=1.0, stem="imagenet"
        )
    )
    config.network = ml_collections.ConfigDict(dict(dtype="bfloat16", remat=False))  # over the encoder's own values
    config.data = ml_collections.ConfigDict(
        dict(
            train_annotations="annotations/instances_train2017.json",
            train_images="train2017",
            test_annotations="annotations/instances_val2017.json",
            test_images="val2017",
            image_size=(800, 1024),  # (height, width) in pixels, VITO A.2
            scale=(0.8, 1.25),  # of the fitting size, VITO A.2
            flip_prob=0.5,  # not in the paper; FCOS's code
            max_boxes=100,  # of an image, the largest; few of COCO's have more
        )
    )
    config.method = ml_collections.ConfigDict(
        dict(
            form="fcos",
            options=dict(
                cells_per_side=8.0,  # ATSS §3.3
                nearest=9,  # ATSS §3.3
                box_weight=2.0,  # ATSS's code
            ),
            alpha=0.25,  # RetinaNet §5.1
            gamma=2.0,  # RetinaNet §5.1
            channels=256,  # RetinaNet §4
            layers=4,  # RetinaNet §4, FCOS §3.2
            norm="group",  # FCOS's code
        )
    )
    config.optimizer = ml_collections.ConfigDict(
        dict(
            name="adam",  # with decoupled decay: AdamW, VITO A.2
            weight_decay=1e-4,  # VITO A.2
            b1=0.9,  # not in the paper
            b2=0.999,
        )
    )
    config.schedule = ml_collections.ConfigDict(
        dict(
            name="piecewise",
            epochs=30.0,  # VITO A.2
            warmup_epochs=0.25,  # VITO A.2, linear
            boundaries=(20.0, 30 * 8 / 9),  # VITO A.2: 2/3 and 8/9 of the training
            factor=0.1,  # VITO A.2
            lr=1e-3,  # VITO A.2, at its batch of 128
        )
    )
    config.test = ml_collections.ConfigDict(
        dict(
            batch_size=64,
            min_score=0.05,  # FCOS's code
            per_level=1000,  # FCOS's code
            max_overlap=0.6,  # FCOS's and ATSS's code
            max_detections=100,  # COCO
        )
    )
    config.sweep = ml_collections.ConfigDict(
        dict(  # of --sweep. VITO A.2 has one for models from elsewhere, without its values
            lr=(1e-3, 3e-4, 1e-4),
            weight_decay=(1e-4, 0.05),
            held_out=0.05,  # share of the training images that the setting is chosen on
        )
    )
    config.run = common.run_section()
    return config


def lvis(config: ml_collections.ConfigDict) -> None:
    config.metric = "lvis"
    # LVIS's images are COCO's, in COCO's folders, and its val takes some from train2017.
    config.data.update(
        dict(
            train_annotations="annotations/lvis_v1_train.json",
            test_annotations="annotations/lvis_v1_val.json",
            max_boxes=300,
        )
    )  # not in the paper
    # 300: LVIS. min_score: detectron2's LVIS configs; scores of 1203 classes are low.
    config.test.update(dict(min_score=1e-4, max_detections=300))


def retinanet(config: ml_collections.ConfigDict) -> None:
    """detectron2's configs/Base-RetinaNet.yaml and its defaults; we could not consult VIVI's own values."""
    config.repeats = 1
    config.batch_size = 16
    config.data.scale = (0.8, 1.0)  # its short sides of 640 to 800
    config.method.update(dict(form="retinanet", norm=""))
    config.method.options = ml_collections.ConfigDict(
        dict(
            cells_per_side=4.0,  # RetinaNet §4: 32 px at stride 8
            octaves=3,
            aspects=(0.5, 1.0, 2.0),
            positive=0.5,
            negative=0.4,
            huber=0.1,
        )
    )
    config.optimizer = ml_collections.ConfigDict(dict(name="sgd", weight_decay=1e-4, momentum=0.9))
    config.sweep.update(dict(lr=(0.02, 0.01, 0.005), weight_decay=(1e-4, 1e-5)))
    config.schedule = ml_collections.ConfigDict(
        dict(name="piecewise", total_steps=90_000, warmup_steps=1000, boundaries=(60_000, 80_000), factor=0.1, lr=0.01)
    )
    config.test.max_overlap = 0.5


def demo(config: ml_collections.ConfigDict) -> None:
    """Smoke test for two CPU cores: overfits a few images. Not a benchmark."""
    config.repeats = 1
    config.batch_size = 4
    config.encoder.update(dict(depth=18, width=0.25))
    config.network.dtype = "float32"
    config.data.update(
        dict(
            train_annotations="annotations/instances_mini.json",
            train_images="images",
            test_annotations="annotations/instances_mini.json",
            test_images="images",
            image_size=(128, 160),
            scale=(1.0, 1.0),
        )
    )
    config.method.update(dict(channels=32, layers=2))
    config.schedule = ml_collections.ConfigDict(
        dict(name="piecewise", total_steps=100, warmup_steps=10, boundaries=(70, 90), factor=0.1, lr=config.schedule.lr)
    )
    config.test.update(dict(batch_size=8, per_level=200))
    config.run.update(dict(log_every=10, checkpoint_every=50))
