"""Files read and examples prepared by threads, in order. Needs neither TensorFlow nor JAX."""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from input_pipeline.streams.order import Order

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(
    function: Callable[[T], R], items: Iterable[T], threads: int | None = None, *, ahead: int = 8
) -> Iterator[R]:
    """function(item) for each item, in order, with `threads` at work and a few results (`ahead`) waiting.

    Args:
      threads: None: one per usable core.
    """
    threads = threads or len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending: collections.deque[concurrent.futures.Future[R]] = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= threads + ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def batches_of(
    example: Callable[[int], tuple], order: Order, first_step: int, num_steps: int | None = None, *, threads: int | None
) -> Iterator[tuple[np.ndarray, ...]]:
    """This process's batches of examples that threads prepare two batches ahead, each of their arrays stacked.

    Args:
      example: number i in the global order -> arrays or numbers.
      num_steps: None: without end.
    """
    start, stop = order.span(first_step, num_steps)
    numbers = itertools.count(start) if stop is None else range(start, stop)
    examples = in_parallel(lambda n: example(order.example(n)), numbers, threads, ahead=2 * order.rows)
    while batch := list(itertools.islice(examples, order.rows)):
        yield tuple(np.stack(arrays) for arrays in zip(*batch, strict=True))
