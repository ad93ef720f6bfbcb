"""Small frame stores for tests, of pictures made up in memory."""

import pathlib

import cv2
import numpy as np

from input_pipeline.store import FrameStore, shard_name, write_index, write_shard


def jpeg(rgb: np.ndarray) -> bytes:
    """uint8[H, W, 3] with little loss, and none between neighbouring colours."""
    full_colour = [cv2.IMWRITE_JPEG_QUALITY, 98, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", rgb[..., ::-1], full_colour)[1].tobytes()


def write_store(
    directory: pathlib.Path, videos: list[dict], frames: list[bytes], class_names: tuple[str, ...] = ()
) -> FrameStore:
    """A store of one shard; videos: {"frames", "fps", "height", "width"} and, if it has them, more columns, each."""
    directory.mkdir(parents=True)
    path = directory / shard_name(0, 1)
    shard, checksums = write_shard(path, frames)
    rows = [
        {"input": f"v{v}.mp4", "status": "ok", "reason": "", "shot_starts": [0], "label": -1, **video}
        for v, video in enumerate(videos)
    ]
    write_index(
        directory,
        settings={},
        rows=rows,
        class_names=list(class_names),
        shards=[shard],
        checksums=[checksums],
    )
    return FrameStore(directory)
