"""Training views: frames of video clips (VITO), crops of still images (MoCLR), labelled images (VIVI's co-training).

A stream says what example i of its Order is; decode.py makes it pixels and batches. Colour and blur are left to the
accelerator.
"""

import dataclasses
import logging
import math

import numpy as np

from input_pipeline.images import LabelledImages
from input_pipeline.store import FrameStore
from input_pipeline.streams import sampling
from input_pipeline.streams.decode import (
    Batches,
    Example,
    decode_any,
    image_height_width,
    training_batches,
    video_batches,
)
from input_pipeline.streams.order import Order, check_enough, check_values
from vivi_jax.config import Count, NonNegative, Positive, Share
from vivi_jax.errors import DataError, lookup

_LOG = logging.getLogger(__name__)


def clip_views(
    store: FrameStore,
    order: Order,
    *,
    views: Count,
    sampler: str,
    clip_seconds: Positive,
    delay_seconds: NonNegative,
    image_size: Count,
    min_crop_area: Share,
) -> Batches:
    """Views of video clips (VITO section 3.1): every video once per epoch, a random clip of it each time.

    Videos shorter than a clip are left out, which is logged.

    Args:
      store: prepared videos.
      order: of the examples.
      views: V, frames drawn from a clip (VITO: 3).
      sampler: how they are drawn, a key of sampling.SAMPLERS (VITO: "marginal").
      clip_seconds: length T of a clip (VITO: 2.56). The sampler "single" needs one frame only and ignores it.
      delay_seconds: time between neighbouring views, for the sampler "fixed_delay" only.
      image_size: height and width of the views in pixels (VITO: 224).
      min_crop_area: smallest crop as a share of the frame (VITO: 0.4).

    Returns:
      batches of {"views": uint8[b, V, image_size, image_size, 3]}, RGB, b = order.rows: see training_batches.

    Raises:
      ConfigError: no such sampler.
      DataError: impossible values or too few usable videos; while iterating, a frame that does not decode.
    """
    check_values(min_crop_area=min_crop_area, views=views, image_size=image_size)
    lookup("sampler", sampler, sampling.SAMPLERS)
    videos, clip_frames, delay = _usable_videos(store, sampler, views, clip_seconds, delay_seconds)
    check_enough(len(videos), order.batch_size, f"usable videos in {store.directory}", "prepare more videos")

    def plan(i: int) -> tuple[int, sampling.ViewPlan]:
        video = int(videos[sampling.pick(order.seed, i, len(videos), order.batch_size)])
        return video, sampling.plan_views(
            sampling.example_rng(order.seed, i),
            num_frames=int(store.num_frames[video]),
            clip_frames=int(clip_frames[video]),
            height=int(store.height[video]),
            width=int(store.width[video]),
            views=views,
            sampler=sampler,
            delay=int(delay[video]),
            min_crop_area=min_crop_area,
        )

    pictures = {"views": (views,)}
    return video_batches(store, plan, order, examples=len(videos), pictures=pictures, image_size=image_size)


def image_views(
    images: LabelledImages, order: Order, *, views: Count, image_size: Count, min_crop_area: Share
) -> Batches:
    """Views of still images (MoCLR): V crops of one image, every image once per epoch; labels are not used.

    Args:
      images, order: what to show, and in which order.
      views: V, crops of an image.
      image_size: height and width of the views in pixels.
      min_crop_area: smallest crop as a share of the image (VITO A.1: 0.08).

    Returns, raises: as clip_views.
    """
    check_values(min_crop_area=min_crop_area, views=views, image_size=image_size)
    return image_crops(images, order, "views", (views,), image_size=image_size, min_crop_area=min_crop_area)


def labelled_images(
    images: LabelledImages, order: Order, *, fraction: float, image_size: int, min_crop_area: float
) -> Batches:
    """One random crop of each labelled image, with its label (VIVI section 3.1, co-training): each once per epoch.

    A fraction below 1 is class-balanced (VIVI section 4), as S4L's lists (Zhai et al. 2019): the same number of images
    from each class, round(fraction * images / classes), chosen by the seed; from a smaller class all it has. With one
    seed, a smaller fraction is a part of a larger one.

    Args:
      images, order: what to show, and in which order.
      fraction: share of the images that is used (VIVI: 0.1 or 1).
      image_size: height and width in pixels.
      min_crop_area: smallest crop as a share of the image.

    Returns:
      batches of {"image": uint8[b, image_size, image_size, 3] RGB, "label": int32[b], index into images.class_names},
      b = order.rows: see training_batches.

    Raises:
      DataError: impossible values, labels outside the classes, a fraction that empties a class or leaves less than a
        batch; while iterating, an image that does not decode.
    """
    check_values(min_crop_area=min_crop_area, image_size=image_size)
    # A seed of its own, from the upper half: with that of the videos, both streams would draw the same crops row by row
    # and, from data sets of the same size, the same numbers.
    order = dataclasses.replace(order, seed=order.seed + 2**63)
    used = images.take(_balanced(images, order.seed, fraction))
    what = f"labelled images ({fraction:.3g} of those in {images.source})"
    check_enough(len(used), order.batch_size, what, "raise fraction", key="data.labelled_batch_size")
    return image_crops(used, order, "image", (), image_size=image_size, min_crop_area=min_crop_area, labels=True)


def image_crops(
    images: LabelledImages,
    order: Order,
    name: str,
    layout: tuple[int, ...],
    *,
    image_size: int,
    min_crop_area: float,
    labels: bool = False,
) -> Batches:
    """Random crops of still images, every image once per epoch.

    Args:
      images, order: what to show, and in which order.
      name, layout: of the array with the crops; its size is the number of crops of an image.
      image_size: height and width of the crops in pixels.
      min_crop_area: smallest crop as a share of the image.
      labels: also batch the labels.

    Returns:
      batches of {name: uint8[b, *layout, image_size, image_size, 3] RGB} and, if asked for, {"label": int32[b]}.
    """
    check_enough(len(images), order.batch_size, f"images in {images.source}", "add images")
    crops = math.prod(layout)

    def example(i: int) -> Example:
        image = sampling.pick(order.seed, i, len(images), order.batch_size)
        data, called = images.read(image), images.name(image)
        height, width = image_height_width(data, called)
        rng = sampling.example_rng(order.seed, i)
        plan = sampling.with_crops(rng, np.zeros(crops, np.int64), height, width, min_crop_area)
        return Example(np.array([data] * crops, object), plan, lambda _: called, {"label": images.labels[image]})

    return training_batches(
        example,
        order,
        examples=len(images),
        pictures={name: layout},
        image_size=image_size,
        decode=decode_any,
        fields={"label": np.int32} if labels else {},
        ahead=images.ahead,
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


def _usable_videos(
    store: FrameStore, sampler: str, views: int, clip_seconds: float, delay_seconds: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Videos at least one clip long.

    Returns:
      videos int64[n], numbers of the usable ones; clip_frames int64[N] and delay int64[N] of all videos, in frames.
    """
    if not 0 < clip_seconds < math.inf:
        raise DataError(f"clip_seconds={clip_seconds}: it is a length, above 0")
    if not 0 <= delay_seconds < math.inf:
        raise DataError(f"delay_seconds={delay_seconds}: it is a time, 0 or more")
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
