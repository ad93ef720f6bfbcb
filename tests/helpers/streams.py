"""Runs a stream of training data."""

from collections.abc import Callable, Iterator

import numpy as np

from input_pipeline.streams.order import Order


def run_stream(
    stream: Callable,
    *data,
    seed: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    first_step: int = 0,
    num_steps: int | None = None,
    threads: int | None = None,
    **options,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of stream(*data, order, **options), in one call."""
    order = Order(seed, batch_size, process_index, process_count)
    return stream(*data, order, **options)(first_step, num_steps, threads)
