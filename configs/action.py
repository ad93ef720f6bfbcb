"""Fine-tuning on action recognition: VDIM's protocol (arXiv:2007.13278 §4) and VITO's (arXiv:2210.06433 §3.2).

    python -m evaluation.action --config=configs/action.py:ucf101_vdim --checkpoint=RUN --data=UCF101 --split=all \\
        --workdir=DIR

The paper's VDIM, pretrained on Kinetics-600: 79.7 % on UCF-101, 49.2 % on HMDB-51, means over three splits. None of
this has been run at this size here.

Variants, one of:
    ucf101_vdim, hmdb51_vdim    clip encoders: K views of 32 frames, Lab dropout; pretrained on Kinetics-600
    ucf101_vdim_split1          the same for an encoder pretrained on UCF-101 (VDIM Table 2): shorter
    ucf101_vito, hmdb51_vito    image encoders: frames of 2 s, averaged. VITO A.2 follows Wu & Wang 2021, they follow
                                the code of AVID (Morgado et al. 2021); HMDB-51 has the values of UCF-101
    demo                        clips of input_pipeline.synthetic_actions, for encoders of configs/vdim.py:demo
    demo_vito                   VITO's protocol on a laptop, for small encoders of images
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import common

VARIANTS = ("ucf101_vdim", "ucf101_vdim_split1", "hmdb51_vdim", "ucf101_vito", "hmdb51_vito", "demo", "demo_vito")


def get_config(argument: str = "ucf101_vdim") -> ml_collections.ConfigDict:
    name = common.parse_argument(argument, one_of=VARIANTS)["variant"]
    if name is None:
        raise ValueError(f"give one variant of {', '.join(VARIANTS)}, not {argument!r}")
    config = vito() if name.endswith("_vito") else vdim()
    config.name = name
    if name == "ucf101_vdim_split1":
        config.schedule.update(dict(total_steps=20_000, boundaries=halvings(3000, 20_000)))  # VDIM §4.2
    if name == "hmdb51_vdim":
        config.data.views = 2  # VDIM §4.3: its clips are shorter
        config.schedule.update(dict(total_steps=4000, boundaries=halvings(400, 4000)))  # VDIM §4.3
    if name == "demo":
        demo(config)
    if name == "demo_vito":
        demo_vito(config)
    return config


def halvings(every: int, total: int) -> tuple[int, ...]:
    return tuple(range(every, total, every))


def vdim() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 64  # not in the paper
    config.micro_batches = 1  # > 1: less memory, BatchNorm per micro-batch
    config.max_missing = 0.01  # share of a list's videos that may be missing or damaged
    config.videos_per_class = placeholder(int)  # training videos to use of each class; None: all
    config.clips_per_video = 1  # random clips of each video in an epoch
    config.prepare = ml_collections.ConfigDict(
        dict(
            fps=60.0,  # at most: videos keep their own rate. The paper gives none
            short_side=256,  # UCF-101 and HMDB-51 have 240
        )
    )
    config.encoder = ml_collections.ConfigDict(
        dict(  # of --checkpoint=none; a run has its own
            name="vdim",
            table="paper",
            width=1.0,
            frames=32,
            norm="batch",
            input_mean=(0.485, 0.456, 0.406),
            input_std=(0.229, 0.224, 0.225),
            dtype="bfloat16",
        )
    )
    config.method = ml_collections.ConfigDict(
        dict(
            color="lab",  # VDIM §4.1
            phi_dim=512,  # VDIM §4, of --checkpoint=none; a run has its own
            hidden=1024,  # VDIM §4.1
            dropout=0.2,  # VDIM §4.1
        )
    )
    config.data = ml_collections.ConfigDict(
        dict(
            views=4,  # K, VDIM §4.1
            frames=32,  # VDIM §4
            downsample=1,  # VDIM §4.1 item 3 compares 1 to 4; views begin at multiples of 32 frames with all of them
            fps=placeholder(float),  # None: every frame, VDIM §4.1 "no downsampling"
            image_size=128,  # VDIM §4
            min_crop_area=0.3,  # AMDIM's code
            aspect=(0.7, 1.4),  # AMDIM's code
            flip_prob=0.0,  # VDIM §3.1 lists no flips
        )
    )
    config.test = ml_collections.ConfigDict(
        dict(
            resize=146,  # AMDIM's code: short side, of which the central 128 are used
            stride=32,  # frames between windows. VDIM §4.1: "across all samples from the same video", without a number
            clips=placeholder(int),
            batch_size=32,
        )
    )
    config.optimizer = ml_collections.ConfigDict(
        dict(
            name="adam",  # VDIM §4.1
            b1=0.9,  # not in the paper
            b2=0.999,
            weight_decay=0.0,  # not in the paper
            frozen_epochs=0.0,  # of the encoder, at the beginning, while the classifier trains
        )
    )
    config.schedule = ml_collections.ConfigDict(
        dict(
            name="piecewise",
            total_steps=30_000,  # VDIM §4.3
            lr=1e-3,  # VDIM §4.1
            warmup_steps=0,
            boundaries=halvings(3000, 30_000),  # VDIM §4.3; §4.1's "every 30000 steps" would never come
            factor=0.5,  # VDIM §4.1
        )
    )
    config.sweep = ml_collections.ConfigDict(
        dict(  # of --sweep. VITO A.2 has one for models from elsewhere, without its values
            lr=(1e-3, 3e-4, 1e-4),
            weight_decay=(0.0, 1e-4),
            held_out=0.2,  # share of the training videos that the setting is chosen on
        )
    )
    config.run = common.run_section()
    return config


def vito() -> ml_collections.ConfigDict:
    """AVID's code, configs/benchmark/ucf/32at16-fold1, with the dropout of Wu & Wang 2021 (VITO §3.2, A.2)."""
    config = vdim()
    config.batch_size = 32
    config.encoder = ml_collections.ConfigDict(
        dict(
            name="resnet", depth=50, version=1, norm="batch", width=1.0, stem="imagenet", dtype="bfloat16", remat=False
        )
    )
    config.method.update(dict(color="jitter", hidden=0, dropout=0.9))
    config.method.phi_dim = placeholder(int)  # None: pooled features of frames
    config.data.update(
        dict(views=1, frames=32, fps=16.0, image_size=224, min_crop_area=0.08, aspect=(3 / 4, 4 / 3), flip_prob=0.5)
    )
    config.test = ml_collections.ConfigDict(dict(resize=256, stride=placeholder(int), clips=10, batch_size=16))
    config.clips_per_video = 5
    config.optimizer.frozen_epochs = 5.0
    config.sweep.lr = (3e-4, 1e-4, 3e-5)
    config.schedule = ml_collections.ConfigDict(
        dict(
            name="piecewise",
            epochs=21.0,
            lr=1e-4,
            warmup_steps=0,
            boundaries=(11.0, 15.0, 19.0),  # epochs 6, 10 and 14 after the 5 of the classifier alone
            factor=0.3,
        )
    )
    return config


def demo(config: ml_collections.ConfigDict) -> None:
    """Two CPU cores, a few minutes: the small table on 8 frames of 48 pixels, as configs/vdim.py:demo; one view."""
    config.batch_size = 16
    config.encoder.update(dict(table="small", frames=8, dtype="float32"))
    config.method.update(dict(phi_dim=128, hidden=128))
    config.data.update(dict(views=1, frames=8, image_size=48))
    config.test.update(dict(resize=55, stride=8))
    config.prepare.update(dict(fps=12.5, short_side=64))  # 8 frames are about a cycle
    config.schedule.update(dict(total_steps=200, boundaries=(100, 150)))
    config.run.update(dict(log_every=20, checkpoint_every=100))


def demo_vito(config: ml_collections.ConfigDict) -> None:
    """The same for image encoders: 4 frames of 64 pixels in half a second."""
    config.batch_size = 8
    config.encoder.update(dict(depth=18, width=0.25, dtype="float32"))
    config.data.update(dict(frames=4, fps=8.0, image_size=64))
    config.test.update(dict(resize=72, clips=2))
    config.prepare.update(dict(fps=12.5, short_side=72))
    config.clips_per_video = 2
    config.optimizer.frozen_epochs = 1.0
    config.schedule.update(dict(epochs=4.0, boundaries=(2.0, 3.0)))
    config.run.update(dict(log_every=20, checkpoint_every=100))
