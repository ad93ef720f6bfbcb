"""Training input: index -> plan -> JPEG bytes here, then decode -> crop -> resize -> flip -> batch in decode.py.

Example i = step * batch_size + row is a pure function of (seed, i), see sampling.py: a run resumes by starting at
another step, and its data do not depend on the number of processes or threads. Colour and blur are left to the
accelerator.
"""

import difflib
import itertools
import logging
import math
from collections.abc import Collection, Iterator

import numpy as np

from input_pipeline.images import LabelledImages
from input_pipeline.store import FrameStore
from input_pipeline.streams import sampling
from input_pipeline.streams.decode import Example, decode_any, decode_jpeg, decoded, image_height_width
from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)


def clip_views(
    store: FrameStore,
    start_step: int = 0,
    *,
    seed: int,
    batch_size: int,
    views: int,
    sampler: str,
    clip_seconds: float,
    delay_seconds: float,
    image_size: int,
    min_crop_area: float,
    num_steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Views of video clips (VITO section 3.1): every video once per epoch, a random clip of it each time.

    Videos shorter than a clip are left out, which is logged.

    Args:
      store: prepared videos.
      start_step: first step to yield; a late one costs nothing.
      seed: decides, with the step, all that is random; 0 or more.
      batch_size: examples in the global batch, over all processes.
      views: V, frames drawn from a clip (VITO: 3).
      sampler: how they are drawn, a key of sampling.SAMPLERS (VITO: "marginal").
      clip_seconds: length T of a clip (VITO: 2.56). The sampler "single" needs one frame only and ignores it.
      delay_seconds: time between neighbouring views, for the sampler "fixed_delay" only.
      image_size: height and width of the views in pixels (VITO: 224).
      min_crop_area: smallest crop as a share of the frame (VITO: 0.4).
      num_steps: batches to yield; None = without end.
      process_index, process_count: this process yields rows [index * b, (index + 1) * b) of each global batch, with
        b = batch_size / process_count.
      threads: examples prepared at a time; None = one per usable core.

    Returns:
      Iterator over {"views": uint8[b, V, image_size, image_size, 3]}, RGB.

    Raises:
      DataError: at once, for impossible values or too few usable videos; while iterating, for a frame that does not
        decode.
    """
    check_values(
        seed=seed,
        batch_size=batch_size,
        process_count=process_count,
        min_crop_area=min_crop_area,
        views=views,
        image_size=image_size,
    )
    check_sampler(sampler, sampling.SAMPLERS)
    videos, clip_frames, delay = _usable_videos(store, sampler, views, clip_seconds, delay_seconds)
    check_enough(len(videos), batch_size, f"usable videos in {store.directory}", "prepare more videos")

    def example(n: int) -> Example:
        i = example_number(n, batch_size, process_index, process_count)
        video = videos[sampling.pick(seed, i, len(videos))]
        plan = sampling.plan_views(
            sampling.example_rng(seed, i),
            num_frames=int(store.num_frames[video]),
            clip_frames=int(clip_frames[video]),
            height=int(store.height[video]),
            width=int(store.width[video]),
            views=views,
            sampler=sampler,
            delay=int(delay[video]),
            min_crop_area=min_crop_area,
        )
        data = store.read(store.first_record[video] + plan.frames)
        return Example(
            data,
            plan.boxes,
            plan.flips,
            lambda view: f"{store.directory}: frame {plan.frames[view]} of {store.videos[video]}",
        )

    rows = batch_size // process_count
    stop = None if num_steps is None else (start_step + num_steps) * rows
    batches = decoded(
        example,
        start_step * rows,
        stop,
        rows=rows,
        views=views,
        image_size=image_size,
        decode=decode_jpeg,
        threads=threads,
    )
    return ({"views": pixels} for pixels in batches)


def image_views(
    images: LabelledImages,
    start_step: int = 0,
    *,
    seed: int,
    batch_size: int,
    views: int,
    image_size: int,
    min_crop_area: float,
    num_steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Views of still images (MoCLR): V crops of one image, every image once per epoch; labels are not used.

    Arguments, batches and errors are those of clip_views; min_crop_area is 0.08 in VITO A.1.
    """
    check_values(
        seed=seed,
        batch_size=batch_size,
        process_count=process_count,
        min_crop_area=min_crop_area,
        views=views,
        image_size=image_size,
    )
    check_enough(len(images), batch_size, f"images in {images.source}", "add images")

    def example(n: int) -> Example:
        i = example_number(n, batch_size, process_index, process_count)
        image = sampling.pick(seed, i, len(images))
        data, name = images.read(image), images.name(image)
        height, width = image_height_width(data, name)
        plan = sampling.plan_views(
            sampling.example_rng(seed, i),
            num_frames=1,
            clip_frames=1,
            height=height,
            width=width,
            views=views,
            sampler="single",
            delay=0,
            min_crop_area=min_crop_area,
        )
        return Example(np.array([data] * views, object), plan.boxes, plan.flips, lambda view: name)

    rows = batch_size // process_count
    stop = None if num_steps is None else (start_step + num_steps) * rows
    batches = decoded(
        example,
        start_step * rows,
        stop,
        rows=rows,
        views=views,
        image_size=image_size,
        decode=decode_any,
        threads=threads,
    )
    return ({"views": pixels} for pixels in batches)


def labelled_images(
    images: LabelledImages,
    start_step: int = 0,
    *,
    seed: int,
    batch_size: int,
    fraction: float,
    image_size: int,
    min_crop_area: float,
    num_steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """One random crop of each labelled image, with its label (VIVI section 3.1, co-training): each once per epoch.

    A fraction below 1 is class-balanced (VIVI section 4), as S4L's lists (Zhai et al. 2019): the same number of images
    from each class, round(fraction * images / classes), chosen by the seed; from a smaller class all it has. With one
    seed, a smaller fraction is a part of a larger one.

    Args:
      fraction: share of the images that is used (VIVI: 0.1 or 1).
      Others are those of clip_views.

    Returns:
      Iterator over {"image": uint8[b, image_size, image_size, 3] RGB, "label": int32[b], index into
      images.class_names}, b = batch_size / process_count.

    Raises:
      DataError: as clip_views; at once also for labels outside the classes and a fraction that empties a class.
    """
    check_values(
        seed=seed,
        batch_size=batch_size,
        process_count=process_count,
        min_crop_area=min_crop_area,
        image_size=image_size,
    )
    # The upper half of the seeds: with that of the videos, row by row the same crops and, in a data set of the same
    # size, the same numbers would be drawn.
    seed += 2**63
    used = images.take(_balanced(images, seed, fraction))
    check_enough(
        len(used), batch_size, f"labelled images ({fraction:.3g} of those in {images.source})", "raise fraction"
    )

    def image_of(n: int) -> tuple[int, int]:
        i = example_number(n, batch_size, process_index, process_count)
        return i, sampling.pick(seed, i, len(used))

    def example(n: int) -> Example:
        i, image = image_of(n)
        data, name = used.read(image), used.name(image)
        plan = sampling.plan_views(
            sampling.example_rng(seed, i),
            num_frames=1,
            clip_frames=1,
            views=1,
            sampler="single",
            delay=0,
            min_crop_area=min_crop_area,
            **dict(zip(("height", "width"), image_height_width(data, name), strict=True)),
        )
        return Example(np.array([data], object), plan.boxes, plan.flips, lambda view: name)

    rows = batch_size // process_count
    stop = None if num_steps is None else (start_step + num_steps) * rows
    batches = decoded(
        example, start_step * rows, stop, rows=rows, views=1, image_size=image_size, decode=decode_any, threads=threads
    )
    numbers = itertools.count(start_step * rows, rows)
    return (
        {"image": pixels[:, 0], "label": used.labels[[image_of(n + row)[1] for row in range(rows)]]}
        for n, pixels in zip(numbers, batches, strict=False)
    )


def _balanced(images: LabelledImages, seed: int, fraction: float) -> np.ndarray:
    """Which images a class-balanced fraction consists of: int64[n], ascending."""
    names, labels = images.class_names, images.labels
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(outside):
        raise DataError(
            f"{len(outside)} labels are outside the {len(names)} classes of {images.source}, the first is "
            f"{labels[outside[0]]} of {images.name(int(outside[0]))}: correct or remove these images"
        )
    if not 0 < fraction <= 1:
        raise DataError(f"fraction={fraction}: it is a share of the images, above 0 and at most 1")
    sizes = np.bincount(labels, minlength=len(names))
    if not sizes.all():
        _LOG.warning(
            "%d of %d classes of %s have no image (%s)",
            np.sum(sizes == 0),
            len(names),
            images.source,
            names[int(sizes.argmin())],
        )
    if fraction == 1:
        return np.arange(len(images))
    filled = int(np.sum(sizes > 0))
    per_class = int(fraction * len(images) / filled + 0.5)
    if per_class == 0:
        least = math.ceil(0.5 * filled / len(images) * 1e4) / 1e4
        raise DataError(
            f"fraction={fraction} of {len(images)} images of {images.source} leaves class "
            f"{names[int(labels[0])]!r} empty, as each of {filled}: the smallest that works is {least:g}"
        )
    chosen = sampling.balanced_subset(seed, labels, per_class)
    _LOG.info(
        "%d of %d images of %s are used, %d of each class%s",
        len(chosen),
        len(images),
        images.source,
        per_class,
        f" ({np.sum((sizes > 0) & (sizes < per_class))} classes have fewer)"
        if sizes[sizes > 0].min() < per_class
        else "",
    )
    return chosen


def example_number(n: int, batch_size: int, process_index: int, process_count: int) -> int:
    """The n-th example of this process -> its number in the global order."""
    rows = batch_size // process_count
    step, row = divmod(n, rows)
    return step * batch_size + process_index * rows + row


def check_values(*, seed: int, batch_size: int, process_count: int, min_crop_area: float, **counts: int) -> None:
    """Raises DataError for values no data could meet; `counts` are any others that must be 1 or more."""
    for name, value in (("batch_size", batch_size), *counts.items()):
        if value < 1:
            raise DataError(f"{name}={value}: must be 1 or more")
    if seed < 0:
        raise DataError(f"seed={seed}: must be 0 or more")
    if not 0 < min_crop_area <= 1:
        raise DataError(f"min_crop_area={min_crop_area}: it is a share of the image's area, above 0 and at most 1")
    if batch_size % process_count:
        raise DataError(
            f"batch_size={batch_size} does not divide among {process_count} processes; "
            f"use a multiple of {process_count}"
        )


def check_sampler(sampler: str, samplers: Collection[str]) -> None:
    """Raises DataError, with the nearest name, unless there is such a sampler."""
    if sampler not in samplers:
        near = difflib.get_close_matches(str(sampler), samplers, n=1, cutoff=0)
        raise DataError(f"no sampler {sampler!r}, did you mean {near[0]!r}? There are: {', '.join(samplers)}")


def check_enough(count: int, batch_size: int, what: str, remedy: str) -> None:
    """Raises DataError unless there are as many examples as a batch has."""
    # A batch with the same video twice would hold false negatives, so this is refused and not padded.
    if count < batch_size:
        raise DataError(f"{count} {what}, fewer than a batch of {batch_size}: lower batch_size or {remedy}")


def _usable_videos(
    store: FrameStore, sampler: str, views: int, clip_seconds: float, delay_seconds: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Videos at least one clip long.

    Returns:
      videos int64[n], numbers of the usable ones; clip_frames int64[N] and delay int64[N] of all videos, in frames.
    """
    if sampler == "single":
        return np.arange(len(store)), np.ones(len(store), np.int64), np.zeros(len(store), np.int64)
    clip_frames = np.maximum(np.rint(clip_seconds * store.fps.astype(float)), 1).astype(np.int64)
    delay = np.rint(delay_seconds * store.fps.astype(float)).astype(np.int64)
    short = np.flatnonzero(store.num_frames < clip_frames)
    remedy = "lower clip_seconds or prepare longer videos"
    if len(short):
        v = short[0]
        example = f"{store.videos[v]} lasts {store.num_frames[v] / store.fps[v]:.2f} s"
        if len(short) == len(store):
            raise DataError(
                f"all {len(store)} videos of {store.directory} are shorter than clip_seconds="
                f"{clip_seconds} ({example}): {remedy}"
            )
        _LOG.warning(
            "%d of %d videos are not used, shorter than clip_seconds=%g (%s): %s",
            len(short),
            len(store),
            clip_seconds,
            example,
            remedy,
        )
    videos = np.flatnonzero(store.num_frames >= clip_frames)
    for v in videos:
        needed = sampling.frames_needed(sampler, views, int(delay[v]))
        if clip_frames[v] < needed:
            raise DataError(
                f"{views} views by {sampler!r} need {needed} frames, a clip of clip_seconds="
                f"{clip_seconds} of {store.videos[v]} has {clip_frames[v]}: raise clip_seconds, or lower "
                f"views or delay_seconds={delay_seconds}"
            )
    return videos, clip_frames, delay
