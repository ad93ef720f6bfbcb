"""Encoded images -> uint8 batches, with tf.data: decode the crop only, resize, flip, batch; in parallel and in order.

Decoding is a TensorFlow operation and resizing an OpenCV one, both outside Python's lock; Python says what to read.
"""

import atexit
import os
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

# Before TensorFlow is imported: its notes on oneDNN and CPU instructions would bury our own lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

from vivi_jax.errors import DataError

# Accelerators belong to JAX: TensorFlow would reserve their memory at its first operation.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")
cv2.setNumThreads(1)  # examples run in parallel, so the resize of one must not

_PREFETCH_BATCHES = 2


class Example(NamedTuple):
    """V views to cut out of encoded images."""

    data: np.ndarray  # bytes[V] (dtype object), image files
    boxes: np.ndarray  # int32[V, 4], crop (y, x, height, width) in pixels
    flips: np.ndarray  # bool[V], mirror left-right
    name: Callable[[int], str]  # view -> what to call its image in a message


def decode_jpeg(data: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Decodes what the box int32[4] = (y, x, height, width) covers of a JPEG file: uint8[height, width, 3], RGB.

    With TensorFlow's defaults, as BYOL: the fast DCT, and smooth ("fancy") upsampling of the colour planes.
    """
    return tf.io.decode_and_crop_jpeg(data, box, channels=3)


def decode_any(data: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """As decode_jpeg, also for PNG, BMP and GIF files (the first picture of it; opacity is dropped)."""
    y, x, height, width = tf.unstack(box)
    return tf.cond(
        tf.io.is_jpeg(data),
        lambda: decode_jpeg(data, box),
        lambda: tf.io.decode_image(data, channels=3, expand_animations=False)[y : y + height, x : x + width],
    )


def resize_and_flip(crops: Sequence[np.ndarray], flips: np.ndarray, image_size: int) -> np.ndarray:
    """V crops uint8[h, w, 3] of any size -> uint8[V, image_size, image_size, 3].

    Two things differ from BYOL, whose augmentation VITO adopts: the bicubic kernel has a = -0.75, and results are
    rounded to uint8. BYOL's (tf.image.resize) has a = -0.5 and gives floats, but costs as much as decoding does. On
    video frames the two differ by half a grey level on average. As in BYOL, nothing is smoothed before shrinking.
    """
    views = _aligned((len(crops), image_size, image_size, 3))
    for view, crop, flip in zip(views, crops, flips, strict=True):
        cv2.resize(crop, (image_size, image_size), dst=view, interpolation=cv2.INTER_CUBIC)
        if flip:
            cv2.flip(view, 1, dst=view)  # NumPy's [:, ::-1] takes longer than the resize
    return views


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised uint8 array at a multiple of 64 bytes, which TensorFlow takes as it is; others it copies."""
    size = int(np.prod(shape))
    buffer = np.empty(size + 63, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].reshape(shape)


def decoded(
    example: Callable[[int], Example],
    start: int,
    stop: int | None,
    *,
    rows: int,
    views: int,
    image_size: int,
    decode: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    threads: int | None,
) -> Iterator[np.ndarray]:
    """Pixels of example(start), example(start + 1), ..., in batches.

    Args:
      example: number -> what to cut out; called from many threads.
      start, stop: first number, and the one behind the last (None = without end).
      rows: examples in a batch; the last batch has fewer if they do not come out even.
      views: V.
      image_size: in pixels.
      decode: decode_jpeg or decode_any.
      threads: examples under way at a time; None = one per usable core.

    Yields:
      uint8[rows, V, image_size, image_size, 3], RGB.

    Raises:
      DataError: what example() raises, or an image that does not decode.
    """
    batches = _decoded(
        example,
        start,
        np.iinfo(np.int64).max if stop is None else stop,
        rows,
        views,
        image_size,
        decode,
        threads or _usable_cores(),
    )
    _OPEN.add(batches)
    return batches


def _decoded(example, start, stop, rows, views, image_size, decode, threads) -> Iterator[np.ndarray]:
    failures = []

    def read(n: np.int64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        try:
            return example(int(n))[:3]
        except Exception as e:  # TensorFlow would turn it into an error of its own: keep it, to raise it below
            failures.append(e)
            raise

    def resize(flips: np.ndarray, *crops: np.ndarray) -> np.ndarray:
        return resize_and_flip(crops, flips, image_size)

    @tf.autograph.experimental.do_not_convert
    def cut(n: tf.Tensor) -> tf.Tensor:
        data, boxes, flips = tf.numpy_function(read, [n], (tf.string, tf.int32, tf.bool))
        data = tf.unstack(tf.ensure_shape(data, (views,)))
        boxes = tf.unstack(tf.ensure_shape(boxes, (views, 4)))
        crops = [decode(image, box) for image, box in zip(data, boxes, strict=True)]
        pixels = tf.numpy_function(resize, [flips, *crops], tf.uint8)
        return tf.ensure_shape(pixels, (views, image_size, image_size, 3))

    ds = tf.data.Dataset.range(start, stop).map(cut, num_parallel_calls=threads, deterministic=True)
    ds = ds.batch(rows).prefetch(_PREFETCH_BATCHES)
    options = tf.data.Options()
    options.autotune.enabled = False  # it would grow buffers and threads beyond what is set here
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    done = start
    try:
        for batch in ds.with_options(options).as_numpy_iterator():
            yield batch
            done += len(batch)
    except tf.errors.OpError as e:
        if failures:
            raise failures[0]  # noqa: B904 - it is the cause of the one caught, not its effect
        raise _find_damage(example, range(done, min(done + rows, stop)), decode) or e from None


def _find_damage(example: Callable[[int], Example], numbers: range, decode: Callable) -> DataError | None:
    """Names the first image that does not decode; TensorFlow's own error does not say which it was."""
    for n in numbers:
        data, boxes, _, name = example(n)
        for view, (image, box) in enumerate(zip(data, boxes, strict=True)):
            try:
                decode(tf.constant(image), tf.constant(box))
            except tf.errors.OpError:
                return DataError(f"{name(view)} is damaged and does not decode; replace it or prepare it again")
    return None


def image_height_width(data: bytes, name: str) -> tuple[int, int]:
    """Size of an encoded image in pixels, from its header where it is a JPEG or PNG file.

    Raises:
      DataError: the data do not decode.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    try:
        if data[:3] == b"\xff\xd8\xff":
            height, width, _ = tf.io.extract_jpeg_shape(data).numpy().tolist()
            return height, width
        return tf.io.decode_image(data, channels=3, expand_animations=False).numpy().shape[:2]
    except tf.errors.InvalidArgumentError as e:
        raise DataError(f"{name} is no image or is damaged; replace or remove it") from e


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


_OPEN = weakref.WeakSet()  # iterators handed out


@atexit.register
def _close_all() -> None:
    # TensorFlow's threads call Python; one that does so while the interpreter shuts down aborts the process.
    for batches in list(_OPEN):
        batches.close()
