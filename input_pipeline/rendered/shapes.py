"""Rendered moving scenes whose class is the shape of one object, written as real video files."""

import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import av
import cv2
import numpy as np
import tqdm

from input_pipeline.folders import is_data
from input_pipeline.preparation.shots import distance, histogram, peak_rule
from vivi_jax import files
from vivi_jax.errors import DataError

FPS = 25
COLOUR_PACE = 0.25  # of the drift of colours in videos of several shots
ZOOM = 2.2  # how much larger the object is in the last of several shots than in the first
TEST_EVERY = 4  # one video in four is held out
SETTINGS = ".settings.json"


# --- shapes: closed contours [P, 2] with y pointing down; a second contour inside the first is a hole ---------------


def _arc(radius: float, start: float = 0.0, stop: float = 2 * np.pi, right: float = 0.0) -> np.ndarray:
    angle = np.linspace(start, stop, 48)
    return np.stack([right + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def polar(radii: list[float]) -> np.ndarray:
    """Contour through the given radii at equal angles, the first one pointing up."""
    angle = 2 * np.pi * np.arange(len(radii)) / len(radii) - np.pi / 2
    return np.asarray(radii)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1)


def _crescent() -> np.ndarray:
    """A disc of radius 1 without a disc of radius 0.85 that is moved right by 0.5."""
    outer_tip = np.arccos((1 + 0.5**2 - 0.85**2) / (2 * 0.5))
    inner_tip = np.arccos((0.85**2 + 0.5**2 - 1) / (2 * 0.85 * 0.5))
    outer = _arc(1.0, outer_tip, 2 * np.pi - outer_tip)
    inner = _arc(0.85, np.pi + inner_tip, np.pi - inner_tip, right=0.5)
    return np.concatenate([outer, inner])


SHAPES = {
    "disc": [_arc(1.0)],
    "ring": [_arc(1.0), _arc(0.62)[::-1]],
    "square": [polar([1.0] * 4)],
    "triangle": [polar([1.0] * 3)],
    "star": [polar([1.0, 0.4] * 5)],
    "cross": [
        np.array(
            [
                (-1, -3),
                (1, -3),
                (1, -1),
                (3, -1),
                (3, 1),
                (1, 1),
                (1, 3),
                (-1, 3),
                (-1, 1),
                (-3, 1),
                (-3, -1),
                (-1, -1),
            ],
            float,
        )
    ],
    "crescent": [_crescent()],
    "heart": [_heart()],
    "arrow": [np.array([(0, -4), (3, -0.5), (1.1, -0.5), (1.1, 4), (-1.1, 4), (-1.1, -0.5), (-3, -0.5)], float)],
    "hourglass": [np.array([(-2, -3), (2, -3), (0.35, 0), (2, 3), (-2, 3), (-0.35, 0)], float)],
}


def _signed_area_and_moment(contour: np.ndarray) -> tuple[float, np.ndarray]:
    x, y = contour.T
    x_next, y_next = np.roll(contour, -1, axis=0).T
    cross = x * y_next - x_next * y
    moment = np.array([np.sum((x + x_next) * cross), np.sum((y + y_next) * cross)]) / 6
    return cross.sum() / 2, moment


def unit_shape(name: str) -> list[np.ndarray]:
    """Contours of SHAPES[name] with area 1 and the centre of mass at (0, 0): each float64[P, 2]."""
    areas, moments = zip(*[_signed_area_and_moment(c) for c in SHAPES[name]], strict=True)
    area, centre = sum(areas), sum(moments) / sum(areas)
    return [(c - centre) / np.sqrt(abs(area)) for c in SHAPES[name]]


# --- scenes -----------------------------------------------------------------------------------------------------------


def drift(rng: np.random.Generator, seconds: np.ndarray, low: float, high: float, channels: int = 1) -> np.ndarray:
    """Smooth random path in [low, high] with a new target four times in three seconds: float64[T, channels]."""
    position = rng.uniform() + seconds * 4 / 3
    left = position.astype(int)
    values = rng.uniform(low, high, (left[-1] + 2, channels))
    weight = (1 - np.cos(np.pi * (position - left)))[:, None] / 2  # cosine ease: no corner in the motion
    return (1 - weight) * values[left] + weight * values[left + 1]


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Random clouds of colour: float32[size, size, 3] with mean about 0 and values mostly in [-1, 1]."""
    clouds = np.zeros((size, size, 3), np.float32)
    for cells, strength in ((3, 0.6), (8, 0.4), (24, 0.3)):
        grid = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        clouds += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    return clouds


def colours(rng: np.random.Generator, seconds: np.ndarray, luminance: np.ndarray, chroma: float) -> np.ndarray:
    """Colour path float64[T, 3]: grey level `luminance` [T, 1] plus a drifting tint of size `chroma`."""
    tint = drift(rng, seconds, -1, 1, channels=3)
    return luminance + chroma * (tint - tint.mean(axis=1, keepdims=True))


class Pose(NamedTuple):
    """Where the object is in each frame."""

    place: np.ndarray  # float64[T, 2], x and y of its centre of mass in pixels
    side: np.ndarray  # float64[T], square root of its area in pixels
    angle: np.ndarray  # float64[T], radians, clockwise on the screen
    squeeze: np.ndarray  # float64[T], factor on its width and divisor of its height


def render_shot(
    rng: np.random.Generator,
    contours: list[np.ndarray],
    *,
    size: int,
    frames: int,
    fps: float = FPS,
    colour_pace: float = 1.0,
    zoom: float = 1.0,
) -> np.ndarray:
    """One camera shot of one object, `zoom` times as large, whose place, size, rotation and squeeze drift."""
    time = np.arange(frames) / fps  # seconds
    place = size * drift(rng, time, 0.4, 0.6, channels=2)
    side = zoom * size * drift(rng, time, 0.42, 0.56)[:, 0]
    angle = rng.uniform(-0.6, 0.6) + np.cumsum(drift(rng, time, -1.5, 1.5)[:, 0]) / fps
    squeeze = np.exp(drift(rng, time, -0.1, 0.1)[:, 0])
    return render_scene(rng, contours, Pose(place, side, angle, squeeze), size=size, fps=fps, colour_pace=colour_pace)


def render_scene(
    rng: np.random.Generator,
    contours: list[np.ndarray],
    pose: Pose,
    *,
    size: int,
    fps: float = FPS,
    colour_pace: float = 1.0,
) -> np.ndarray:
    """An object in front of a background, uint8[T, size, size, 3] RGB, all but the pose drawn from `rng` alone.

    What drifts: the object's colour and the light, `colour_pace` times as fast as the rest; the background pans and
    fades from one texture to the next. The object is darker or lighter than the background, so that it survives the
    loss of colour, and which of the two it is says nothing about its class.
    """
    frames = len(pose.side)
    time = np.arange(frames) / fps
    slow = time * colour_pace
    lighter = rng.choice([-1, 1])
    ground = 0.5 - lighter * drift(rng, slow, 0.02, 0.30)
    ground_rgb = colours(rng, slow, ground, 0.25)
    object_rgb = colours(rng, slow, ground + lighter * drift(rng, slow, 0.35, 0.5), 0.35)
    roughness = drift(rng, slow, 0.04, 0.1)[:, 0]

    extent = 2 * size
    textures = [texture(rng, extent) for _ in range(3)]
    skin = 0.12 * texture(rng, extent)
    pan = drift(rng, time, 0, size - 1, channels=4).astype(int)
    fade = drift(rng, slow, 0, len(textures) - 1)[:, 0]

    video = np.empty((frames, size, size, 3), np.uint8)
    for t in range(frames):
        x, y, skin_x, skin_y = pan[t]
        first = min(int(fade[t]), len(textures) - 2)
        cut = np.s_[y : y + size, x : x + size]
        scene = cv2.addWeighted(
            textures[first][cut],
            roughness[t] * (1 - fade[t] + first),
            textures[first + 1][cut],
            roughness[t] * (fade[t] - first),
            0,
        )
        scene = _tinted(scene, ground_rgb[t])
        surface = _tinted(skin[skin_y : skin_y + size, skin_x : skin_x + size], object_rgb[t])
        place, *form = (path[t] for path in pose)
        mask = _object_mask(contours, size, place, *form)
        shadow = _object_mask(contours, size, place + size / 32, *form)
        shade = 1 - 0.35 * cv2.blur(shadow, (size // 10, size // 10))
        scene = cv2.multiply(scene, cv2.merge([shade * (1 - mask)] * 3))  # covered where the object is
        scene = cv2.add(scene, cv2.multiply(surface, cv2.merge([mask] * 3)))
        video[t] = cv2.convertScaleAbs(np.maximum(scene, 0, out=scene), alpha=255)  # rounds, saturates at 255
    return video


def _tinted(picture: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """Adds a colour to all pixels of float32[H, W, 3]."""
    return cv2.add(picture, (*rgb, 0))  # pyright: ignore[reportCallIssue, reportArgumentType]  its types know no scalars


def _object_mask(
    contours: list[np.ndarray], size: int, place: np.ndarray, side: float, angle: float, squeeze: float
) -> np.ndarray:
    """Anti-aliased coverage float32[size, size] in [0, 1] of the transformed contours."""
    cos, sin = np.cos(angle), np.sin(angle)
    transform = side * np.array([[cos, -sin], [sin, cos]]) @ np.diag([squeeze, 1 / squeeze])
    corners = [np.round((c @ transform.T + place) * 16).astype(np.int32) for c in contours]  # 4 fractional bits
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, corners, 255, lineType=cv2.LINE_AA, shift=4)
    return mask.astype(np.float32) / 255


# --- files ------------------------------------------------------------------------------------------------------------


def render_video(
    rng: np.random.Generator, shape: str, *, size: int, frames: int, shots: int, fps: float = FPS
) -> np.ndarray:
    """Hard cuts between `shots` scenes with an object of the same shape: uint8[frames, size, size, 3] RGB."""
    contours = unit_shape(shape)
    if shots == 1:
        return render_shot(rng, contours, size=size, frames=frames, fps=fps)

    def shot(frames: int, zoom: float) -> np.ndarray:
        return render_shot(rng, contours, size=size, frames=frames, fps=fps, colour_pace=COLOUR_PACE, zoom=zoom)

    return cut_together(rng, shot, frames=frames, shots=shots)


def cut_together(
    rng: np.random.Generator, render: Callable[[int, float], np.ndarray], *, frames: int, shots: int
) -> np.ndarray:
    """Shots that render(their frames, their zoom) makes, one behind the other: uint8[frames, size, size, 3] RGB.

    Each shot has at least four fifths of an equal share of the frames. From shot to shot the camera comes nearer, ZOOM
    times in all: nothing else in a shot tells its place in the order. A shot whose cut is not clear is made again.
    """
    slack = np.sort(rng.integers(0, frames // 5 + 1, shots - 1))
    cuts = (np.arange(1, shots) * (frames - frames // 5)) // shots + slack
    video = np.empty(0, np.uint8)
    zooms = ZOOM ** (np.arange(shots) / (shots - 1) - 0.75)  # in the last shots it is as large as in videos of one
    for zoom, (start, stop) in zip(zooms, itertools.pairwise([0, *cuts, frames]), strict=True):
        draws = (render(int(stop - start), zoom) for _ in range(1000))  # at least half of them are accepted
        longer = (np.concatenate([video.reshape(-1, *shot.shape[1:]), shot]) for shot in draws)
        video = next(candidate for candidate in longer if cuts_are_clear(candidate, cuts[cuts < stop]))
    return video


def cuts_are_clear(video: np.ndarray, cuts: np.ndarray) -> bool:
    """Whether colour histograms of uint8[T, H, W, 3] show these cuts and no others, by every rule of shots.py.

    At a cut three fifths of the pixels change their bin; elsewhere at most a fifth does, without a sudden rise. The
    second condition is on each shot by itself, so that a suitable next shot can always be found.
    """
    histogram_T = [histogram(frame[::2, ::2]) for frame in video]
    d_T = np.array([0.0] + [distance(a, b) for a, b in itertools.pairwise(histogram_T)])
    inside = np.delete(np.arange(len(d_T)), cuts)
    return bool(d_T[cuts].min(initial=1) > 0.6 and d_T[inside].max() < 0.2 and peak_rule(d_T)[inside].max() < 0.8)


def write_video(path: pathlib.Path, video: np.ndarray, fps: int = FPS) -> None:
    """Encodes uint8[T, H, W, 3] RGB frames to an H.264 mp4 file; one thread, so that equal frames give equal files."""
    options = {"preset": "ultrafast", "crf": "16", "threads": "1"}
    # The same name always, so that what a kill leaves behind is written over when the rendering goes on.
    with files.atomic(path, unfinished=path.with_name(f".{path.name}.partial")) as unfinished:
        encode(unfinished, video, rate=fps, pixel_format="yuv420p", options=options)


def encode(path: pathlib.Path, video: np.ndarray, *, rate: int, pixel_format: str, options: dict[str, str]) -> None:
    """Encodes uint8[T, H, W, 3] RGB frames to an H.264 mp4 file with options of libx264."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = pixel_format
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def plan_videos(videos: int, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """(split, class, number within the split) of each video; in both splits the classes take turns."""
    test = videos // TEST_EVERY
    return [
        (split, classes[i % len(classes)], i)
        for split, count in (("train", videos - test), ("test", test))
        for i in range(count)
    ]


def video_name(split: str, class_name: str, number: int) -> str:
    return f"{split}/{class_name}/{number:05d}.mp4"


def _write_one(job: tuple[str, str, int], *, out: pathlib.Path, seed: int, fps: int, render: Callable) -> None:
    split, class_name, number = job
    cv2.setNumThreads(1)  # the pictures are small; the parallelism is over videos
    rng = np.random.default_rng([seed, ("train", "test").index(split), number])
    write_video(out / video_name(*job), render(rng, class_name), fps)


def write_videos(
    out: str | os.PathLike,
    *,
    videos: int,
    seed: int,
    size: int = 96,
    seconds: float = 3.0,
    fps: int = FPS,
    classes: Sequence[str] = tuple(SHAPES),
    shots: int = 1,
    workers: int | None = None,
) -> None:
    """Renders `videos` clips, three in four to OUT/train and the rest to OUT/test, one folder per class.

    Args:
      out: folder to write; new, empty, or left by an interrupted call with the same settings.
      videos: number of clips, at least four times the number of classes.
      seed: int >= 0; another seed draws other scenes.
      size: side of the square picture in pixels, even, at least 32.
      seconds: length of a clip, rounded to whole frames.
      fps: frames per second.
      classes: names from SHAPES, at least two.
      shots: camera shots per clip (hard cuts to another scene with an object of the same class), of at least
        nine frames: a shot detector needs that many between two cuts.
      workers: processes; None = one per processor core. The files do not depend on it.

    Raises:
      DataError: an impossible value, or OUT holds something else.
      ConfigError: OUT holds videos of other settings.
    """
    frames = round(seconds * fps)
    check_values(
        videos=videos, seed=seed, size=size, frames=frames, fps=fps, classes=classes, known=tuple(SHAPES), shots=shots
    )
    settings = dict(videos=videos, seed=seed, size=size, frames=frames, fps=fps, classes=list(classes), shots=shots)
    write_rendered(
        out, settings, functools.partial(render_video, size=size, frames=frames, shots=shots, fps=fps), workers
    )


def write_rendered(
    out: str | os.PathLike,
    settings: dict,
    render: Callable[[np.random.Generator, str], np.ndarray],
    workers: int | None,
) -> None:
    """Writes the videos that are not there yet, OUT/{train,test}/CLASS/NUMBER.mp4.

    Args:
      settings: JSON values that decide the pixels, among them "videos", "classes", "seed" and "fps"; kept in OUT.
      render: (random numbers of one video, its class) -> uint8[T, H, W, 3] RGB; it must pickle.
      workers: as in write_videos.

    Raises:
      DataError: OUT holds something else.
      ConfigError: OUT holds videos of other settings.
    """
    out, classes = pathlib.Path(out), settings["classes"]
    _check_free(out)
    files.claim(out / SETTINGS, settings, option="--out")
    jobs = [job for job in plan_videos(settings["videos"], classes) if not (out / video_name(*job)).exists()]
    if not jobs:
        return
    for split, class_name, _ in jobs:
        (out / split / class_name).mkdir(parents=True, exist_ok=True)
    write = functools.partial(_write_one, out=out, seed=settings["seed"], fps=settings["fps"], render=render)
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    # "spawn": a fork would copy the locks of a caller that runs threads, as JAX and TensorFlow do.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        for _ in tqdm.tqdm(pool.map(write, jobs, chunksize=4), total=len(jobs), unit="video", disable=None):
            pass


def check_values(
    *,
    videos: int,
    seed: int,
    size: int,
    frames: int,
    fps: int,
    classes: Sequence[str],
    known: Sequence[str],
    shots: int = 1,
) -> None:
    """Raises DataError for values nothing can be rendered with; `known`: the classes there are."""
    unknown = [name for name in classes if name not in known]
    if unknown or len(set(classes)) != len(classes) or len(classes) < 2:
        raise DataError(f"classes must be two or more different ones of {', '.join(known)}, not {','.join(classes)!r}")
    if videos < TEST_EVERY * len(classes):
        raise DataError(
            f"{videos} videos are too few for {len(classes)} classes in train/ and test/: give at least "
            f"{TEST_EVERY * len(classes)}"
        )
    if size < 32 or size % 2:
        raise DataError(f"size must be even and at least 32 pixels, not {size}")
    if fps < 1:
        raise DataError(f"fps must be a whole number of frames per second, 1 or more, not {fps}")
    shortest = 9 if shots > 1 else 2  # frames; at 25 fps the peak rule looks 8 frames around a cut
    if shots < 1 or 4 * frames // 5 < shots * shortest:
        raise DataError(
            f"{frames} frames ({frames / fps:g} s) are too few for {shots} shots of at least {shortest} "
            "frames: raise --seconds or --fps"
        )
    if seed < 0:
        raise DataError(f"seed must not be negative, got {seed}")


def _check_free(out: pathlib.Path) -> None:
    """Raises DataError unless OUT is new, empty, or a folder that was claimed for rendered videos."""
    if not out.exists() or (out / SETTINGS).is_file():
        return
    if not out.is_dir() or any(map(is_data, os.listdir(out))):  # unfinished settings of a killed run are hidden
        raise DataError(f"{out} exists and is no folder of rendered videos; choose another --out")
