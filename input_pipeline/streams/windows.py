"""Clips of consecutive frames: two windows of a video to pretrain on (VDIM section 3.1), labelled ones to fine-tune on.

A view here is a sequence of frames with one crop, one flip and one rotation for all of them. As in pipeline.py, example
i = step * batch_size + row is a pure function of (seed, i), and decode.py turns it into pixels. Colour is left to the
accelerator. Every needed frame is read once, also where two views share it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from input_pipeline.store import FrameStore
from input_pipeline.streams import sampling
from input_pipeline.streams import views as pipeline
from input_pipeline.streams.decode import Example, decode_jpeg, decoded
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
AMDIM_ASPECT = (0.7, 1.4)  # width / height of crops in AMDIM's code, on which VDIM builds; VDIM gives no magnitudes


class ClipPlan(NamedTuple):
    """What to read and cut out for the views of one example; F frames over all views, one view after the other."""

    frames: np.ndarray  # int64[F], frame number in the video
    boxes: np.ndarray  # int32[F, 4], crop (y, x, height, width) in pixels
    flips: np.ndarray  # bool[F], mirror left-right
    turns: np.ndarray  # int64[views], quarter turns anticlockwise


def clip_pairs(
    store: FrameStore,
    start_step: int = 0,
    *,
    seed: int,
    batch_size: int,
    frames: int,
    offset: int,
    downsample: int,
    difference: bool,
    image_size: int,
    min_crop_area: float,
    flip_prob: float,
    rotate: bool,
    num_steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Two views of a random window of each video (VDIM section 3.1): every video once per epoch.

    The window is the shortest that holds both views, its start uniform in the video, at the rate of the store (the
    paper gives none: prepare with a high --fps to keep the videos' own). Where the video ends inside it, the last frame
    is repeated.

    Args:
      store: prepared videos.
      start_step: first step to yield; a late one costs nothing.
      seed: decides, with the step, all that is random; 0 or more.
      batch_size: examples in the global batch, over all processes.
      frames: T, length of view 1, the first frames of the window (VDIM: 32).
      offset: frame of the window at which view 2 starts (VDIM: 0 or T).
      downsample: view 2 takes every so many-th frame (VDIM: 1, 2 or 3).
      difference: view 2 is twice as long: two adjacent halves, whose features the method subtracts.
      image_size: height and width of the views in pixels (VDIM: 128).
      min_crop_area: smallest crop as a share of the frame (AMDIM's code: 0.3); aspect ratio in AMDIM_ASPECT.
      flip_prob: chance that a view is mirrored (VDIM lists no flips: 0).
      rotate: turn each view by 0, 90, 180 or 270 degrees (VDIM names no angles).
      num_steps: batches to yield; None = without end.
      process_index, process_count: this process yields rows [index * b, (index + 1) * b) of each global batch, with
        b = batch_size / process_count.
      threads: examples prepared at a time; None = one per usable core.

    Returns:
      Iterator over {"view1": uint8[b, T, image_size, image_size, 3], "view2": uint8[b, T or 2T, ...]}, RGB.

    Raises:
      DataError: at once, for impossible values or fewer videos than a batch; while iterating, for a frame that does not
        decode.
    """
    pipeline.check_values(
        seed=seed,
        batch_size=batch_size,
        process_count=process_count,
        min_crop_area=min_crop_area,
        frames=frames,
        downsample=downsample,
        image_size=image_size,
    )
    _check_flip_prob(flip_prob)
    if offset < 0:
        raise DataError(f"offset={offset}: view 2 cannot start before view 1; give 0 or {frames}")
    pipeline.check_enough(len(store), batch_size, f"videos in {store.directory}", "prepare more videos")
    offsets = [np.arange(frames), offset + downsample * np.arange(2 * frames if difference else frames)]
    _log_short(store, np.arange(len(store)), np.full(len(store), _span(offsets)))

    def plan(i: int) -> tuple[int, ClipPlan]:
        video = sampling.pick(seed, i, len(store))
        return video, plan_clips(
            sampling.example_rng(seed, i),
            offsets,
            num_frames=int(store.num_frames[video]),
            height=int(store.height[video]),
            width=int(store.width[video]),
            min_crop_area=min_crop_area,
            aspect=AMDIM_ASPECT,
            flip_prob=flip_prob,
            rotate=rotate,
        )

    numbers = _Share(batch_size, process_index, process_count)
    batches = _pixels(
        store,
        lambda n: plan(numbers.example(n)),
        *numbers.span(start_step, num_steps),
        rows=numbers.rows,
        frames=sum(map(len, offsets)),
        image_size=image_size,
        threads=threads,
    )
    return _two_views(batches, plan, numbers, start_step, frames, rotate)


def _two_views(batches, plan, numbers: "_Share", step: int, frames: int, rotate: bool) -> Iterator[dict]:
    for pixels in batches:
        views = {"view1": pixels[:, :frames], "view2": pixels[:, frames:]}
        if rotate:
            turns = [plan(numbers.example(step * numbers.rows + row))[1].turns for row in range(numbers.rows)]
            views = {
                name: np.stack([np.rot90(clip, turn[v], axes=(1, 2)) for clip, turn in zip(x, turns, strict=True)])
                for v, (name, x) in enumerate(views.items())
            }
        yield views
        step += 1


def labelled_clips(
    store: FrameStore,
    videos: np.ndarray,
    labels: np.ndarray,
    start_step: int = 0,
    *,
    seed: int,
    batch_size: int,
    views: int,
    frames: int,
    fps: float | None,
    image_size: int,
    min_crop_area: float,
    aspect: tuple[float, float],
    flip_prob: float,
    num_steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Training clips with labels: K views one behind the other from a random start, each with its own crop and flip.

    VDIM section 4.1: "K subsequences, each of which has an offset that is a multiple of 32". Where the video ends
    earlier, its last frame is repeated.

    Args:
      store, start_step, seed, batch_size, image_size, num_steps, process_index, process_count, threads: as above.
      videos: int[n], which videos of the store to draw from; labels: int[n], their classes.
      views: K; frames: T.
      fps: rate of the clips in frames/s, by nearest frames; None = that of the store.
      min_crop_area, aspect: of the random resized crops; flip_prob: chance of mirroring.

    Returns:
      Iterator over {"clips": uint8[b, K, T, image_size, image_size, 3], "label": int32[b]}.

    Raises:
      DataError: as above; a batch may hold a video more than once.
    """
    pipeline.check_values(
        seed=seed,
        batch_size=batch_size,
        process_count=process_count,
        min_crop_area=min_crop_area,
        views=views,
        frames=frames,
        image_size=image_size,
    )
    _check_flip_prob(flip_prob)
    offsets = clip_offsets(store, views=views, frames=frames, fps=fps)
    _log_short(store, videos, np.array([_span(offsets(video)) for video in videos]))
    numbers = _Share(batch_size, process_index, process_count)

    def plan(n: int) -> tuple[int, ClipPlan]:
        i = numbers.example(n)
        video = videos[sampling.pick(seed, i, len(videos))]
        return video, plan_clips(
            sampling.example_rng(seed, i),
            offsets(video),
            num_frames=int(store.num_frames[video]),
            height=int(store.height[video]),
            width=int(store.width[video]),
            min_crop_area=min_crop_area,
            aspect=aspect,
            flip_prob=flip_prob,
            rotate=False,
        )

    start, stop = numbers.span(start_step, num_steps)
    batches = _pixels(
        store, plan, start, stop, rows=numbers.rows, frames=views * frames, image_size=image_size, threads=threads
    )

    def labelled() -> Iterator[dict[str, np.ndarray]]:
        n = start
        for pixels in batches:
            picks = [sampling.pick(seed, numbers.example(k), len(videos)) for k in range(n, n + len(pixels))]
            yield {
                "clips": pixels.reshape(len(pixels), views, frames, *pixels.shape[2:]),
                "label": np.asarray(labels)[picks].astype(np.int32),
            }
            n += len(pixels)

    return labelled()


def test_clips(
    store: FrameStore,
    videos: np.ndarray,
    *,
    batch_size: int,
    views: int,
    frames: int,
    fps: float | None,
    image_size: int,
    resize: int,
    stride: int | None,
    clips: int | None,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Test clips: fixed windows of every video, of the shape that labelled_clips gives, cut out of the middle.

    Args:
      videos: int[n], which videos of the store.
      resize: the central square of image_size / resize of the short side is used (AMDIM's code: 128 of 146).
      stride, clips: windows begin every `stride` frames of the store, or `clips` of them are spaced evenly over the
        video; see window_starts.

    Yields:
      {"clips": uint8[b, K, T, image_size, image_size, 3], "video": int32[b], index into `videos`}, b = batch_size, the
      last one smaller.
    """
    offsets = clip_offsets(store, views=views, frames=frames, fps=fps)
    windows = [
        (index, start)
        for index, video in enumerate(videos)
        for start in window_starts(int(store.num_frames[video]), _span(offsets(video)), stride=stride, clips=clips)
    ]

    def plan(n: int) -> tuple[int, ClipPlan]:
        index, start = windows[n]
        video = videos[index]
        count = views * frames
        wanted = np.minimum(start + np.concatenate(offsets(video)), store.num_frames[video] - 1)
        box = central_square(int(store.height[video]), int(store.width[video]), image_size / resize)
        return video, ClipPlan(
            wanted, np.tile(np.array(box, np.int32), (count, 1)), np.zeros(count, bool), np.zeros(views, int)
        )

    done = 0
    for pixels in _pixels(
        store, plan, 0, len(windows), rows=batch_size, frames=views * frames, image_size=image_size, threads=threads
    ):
        index = np.array([index for index, _ in windows[done : done + len(pixels)]], np.int32)
        yield {"clips": pixels.reshape(len(pixels), views, frames, *pixels.shape[2:]), "video": index}
        done += len(pixels)


# ---- Plans: pure functions ------------------------------------------------------------------------------------------


def plan_clips(
    rng: np.random.Generator,
    offsets: Sequence[np.ndarray],
    *,
    num_frames: int,
    height: int,
    width: int,
    min_crop_area: float,
    aspect: tuple[float, float],
    flip_prob: float,
    rotate: bool,
) -> ClipPlan:
    """Draws the start of a window and a crop, a flip and a rotation per view.

    Args:
      rng: sampling.example_rng(seed, i).
      offsets: per view, the frames of the window it takes, int64[t].
      num_frames: of the video; where the window goes beyond, its last frame is repeated.
    """
    start = rng.integers(max(num_frames - _span(offsets), 0) + 1)
    lengths = [len(view) for view in offsets]
    boxes = [sampling.random_resized_crop(rng, height, width, min_crop_area, aspect=aspect) for _ in offsets]
    flips = rng.random(len(offsets)) < flip_prob
    turns = rng.integers(4, size=len(offsets)) if rotate else np.zeros(len(offsets), int)
    return ClipPlan(
        np.minimum(start + np.concatenate(offsets), num_frames - 1),
        np.repeat(np.array(boxes, np.int32), lengths, axis=0),
        np.repeat(flips, lengths),
        turns,
    )


def clip_offsets(store: FrameStore, *, views: int, frames: int, fps: float | None) -> Callable[[int], list[np.ndarray]]:
    """Returns offsets(video): per view, the frames of its window at `fps` frames/s (None: every frame): int64[T] each.

    The views follow one another without a gap.
    """

    def offsets(video: int) -> list[np.ndarray]:
        step = 1.0 if fps is None else float(store.fps[video]) / fps
        return np.split(np.floor(np.arange(views * frames) * step + 0.5).astype(np.int64), views)

    return offsets


def window_starts(num_frames: int, span: int, *, stride: int | None, clips: int | None) -> np.ndarray:
    """First frames of a video's test windows of `span` frames: int64[n], n >= 1.

    Either every `stride`-th frame from which a whole window fits, or `clips` of them evenly spaced from the first to
    the last, equal ones once. A video shorter than the span has one start, 0.
    """
    last = max(num_frames - span, 0)
    if (stride is None) == (clips is None):
        raise DataError(f"test windows: give a stride or a number of clips, not stride={stride} and clips={clips}")
    if stride is not None:
        return np.arange(0, last + 1, stride)
    return np.unique(np.linspace(0, last, clips).round().astype(np.int64))


def central_square(height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """Box (y, x, side, side) in the middle, its side this share of the short one."""
    side = max(round(min(height, width) * share), 1)
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side


def _span(offsets: Sequence[np.ndarray]) -> int:
    """Frames of the window that holds all views."""
    return 1 + max(int(view[-1]) for view in offsets)


# ---- Reading --------------------------------------------------------------------------------------------------------


class _Share(NamedTuple):
    """Which examples of the global order this process prepares."""

    batch_size: int
    process_index: int
    process_count: int

    @property
    def rows(self) -> int:
        return self.batch_size // self.process_count

    def example(self, n: int) -> int:
        """The n-th example of this process -> its number in the global order."""
        return pipeline.example_number(n, *self)

    def span(self, start_step: int, num_steps: int | None) -> tuple[int, int | None]:
        return start_step * self.rows, None if num_steps is None else (start_step + num_steps) * self.rows


def _pixels(
    store: FrameStore,
    plan: Callable[[int], tuple[int, ClipPlan]],
    start: int,
    stop: int | None,
    *,
    rows: int,
    frames: int,
    image_size: int,
    threads: int | None,
) -> Iterator[np.ndarray]:
    """uint8[rows, F, image_size, image_size, 3] of plan(start), plan(start + 1), ...; rotations are the caller's."""

    def example(n: int) -> Example:
        video, clip = plan(n)
        wanted, inverse = np.unique(clip.frames, return_inverse=True)
        data = store.read(store.first_record[video] + wanted)[inverse]
        return Example(
            data,
            clip.boxes,
            clip.flips,
            lambda k: f"{store.directory}: frame {clip.frames[k]} of {store.videos[video]}",
        )

    return decoded(
        example, start, stop, rows=rows, views=frames, image_size=image_size, decode=decode_jpeg, threads=threads
    )


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
