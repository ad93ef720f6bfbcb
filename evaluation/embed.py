"""Features of every image and video in a folder, as a table.

    python -m evaluation.embed FOLDER --checkpoint=RUN --out=features.parquet        or .npz, or .csv

An image is one row. A video is one row, the mean over its frames at --fps; with --per_frame it is a row per frame, with
the frame's time. Of a picture the central square of 7/8 of the short side is taken, as in the other evaluations. A file
that cannot be read is named, and counted at the end; the others are written.
"""

import argparse
import csv
import importlib
import io
import logging
import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from evaluation import encoders
from input_pipeline import folders
from input_pipeline.preparation.sandbox import Sandbox
from input_pipeline.streams import decode
from vivi_jax import command_line, files
from vivi_jax.errors import ConfigError, DataError
from vivi_jax.export.pretrained import LoadedEncoder

_LOG = logging.getLogger("evaluation.embed")
FORMATS = (".parquet", ".npz", ".csv")
LIMITS = {"memory_mb": 2048, "cpu_s": 1800, "wall_s": 3600.0}  # of decoding one video, as in prepare
JPEG_QUALITY = 95


class Rows(NamedTuple):
    """A table of N rows.

    Attributes:
      names: paths relative to the folder, [N].
      seconds: float64 [N], the time of a frame; NaN of images, and of rows that are a whole video.
      frames: int32 [N], how many the row is the mean of.
      features: float32 [N, C].
    """

    names: list[str]
    seconds: np.ndarray
    frames: np.ndarray
    features: np.ndarray


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("evaluation.embed", __doc__)
    parser.add_argument("folder", help="folder with images and videos, at any depth; or one file")
    parser.add_argument("--checkpoint", "--workdir", required=True, help="run directory or file of weights")
    parser.add_argument("--out", required=True, help=f"file to write: {', '.join(FORMATS)}")
    parser.add_argument("--fps", type=float, default=1.0, help="frames per second taken of videos")
    parser.add_argument("--per_frame", action="store_true", help="a row per frame of a video, not their mean")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time")
    parser.add_argument("--image_size", type=int, help="pixels of a side; by default what the run was trained at")
    command_line.run_parser(embed, parser, argv, remote=["checkpoint"], copied=["folder"])


def embed(options: argparse.Namespace) -> None:
    """Writes the table and says how many files are in it, and how many could not be read."""
    out = pathlib.Path(options.out)
    check(options, out)
    root = pathlib.Path(options.folder)
    names = list_files(root)
    loaded = encoders.load_encoder(options.checkpoint)
    size = options.image_size or loaded.image_size
    failed: dict[str, str] = {}
    pictures = read_all(root, names, size, options.fps, failed)
    rows = table(loaded, pictures, per_frame=options.per_frame, batch_size=options.batch_size, size=size)
    for name, reason in failed.items():
        _LOG.warning("left out %s: %s", name, reason)
    counted = f"{len(failed)} of {len(names)} files could not be read"
    if not rows.names:
        raise DataError(f"{counted}: nothing was written")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(out, content(rows, out.suffix))
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error}") from error
    print(f"wrote {out}: {len(rows.names)} rows of {rows.features.shape[1]} features; {counted}")


def check(options: argparse.Namespace, out: pathlib.Path) -> None:
    """Raises ConfigError for options that cannot work, before anything is read."""
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out={out}: its name must end in {', '.join(FORMATS)}")
    if out.suffix == ".parquet":
        pyarrow()
    if not 0 < options.fps < math.inf:
        raise ConfigError(f"--fps={options.fps}: must be above 0")
    for name in ("batch_size", "image_size"):
        value = vars(options)[name]
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value}: must be 1 or more")


def list_files(root: pathlib.Path) -> list[str]:
    """Names of the data files below a folder, or [""] of a file itself.

    Raises:
      DataError: nothing there.
    """
    if root.is_file():
        return [""]
    names = folders.walk(root) if root.is_dir() else []
    if not names:
        raise DataError(f"no files in {root}; give a folder with images or videos, or one file")
    return names


def read_all(
    root: pathlib.Path, names: list[str], size: int, fps: float, failed: dict[str, str]
) -> Iterator[tuple[str, float, np.ndarray]]:
    """Yields (name, seconds, uint8[size, size, 3]) of every picture; puts what cannot be read into `failed`.

    The frames of a video come one after the other. Seconds are NaN of images.
    """
    sandbox = Sandbox(**LIMITS)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name in tqdm(names, unit="file", disable=None):
                path = root / name if name else root
                shown = name or root.name
                try:
                    if path.suffix.lower() in folders.IMAGE_SUFFIXES:
                        yield shown, math.nan, square(decode.decode_whole(path.read_bytes()), size)
                    else:
                        yield from ((shown, *frame) for frame in video_frames(sandbox, path, scratch, size, fps))
                except (ValueError, OSError) as error:
                    failed[shown] = " ".join(str(error).split())
        finally:
            sandbox.close()


def video_frames(
    sandbox: Sandbox, path: pathlib.Path, scratch: str, size: int, fps: float
) -> Iterator[tuple[float, np.ndarray]]:
    """Yields (seconds, uint8[size, size, 3]) of a video's frames.

    Raises:
      DataError: it cannot be decoded.
    """
    frame_file = pathlib.Path(scratch, "frames")
    settings = {"fps": fps, "short_side": math.ceil(size * 8 / 7), "jpeg_quality": JPEG_QUALITY, "shot_rule": "auto"}
    row = sandbox.decode(str(path), str(frame_file), **settings)
    if row["status"] != "ok":
        raise DataError(row["reason"])
    with open(frame_file, "rb") as file:
        for k, length in enumerate(row["jpeg_bytes"]):
            yield k / row["fps"], square(decode.decode_whole(file.read(length)), size)


def square(picture_HxWx3: np.ndarray, size: int) -> np.ndarray:
    """The central square of 7/8 of the short side, uint8[size, size, 3]."""
    height, width = picture_HxWx3.shape[:2]
    side = max(min(height, width) * 7 // 8, 1)
    top, left = (height - side) // 2, (width - side) // 2
    still = np.zeros(1, np.int64)
    return decode.finish([picture_HxWx3[top : top + side, left : left + side]], still, still, size)[0]


def table(
    loaded: LoadedEncoder,
    pictures: Iterator[tuple[str, float, np.ndarray]],
    *,
    per_frame: bool,
    batch_size: int,
    size: int,
) -> Rows:
    """The rows of all pictures, in their order; no more than a batch of pictures is in memory."""
    names: list[str] = []
    seconds: list[float] = []
    frames: list[int] = []
    sums: list[np.ndarray] = []
    for name, time, vector in vectors(loaded, pictures, batch_size, size):
        if names and names[-1] == name and not per_frame:
            sums[-1] = sums[-1] + vector
            frames[-1] += 1
            seconds[-1] = math.nan
            continue
        names.append(name)
        seconds.append(time if per_frame else math.nan)
        frames.append(1)
        sums.append(vector.astype(np.float64))
    features = [total / count for total, count in zip(sums, frames, strict=True)]
    return Rows(names, np.array(seconds), np.array(frames, np.int32), np.array(features, np.float32))


def vectors(
    loaded: LoadedEncoder, pictures: Iterator[tuple[str, float, np.ndarray]], batch_size: int, size: int
) -> Iterator[tuple[str, float, np.ndarray]]:
    """Yields (name, seconds, float32[C]) of each picture; every batch is filled up, so that one program serves all."""
    batch: list[tuple[str, float, np.ndarray]] = []

    def encoded() -> Iterator[tuple[str, float, np.ndarray]]:
        images = np.zeros((batch_size, size, size, 3), np.uint8)
        images[: len(batch)] = [picture for _, _, picture in batch]
        found = loaded.features(images)
        yield from ((name, time, vector) for (name, time, _), vector in zip(batch, found, strict=False))
        batch.clear()

    for item in pictures:
        batch.append(item)
        if len(batch) == batch_size:
            yield from encoded()
    if batch:
        yield from encoded()


def content(rows: Rows, suffix: str) -> bytes:
    """The table as a file of this kind."""
    if suffix == ".npz":
        buffer = io.BytesIO()
        named: dict[str, Any] = rows._asdict() | {"names": np.array(rows.names)}
        np.savez(buffer, **named)
        return buffer.getvalue()
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", "seconds", "frames", *(f"feature{i}" for i in range(rows.features.shape[1]))])
        for name, time, count, vector in zip(*rows, strict=True):
            writer.writerow([name, "" if math.isnan(time) else time, count, *vector.tolist()])
        return text.getvalue().encode(errors="backslashreplace")
    arrow = pyarrow()
    buffer = io.BytesIO()
    columns = {
        "name": rows.names,
        "seconds": arrow.array(rows.seconds, from_pandas=True),  # NaN is no value
        "frames": rows.frames,
        "features": arrow.FixedSizeListArray.from_arrays(arrow.array(rows.features.ravel()), rows.features.shape[1]),
    }
    importlib.import_module("pyarrow.parquet").write_table(arrow.table(columns), buffer)
    return buffer.getvalue()


def pyarrow():
    """The package.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise ConfigError("--out=*.parquet needs the package pyarrow: pip install pyarrow, or --out=*.npz") from None


if __name__ == "__main__":
    main()
