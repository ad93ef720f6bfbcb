"""Rendered action clips whose class is a motion, written as real video files."""

import functools
import os
from collections.abc import Sequence

import numpy as np

from input_pipeline.rendered import shapes

# (x, y, size) of each class as functions of its cycle's angle t, in radians, which grows with time; None stands still.
# All are sines, so that at a random point of the cycle they have one distribution of values. y points down.
ACTIONS = {
    "left_right": (np.sin, None, None),
    "up_down": (None, np.sin, None),
    "rising_diagonal": (np.sin, lambda t: -np.sin(t), None),
    "falling_diagonal": (np.sin, np.sin, None),
    "clockwise": (np.cos, np.sin, None),
    "anticlockwise": (np.cos, lambda t: -np.sin(t), None),
    "pulsate": (None, None, np.sin),
    "still": (None, None, None),
}
SHAPE = "disc"
HERTZ = (1.2, 1.8)  # cycles per second
REACH = 0.20  # of x and y, as a share of the picture's side
GROWTH = 0.35  # exp(+-0.35): the size varies by a factor of 2


def draw_pose(rng: np.random.Generator, action: str, *, size: int, frames: int, fps: float = shapes.FPS) -> shapes.Pose:
    """Pose of an object that does `action`, one of ACTIONS; the rest is drawn from `rng` in the same way for all."""
    time = np.arange(frames) / fps  # seconds
    cycle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * rng.uniform(*HERTZ) * time
    still = rng.uniform(0, 2 * np.pi, 3)
    centre, side = size * rng.uniform(0.3, 0.7, 2), size * np.exp(rng.uniform(np.log(0.24), np.log(0.34)))

    x, y, growth = (
        np.full(frames, np.sin(rest)) if run is None else run(cycle)
        for run, rest in zip(ACTIONS[action], still, strict=True)
    )
    return shapes.Pose(
        place=centre + REACH * size * np.stack([x, y], axis=1),
        side=side * np.exp(GROWTH * growth),
        angle=np.zeros(frames),
        squeeze=np.ones(frames),
    )


def render_action(rng: np.random.Generator, action: str, *, size: int, frames: int, fps: float) -> np.ndarray:
    """One clip: uint8[frames, size, size, 3] RGB."""
    pose = draw_pose(rng, action, size=size, frames=frames, fps=fps)
    return shapes.render_scene(rng, shapes.unit_shape(SHAPE), pose, size=size, fps=fps)


def write_actions(
    out: str | os.PathLike,
    *,
    videos: int,
    seed: int,
    size: int = 80,
    seconds: float = 2.4,
    fps: int = shapes.FPS,
    classes: Sequence[str] = tuple(ACTIONS),
    workers: int | None = None,
) -> None:
    """Renders `videos` clips, three in four to OUT/train and the rest to OUT/test, one folder per class.

    Arguments, errors and what happens after an interruption: shapes.write_videos; classes are names from ACTIONS.
    """
    frames = round(seconds * fps)
    shapes.check_values(
        videos=videos, seed=seed, size=size, frames=frames, fps=fps, classes=classes, known=tuple(ACTIONS)
    )
    settings = dict(videos=videos, seed=seed, size=size, frames=frames, fps=fps, classes=list(classes), kind="actions")
    render = functools.partial(render_action, size=size, frames=frames, fps=fps)
    shapes.write_rendered(out, settings, render, workers)
