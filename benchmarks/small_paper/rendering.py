"""What a frame of the small paper's scenes takes to render, beside one of the demo's videos of the same size.

    python -m benchmarks.small_paper.rendering

Processor time of one core, so other work on the machine matters little. Writes docs/results/small_paper_rendering.json.
"""

import time
from collections.abc import Callable

import cv2
import numpy as np

from benchmarks.results import record
from input_pipeline.rendered import scenes, shapes
from input_pipeline.rendered.creatures import CREATURES

SIZE, FRAMES, VIDEOS, ROUNDS = 80, 34, 20, 5


def scene(rng: np.random.Generator, i: int) -> None:
    creature = list(CREATURES)[i % len(CREATURES)]
    scenes.render_shot(rng, creature, scenes.Settings(SIZE, FRAMES))


def shape(rng: np.random.Generator, i: int) -> None:
    contours = shapes.unit_shape(list(shapes.SHAPES)[i % len(shapes.SHAPES)])
    shapes.render_shot(rng, contours, size=SIZE, frames=FRAMES, fps=scenes.FPS)


def milliseconds(render: Callable[[np.random.Generator, int], None], seed: int) -> float:
    """Of a frame."""
    start = time.process_time()
    for i in range(VIDEOS):
        render(np.random.default_rng([seed, i]), i)
    return 1e3 * (time.process_time() - start) / VIDEOS / FRAMES


def main() -> None:
    cv2.setNumThreads(1)
    for render in (scene, shape):
        milliseconds(render, ROUNDS)  # what is kept from the first call on
    rounds = [(milliseconds(scene, seed), milliseconds(shape, seed)) for seed in range(ROUNDS)]
    of_scenes, of_shapes = np.median(rounds, axis=0).tolist()
    ratio = float(np.median([a / b for a, b in rounds]))
    values = {"scene_ms": of_scenes, "shape_ms": of_shapes, "ratio": ratio, "size": SIZE, "rounds": ROUNDS}
    command = "python -m benchmarks.small_paper.rendering"
    print(values, record("small_paper_rendering", values, command=command, seeds=list(range(ROUNDS))))


if __name__ == "__main__":
    main()
