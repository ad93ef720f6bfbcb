"""Frames of consecutive shots of a video, for VIVI: which videos have enough of them, and the stream.

The stream says what example i of its Order is; decode.py makes it pixels and batches.
"""

import itertools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.images import LabelledImages
from input_pipeline.store import OLD_SHOTS, FrameStore
from input_pipeline.streams import sampling
from input_pipeline.streams.decode import Batches, video_batches
from input_pipeline.streams.order import Order, check_enough, check_values
from input_pipeline.streams.views import image_crops
from vivi_jax.config import Count, NonNegative, Positive, Share
from vivi_jax.errors import DataError, lookup

_LOG = logging.getLogger(__name__)
_LOSSES_NEED = 2  # shots of a video, frames of a shot, videos: VIVI's losses compare them, so fewer are not proposed


def shot_frames(
    store: FrameStore,
    order: Order,
    *,
    shots: Count,
    frames: Count,
    frame_rate: Positive,
    min_shot_seconds: NonNegative,
    sampler: str,
    image_size: Count,
    min_crop_area: Share,
) -> Batches:
    """M frames of each of K consecutive shots (VIVI section 4): every video once per epoch, at a random place.

    A store has all shots, however short. Shots below min_shot_seconds are passed over: those before and after one are
    neighbours. Of the others K in a row must have M frames each; videos without are dropped and counted in the log.
    (The paper: "dropping those videos with fewer shots". It says nothing of short shots.)

    Every frame has a crop and a flip of its own. The paper names the mechanism of GoogLeNet (Szegedy et al. 2015,
    section 6): area uniform in 8 % to 100 %, aspect ratio in [3/4, 4/3]. The published code of S4L, which shares
    authors, starts at 5 %, refuses what covers less than 10 %, draws the side and not the area, and resizes bilinearly;
    here the resize is bicubic.

    Args:
      store: prepared videos.
      order: of the examples.
      shots: K (VIVI: 2 or 4).
      frames: M (VIVI: 8 for exemplars, 4 for rotations).
      frame_rate: of the M frames, in Hz (VIVI: 1), rounded to a whole number of the video's frames between two.
      min_shot_seconds: length of the shortest shot that counts as one; 0 = all do.
      sampler: "consecutive"; or "single": M crops of a single frame per video, the same one in every epoch ("a data set
        obtained by selecting a single random frame from each video"), which needs K = 1 and ignores frame_rate and
        min_shot_seconds.
      image_size: height and width in pixels (VIVI: 224).
      min_crop_area: smallest crop as a share of the frame.

    Returns:
      batches of {"shots": uint8[b, K, M, image_size, image_size, 3]}, RGB, b = order.rows: see training_batches.

    Raises:
      ConfigError: no such sampler.
      DataError: impossible values or fewer usable videos than a batch; while iterating, a frame that does not decode.
    """
    check_values(min_crop_area=min_crop_area, shots=shots, frames=frames, image_size=image_size)
    if not (frame_rate > 0 and math.isfinite(frame_rate)):
        raise DataError(f"frame_rate={frame_rate}: it is a rate in Hz, above 0")
    if not (min_shot_seconds >= 0 and math.isfinite(min_shot_seconds)):
        raise DataError(f"min_shot_seconds={min_shot_seconds}: it is a length, 0 or more")
    usable = lookup("sampler", sampler, {"consecutive": _consecutive_shots, "single": _single_frames})
    asked = dict(shots=shots, frames=frames, frame_rate=frame_rate, min_shot_seconds=min_shot_seconds)
    videos, shot_ranges = usable(store, order, **asked)

    def plan(i: int) -> tuple[int, sampling.ViewPlan]:
        video = int(videos[sampling.pick(order.seed, i, len(videos), order.batch_size)])
        return video, sampling.plan_shots(
            sampling.example_rng(order.seed, i),
            **shot_ranges(video),
            shots=shots,
            frames=frames,
            height=int(store.height[video]),
            width=int(store.width[video]),
            min_crop_area=min_crop_area,
        )

    pictures = {"shots": (shots, frames)}
    return video_batches(store, plan, order, examples=len(videos), pictures=pictures, image_size=image_size)


def image_frames(
    images: LabelledImages, order: Order, *, shots: Count, frames: Count, image_size: Count, min_crop_area: Share
) -> Batches:
    """Still images in the form of shots (VIVI section 4, Ex-ImageNet and Rot-ImageNet): M crops of one image.

    Args:
      images, order: what to show, and in which order.
      shots: K, which is 1.
      frames: M, crops of an image.
      image_size: height and width of the crops in pixels.
      min_crop_area: smallest crop as a share of the image.

    Returns, raises: as shot_frames.
    """
    check_values(min_crop_area=min_crop_area, shots=shots, frames=frames, image_size=image_size)
    if shots != 1:
        raise DataError(f"an image is one shot, so shots must be 1, not {shots}")
    return image_crops(images, order, "shots", (1, frames), image_size=image_size, min_crop_area=min_crop_area)


# --- where an example can be taken from: video -> ranges_Sx2, positions and step of sampling.plan_shots ---------------

_ShotRanges = Callable[[int], dict]


def _single_frames(store: FrameStore, order: Order, *, shots: int, **ignored: float) -> tuple[np.ndarray, _ShotRanges]:
    """All videos, each with one frame drawn from it."""
    del ignored
    if shots != 1:
        raise DataError(f"sampler 'single' takes one frame of a video, so shots must be 1, not {shots}")
    check_enough(len(store), order.batch_size, f"videos in {store.directory}", "prepare more videos")

    def shot_ranges(video: int) -> dict:
        frame = sampling.video_rng(order.seed, video).integers(store.num_frames[video])
        return dict(ranges_Sx2=np.array([[frame, frame + 1]]), positions=np.array([0]), step=0)

    return np.arange(len(store)), shot_ranges


def _consecutive_shots(
    store: FrameStore, order: Order, *, shots: int, frames: int, frame_rate: float, min_shot_seconds: float
) -> tuple[np.ndarray, _ShotRanges]:
    """Videos with K consecutive shots of M frames, and at which shots such a run begins."""
    if store.shots_may_hold_cuts:
        _LOG.warning("%s: %s", store.directory, OLD_SHOTS)
    counted = _counted(store, min_shot_seconds)
    first = _runs(store, counted, shots, frames, frame_rate)
    videos, begin = np.unique(counted.video_S[first], return_index=True)
    if len(videos) < order.batch_size:
        asked = dict(shots=shots, frames=frames, frame_rate=frame_rate)
        possible = _possible(store, counted, order.batch_size, **asked)
        rows = len(videos) // order.process_count * order.process_count
        possible = [f"--config.data.{option}" for option in possible]
        possible += [f"--config.batch_size={rows}"] if rows >= _LOSSES_NEED else []
        # Single frames ask nothing of the shots: what is left to those whose videos have too few of them.
        possible += ["--config=configs/vivi.py:ex-f,own"] if len(store) >= order.batch_size else []
        remedy = f"possible is one of {', '.join(possible)}, or" if possible else ""
        raise DataError(
            f"{len(videos)} of {len(store)} videos in {store.directory} have shots={shots} consecutive shots of "
            f"frames={frames} at frame_rate={frame_rate:g} Hz, fewer than a batch of {order.batch_size}: "
            + f"{remedy} prepare more videos".lstrip()
        )
    dropped = len(store) - len(videos)
    if dropped:
        few = int(np.sum(np.bincount(counted.video_S, minlength=len(store)) < shots))
        _LOG.warning(
            "%d of %d videos are not used: %d with fewer than shots=%d, %d without so many consecutive ones "
            "of frames=%d at frame_rate=%g Hz",
            dropped,
            len(store),
            few,
            shots,
            dropped - few,
            frames,
            frame_rate,
        )
    end, step_N = np.append(begin[1:], len(first)), _steps(store, frame_rate)

    def shot_ranges(v: int) -> dict:
        k = np.searchsorted(videos, v)
        return dict(ranges_Sx2=counted.ranges_Sx2, positions=first[begin[k] : end[k]], step=int(step_N[v]))

    return videos, shot_ranges


def _steps(store: FrameStore, frame_rate: float) -> np.ndarray:
    """int64[N]: frames of each video from one sampled frame to the next; 0 = it has too few frames a second."""
    return np.rint(store.fps.astype(float) / frame_rate).astype(np.int64)


class _Shots(NamedTuple):
    """Shots of a whole store, in order."""

    ranges_Sx2: np.ndarray  # int64, (start, stop) frames in the video
    video_S: np.ndarray  # int64, the video each is of


def _counted(store: FrameStore, min_shot_seconds: float) -> _Shots:
    """The shots of at least so many seconds."""
    video_S = np.repeat(np.arange(len(store)), np.diff(store.shot_offsets))
    stop_S = np.append(store.shot_starts[1:], 0)
    stop_S[store.shot_offsets[1:] - 1] = store.num_frames
    seconds_S = (stop_S - store.shot_starts) / store.fps[video_S].astype(float)
    long_S = seconds_S >= min_shot_seconds - 1e-6  # rates are rounded
    return _Shots(np.stack([store.shot_starts, stop_S], axis=1)[long_S].astype(np.int64), video_S[long_S])


def _runs(store: FrameStore, counted: _Shots, shots: int, frames: int, frame_rate: float) -> np.ndarray:
    """All runs of K consecutive shots of a video, each long enough for M frames: int64[R], their first shots."""
    video_S = counted.video_S
    if shots > len(video_S):
        return np.empty(0, np.int64)
    step_S = _steps(store, frame_rate)[video_S]
    long_S = (step_S > 0) & (np.diff(counted.ranges_Sx2)[:, 0] > (frames - 1) * step_S)
    of_one_video = video_S[: len(video_S) - shots + 1] == video_S[shots - 1 :]
    return np.flatnonzero(of_one_video & np.lib.stride_tricks.sliding_window_view(long_S, shots).all(axis=1))


def _possible(store: FrameStore, counted: _Shots, batch_size: int, **asked: Any) -> list[str]:
    """Of shots, frames and frame_rate each: the nearest value that gives a batch, the others as asked; or nothing."""
    rates = (math.ceil(asked["frame_rate"] * 1.25**k * 100) / 100 for k in itertools.count(1))
    tries = {
        "shots": range(asked["shots"] - 1, _LOSSES_NEED - 1, -1),
        "frames": range(asked["frames"] - 1, _LOSSES_NEED - 1, -1),
        "frame_rate": itertools.takewhile(lambda rate: rate <= 2 * store.fps.max(), rates),  # above, no step is left
    }

    def enough(name: str, value: Any) -> bool:
        first = _runs(store, counted, **asked | {name: value})
        return len(np.unique(counted.video_S[first])) >= batch_size

    found = {name: next((value for value in values if enough(name, value)), None) for name, values in tries.items()}
    return [f"{name}={value:g}" for name, value in found.items() if value]
