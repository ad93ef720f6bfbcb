"""DAVIS: propagates the first mask through each sequence and scores the others. The command is evaluation/davis.py."""

import dataclasses
import json
import logging
import pathlib
import shutil
import time
from typing import Self

import av
import numpy as np

from evaluation.protocols.davis import data as davis_data
from evaluation.protocols.davis.data import Sequence
from evaluation.protocols.davis.metrics import overall, score_sequence
from evaluation.protocols.davis.propagate import PROTOCOLS, VFS_SHALLOW_RADIUS, PropagationProtocol, Propagator
from evaluation.protocols.interpolation import dense_encoder
from evaluation.protocols.masks import palette
from vivi_jax import files
from vivi_jax.errors import DataError
from vivi_jax.models.base import Encoder
from vivi_jax.models.resnet import ResNet

_LOG = logging.getLogger(__name__)
VIDEO_FPS = 24  # DAVIS' frames


def choose_protocol(name: str, encoder: Encoder, short_side: int | None) -> PropagationProtocol:
    """PROTOCOLS[name]; VFS has a smaller radius for shallow ResNets. `short_side` replaces its own."""
    protocol = PROTOCOLS[name]
    if name == "vfs" and isinstance(encoder, ResNet) and encoder.depth < 50:
        protocol = dataclasses.replace(protocol, radius=VFS_SHALLOW_RADIUS)
    return protocol if short_side is None else dataclasses.replace(protocol, short_side=short_side)


def evaluate(
    encoder: Encoder, variables: dict, sequences: list[Sequence], protocol: PropagationProtocol, out: pathlib.Path
) -> dict:
    """Propagates and scores every sequence that has no result yet; davis.json without its sources."""
    dense, layer = dense_encoder(encoder, 1, output_stride=8, dilate=False)
    results = {}
    for sequence in sequences:
        path = out / "sequences" / f"{sequence.name}.json"
        if not path.exists():
            result = run_sequence(dense, layer, variables, sequence, protocol, out)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, result)
        results[sequence.name] = json.loads(path.read_text())
    return summary(results)


def run_sequence(
    encoder: Encoder, layer: str, variables: dict, sequence: Sequence, protocol: PropagationProtocol, out: pathlib.Path
) -> dict:
    """Writes the masks and the video of one sequence; {"frames", "seconds_per_frame": median, "objects": scores}."""
    masks = files.inside(out / "masks", sequence.name)
    shutil.rmtree(masks, ignore_errors=True)  # of a run that was killed
    masks.mkdir(parents=True)
    (out / "videos").mkdir(exist_ok=True)
    seconds, start = [], time.perf_counter()
    with Video(out / "videos" / f"{sequence.name}.mp4", sequence.size) as video:
        for i, path in enumerate(sequence.frames):
            frame = sequence.frame(i)
            if i == 0:
                objects = sequence.mask(0)
                propagator = Propagator(encoder, layer, variables, protocol, objects, frame, sequence.objects)
            else:
                objects = propagator.step(frame)
            davis_data.write_objects(masks / f"{path.stem}.png", objects)
            video.add(frame, objects)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    result = {"frames": len(sequence.frames), "seconds_per_frame": float(np.median(seconds))} | score(sequence, masks)
    _LOG.info(
        "%s: %d frames, %.2f s per frame (median)%s",
        sequence.name,
        result["frames"],
        result["seconds_per_frame"],
        short_scores(result["objects"]),
    )
    return result


def score(sequence: Sequence, masks: pathlib.Path) -> dict:
    """{"objects": scores of each object against saved masks}; empty where the sequence has no annotations.

    Raises:
      DataError: a result that is missing, of another size, or with an object that the first frame does not have.
    """
    if not sequence.scored:
        return {"objects": []}

    def saved(i: int) -> np.ndarray:
        path = masks / f"{sequence.frames[i].stem}.png"
        found = davis_data.read_objects(path, binary=sequence.objects == 1)  # in a result nothing is 255 but an object
        if found.shape != sequence.size:
            raise DataError(
                f"{path} is {found.shape[1]} x {found.shape[0]} pixels, its frame {sequence.size[1]} x "
                f"{sequence.size[0]}"
            )
        if found.max() > sequence.objects:
            raise DataError(f"{path} has object {found.max()}; {sequence.name} has {sequence.objects}")
        return found

    return {"objects": score_sequence(sequence, saved)}


def summary(results: dict[str, dict]) -> dict:
    """{"scores": means over all objects, or None, "sequences": results, "seconds_per_frame"}."""
    objects = [scores for result in results.values() for scores in result["objects"]]
    seconds = [result["seconds_per_frame"] for result in results.values() if "seconds_per_frame" in result]
    return {
        "scores": overall(objects) if objects else None,
        "seconds_per_frame": float(np.mean(seconds)) if seconds else None,
        "sequences": results,
    }


def short_scores(objects: list[dict]) -> str:
    """For the log: the means over the objects of one sequence."""
    if not objects:
        return ", no masks to score against"
    found = overall(objects)
    return f", J {100 * found['J_mean']:.1f}, F {100 * found['F_mean']:.1f}"


def markdown(result: dict) -> str:
    """The means, and a row for each object, in per cent."""
    columns = ("mean", "recall", "decay")
    rows = [
        f"| {name} {k} | " + " | ".join(f"{100 * scores[m][c]:.1f}" for m in "JF" for c in columns) + " |"
        for name, sequence in result["sequences"].items()
        for k, scores in enumerate(sequence["objects"], 1)
    ]
    lines = [
        f"# DAVIS 2017: {result['source']}",
        "",
        f"Protocol: {result['protocol']}. Data: {result['data']}, {len(result['sequences'])} sequences.",
        "",
    ]
    if result["seconds_per_frame"]:
        lines += [f"{result['seconds_per_frame']:.2f} s per frame (mean of the sequences' medians).", ""]
    if not rows:
        return "\n".join([*lines, "No sequence has masks to score against.", ""])
    means = " | ".join(f"{100 * result['scores'][f'{m}_{c}']:.1f}" for m in "JF" for c in columns)
    return "\n".join(
        [
            *lines,
            f"J&F {100 * result['scores']['J&F']:.1f}",
            "",
            "| object | J mean | J recall | J decay | F mean | F recall | F decay |",
            "|---|---|---|---|---|---|---|",
            *rows,
            f"| mean | {means} |",
            "",
        ]
    )


class Video:
    """Writes frames with their objects in colour, H.264; for looking at."""

    def __init__(self, path: pathlib.Path, size: tuple[int, int]):
        self._height, self._width = (length // 2 * 2 for length in size)  # H.264 halves the colours' resolution
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream("libx264", rate=VIDEO_FPS, options={"crf": "20", "threads": "1"})
        self._stream.height, self._stream.width, self._stream.pix_fmt = self._height, self._width, "yuv420p"

    def add(self, frame: np.ndarray, objects: np.ndarray) -> None:
        """uint8[H, W, 3] and uint8[H, W]."""
        shown = np.where((objects > 0)[..., None], frame // 2 + palette()[objects] // 2, frame)
        picture = np.ascontiguousarray(shown[: self._height, : self._width])
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()
