"""Creatures of moving parts with a patterned skin: the objects of rendered/scenes.py.

A creature is a body and limbs. A limb is a tapered ribbon that swings about its joint and bends along a wave, both in
step with the creature's gait, which is what its classes differ in beside anatomy and skin. Two classes share each skin,
so that a skin alone does not tell the class.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

CANVAS = 160  # pixels a side of the picture of a skin, which spans 4 x 4 units: one unit is the root of the area


_CYCLE = 2 * np.pi * np.arange(16) / 16  # a whole gait


class Limb(NamedTuple):
    """A ribbon from a joint outwards. Lengths in units of the plan, angles in radians with y pointing down."""

    joint: tuple[float, float]
    direction: float
    length: float
    root: float  # half its width at the joint
    tip: float  # half its width at the end
    swing: float  # amplitude of its angle
    phase: float  # of its swing in the gait
    bend: float = 0.0  # amplitude of a wave that runs along it


class Plan(NamedTuple):
    """Anatomy, skin and gait of a class."""

    body: tuple[float, float] | None  # half axes of an ellipse; None: limbs alone
    limbs: tuple[Limb, ...]
    skin: str  # one of SKINS
    hertz: float  # of the gait, times a factor of the video
    turn: float = 0.0  # whole turns in a cycle of the gait


def _pair(x: float, y: float, direction: float, length: float, root: float, tip: float, swing: float, phase: float):
    """A limb and its mirror image, left and right in step."""
    return (
        Limb((x, y), direction, length, root, tip, swing, phase),
        Limb((-x, y), np.pi - direction, length, root, tip, -swing, phase),
    )


def _around(count: int, length: float, root: float, tip: float, swing: float, bend: float = 0.0, wave: float = 0.0):
    """Limbs at equal angles about the centre; `wave`: how far the gait of each is behind the one before, in cycles."""
    angles = 2 * np.pi * np.arange(count) / count - np.pi / 2
    return tuple(
        Limb((0, 0), float(a), length, root, tip, swing, 2 * np.pi * wave * i, bend) for i, a in enumerate(angles)
    )


CREATURES = {
    "crab": Plan(
        (1.0, 0.62),
        _pair(0.75, -0.2, -0.9, 0.95, 0.2, 0.3, 0.35, 0.0)
        + _pair(0.85, 0.15, 0.35, 0.75, 0.13, 0.05, 0.3, 2.0)
        + _pair(0.6, 0.4, 0.95, 0.75, 0.13, 0.05, 0.3, 4.0),
        "stripes",
        1.3,
    ),
    "bird": Plan(
        (0.32, 0.95),
        _pair(0.2, -0.3, -0.1, 1.7, 0.42, 0.12, 0.6, 0.0) + (Limb((0, 0.8), np.pi / 2, 0.7, 0.15, 0.4, 0.1, 1.0),),
        "stripes",
        1.1,
    ),
    "fish": Plan(
        (1.15, 0.55),
        (Limb((-0.95, 0), np.pi, 1.0, 0.12, 0.6, 0.5, 0.0), Limb((0.1, -0.4), -1.9, 0.6, 0.3, 0.1, 0.25, 1.5)),
        "checks",
        1.2,
    ),
    "starfish": Plan((0.4, 0.4), _around(5, 1.5, 0.36, 0.06, 0.25, wave=0.4), "checks", 0.7),
    "squid": Plan(
        (0.5, 0.85),
        tuple(
            Limb((x, 0.6), np.pi / 2 - 0.5 * x, 1.6, 0.14, 0.06, 0.15, 2.0 * x, 0.55)
            for x in (-0.36, -0.12, 0.12, 0.36)
        )
        + _pair(0.2, -0.6, -0.5, 0.6, 0.3, 0.1, 0.1, 0.0),
        "spots",
        0.9,
    ),
    "snake": Plan(
        None,
        (
            Limb((0, 0), 0.0, 1.9, 0.24, 0.16, 0.1, 0.0, 1.0),
            Limb((0, 0), np.pi, 1.9, 0.24, 0.08, 0.1, np.pi, 1.0),
        ),
        "spots",
        0.8,
    ),
    "horse": Plan(
        (1.05, 0.42),
        (
            Limb((0.75, 0.2), 1.57, 1.15, 0.15, 0.1, 0.5, 0.0),
            Limb((0.5, 0.2), 1.57, 1.15, 0.15, 0.1, 0.5, np.pi),
            Limb((-0.6, 0.2), 1.57, 1.15, 0.15, 0.1, 0.5, np.pi / 2),
            Limb((-0.85, 0.2), 1.57, 1.15, 0.15, 0.1, 0.5, 3 * np.pi / 2),
            Limb((0.8, -0.1), -0.9, 1.0, 0.22, 0.24, 0.2, 0.0),
        ),
        "zigzags",
        1.4,
    ),
    "windmill": Plan((0.25, 0.25), _around(3, 1.6, 0.1, 0.42, 0.0), "zigzags", 0.5, turn=1.0),
    "scissors": Plan(
        None,
        (
            Limb((0, 0), -0.45, 1.7, 0.2, 0.12, 0.4, 0.0),
            Limb((0, 0), 0.45, 1.7, 0.2, 0.12, -0.4, 0.0),
            Limb((0, 0), np.pi - 0.45, 1.0, 0.16, 0.36, 0.4, np.pi),
            Limb((0, 0), np.pi + 0.45, 1.0, 0.16, 0.36, -0.4, np.pi),
        ),
        "rings",
        1.0,
    ),
    "dragonfly": Plan(
        (0.2, 1.35),
        _pair(0.1, -0.5, -0.35, 1.4, 0.12, 0.26, 0.3, 0.0) + _pair(0.1, -0.1, 0.3, 1.2, 0.12, 0.26, 0.3, np.pi),
        "rings",
        1.6,
    ),
}


def contours(name: str, cycle: np.ndarray, *, scaled: bool = True) -> list[np.ndarray]:
    """Outlines of the parts at T angles of the gait's cycle, in radians: each float64[T, P, 2], y pointing down.

    Their union has, on average over the gait, the area 1 and its centre of mass at (0, 0), unless not `scaled`.
    """
    plan = CREATURES[name]
    parts = [_ribbon(limb, cycle) for limb in plan.limbs]
    if plan.body is not None:
        angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        body = np.stack([plan.body[0] * np.cos(angle), plan.body[1] * np.sin(angle)], axis=1)
        parts.append(np.broadcast_to(body, (len(cycle), *body.shape)))
    if plan.turn:
        cos, sin = np.cos(plan.turn * cycle), np.sin(plan.turn * cycle)
        parts = [part @ np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2) for part in parts]
    if not scaled:
        return parts
    centre, side = _measures(name)
    return [(part - centre) / side for part in parts]


def _ribbon(limb: Limb, cycle: np.ndarray) -> np.ndarray:
    s, gait = np.linspace(0, 1, 9), cycle[:, None] + limb.phase  # s: along it
    angle = limb.direction + limb.swing * np.sin(gait)
    angle = angle + limb.bend * np.sin(gait - 2 * np.pi * s) * np.minimum(1, 3 * s)
    forward = np.stack([np.cos(angle), np.sin(angle)], axis=2)
    middle = np.cumsum(forward, axis=1) - forward[:, :1]
    middle = np.asarray(limb.joint) + middle * limb.length / 8
    half = (limb.root + (limb.tip - limb.root) * s)[:, None] * np.stack([-forward[..., 1], forward[..., 0]], axis=2)
    return np.concatenate([middle + half, (middle - half)[:, ::-1]], axis=1)


@functools.cache
def _measures(name: str) -> tuple[np.ndarray, float]:
    """Centre of mass and root of the area of the union of the parts, averaged over a gait; in units of the plan."""
    pixels, areas, centres = 64, [], []
    parts = [np.round((part + 4) * pixels).astype(np.int32) for part in contours(name, _CYCLE, scaled=False)]
    for t in range(len(_CYCLE)):
        mask = np.zeros((8 * pixels, 8 * pixels), np.uint8)
        for part in parts:
            cv2.fillPoly(mask, [part[t]], 1)
        y, x = np.nonzero(mask)
        areas.append(len(x) / pixels**2)
        centres.append((x.mean() / pixels - 4, y.mean() / pixels - 4))
    return np.mean(centres, axis=0), float(np.sqrt(np.mean(areas)))


# --- skins: functions of the position in units of the creature's side -------------------------------------------------

SKINS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": lambda x, y: np.sin(2 * np.pi * y),
    "checks": lambda x, y: np.sin(2 * np.pi * x) * np.sin(2 * np.pi * y),
    "spots": lambda x, y: (
        np.cos(2 * np.pi * x)
        + np.cos(2 * np.pi * (x / 2 + y * np.sqrt(3) / 2))
        + np.cos(2 * np.pi * (-x / 2 + y * np.sqrt(3) / 2))
    ),
    "zigzags": lambda x, y: np.sin(2 * np.pi * (y + np.abs(2 * ((x / 1.4) % 1) - 1))),
    "rings": lambda x, y: np.sin(2 * np.pi * np.hypot(x, y)),
}
PERIOD = (0.3, 0.36)  # of a skin, in units of the creature's side


_GRID = np.arange(CANVAS) - CANVAS / 2
_TONES = np.linspace(0, 255, 9)  # three quarters of a skin have one of its two tones, the rest lies between


def skin(rng: np.random.Generator, name: str) -> np.ndarray:
    """Picture of a skin, uint8[CANVAS, CANVAS], 0 where it has its first tone and 255 where its second.

    Period, phase, direction, and which tone is which are drawn from `rng`. The values of every skin are mapped to the
    same distribution, so that no histogram tells one from another; and in the middle of rings, say, either tone is as
    likely, so that no average of pixels does.
    """
    period, direction = rng.uniform(*PERIOD) * CANVAS / 4, rng.uniform(0, 2 * np.pi)
    phase_x, phase_y = rng.uniform(-0.5, 0.5, 2)
    x, y = _GRID * (np.cos(direction) / period), _GRID * (np.sin(direction) / period)
    values = SKINS[name](x[None] + y[:, None] + phase_x, x[:, None] - y[None] + phase_y)
    picture = np.interp(values, _quantiles(name), _TONES).astype(np.uint8)
    return picture if rng.uniform() < 0.5 else 255 - picture


@functools.cache
def _quantiles(name: str) -> np.ndarray:
    """Values of a skin at the ranks that become _TONES."""
    y, x = np.mgrid[-8:8:400j, -8:8:400j]
    return np.quantile(SKINS[name](x, y), np.linspace(0.375, 0.625, len(_TONES)))
