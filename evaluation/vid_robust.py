"""ImageNet-Vid-Robust: accuracy on single frames, and on all frames within k of them (PM-k; Shankar et al. 2019).

    python -m evaluation.vid_robust --data=DIR --checkpoint=RUN_OR_FILE|--predictions=FILE [--out=JSON]

DIR holds the official metadata (pmsets.json, labels.json, rev_class_idx_map.json) and, unless predictions are
given, the frames, under the names of pmsets.json: DIR/val/VIDEO/000010.JPEG. The encoder must have
ImageNet's 1000-class classifier. FILE is an .npz with `names` [N] and `logits` [N, 1000 or 30], or a CSV file with
lines of name,logit,logit,...
"""

import argparse
import csv
import dataclasses
import json
import pathlib

import numpy as np
from scipy import stats

from evaluation import encoders
from input_pipeline import images
from input_pipeline.folders import Finder
from input_pipeline.lists import read_lines
from vivi_jax import command_line, files
from vivi_jax.errors import ConfigError, DataError
from vivi_jax.models.base import Encoder

VID_CLASSES, IMAGENET_CLASSES = 30, 1000
_MAX_PREDICTIONS = 2**32  # bytes: 20 times those of all frames of the set
WINDOW = 10  # frames: the farthest neighbours in pmsets.json


@dataclasses.dataclass(frozen=True)
class Frames:
    """The official metadata."""

    neighbours: dict[str, list[str]]  # anchor -> its neighbours, up to 20
    labels: dict[str, set[int]]  # frame -> its right classes among the 30
    imagenet_classes: list[list[int]]  # of each of the 30: its ImageNet classes

    @property
    def names(self) -> list[str]:
        """All frames, each once, sorted."""
        return sorted({*self.neighbours, *(name for near in self.neighbours.values() for name in near)})


def load_metadata(data: str) -> Frames:
    """Raises DataError: a file is missing or damaged, or a frame has no label."""

    def read(name: str) -> dict:
        path = pathlib.Path(data) / name
        try:
            return json.loads(path.read_bytes())  # finds out the encoding itself, with a byte-order mark too
        except FileNotFoundError:
            raise DataError(
                f"no {path}; copy the files of src/eval_settings/imagenet-vid-robust_metadata in "
                "modestyachts/imagenet-testbed there"
            ) from None
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}") from None

    mapping = read("rev_class_idx_map.json")
    frames = Frames(
        read("pmsets.json"),
        {name: set(label) for name, label in read("labels.json").items()},
        [mapping[str(k)] for k in range(len(mapping))],
    )
    unlabelled = [name for name in frames.names if name not in frames.labels]
    if unlabelled:
        raise DataError(f"{data}/labels.json lacks {len(unlabelled)} frames of pmsets.json, the first {unlabelled[0]}")
    return frames


def to_vid_classes(logits: np.ndarray, imagenet_classes: list[list[int]]) -> np.ndarray:
    """[N, 1000] -> [N, 30]: the largest logit of the ImageNet classes that belong to each class."""
    return np.stack([logits[:, classes].max(axis=1) for classes in imagenet_classes], axis=1)


def score(right: dict[str, bool], neighbours: dict[str, list[str]], *, k: int) -> int:
    """Anchors that are right together with every neighbour at most k frames away; k = 0: the anchors alone."""
    return sum(
        right[anchor] and all(right[name] for name in near if abs(number(name) - number(anchor)) <= k)
        for anchor, near in neighbours.items()
    )


def number(name: str) -> int:
    """Frame number, from the file name: "val/VIDEO/000010.JPEG" -> 10."""
    try:
        return int(pathlib.PurePath(name).stem)
    except ValueError:
        raise DataError(f"frame {name} of pmsets.json has no number for a name") from None


def clopper_pearson(k: int, n: int, *, alpha: float = 0.05) -> tuple[float, float]:
    """Exact confidence interval of a proportion, k successes of n; the paper's have alpha = 0.05."""
    low = stats.beta.ppf(alpha / 2, k, n - k + 1) if k else 0.0
    high = stats.beta.ppf(1 - alpha / 2, k + 1, n - k) if k < n else 1.0
    return float(low), float(high)


def evaluate(frames: Frames, names: list[str], logits: np.ndarray) -> dict:
    """{"anchors", "frames", "pm": [{"k", "right", "accuracy", "interval"} for k = 0 .. 10], "drop": pm-0 - pm-10}.

    Args:
      names: of the frames in `logits`, float[N, 1000] or float[N, 30].

    Raises:
      DataError: frames without logits, or logits of another width, or not finite.
    """
    if logits.ndim != 2 or len(names) != len(logits) or logits.shape[1] not in (VID_CLASSES, IMAGENET_CLASSES):
        raise DataError(
            f"logits of {len(names)} frames have shape {logits.shape}: must be [frames, "
            f"{IMAGENET_CLASSES}] or [frames, {VID_CLASSES}]"
        )
    if not np.isfinite(logits).all():
        raise DataError(f"the logits of {names[np.flatnonzero(~np.isfinite(logits).all(axis=1))[0]]} are not finite")
    if logits.shape[1] == IMAGENET_CLASSES:
        logits = to_vid_classes(logits, frames.imagenet_classes)
    predicted = dict(zip(names, logits.argmax(axis=1).tolist(), strict=True))
    missing = [name for name in frames.names if name not in predicted]
    if missing:
        raise DataError(f"{len(missing)} of {len(frames.names)} frames have no logits: {', '.join(missing[:5])}")
    right = {name: predicted[name] in frames.labels[name] for name in frames.names}
    total, rows = len(frames.neighbours), []
    for k in range(WINDOW + 1):
        count = score(right, frames.neighbours, k=k)
        rows.append({"k": k, "right": count, "accuracy": count / total, "interval": clopper_pearson(count, total)})
    return {
        "anchors": total,
        "frames": len(frames.names),
        "pm": rows,
        "drop": rows[0]["accuracy"] - rows[-1]["accuracy"],
    }


def predict(
    encoder: Encoder, variables: dict, frames: Frames, data: str, *, image_size: int, batch_size: int
) -> tuple[list[str], np.ndarray]:
    """(frame names, float32[N, 1000] logits) of the central square of each frame.

    Raises:
      ConfigError: an encoder without a classifier of 1000 classes.
      DataError: frames that are missing or do not decode.
    """
    classes = encoder.num_classes
    if classes != IMAGENET_CLASSES:
        raise ConfigError(
            f"the encoder has {'no classifier' if classes is None else f'{classes} classes'}; "
            f"ImageNet-Vid-Robust needs ImageNet's {IMAGENET_CLASSES}: take a supervised or co-trained "
            "model, or give --predictions"
        )
    names, root = frames.names, pathlib.Path(data)
    finder = Finder(root)
    paths = [finder.find(name) or root / name for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(names)} frames are not in {root}: {', '.join(missing[:5])}")
    pictures = images.LabelledImages(
        str(root),
        np.zeros(len(names), np.int32),
        [""],
        lambda i: paths[i].read_bytes(),
        lambda i: str(paths[i]),
    )
    batches = images.eval_batches(pictures, batch_size=batch_size, image_size=image_size)
    return names, encoders.extract_logits(encoder, variables, batches)[0]


def read_predictions(path: str) -> tuple[list[str], np.ndarray]:
    """(names, float[N, classes] logits) of an .npz or CSV file. Raises DataError: no such file, or not of that form."""
    try:
        if pathlib.Path(path).suffix == ".npz":
            files.check_unpacked(path, _MAX_PREDICTIONS)
            with np.load(path, allow_pickle=False) as file:
                return file["names"].tolist(), file["logits"]
        lines = [line for line in csv.reader(read_lines(path)) if line]
        return [line[0].strip() for line in lines], np.array([line[1:] for line in lines], np.float64)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"no predictions in {path} (names and logits as .npz, or lines of name,logit,...): {error}"
        ) from None


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("evaluation.vid_robust", __doc__)
    parser.add_argument("--data", "--data_dir", required=True, help="folder of the metadata, and of the frames")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--checkpoint", help="run directory or file of weights of an encoder with a classifier")
    given.add_argument("--predictions", help=".npz or CSV file of names and logits")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--out", help="JSON file to write the result to")
    command_line.run_parser(run, parser, argv, remote=["checkpoint"], copied=["data", "predictions"])


def run(options: argparse.Namespace) -> None:
    """Writes and prints the scores."""
    frames = load_metadata(options.data)
    if options.predictions:
        names, logits = read_predictions(options.predictions)
    else:
        encoder, variables, _ = encoders.load_encoder(options.checkpoint)
        names, logits = predict(
            encoder, variables, frames, options.data, image_size=options.image_size, batch_size=options.batch_size
        )
    result = evaluate(frames, names, logits)
    for row in (result["pm"][0], result["pm"][-1]):
        low, high = (100 * bound for bound in row["interval"])
        print(f"PM-{row['k']}: {row['accuracy']:.1%} [{low:.1f}, {high:.1f}] of {result['anchors']} anchors")
    print(f"drop: {100 * result['drop']:.1f}")
    if options.out:
        source = {"checkpoint": options.checkpoint, "predictions": options.predictions}
        files.write_json(options.out, result | source)


if __name__ == "__main__":
    main()
