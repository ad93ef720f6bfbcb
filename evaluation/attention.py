"""Where a trained method looks: frames with their attention masks laid over (VITO Figure A.1).

    python -m evaluation.attention --checkpoint=RUN --images=DIR --out=PNG [--count=8]

DIR is a frame store, of which pairs of frames of several clips are shown, or a folder of images. The masks come from
the online network, each frame by itself. The paper draws the coarsest scale; all scales are drawn here, coarsest first.
"""

import argparse
import os
import pathlib
from typing import BinaryIO

import cv2
import jax
import ml_collections
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from input_pipeline.folders import IMAGE_SUFFIXES, walk
from input_pipeline.store import META, FrameStore
from input_pipeline.streams import picture_size
from vivi_jax import checkpoint, command_line
from vivi_jax.buckets.client import ADDRESSES, Folder
from vivi_jax.buckets.local import copied
from vivi_jax.build import build_method
from vivi_jax.errors import ConfigError, DataError
from vivi_jax.methods.base import HasAttention

PAIR_SECONDS = 0.76  # between the two frames of a clip: the median of VITO's training pairs (VITO §4.2)
HEAT = 0.55  # opacity of the mask over the frame


def load_images(source: str, *, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    """Returns (uint8[N, size, size, 3] central squares, N captions), N <= count, evenly spaced over a folder or store.

    A frame store gives two frames of each clip, next to each other; of a folder every image, also in folders below,
    may be chosen.

    Raises:
      DataError: no images, or one that does not decode.
    """
    if source.startswith(ADDRESSES) and META not in Folder(source).names():
        source = copied(source)
    root = pathlib.Path(source)
    if source.startswith(ADDRESSES) or (root / META).is_file():
        encoded = _clip_pairs(FrameStore(source), count // 2)
    else:
        files = sorted(p for p in map(root.joinpath, walk(root)) if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise DataError(f"{source} is neither a frame store nor a folder with {', '.join(sorted(IMAGE_SUFFIXES))}")
        encoded = [(files[i].read_bytes(), files[i].stem, str(files[i])) for i in spread(len(files), count)]
    return np.stack([_central_square(data, size, name) for data, _, name in encoded]), [c for _, c, _ in encoded]


def spread(total: int, count: int) -> np.ndarray:
    """At most `count` different indices, evenly spaced from 0 to total - 1."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))


def _clip_pairs(store: FrameStore, clips: int) -> list[tuple[bytes, str, str]]:
    """(JPEG, caption, name for messages) of two frames around the middle of each of `clips` videos."""
    pairs = []
    for v in spread(len(store), clips):
        gap = round(PAIR_SECONDS * float(store.fps[v]))
        first = (store.num_frames[v] - gap) // 2
        for frame in np.clip([first, first + gap], 0, store.num_frames[v] - 1):
            name = pathlib.Path(str(store.videos[v])).stem
            pairs.append(
                (
                    store.read(store.first_record[v] + frame).item(),
                    f"{name}, {frame / store.fps[v]:.2f} s",
                    f"frame {frame} of {store.videos[v]}",
                )
            )
    return pairs


def _central_square(data: bytes, size: int, name: str) -> np.ndarray:
    try:
        picture_size.of(data, name)
    except picture_size.TooLarge:
        raise
    except ValueError:
        raise DataError(f"{name} does not decode; replace or remove it") from None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise DataError(f"{name} does not decode; replace or remove it")
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = image[top : top + side, left : left + side]
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if size < side else cv2.INTER_CUBIC)


def method_with_attention(run: str) -> HasAttention:
    """The method of a run.

    Raises:
      CheckpointError: no run there.
      ConfigError: its method has no attention.
    """
    method = build_method(ml_collections.ConfigDict(checkpoint.load_config(run)))
    if not isinstance(method, HasAttention):
        raise ConfigError(f"{run} is of {type(method).__name__}, which has no attention to show")
    return method


def load_masks(run: str, method: HasAttention, images: np.ndarray) -> dict[str, np.ndarray]:
    """Attention masks of a run's online network: feature map -> float32[N, h, w], each summing to 1.

    Args:
      run: run directory.
      method: of the run.
      images: uint8[N, H, W, 3].

    Raises:
      CheckpointError: nothing good in the run.
      ConfigError: this configuration of its method has no attention.
    """
    state = checkpoint.load_state(run)
    masks = jax.jit(method.attention_masks)(state["params"], state["model_state"], images.astype(np.float32) / 255)
    if not masks:
        raise ConfigError(f"{run} was configured without attention (config.method, config.encoder): none to show")
    return {stage: np.asarray(mask) for stage, mask in masks.items()}


def overlay(image: np.ndarray, mask: np.ndarray, peak: float) -> np.ndarray:
    """A frame in grey under its mask in colour.

    Args:
      image: uint8[H, W, 3].
      mask: float[h, w], sums to 1.
      peak: attention, in multiples of the uniform 1 / (h w), that gets the strongest colour.

    Returns:
      float[H, W, 3] in [0, 1].
    """
    heat = cv2.resize(mask * mask.size / peak, image.shape[1::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] / 255
    return (1 - HEAT) * grey + HEAT * colormaps["inferno"](heat)[..., :3]


def attention_figure(
    images: np.ndarray, masks: dict[str, np.ndarray], captions: list[str], out: str | os.PathLike | BinaryIO
) -> None:
    """Draws a column per frame; rows: the frame, then it under the mask of each scale, the coarsest first.

    Colours of a row have one scale, from no attention to the row's maximum, which is written beside it in multiples of
    uniform attention: at 1x the mask picks nothing out.

    Args:
      images: uint8[N, H, W, 3]; masks: stage -> float[N, h, w]; captions: N strings.
      out: PNG file, by name or open.
    """
    scales = sorted(masks.items(), key=lambda item: item[1][0].size)
    figure = Figure(figsize=(0.9 + 1.35 * len(images), 0.3 + 1.4 * (1 + len(scales))), dpi=150, layout="constrained")
    axes = figure.subplots(1 + len(scales), len(images), squeeze=False)
    for image, caption, axis in zip(images, captions, axes[0], strict=True):
        axis.imshow(image)
        axis.set_title(caption.replace(", ", "\n"), fontsize=9, parse_math=False)  # names may have a $
    axes[0, 0].set_ylabel("frame", fontsize=9)
    for (stage, mask_NxHxW), row in zip(scales, axes[1:], strict=True):
        height, width = mask_NxHxW.shape[1:]
        peak = float(mask_NxHxW.max()) * height * width
        for image, mask, axis in zip(images, mask_NxHxW, row, strict=True):
            axis.imshow(overlay(image, mask, peak))
        row[0].set_ylabel(f"{stage}, {height} x {width}\nup to {peak:.1f}x uniform", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(out, format="png")


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("evaluation.attention", __doc__)
    parser.add_argument("--checkpoint", required=True, help="run directory")
    parser.add_argument("--images", required=True, help="frame store, or folder of images")
    parser.add_argument("--out", required=True, help="PNG file to write")
    parser.add_argument("--count", type=int, default=8, help="frames to show, at least 2")
    command_line.run_parser(draw, parser, argv, remote=["checkpoint", "images"])


def draw(options: argparse.Namespace) -> None:
    """Writes the picture."""
    method = method_with_attention(options.checkpoint)
    size = checkpoint.load_config(options.checkpoint)["data"]["image_size"]
    images, captions = load_images(options.images, count=max(options.count, 2), size=size)
    attention_figure(images, load_masks(options.checkpoint, method, images), captions, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
