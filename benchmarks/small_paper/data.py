"""The rendered sets of a size, made once: frame stores, sequences with masks, frames around the middle of videos."""

import pathlib
import shutil

import cv2
import numpy as np

from benchmarks.small_paper.settings import CHOSEN_SEEDS, SIZES
from benchmarks.training import rendered_store
from evaluation.protocols.davis import data as davis_data
from input_pipeline.images import LabelledImages
from input_pipeline.rendered import scenes
from input_pipeline.rendered.creatures import CREATURES
from input_pipeline.store import FrameStore

SEQUENCE_FRAMES, SEQUENCE_SIZE, LEAST_PIXELS = 12, 96, 40
NEIGHBOURS = 10  # frames before and after the middle one, as in ImageNet-Vid-Robust


def seed_of_videos(seed: int) -> int:
    """Seeds for choosing see other videos than the reported ones."""
    return CHOSEN_SEEDS if seed >= CHOSEN_SEEDS else 0


def store(out: pathlib.Path, size: str, videos: str, seed: int) -> pathlib.Path:
    """Folder with the stores train/ and test/ of a set, rendered and prepared if they are not there."""
    module, arguments, preparation = SIZES[size].videos[videos]
    folder = out / "data" / f"{videos}-{seed_of_videos(seed)}"
    rendered_store(folder, module, (*arguments, f"--seed={seed_of_videos(seed)}"), preparation)
    return folder / "store"


def sequences(out: pathlib.Path, size: str, seed: int) -> pathlib.Path:
    """Folder of rendered sequences in DAVIS' layout, with masks of every object that the first frame shows."""
    root = out / "data" / f"sequences-{seed_of_videos(seed)}"
    if (root / "ImageSets").exists():
        return root
    unfinished, names, drawn = root.with_name(f".{root.name}"), [], 0
    shutil.rmtree(unfinished, ignore_errors=True)
    while len(names) < SIZES[size].sequences:
        # 2: what "train" and "test" are in the random numbers of videos is 0 and 1.
        rng = np.random.default_rng([seed_of_videos(seed), 2, drawn])
        creature, drawn = list(CREATURES)[drawn % len(CREATURES)], drawn + 1
        settings = scenes.Settings(SEQUENCE_SIZE, SEQUENCE_FRAMES, distractors=(1, 3))
        frames, masks = scenes.render_shot(rng, creature, settings, masks=True)
        assert masks is not None
        if np.sum(masks[0] == 1) < 5 * LEAST_PIXELS:  # the creature is hidden
            continue
        names.append(f"{creature}-{drawn:03d}")
        _write_sequence(unfinished, names[-1], frames, masks)
    (unfinished / "ImageSets" / "2017").mkdir(parents=True)
    (unfinished / davis_data.LISTS[0]).write_text("".join(f"{name}\n" for name in names))
    unfinished.rename(root)
    return root


def _write_sequence(root: pathlib.Path, name: str, frames: np.ndarray, masks: np.ndarray) -> None:
    numbers = [n for n in range(1, masks.max() + 1) if np.sum(masks[0] == n) >= LEAST_PIXELS]
    renumbered = np.zeros(256, np.uint8)
    renumbered[numbers] = np.arange(1, len(numbers) + 1)
    folders = [root / part / davis_data.RESOLUTION / name for part in ("JPEGImages", "Annotations")]
    for folder in folders:
        folder.mkdir(parents=True)
    for t, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        cv2.imwrite(str(folders[0] / f"{t:05d}.jpg"), frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        davis_data.write_objects(folders[1] / f"{t:05d}.png", renumbered[mask])


def frames_around_the_middle(test: pathlib.Path, labels: LabelledImages, videos: int) -> tuple[LabelledImages, dict]:
    """Frames of the first `videos` of a store, each up to NEIGHBOURS frames from the middle one.

    Args:
      labels: the same store's middle frames, one of each video in its order.

    Returns:
      the frames as labelled images, named VIDEO/FRAME; and {name of a middle frame: names of its neighbours}.
    """
    frames = FrameStore(test)
    names, records, classes, neighbours = [], [], [], {}
    for video in range(min(videos, len(frames))):
        middle = int(frames.num_frames[video]) // 2
        near = range(max(0, middle - NEIGHBOURS), min(int(frames.num_frames[video]), middle + NEIGHBOURS + 1))
        neighbours[f"{video}/{middle}"] = [f"{video}/{t}" for t in near if t != middle]
        names += [f"{video}/{t}" for t in near]
        records += [(video, t) for t in near]
        classes += [labels.labels[video]] * len(near)

    def read(i: int) -> bytes:
        video, t = records[i]
        return frames.read_frames(video, np.array([t]))[0]

    pictures = LabelledImages(str(test), np.array(classes, np.int32), labels.class_names, read, lambda i: names[i])
    return pictures, neighbours
