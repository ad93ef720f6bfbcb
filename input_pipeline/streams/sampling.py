"""Which frames, crops and flips training example i uses: pure functions of (seed, i), so nothing needs saving.

Resuming is starting at another i, and P processes that take different i never overlap. Every random number comes from
the counter-based generator Philox: the key holds (seed, number), the top word of the counter says what for.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Top word of Philox's 256-bit counter: an epoch, an example and a video of one number never share bits.
_EPOCH, _EXAMPLE, _VIDEO, _SUBSET = range(4)


class ViewPlan(NamedTuple):
    """What to read and cut out for the V pictures of one example."""

    frames: np.ndarray  # int64[V], frame number in the video
    boxes: np.ndarray  # int32[V, 4], crop (y, x, height, width) in pixels
    flips: np.ndarray  # bool[V], mirror left-right
    turns: np.ndarray  # int64[V], then quarter turns anticlockwise


def _generator(purpose: int, seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(
        np.random.Philox(counter=np.array([0, 0, 0, purpose], np.uint64), key=np.array([seed, number], np.uint64))
    )


@functools.lru_cache(maxsize=4)
def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of 0..n-1 for each epoch: int64[n]. Read-only, as it is cached."""
    order = _generator(_EPOCH, seed, epoch).permutation(n)
    order.setflags(write=False)
    return order


@functools.lru_cache(maxsize=4)  # at the turn of an epoch, examples of both are under way, perhaps of two streams
def epoch_order(seed: int, epoch: int, n: int, batch_size: int = 1) -> np.ndarray:
    """Order in which an epoch visits n videos: int64[n], a permutation of 0..n-1 by which no batch repeats a video.

    Epochs follow one another without a gap, so a batch may hold the last videos of one and the first of the next. An
    epoch therefore begins with videos that are not among the last of the one before; apart from that it is shuffled.
    The order is a function of its arguments alone, however late the epoch. Read-only, as it is cached.

    Args:
      batch_size: of the batches the endless order is cut into, at most n; 1 for none.
    """
    last = _last(seed, epoch, n, batch_size)
    begun = _last(seed, epoch - 1, n, batch_size)  # the batch that reaches into this epoch holds these already
    head = batch_size - len(begun) if len(begun) else 0
    order = shuffled(seed, epoch, n)
    first = order[~np.isin(order, last)]
    if head:
        fits = np.cumsum(~np.isin(first, begun))
        chosen = (np.diff(fits, prepend=0) > 0) & (fits <= head)
        first = np.concatenate([first[chosen], first[~chosen]])
    order = np.concatenate([first, order[np.isin(order, last)]])
    order.setflags(write=False)
    return order


def _last(seed: int, epoch: int, n: int, batch_size: int) -> np.ndarray:
    """The videos of an epoch that share a batch with the next one: int64[r], r < batch_size, in no order.

    Where an epoch has a whole batch to itself, or ends r <= n - batch_size videos after one, these are the last of its
    permutation. Otherwise all its other videos share a batch with the epoch before, so that its last must include all
    of the last of that one: they are the end of one permutation, longer by n - batch_size in each of these epochs.
    """
    r = n * (epoch + 1) % batch_size
    if not r:
        return np.empty(0, np.int64)
    anchor = epoch - (math.ceil(r / (n - batch_size)) - 1)
    return shuffled(seed, anchor, n)[n - r :]


def pick(seed: int, i: int, n: int, batch_size: int = 1) -> int:
    """Which of n videos example i shows (i counts over all epochs): each of them once per epoch, none twice in a batch.

    >>> [sorted(pick(0, i, n=4) for i in epoch) for epoch in (range(4), range(4, 8))]
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    >>> [len({pick(0, i, n=4, batch_size=3) for i in batch}) for batch in (range(3), range(3, 6), range(6, 9))]
    [3, 3, 3]
    """
    epoch, position = divmod(i, n)
    return int(epoch_order(seed, epoch, n, batch_size)[position])


def example_rng(seed: int, i: int) -> np.random.Generator:
    """Generator of example i, for its frames, crops and flips."""
    return _generator(_EXAMPLE, seed, i)


def video_rng(seed: int, video: int) -> np.random.Generator:
    """Generator of what is drawn once for a video and stays the same in every epoch."""
    return _generator(_VIDEO, seed, video)


def balanced_subset(seed: int, labels: np.ndarray, per_class: int) -> np.ndarray:
    """`per_class` random examples of each class, or all of a smaller class: int64[n] ascending indices into int[N].

    The subsets of one seed are nested: a smaller `per_class` gives a part of what a larger one gives.
    """
    shuffled = _generator(_SUBSET, seed, 0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    first = np.searchsorted(labels[by_class], labels[by_class], side="left")
    return np.sort(by_class[np.arange(len(labels)) - first < per_class])


def marginal(rng: np.random.Generator, num_frames: int, views: int, delay: int) -> np.ndarray:
    """i.i.d. uniform over the clip (VITO section 3.1): differences of 0 are the most frequent."""
    del delay
    return rng.integers(num_frames, size=views)


def fixed_delay(rng: np.random.Generator, num_frames: int, views: int, delay: int) -> np.ndarray:
    """Neighbouring views exactly `delay` frames apart (VINCE, Gordon et al. 2020; VITO Fig. A.2).

    Those papers take pairs; more views at the same step are our extension.

    >>> np.diff(fixed_delay(example_rng(0, 3), num_frames=64, views=3, delay=25)).tolist()
    [25, 25]
    """
    return rng.integers(num_frames - (views - 1) * delay) + delay * np.arange(views)


def uniform_chunks(rng: np.random.Generator, num_frames: int, views: int, delay: int) -> np.ndarray:
    """One frame from each of V equal, disjoint chunks of the clip (VFS, Xu & Wang 2021; VITO Fig. A.2)."""
    del delay
    edges = np.arange(views + 1) * num_frames // views
    return rng.integers(edges[:-1], edges[1:])


def single(rng: np.random.Generator, num_frames: int, views: int, delay: int) -> np.ndarray:
    """One frame for all views: MoCLR on the frames of videos (VITO section 4.1)."""
    del delay
    return np.full(views, rng.integers(num_frames))


# All have the same arguments, (rng, frames in the clip, views, delay in frames), and return int64[V] offsets into the
# clip, the views of fixed_delay and uniform_chunks in the order of time; only fixed_delay looks at the delay.
SAMPLERS = {"marginal": marginal, "fixed_delay": fixed_delay, "uniform_chunks": uniform_chunks, "single": single}


def frames_needed(sampler: str, views: int, delay: int) -> int:
    """Length of the shortest clip, in frames, from which the sampler can draw.

    >>> frames_needed("fixed_delay", views=3, delay=25), frames_needed("marginal", views=3, delay=25)
    (51, 1)
    """
    return {"fixed_delay": (views - 1) * delay + 1, "uniform_chunks": views}.get(sampler, 1)


def random_resized_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    min_area: float,
    max_area: float = 1.0,
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Random crop (y, x, height, width) in pixels, as BYOL cuts it (VITO A.1).

    Its area is uniform in [min_area, max_area] of the image's, its aspect ratio (width / height) log-uniform in
    `aspect`. Sides are rounded, and clamped to the image without drawing again, so that crops of a wide image can fall
    below the minimum area.
    """
    u_area, u_ratio, u_y, u_x = rng.random(4).tolist()  # one call: this runs for every view
    area = height * width * (min_area + (max_area - min_area) * u_area)
    ratio = aspect[0] * (aspect[1] / aspect[0]) ** u_ratio
    crop_height = min(max(round(math.sqrt(area / ratio)), 1), height)
    crop_width = min(max(round(math.sqrt(area * ratio)), 1), width)
    y = int(u_y * (height - crop_height + 1))
    x = int(u_x * (width - crop_width + 1))
    return y, x, crop_height, crop_width


def plan_views(
    rng: np.random.Generator,
    *,
    num_frames: int,
    clip_frames: int,
    height: int,
    width: int,
    views: int,
    sampler: str,
    delay: int,
    min_crop_area: float,
) -> ViewPlan:
    """Draws frames, crops and flips of one example.

    Args:
      rng: example_rng(seed, i).
      num_frames: frames of the video; height, width: their size in pixels.
      clip_frames: length T of the clip, at most num_frames. Its start is uniform in the video; shot boundaries are
        ignored, as VITO does not mention any.
      views: V.
      sampler: key of SAMPLERS.
      delay: frames between views, for "fixed_delay".
      min_crop_area: smallest crop as a share of the frame (VITO A.1: 0.4 for video, 0.08 for images).
    """
    start = rng.integers(num_frames - clip_frames + 1)
    frames = start + SAMPLERS[sampler](rng, clip_frames, views, delay)
    return with_crops(rng, frames, height, width, min_crop_area)


def plan_shots(
    rng: np.random.Generator,
    *,
    ranges_Sx2: np.ndarray,
    positions: np.ndarray,
    shots: int,
    frames: int,
    step: int,
    height: int,
    width: int,
    min_crop_area: float,
) -> ViewPlan:
    """Draws K consecutive shots and M frames of each, `step` apart: a plan of K * M views, shot by shot.

    Args:
      rng: example_rng(seed, i).
      ranges_Sx2: (start, stop) frames of shots, those of the video among them.
      positions: int[P], rows of ranges_Sx2 at which K long enough shots of the video begin.
      shots, frames: K and M.
      step: frames of the video from one of the M to the next.
      height, width, min_crop_area: as in plan_views. Every frame has a crop and a flip of its own (VIVI section 3.2:
        "augment each frame once").
    """
    first = positions[rng.integers(len(positions))]
    start_K, stop_K = ranges_Sx2[first : first + shots].T
    start_K = start_K + rng.integers(stop_K - start_K - (frames - 1) * step)
    frames_KxM = start_K[:, None] + step * np.arange(frames)
    return with_crops(rng, frames_KxM.ravel(), height, width, min_crop_area)


def with_crops(rng: np.random.Generator, frames: np.ndarray, height: int, width: int, min_crop_area: float) -> ViewPlan:
    """A plan for the given frames int64[V], each with a random crop and flip of its own."""
    boxes = np.array([random_resized_crop(rng, height, width, min_crop_area) for _ in frames], np.int32)
    flips = rng.random(len(frames)) < 0.5
    return ViewPlan(frames, boxes, flips, np.zeros(len(frames), np.int64))


def central_square(frames: np.ndarray, height: int, width: int, side: int) -> ViewPlan:
    """A plan for the given frames int64[V]: of each the square of `side` pixels in the middle.

    >>> central_square(np.array([7]), height=48, width=64, side=32).boxes.tolist()
    [[8, 16, 32, 32]]
    """
    box = ((height - side + 1) // 2, (width - side + 1) // 2, side, side)
    boxes, flips = np.tile(np.array(box, np.int32), (len(frames), 1)), np.zeros(len(frames), bool)
    return ViewPlan(frames, boxes, flips, np.zeros(len(frames), np.int64))


def span(offsets: Sequence[np.ndarray]) -> int:
    """Frames of the shortest window that holds all views, given which of its frames each takes, ascending."""
    return 1 + max(int(view[-1]) for view in offsets)


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
) -> ViewPlan:
    """Draws the start of a window, and one crop, flip and rotation for all pictures of a view; view by view.

    Args:
      rng: example_rng(seed, i).
      offsets: per view, the frames of the window it takes, int64[t] ascending.
      num_frames: of the video; where the window goes beyond, its last frame is repeated.
      height, width: of the video, in pixels.
      min_crop_area, aspect: see random_resized_crop.
      flip_prob: chance that a view is mirrored.
      rotate: turn each view by 0 to 3 quarter turns.
    """
    start = rng.integers(max(num_frames - span(offsets), 0) + 1)
    boxes = [random_resized_crop(rng, height, width, min_crop_area, aspect=aspect) for _ in offsets]
    flips = rng.random(len(offsets)) < flip_prob
    turns = rng.integers(4, size=len(offsets)) if rotate else np.zeros(len(offsets), np.int64)
    lengths = [len(view) for view in offsets]
    return ViewPlan(
        np.minimum(start + np.concatenate(offsets), num_frames - 1),
        np.repeat(np.array(boxes, np.int32), lengths, axis=0),
        np.repeat(flips, lengths),
        np.repeat(turns, lengths),
    )
