"""Clips of consecutive frames: two windows of a video to pretrain on (VDIM section 3.1), labelled ones to fine-tune on.

A view here is a sequence of frames with one crop, one flip and one rotation for all of them. A stream says what example
i of its Order is; decode.py makes it pixels and batches. Colour is left to the accelerator.
"""

import logging
from collections.abc import Callable, Iterator

import numpy as np

from input_pipeline.store import FrameStore
from input_pipeline.streams import sampling
from input_pipeline.streams.decode import (
    Batches,
    Example,
    decode_jpeg,
    decoded,
    from_store,
    training_batches,
    video_batches,
)
from input_pipeline.streams.order import Order, check_enough, check_values
from vivi_jax.config import Chance, Count, Positive, Share, Whole
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
AMDIM_ASPECT = (0.7, 1.4)  # width / height of crops in AMDIM's code, on which VDIM builds; VDIM gives no magnitudes


def clip_pairs(
    store: FrameStore,
    order: Order,
    *,
    frames: Count,
    offset: Whole,
    downsample: Count,
    difference: bool,
    image_size: Count,
    min_crop_area: Share,
    flip_prob: Chance,
    rotate: bool,
) -> Batches:
    """Two views of a random window of each video (VDIM section 3.1): every video once per epoch.

    The window is the shortest that holds both views, its start uniform in the video, at the rate of the store (the
    paper gives none: prepare with a high --fps to keep the videos' own). Where the video ends inside it, the last frame
    is repeated.

    Args:
      store: prepared videos.
      order: of the examples.
      frames: T, length of view 1, the first frames of the window (VDIM: 32).
      offset: frame of the window at which view 2 starts (VDIM: 0 or T).
      downsample: frame stride of view 2 (VDIM: 1, 2 or 3).
      difference: view 2 is twice as long, two adjacent halves whose features the method subtracts.
      image_size: height and width of the views in pixels (VDIM: 128).
      min_crop_area: smallest crop as a share of the frame (AMDIM's code: 0.3); aspect ratio in AMDIM_ASPECT.
      flip_prob: chance that a view is mirrored (VDIM lists no flips: 0).
      rotate: turn each view by 0, 90, 180 or 270 degrees (VDIM names no angles).

    Returns:
      batches of {"view1": uint8[b, T, image_size, image_size, 3], "view2": uint8[b, T or 2T, ...]} RGB, b = order.rows:
      see training_batches.

    Raises:
      DataError: impossible values or fewer videos than a batch; while iterating, a frame that does not decode.
    """
    check_values(min_crop_area=min_crop_area, frames=frames, downsample=downsample, image_size=image_size)
    _check_flip_prob(flip_prob)
    if offset < 0:
        raise DataError(f"offset={offset}: view 2 cannot start before view 1; give 0 or {frames}")
    check_enough(len(store), order.batch_size, f"videos in {store.directory}", "prepare more videos")
    offsets = [np.arange(frames), offset + downsample * np.arange(2 * frames if difference else frames)]
    _log_short(store, np.arange(len(store)), np.full(len(store), sampling.span(offsets)))

    def plan(i: int) -> tuple[int, sampling.ViewPlan]:
        video = sampling.pick(order.seed, i, len(store), order.batch_size)
        return video, sampling.plan_clips(
            sampling.example_rng(order.seed, i),
            offsets,
            num_frames=int(store.num_frames[video]),
            height=int(store.height[video]),
            width=int(store.width[video]),
            min_crop_area=min_crop_area,
            aspect=AMDIM_ASPECT,
            flip_prob=flip_prob,
            rotate=rotate,
        )

    pictures = {"view1": (frames,), "view2": (len(offsets[1]),)}
    return video_batches(store, plan, order, examples=len(store), pictures=pictures, image_size=image_size)


def labelled_clips(
    store: FrameStore,
    videos: np.ndarray,
    labels: np.ndarray,
    order: Order,
    *,
    views: Count,
    frames: Count,
    downsample: Count,
    fps: Positive | None,
    image_size: Count,
    min_crop_area: Share,
    aspect: tuple[Positive, Positive],
    flip_prob: Chance,
) -> Batches:
    """Training clips with labels: K consecutive views from a random start, each with a crop and flip of its own.

    VDIM section 4.1: "K subsequences, each of which has an offset that is a multiple of 32". Where the video ends
    earlier, its last frame is repeated.

    Args:
      store: prepared videos.
      videos: int[n], which videos of the store to draw from; labels: int[n], their classes.
      order: of the examples; a batch may hold a video more than once, as there may be fewer videos than it has rows.
      views: K; frames: T.
      downsample: frame stride of a view (VDIM section 4.1: 1, compared with 2, 3 and 4); see clip_offsets.
      fps: rate of the clips in frames/s before that, by nearest frames; None = that of the store.
      image_size: height and width of the clips in pixels.
      min_crop_area, aspect: of the random resized crops; flip_prob: chance of mirroring.

    Returns:
      batches of {"clips": uint8[b, K, T, image_size, image_size, 3] RGB, "label": int32[b]}, b = order.rows: see
      training_batches.

    Raises:
      DataError: impossible values; while iterating, a frame that does not decode.
    """
    check_values(min_crop_area=min_crop_area, views=views, frames=frames, downsample=downsample, image_size=image_size)
    _check_flip_prob(flip_prob)
    offsets = clip_offsets(store, views=views, frames=frames, downsample=downsample, fps=fps)
    _log_short(store, videos, np.array([sampling.span(offsets(video)) for video in videos]))

    def example(i: int) -> Example:
        index = sampling.pick(order.seed, i, len(videos))
        video = videos[index]
        plan = sampling.plan_clips(
            sampling.example_rng(order.seed, i),
            offsets(video),
            num_frames=int(store.num_frames[video]),
            height=int(store.height[video]),
            width=int(store.width[video]),
            min_crop_area=min_crop_area,
            aspect=aspect,
            flip_prob=flip_prob,
            rotate=False,
        )
        return from_store(store, video, plan, {"label": labels[index]})

    return training_batches(
        example,
        order,
        examples=len(videos),
        pictures={"clips": (views, frames)},
        image_size=image_size,
        decode=decode_jpeg,
        fields={"label": np.int32},
        ahead=store.ahead,
    )


def test_clips(
    store: FrameStore,
    videos: np.ndarray,
    *,
    batch_size: Count,
    views: Count,
    frames: Count,
    downsample: Count,
    fps: Positive | None,
    image_size: Count,
    resize: Count,
    stride: Count | None,
    clips: Count | None,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Test clips: fixed windows of every video, with central crops, in the layout of labelled_clips.

    Args:
      store: prepared videos.
      videos: int[n], which videos of the store.
      batch_size: b.
      views: K; frames: T.
      downsample: frame stride of a view (VDIM section 4.1: 1, compared with 2, 3 and 4); see clip_offsets.
      fps: rate of the clips in frames/s before that, by nearest frames; None = that of the store.
      image_size: height and width of the clips in pixels.
      resize: the central square of image_size / resize of the short side is used (AMDIM's code: 128 of 146).
      stride, clips: windows begin every `stride` frames of the store, or `clips` of them are spaced evenly over the
        video; see window_starts.
      threads: examples prepared at a time; None = one per usable core.

    Returns:
      Iterator over {"clips": uint8[b, K, T, image_size, image_size, 3] RGB, "video": int32[b], index into `videos`},
      b = batch_size, the last one smaller.
    """
    offsets = clip_offsets(store, views=views, frames=frames, downsample=downsample, fps=fps)
    windows = [
        (index, start)
        for index, video in enumerate(videos)
        for start in window_starts(
            int(store.num_frames[video]), sampling.span(offsets(video)), stride=stride, clips=clips
        )
    ]

    def example(n: int) -> Example:
        index, start = windows[n]
        video = videos[index]
        height, width = int(store.height[video]), int(store.width[video])
        wanted = np.minimum(start + np.concatenate(offsets(video)), store.num_frames[video] - 1)
        side = max(round(min(height, width) * (image_size / resize)), 1)
        return from_store(store, video, sampling.central_square(wanted, height, width, side), {"video": index})

    return decoded(
        example,
        0,
        len(windows),
        rows=batch_size,
        pictures={"clips": (views, frames)},
        image_size=image_size,
        decode=decode_jpeg,
        fields={"video": np.int32},
        threads=threads,
        ahead=store.ahead,
    )


def clip_offsets(
    store: FrameStore, *, views: int, frames: int, downsample: int, fps: float | None
) -> Callable[[int], list[np.ndarray]]:
    """Returns offsets(video): per view, the frames of its window at `fps` frames/s (None: every frame): int64[T] each.

    View k begins k T frames after the first and takes every `downsample`-th frame from there: VDIM's offsets are "a
    multiple of 32", its T, whatever the down-sampling. Without it views follow one another, with it they overlap.
    """
    steps_KxT = frames * np.arange(views)[:, None] + downsample * np.arange(frames)

    def offsets(video: int) -> list[np.ndarray]:
        step = 1.0 if fps is None else float(store.fps[video]) / fps
        return list(np.floor(steps_KxT * step + 0.5).astype(np.int64))

    return offsets


def window_starts(num_frames: int, span: int, *, stride: int | None, clips: int | None) -> np.ndarray:
    """First frames of a video's test windows of `span` frames: int64[n], n >= 1.

    Either every `stride`-th frame from which a whole window fits, or `clips` starts evenly spaced from the first such
    frame to the last, without duplicates. A video shorter than the span has one start, 0.
    """
    last = max(num_frames - span, 0)
    if stride is not None and clips is None:
        return np.arange(0, last + 1, stride)
    if clips is not None and stride is None:
        return np.unique(np.linspace(0, last, clips).round().astype(np.int64))
    raise DataError(f"test windows: give a stride or a number of clips, not stride={stride} and clips={clips}")


def _log_short(store: FrameStore, videos: np.ndarray, spans: np.ndarray) -> None:
    short = np.flatnonzero(store.num_frames[videos] < spans)
    if len(short):
        video = videos[short[0]]
        _LOG.warning(
            "%d of %d videos are shorter than a window of %d frames (%s has %d): their last frame is repeated",
            len(short),
            len(videos),
            spans[short[0]],
            store.videos[video],
            store.num_frames[video],
        )


def _check_flip_prob(flip_prob: float) -> None:
    if not 0 <= flip_prob <= 1:
        raise DataError(f"flip_prob={flip_prob}: a chance is between 0 and 1")
