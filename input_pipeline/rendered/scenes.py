"""Filmed creatures: a moving camera, distractors, occlusion, cuts. The class is the creature and nothing else.

All that is not the class is drawn in the same way for every class: place, size, direction, colours, light, background,
what else is in the picture. Of the two tones of a skin one is darker and one lighter than the background, each covers
half of every skin, and the area is 1 on average over a gait. So neither a histogram of colours nor a thumbnail tells
the class (tests/test_scenes.py). That the tones lie on both sides also leaves less to tell one video from another by:
a creature that stays lighter than its background does so in every frame.
"""

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from input_pipeline.rendered import shapes
from input_pipeline.rendered.creatures import CANVAS, CREATURES, SKINS, contours, skin

FPS = 10
SIDE = (0.44, 0.58)  # of the creature: the root of its area over the side of the picture
DISTRACTORS = (0, 1)  # least and most of them, beside the creature
IN_FRONT = 0.3  # share of the shots with something that passes in front,
OCCLUDED = 0.3  # and of the time in which it is in the picture there
_RAMP = np.linspace(0, 1, 256)[:, None]


class Settings(NamedTuple):
    """What decides a video beside its class and its random numbers."""

    size: int  # pixels
    frames: int
    fps: float = FPS
    shots: int = 1
    distractors: tuple[int, int] = DISTRACTORS


class Thing(NamedTuple):
    """Something flat in the picture: its outlines in every frame, and how its skin is laid on."""

    outlines: list[np.ndarray]  # of its parts: each float64[T, P, 2], in units of its side
    place: np.ndarray  # float64[T, 2], pixels
    side: np.ndarray  # float64[T], pixels
    angle: np.ndarray  # float64[T], radians
    stretch: np.ndarray  # float64[T], factor on its width and divisor of its height
    skin: np.ndarray  # uint8[CANVAS, CANVAS]
    colours: np.ndarray  # float64[T, 2, 3] in [0, 1], of the two tones


def render_shot(
    rng: np.random.Generator,
    creature: str,
    settings: Settings,
    *,
    colour_pace: float = 1.0,
    zoom: float = 1.0,
    masks: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """One camera shot; the creature is `zoom` times as large as usual.

    Returns:
      uint8[T, S, S, 3] RGB; and with `masks` uint8[T, S, S], the visible pixels of the creature (1) and of the
      distractors (2, 3, ...), 0 elsewhere.
    """
    size, frames = settings.size, settings.frames
    time = np.arange(frames) / settings.fps
    slow = time * colour_pace
    drift = functools.partial(shapes.drift, rng)
    ground = 0.5 + drift(slow, -0.12, 0.12)  # float64[T, 1]

    main = _creature(rng, creature, time, slow, ground, zoom * size, size)
    others = [
        _distractor(rng, time, slow, ground, size) for _ in range(rng.integers(*settings.distractors, endpoint=True))
    ]
    in_front = [_occluder(rng, time, slow, ground, size)] if rng.uniform() < IN_FRONT else []
    background = _Background(rng, time, slow, ground, size)

    behind = rng.integers(0, len(others) + 1)  # so many distractors are behind the creature
    order = [*others[:behind], main, *others[behind:]]
    numbers = [*range(2, 2 + behind), 1, *range(2 + behind, 2 + len(others))]
    video = np.empty((frames, size, size, 3), np.uint8)
    objects = np.zeros((frames, size, size), np.uint8) if masks else None
    for t in range(frames):
        picture = background.at(t)
        for thing, number in zip([*order, *in_front], [*numbers, *[0] * len(in_front)], strict=True):
            covered = _lay_on(picture, thing, t)
            if objects is not None:
                objects[t][covered > 127] = number
        video[t] = cv2.convertScaleAbs(np.maximum(picture, 0, out=picture), alpha=255)
    return video, objects


def _lay_on(picture: np.ndarray, thing: Thing, t: int) -> np.ndarray:
    """Puts a thing onto float32[S, S, 3], in place; returns its coverage uint8[S, S]."""
    size = len(picture)
    cos, sin = np.cos(thing.angle[t]), np.sin(thing.angle[t])
    turn = np.array([[cos, -sin], [sin, cos]]) @ np.diag([thing.stretch[t], 1 / thing.stretch[t]])
    transform = thing.side[t] * turn
    mask = np.zeros((size, size), np.uint8)
    for outline in thing.outlines:
        corners = np.round((outline[t] @ transform.T + thing.place[t]) * 16).astype(np.int32)
        cv2.fillPoly(mask, [corners], 255, lineType=cv2.LINE_AA, shift=4)
    x, y, width, height = cv2.boundingRect(mask)
    if not width:
        return mask
    # From the pixels of the picture back to those of the skin, in the rectangle that it fills.
    back = np.linalg.inv(transform) * (CANVAS / 4)
    offset = back @ (np.array([x, y]) - thing.place[t]) + CANVAS / 2
    tone = cv2.warpAffine(
        thing.skin,
        np.column_stack([back, offset]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT,
    )
    first, second = thing.colours[t]
    table = (first + _RAMP * (second - first)).astype(np.float32)
    part = picture[y : y + height, x : x + width]
    weight = (mask[y : y + height, x : x + width] * np.float32(1 / 255))[..., None]
    part += weight * (table.take(tone, axis=0) - part)
    return mask


def _tones(rng, slow: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """float64[T, 2, 3]: tones below and above a grey level [T, 1], each with a tint of its own; all of it drifts."""
    half = shapes.drift(rng, slow, 0.28, 0.42)
    return np.stack([shapes.colours(rng, slow, ground + side * half, 0.15) for side in (-1, 1)], axis=1)


def _turning(rng, time: np.ndarray, fastest: float) -> np.ndarray:
    """float64[T]: an angle whose speed drifts, in radians and at most `fastest` a second either way."""
    return np.cumsum(shapes.drift(rng, time, -fastest, fastest)[:, 0] * np.diff(time, prepend=0.0))


def _creature(rng, name: str, time, slow, ground, unit: float, size: int) -> Thing:
    """`unit`: pixels that SIDE is a share of."""
    drift = functools.partial(shapes.drift, rng)
    cycle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * CREATURES[name].hertz * rng.uniform(0.8, 1.2) * time
    return Thing(
        outlines=contours(name, cycle),
        place=size * drift(time, 0.38, 0.62, channels=2),
        side=unit * drift(time, *SIDE)[:, 0],
        angle=rng.uniform(-np.pi, np.pi) + _turning(rng, time, 1.2),
        stretch=np.exp(drift(time, -0.12, 0.12)[:, 0]),
        skin=skin(rng, CREATURES[name].skin),
        colours=_tones(rng, slow, ground),
    )


def _blob(rng) -> np.ndarray:
    """A random outline of about area 1."""
    return shapes.polar(list(rng.uniform(0.4, 0.85, rng.integers(5, 10))))


def _distractor(rng, time, slow, ground, size: int) -> Thing:
    drift = functools.partial(shapes.drift, rng)
    outline, frames = _blob(rng), len(time)
    return Thing(
        outlines=[np.broadcast_to(outline, (frames, *outline.shape))],
        place=size * drift(time, 0.0, 1.0, channels=2),
        side=np.full(frames, size * rng.uniform(0.1, 0.2)),
        angle=rng.uniform(0, 2 * np.pi) + rng.uniform(-1, 1) * time,
        stretch=np.ones(frames),
        skin=skin(rng, rng.choice(list(SKINS))),
        colours=_tones(rng, slow, ground),
    )


def _occluder(rng, time, slow, ground, size: int) -> Thing:
    """A bar that passes in front of everything now and then."""
    frames, across = len(time), rng.uniform(0, 2 * np.pi)
    outline = np.array([(-0.1, -2.0), (0.1, -2.0), (0.1, 2.0), (-0.1, 2.0)])
    sweep = shapes.drift(rng, time / 2, -0.5 / OCCLUDED, 0.5 / OCCLUDED)[:, 0]  # in the picture within +-0.5
    place = size * (0.5 + sweep[:, None] * np.array([np.cos(across), np.sin(across)]))
    return Thing(
        outlines=[np.broadcast_to(outline, (frames, *outline.shape))],
        place=place,
        side=np.full(frames, size),
        angle=np.full(frames, across),
        stretch=np.full(frames, rng.uniform(0.6, 1.2)),
        skin=np.full((CANVAS, CANVAS), rng.choice([0, 255]), np.uint8),
        colours=_tones(rng, slow, ground),
    )


class _Background:
    """Clouds and patches under a camera that pans, turns and zooms, in a light that changes."""

    def __init__(self, rng: np.random.Generator, time, slow, ground, size: int):
        drift = functools.partial(shapes.drift, rng)
        self.size, extent = size, 4 * size
        canvas = shapes.texture(rng, extent)
        for _ in range(rng.integers(4, 12)):  # edges, which clouds have not
            corners = (rng.uniform(0, extent, 2) + size * rng.uniform(0.2, 0.7) * _blob(rng)).astype(np.int32)
            cv2.fillPoly(canvas, [corners], rng.uniform(-0.8, 0.8, 3).tolist(), lineType=cv2.LINE_AA)
        self.canvas = canvas
        self.strength = drift(slow, 0.05, 0.12)[:, 0]
        self.colour = shapes.colours(rng, slow, ground, 0.25)
        self.centre = extent * drift(time / 2, 0.25, 0.75, channels=2)
        self.angle = rng.uniform(0, 2 * np.pi) + _turning(rng, time, 0.4)
        self.zoom = np.exp(drift(time, -0.3, 0.3)[:, 0])

    def at(self, t: int) -> np.ndarray:
        """float32[S, S, 3], mostly in [0, 1]."""
        cos, sin = self.zoom[t] * np.cos(self.angle[t]), self.zoom[t] * np.sin(self.angle[t])
        back = np.array([[cos, -sin], [sin, cos]])
        offset = self.centre[t] - back @ np.full(2, self.size / 2)
        picture = cv2.warpAffine(
            self.canvas,
            np.column_stack([back, offset]),
            (self.size, self.size),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT,
        )
        picture *= np.float32(self.strength[t])
        return cv2.add(picture, (*self.colour[t], 0))  # pyright: ignore[reportCallIssue, reportArgumentType]


def render_video(rng: np.random.Generator, creature: str, settings: Settings) -> np.ndarray:
    """Hard cuts between shots of creatures of one class: uint8[frames, size, size, 3] RGB."""
    if settings.shots == 1:
        return render_shot(rng, creature, settings)[0]

    def shot(frames: int, zoom: float) -> np.ndarray:
        one = settings._replace(frames=frames)
        return render_shot(rng, creature, one, colour_pace=shapes.COLOUR_PACE, zoom=zoom)[0]

    return shapes.cut_together(rng, shot, frames=settings.frames, shots=settings.shots)


def write_scenes(
    out: str | os.PathLike,
    *,
    videos: int,
    seed: int,
    size: int = 96,
    seconds: float = 3.4,
    fps: int = FPS,
    classes: Sequence[str] = tuple(CREATURES),
    shots: int = 1,
    workers: int | None = None,
) -> None:
    """Renders `videos` clips, three in four to OUT/train and the rest to OUT/test, one folder per class.

    Arguments, errors and what happens after an interruption: shapes.write_videos; classes are names from CREATURES.
    """
    frames = round(seconds * fps)
    shapes.check_values(
        videos=videos,
        seed=seed,
        size=size,
        frames=frames,
        fps=fps,
        classes=classes,
        known=tuple(CREATURES),
        shots=shots,
    )
    settings = dict(videos=videos, seed=seed, size=size, frames=frames, fps=fps, classes=list(classes), shots=shots)
    render = functools.partial(render_video, settings=Settings(size, frames, fps, shots))
    shapes.write_rendered(out, settings | {"kind": "scenes"}, render, workers)
