"""UCF-101 from TensorFlow Datasets, written out as video files: TFDS keeps pictures, the rest here reads videos."""

import os
import pathlib

import numpy as np

from input_pipeline import tfds_sets
from input_pipeline.rendered.shapes import encode
from vivi_jax import files
from vivi_jax.errors import DataError

NAME = "ucf101"
FRAMES_PER_SECOND = 25  # of UCF-101's files (Soomro et al. 2012, section 3); TFDS does not keep it
_DONE = "complete"


def write_videos(number: str, out: str | os.PathLike, data_dir: str | None = None) -> None:
    """Writes split `number` ("1", "2", "3") to OUT/{train,test}/CLASS/*.mp4; goes on where it was interrupted.

    The files are H.264 without chroma sub-sampling, at a quality above the originals'. TFDS does not keep the names of
    the videos: they are numbered in its order.

    Raises:
      DataError: TFDS has not prepared the data set, or has no such split.
    """
    root = pathlib.Path(out)
    if (root / _DONE).exists():
        return
    builder = tfds_sets.builder(f"{NAME}/{NAME}_{number}", data_dir)
    classes = builder.info.features["label"].names
    for part in ("train", "test"):
        try:
            examples = tfds_sets.examples(builder, part)
        except (AssertionError, ValueError, OSError) as e:
            raise DataError(
                f"TFDS has no {part!r} of {NAME}/{NAME}_{number} ({' '.join(str(e).split())[:200]}); give a folder as "
                f"--data, or run: {tfds_sets.command(f'{NAME}/{NAME}_{number}', data_dir)}"
            ) from e
        for i, example in enumerate(examples):
            path = files.inside(root / part, classes[example["label"]]) / f"{i:05d}.mp4"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, example["video"])
    (root / _DONE).touch()


def _write(path: pathlib.Path, frames: np.ndarray) -> None:
    """Encodes uint8[T, H, W, 3] RGB frames, of any height and width, which needs yuv444p."""
    with files.atomic(path, unfinished=path.with_name(f".{path.name}.partial")) as unfinished:
        encode(unfinished, frames, rate=FRAMES_PER_SECOND, pixel_format="yuv444p", options={"crf": "8"})
