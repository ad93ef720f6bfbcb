"""Encoded images -> uint8 batches, with tf.data: decode the crop only, resize, flip, batch; in parallel and in order.

TensorFlow decodes and OpenCV resizes, both without Python's lock; Python only says what to read.
"""

import atexit
import concurrent.futures
import dataclasses
import itertools
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

# Before TensorFlow is imported: its notes on oneDNN and CPU instructions would hide our own log lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

from input_pipeline.store import FrameStore
from input_pipeline.streams import picture_size
from input_pipeline.streams.order import Order
from input_pipeline.streams.sampling import ViewPlan
from vivi_jax.errors import DataError

# Accelerators belong to JAX: TensorFlow would reserve their memory at its first operation.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")
cv2.setNumThreads(1)  # examples run in parallel, so the resize of one must not

_PREFETCH_BATCHES = 2
_OF_TENSORFLOW = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")  # how JPEG, PNG and GIF files begin


class Example(NamedTuple):
    """V pictures to cut out of encoded images, and what else is known of the example."""

    data: np.ndarray  # bytes[V] (dtype object), image files
    plan: ViewPlan
    name: Callable[[int], str]  # picture -> what to call its image in a message
    fields: Mapping[str, Any] = {}  # scalars that go into the batch beside the pixels, such as its label


@dataclasses.dataclass(frozen=True)
class Batches:
    """A stream: batches(first_step=0, num_steps=None, threads=None) -> iterator, see training_batches."""

    examples: int  # in an epoch: the videos or images that are used
    make: Callable[..., Iterator[dict[str, np.ndarray]]]
    # Example i -> float64[V], the seconds in its video that its pictures are of, in their order; None: of still images.
    seconds: Callable[[int], np.ndarray] | None = None

    def __call__(
        self, first_step: int = 0, num_steps: int | None = None, threads: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        return self.make(first_step, num_steps, threads)


def from_store(store: FrameStore, video: int, plan: ViewPlan, fields: Mapping[str, Any] = {}) -> Example:
    """The frames of a video that a plan asks for, each read once."""
    return Example(
        store.read_frames(video, plan.frames),
        plan,
        lambda picture: store.frame_name(video, int(plan.frames[picture])),
        fields,
    )


def decode_jpeg(data: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Decodes what the box int32[4] = (y, x, height, width) covers of a JPEG file: uint8[height, width, 3], RGB.

    With TensorFlow's defaults, as BYOL: the fast DCT, and smooth ("fancy") upsampling of the colour planes.
    """
    return tf.io.decode_and_crop_jpeg(data, box, channels=3)


def decode_any(data: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """As decode_jpeg, also for PNG, GIF, BMP, WebP and TIFF files: the first picture of several, without opacity."""
    y, x, height, width = tf.unstack(box)

    def cropped() -> tf.Tensor:
        # Bytes in a graph, but an array of them outside.
        image = tf.numpy_function(lambda found: decode_whole(np.asarray(found, object).item()), [data], tf.uint8)
        return tf.ensure_shape(image, (None, None, 3))[y : y + height, x : x + width]

    return tf.cond(tf.io.is_jpeg(data), lambda: decode_jpeg(data, box), cropped)


def decode_whole(data: bytes) -> np.ndarray:
    """An image file, of a kind that decode_any decodes: uint8[height, width, 3], RGB.

    Raises:
      ValueError: the data do not decode, or to too many pixels (TooLarge).
    """
    picture_size.of(data, "the image")
    if data.startswith(_OF_TENSORFLOW):
        try:
            return tf.io.decode_image(data, channels=3, expand_animations=False).numpy()
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(str(error)) from None
    # TensorFlow takes a BMP file's numbers of colours in its palette for grey levels, and knows no TIFF.
    if (rgb := picture_size.tiff_without_opacity(data)) is not None:
        return rgb
    # Not IMREAD_COLOR_RGB, which gives BGR for an AVIF file with opacity (findings/opencv_5_and_opacity.sh).
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if image is None:
        raise ValueError("no image that can be read")
    return np.ascontiguousarray(image[:, :, ::-1])


def finish(crops: Sequence[np.ndarray], flips: np.ndarray, turns: np.ndarray, image_size: int) -> np.ndarray:
    """Resizes V crops uint8[h, w, 3] of any size to uint8[V, image_size, image_size, 3], mirrors and turns them.

    Two things differ from BYOL, whose augmentation VITO adopts: the bicubic kernel has a = -0.75, and results are
    rounded to uint8. BYOL's (tf.image.resize) has a = -0.5 and gives floats, but costs as much as decoding does. On
    video frames the two differ by half a grey level on average. As in BYOL, nothing is smoothed before shrinking.
    """
    views = _aligned((len(crops), image_size, image_size, 3))
    for view, crop, flip, turn in zip(views, crops, flips, turns, strict=True):
        cv2.resize(crop, (image_size, image_size), dst=view, interpolation=cv2.INTER_CUBIC)
        if flip:
            cv2.flip(view, 1, dst=view)  # NumPy's [:, ::-1] takes longer than the resize
        if turn:
            view[:] = np.rot90(view, turn)
    return views


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised uint8 array, 64-byte aligned, so that TensorFlow uses it without a copy."""
    size = int(np.prod(shape))
    buffer = np.empty(size + 63, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].reshape(shape)


def video_batches(
    store: FrameStore, plan: Callable[[int], tuple[int, ViewPlan]], order: Order, *, examples: int, **options
) -> Batches:
    """training_batches of the videos of a store.

    Args:
      plan: number in the global order -> the video, and what to cut out of it.
      options: as there, without `decode` and `ahead`.
    """

    def seconds(i: int) -> np.ndarray:
        video, views = plan(i)
        return views.frames / float(store.fps[video])

    def example(i: int) -> Example:
        return from_store(store, *plan(i))

    batches = training_batches(example, order, examples=examples, decode=decode_jpeg, ahead=store.ahead, **options)
    return dataclasses.replace(batches, seconds=seconds)


def training_batches(example: Callable[[int], Example], order: Order, *, examples: int, **options) -> Batches:
    """Returns batches(first_step=0, num_steps=None, threads=None): this process's share of each batch from a step on.

    Args:
      example: number in the global order -> what to cut out.
      examples: in an epoch.
      options: those of `decoded` that say what a batch holds.
    """

    def batches(first_step: int, num_steps: int | None, threads: int | None) -> Iterator[dict[str, np.ndarray]]:
        start, stop = order.span(first_step, num_steps)
        return decoded(lambda n: example(order.example(n)), start, stop, rows=order.rows, threads=threads, **options)

    return Batches(examples, batches)


def decoded(
    example: Callable[[int], Example],
    start: int,
    stop: int | None,
    *,
    rows: int,
    pictures: Mapping[str, tuple[int, ...]],
    image_size: int | Mapping[str, int],
    decode: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    fields: Mapping[str, type[np.generic]] | None = None,
    threads: int | None = None,
    ahead: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of example(start), example(start + 1), ...

    Args:
      example: number -> what to cut out; called from many threads.
      start, stop: first number, and the one behind the last (None = without end).
      rows: examples in a batch; the last batch has fewer if they do not come out even.
      pictures: array of the batch -> how an example's pictures are laid out in it, such as {"views": (3,)}; of several
        arrays each takes as many pictures as it holds, one after the other.
      image_size: in pixels; of several arrays each may have its own, such as global and local views.
      decode: decode_jpeg or decode_any.
      fields: the fields of an example -> their dtype.
      threads: examples under way at a time; None = one per usable core.
      ahead: examples that are begun before their turn, each in a thread of its own that mostly waits, as for a bucket.

    Yields:
      {array: uint8[rows, *its layout, its size, its size, 3], RGB; field: dtype[rows]}.

    Raises:
      DataError: what example() raises, or an image that does not decode.
    """
    counts = [math.prod(layout) for layout in pictures.values()]
    sizes = image_size if isinstance(image_size, Mapping) else dict.fromkeys(pictures, image_size)
    fields, threads = dict(fields or {}), threads or len(os.sched_getaffinity(0))
    failures = []
    reader = ReadAhead(example, start, stop, ahead) if ahead else None
    begin = reader or example

    def read(n: np.int64) -> tuple[np.ndarray, ...]:
        try:
            found = begin(int(n))
            scalars = (np.asarray(found.fields[field], dtype) for field, dtype in fields.items())
            return found.data, found.plan.boxes, found.plan.flips, found.plan.turns, *scalars
        except Exception as e:  # TensorFlow would turn it into an error of its own: keep it, to raise it below
            failures.append(e)
            raise

    def resize(flips: np.ndarray, turns: np.ndarray, *crops: np.ndarray) -> list[np.ndarray]:
        stops = itertools.accumulate(counts)
        parts = [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
        return [finish(crops[p], flips[p], turns[p], sizes[name]) for name, p in zip(pictures, parts, strict=True)]

    @tf.autograph.experimental.do_not_convert
    def cut(n: tf.Tensor) -> dict[str, tf.Tensor]:
        types = (tf.string, tf.int32, tf.bool, tf.int64, *(np.dtype(dtype).name for dtype in fields.values()))
        data, boxes, flips, turns, *scalars = tf.numpy_function(read, [n], types)
        data = tf.unstack(tf.ensure_shape(data, (sum(counts),)))
        boxes = tf.unstack(tf.ensure_shape(boxes, (sum(counts), 4)))
        crops = [decode(image, box) for image, box in zip(data, boxes, strict=True)]
        parts = tf.numpy_function(resize, [flips, turns, *crops], [tf.uint8] * len(pictures))
        arrays = {
            name: tf.reshape(part, (*layout, sizes[name], sizes[name], 3))
            for (name, layout), part in zip(pictures.items(), parts, strict=True)
        }
        return arrays | {name: tf.ensure_shape(scalar, ()) for name, scalar in zip(fields, scalars, strict=True)}

    stop = np.iinfo(np.int64).max if stop is None else stop
    ds = tf.data.Dataset.range(start, stop)
    ds = ds.map(cut, num_parallel_calls=threads, deterministic=True).batch(rows).prefetch(_PREFETCH_BATCHES)
    options = tf.data.Options()
    options.autotune.enabled = False  # it would grow buffers and threads beyond what is set here
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1

    def batches() -> Iterator[Any]:
        first = start
        try:
            for batch in ds.with_options(options).as_numpy_iterator():
                yield batch
                first += rows
        except tf.errors.OpError as e:
            if failures:
                raise failures[0]  # noqa: B904 - it is the cause of the one caught, not its effect
            raise _find_damage(example, range(first, min(first + rows, stop)), decode) or e from None
        finally:
            if reader:
                reader.close()

    iterator = batches()
    _OPEN.add(iterator)
    return iterator


class ReadAhead:
    """example(n), begun in the order of the numbers, `ahead` of them before their turn."""

    def __init__(self, example: Callable[[int], Example], start: int, stop: int | None, ahead: int):
        self._example, self._next, self._stop, self._ahead = example, start, stop, ahead
        self._begun: dict[int, concurrent.futures.Future[Example]] = {}
        self._lock = threading.Lock()
        self._threads = concurrent.futures.ThreadPoolExecutor(ahead, thread_name_prefix="read_ahead")

    def __call__(self, n: int) -> Example:
        with self._lock:
            last = n + self._ahead if self._stop is None else min(n + self._ahead, self._stop - 1)
            while self._next <= last:
                self._begun[self._next] = self._threads.submit(self._example, self._next)
                self._next += 1
            found = self._begun.pop(n)
        return found.result()

    def close(self) -> None:
        """Begins no more; those under way are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _find_damage(example: Callable[[int], Example], numbers: range, decode: Callable) -> DataError | None:
    """Names the first image that does not decode; TensorFlow's own error does not say which it was."""
    for n in numbers:
        found = example(n)
        for picture, (image, box) in enumerate(zip(found.data, found.plan.boxes, strict=True)):
            try:
                decode(tf.constant(image), tf.constant(box))
            except (tf.errors.OpError, ValueError):
                return DataError(
                    f"{found.name(picture)} is damaged and does not decode; replace it or prepare it again"
                )
    return None


def image_height_width(data: bytes, name: str, max_pixels: int = picture_size.MAX_PIXELS) -> tuple[int, int]:
    """Size of an encoded image in pixels, from its header.

    Raises:
      DataError: the data do not decode, or are of a picture of more than `max_pixels`.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            height, width, _ = tf.io.extract_jpeg_shape(data).numpy().tolist()
            picture_size.check(height, width, name, max_pixels)
            return height, width
        return picture_size.of(data, name, max_pixels)
    except picture_size.TooLarge:
        raise
    except (tf.errors.InvalidArgumentError, ValueError) as e:
        raise DataError(f"{name} is no image or is damaged; replace or remove it") from e


_OPEN = weakref.WeakSet()  # iterators handed out


@atexit.register
def _close_all() -> None:
    # TensorFlow's threads call Python; a call while the interpreter shuts down would abort the process.
    for batches in list(_OPEN):
        batches.close()
