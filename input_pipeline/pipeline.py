"""Batches for training: index -> plan -> JPEG bytes -> decode and crop -> resize -> flip -> batch -> prefetch.

Example i = step * batch_size + row is a pure function of (seed, i), see sampling.py: a run resumes by starting at
another step, and its data do not depend on the number of processes or threads. Colour and blur are left to the
accelerator.
"""
import atexit
import difflib
import logging
import os
import struct
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import cv2
import numpy as np
import tensorflow as tf

from input_pipeline import sampling
from input_pipeline.store import DataError, FrameStore

if TYPE_CHECKING:
    from input_pipeline.images import LabelledImages

# Accelerators belong to JAX: TensorFlow would reserve their memory at its first operation.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")
cv2.setNumThreads(1)  # examples run in parallel, so the resize of one must not

_LOG = logging.getLogger(__name__)
_PREFETCH_BATCHES = 2


def clip_views(store: FrameStore, start_step: int = 0, *, seed: int, batch_size: int, views: int, sampler: str,
               clip_seconds: float, delay_seconds: float, image_size: int, min_crop_area: float,
               num_steps: int | None = None, process_index: int = 0, process_count: int = 1,
               threads: int | None = None) -> Iterator[dict[str, np.ndarray]]:
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
    _check_values(seed=seed, batch_size=batch_size, views=views, sampler=sampler, image_size=image_size,
                  min_crop_area=min_crop_area, process_count=process_count)
    videos, clip_frames, delay = _usable_videos(store, sampler, views, clip_seconds, delay_seconds)
    _check_enough(len(videos), batch_size, f"usable videos in {store.directory}", "prepare more videos")

    def load(i: int) -> np.ndarray:
        video = videos[sampling.pick(seed, i, len(videos))]
        plan = sampling.plan_views(
            sampling.example_rng(seed, i), num_frames=store.num_frames[video], clip_frames=clip_frames[video],
            height=store.height[video], width=store.width[video], views=views, sampler=sampler,
            delay=delay[video], min_crop_area=min_crop_area)
        frames, which = np.unique(plan.frames, return_inverse=True)  # no record is read twice
        data = store.read(store.first_record[video] + frames)[which]
        try:
            return _cut_views(data, plan, image_size)
        except tf.errors.InvalidArgumentError as e:
            raise DataError(f"{store.directory}: a frame of {store.videos[video]} among {frames.tolist()} does not "
                            f"decode; delete the directory and prepare it again") from e

    return _closed_at_exit(_batches(
        load, (views, image_size, image_size, 3), batch_size=batch_size, start_step=start_step, num_steps=num_steps,
        process_index=process_index, process_count=process_count, threads=threads))


def image_views(images: "LabelledImages", start_step: int = 0, *, seed: int, batch_size: int, views: int,
                image_size: int, min_crop_area: float, num_steps: int | None = None, process_index: int = 0,
                process_count: int = 1, threads: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Views of still images (MoCLR): V crops of one image, every image once per epoch; labels are not used.

    Arguments, batches and errors are those of clip_views; min_crop_area is 0.08 in VITO A.1.
    """
    _check_values(seed=seed, batch_size=batch_size, views=views, sampler="single", image_size=image_size,
                  min_crop_area=min_crop_area, process_count=process_count)
    _check_enough(len(images), batch_size, f"images in {images.source}", "add images")

    def load(i: int) -> np.ndarray:
        image = sampling.pick(seed, i, len(images))
        data = images.read(image)
        try:
            height, width = image_height_width(data)
            plan = sampling.plan_views(
                sampling.example_rng(seed, i), num_frames=1, clip_frames=1, height=height, width=width,
                views=views, sampler="single", delay=0, min_crop_area=min_crop_area)
            return _cut_views([data] * views, plan, image_size)
        except tf.errors.InvalidArgumentError as e:
            raise DataError(f"{images.name(image)} does not decode; replace or remove it") from e

    return _closed_at_exit(_batches(
        load, (views, image_size, image_size, 3), batch_size=batch_size, start_step=start_step, num_steps=num_steps,
        process_index=process_index, process_count=process_count, threads=threads))


def _check_values(*, seed: int, batch_size: int, views: int, sampler: str, image_size: int, min_crop_area: float,
                  process_count: int) -> None:
    if sampler not in sampling.SAMPLERS:
        near = difflib.get_close_matches(str(sampler), sampling.SAMPLERS, n=1, cutoff=0)
        raise DataError(f"no sampler {sampler!r}, did you mean {near[0]!r}? There are: {', '.join(sampling.SAMPLERS)}")
    for name, value in (("batch_size", batch_size), ("views", views), ("image_size", image_size)):
        if value < 1:
            raise DataError(f"{name}={value}: must be 1 or more")
    if seed < 0:
        raise DataError(f"seed={seed}: must be 0 or more")
    if not 0 < min_crop_area <= 1:
        raise DataError(f"min_crop_area={min_crop_area}: it is a share of the image's area, above 0 and at most 1")
    if batch_size % process_count:
        raise DataError(f"batch_size={batch_size} does not divide among {process_count} processes; "
                        f"use a multiple of {process_count}")


def _check_enough(count: int, batch_size: int, what: str, remedy: str) -> None:
    # A batch with the same video twice would hold false negatives, so this is refused and not padded.
    if count < batch_size:
        raise DataError(f"{count} {what}, fewer than a batch of {batch_size}: lower batch_size or {remedy}")


def _usable_videos(store: FrameStore, sampler: str, views: int, clip_seconds: float, delay_seconds: float
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
            raise DataError(f"all {len(store)} videos of {store.directory} are shorter than clip_seconds="
                            f"{clip_seconds} ({example}): {remedy}")
        _LOG.warning("%d of %d videos are not used, shorter than clip_seconds=%g (%s): %s", len(short), len(store),
                     clip_seconds, example, remedy)
    videos = np.flatnonzero(store.num_frames >= clip_frames)
    for v in videos:
        needed = sampling.frames_needed(sampler, views, int(delay[v]))
        if clip_frames[v] < needed:
            raise DataError(f"{views} views by {sampler!r} need {needed} frames, a clip of clip_seconds="
                            f"{clip_seconds} of {store.videos[v]} has {clip_frames[v]}: raise clip_seconds, or lower "
                            f"views or delay_seconds={delay_seconds}")
    return videos, clip_frames, delay


def _batches(load: Callable[[int], np.ndarray], shape: tuple[int, ...], *, batch_size: int, start_step: int,
             num_steps: int | None, process_index: int, process_count: int, threads: int | None
             ) -> Iterator[dict[str, np.ndarray]]:
    """Calls load(i) for this process's rows of each step, many at a time; yields the results in order."""
    rows = batch_size // process_count
    failures = []

    def example(n: np.int64) -> np.ndarray:
        step, row = divmod(int(n), rows)
        try:
            return load(step * batch_size + process_index * rows + row)
        except Exception as e:  # TensorFlow would turn it into an error of its own: keep it, to raise it below
            failures.append(e)
            raise

    stop = start_step + num_steps if num_steps is not None else np.iinfo(np.int64).max // rows
    threads = threads or len(os.sched_getaffinity(0))
    ds = tf.data.Dataset.range(start_step * rows, stop * rows)
    ds = ds.map(lambda n: tf.ensure_shape(tf.numpy_function(example, [n], tf.uint8), shape),
                num_parallel_calls=threads, deterministic=True)
    ds = ds.batch(rows, drop_remainder=True).prefetch(_PREFETCH_BATCHES)
    options = tf.data.Options()
    options.autotune.enabled = False  # it would grow buffers and threads beyond what is set here
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    try:
        for views in ds.with_options(options).as_numpy_iterator():
            yield {"views": views}
    except tf.errors.OpError:
        if failures:
            raise failures[0]  # noqa: B904 - it is the cause of the one caught, not its effect
        raise


_OPEN = weakref.WeakSet()


def _closed_at_exit(batches: Iterator) -> Iterator:
    """TensorFlow's threads call Python; one that does so while the interpreter shuts down aborts the process."""
    _OPEN.add(batches)
    return batches


@atexit.register
def _close_all() -> None:
    for batches in list(_OPEN):
        batches.close()


def _cut_views(data: list[bytes], plan: sampling.ViewPlan, image_size: int) -> np.ndarray:
    """Decodes, crops, resizes and flips: V encoded images -> uint8[V, image_size, image_size, 3]."""
    views = np.empty((len(data), image_size, image_size, 3), np.uint8)
    for view, frame, box, flip in zip(views, data, plan.boxes, plan.flips, strict=True):
        crop = crop_and_resize(frame, box, image_size)
        view[:] = crop[:, ::-1] if flip else crop
    return views


def crop_and_resize(data: bytes, box: np.ndarray, image_size: int) -> np.ndarray:
    """Decodes only the box of an encoded image and resizes it.

    Two things differ from BYOL, whose augmentation VITO adopts: the bicubic kernel has a = -0.75, and results are
    rounded to uint8. BYOL's (tf.image.resize) has a = -0.5 and gives floats, but costs as much as decoding does. On
    video frames the two differ by half a grey level on average. As in BYOL, nothing is smoothed before shrinking.

    Args:
      data: a JPEG, PNG, BMP or GIF file.
      box: int[4], (y, x, height, width) in pixels.

    Returns:
      uint8[image_size, image_size, 3], RGB.

    Raises:
      tf.errors.InvalidArgumentError: the data do not decode.
    """
    if _is_jpeg(data):
        # TensorFlow's defaults, as in BYOL: the fast DCT and smooth ("fancy") upsampling of the colour planes.
        crop = tf.io.decode_and_crop_jpeg(data, box, channels=3).numpy()
    else:
        y, x, height, width = box
        crop = _decode_whole(data)[y:y + height, x:x + width]
    return cv2.resize(crop, (image_size, image_size), interpolation=cv2.INTER_CUBIC)


def image_height_width(data: bytes) -> tuple[int, int]:
    """Size of an encoded image in pixels, from its header where it is a JPEG or PNG file.

    Raises:
      tf.errors.InvalidArgumentError: the data do not decode.
    """
    if _is_jpeg(data):
        height, width, _ = tf.io.extract_jpeg_shape(data).numpy().tolist()
        return height, width
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    return _decode_whole(data).shape[:2]


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _decode_whole(data: bytes) -> np.ndarray:
    return tf.io.decode_image(data, channels=3, expand_animations=False).numpy()
