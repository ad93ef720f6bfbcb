"""Batches of training data in Python: the streams of views under the names of version 0.1.0, for one more release.

    for batch in pipeline.clip_views(FrameStore("STORE"), seed=0, batch_size=64, views=2, ...): ...

New code makes an Order and calls input_pipeline.streams itself.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from input_pipeline.streams import views
from input_pipeline.streams.decode import Batches
from input_pipeline.streams.order import Order


def _in_one_call(stream: Callable[..., Batches]) -> Callable[..., Iterator[dict[str, np.ndarray]]]:
    def batches(
        data: Any,
        start_step: int = 0,
        *,
        seed: int,
        batch_size: int,
        num_steps: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        threads: int | None = None,
        **options: Any,
    ) -> Iterator[dict[str, np.ndarray]]:
        order = Order(seed, batch_size, process_index, process_count)
        return stream(data, order, **options)(start_step, num_steps, threads)

    batches.__doc__ = (
        f"streams.views.{stream.__name__}(data, Order(seed, batch_size, process_index, process_count), **options), "
        "`num_steps` batches of it from `start_step` on (None: without end)."
    )
    return batches


clip_views = _in_one_call(views.clip_views)
image_views = _in_one_call(views.image_views)
labelled_images = _in_one_call(views.labelled_images)
