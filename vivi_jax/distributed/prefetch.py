"""NumPy batches -> global arrays on the mesh, a few steps ahead of the training step."""

import collections
import concurrent.futures
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from vivi_jax.distributed import sharding


class Prefetcher:
    """Iterator over global batches; transfers run in a thread while the accelerator works.

    Args:
      batches: yields dicts of arrays whose leading axis is this process's share of the global batch.
      mesh: the batch is split over all its devices.
      depth: batches held on the device ahead of the one in use.

    Attributes:
      wait_seconds: time the caller has waited for data so far; large if the input pipeline is too slow.
    """

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, depth: int = 2):
        self._batches = batches
        self._sharding = sharding.batch_sharding(mesh)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead = collections.deque(self._thread.submit(self._load) for _ in range(depth))
        self.wait_seconds = 0.0

    def _load(self) -> dict[str, jax.Array] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        return {name: jax.make_array_from_process_local_data(self._sharding, x) for name, x in batch.items()}

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        start = time.perf_counter()
        batch = self._ahead.popleft().result()
        self.wait_seconds += time.perf_counter() - start
        if batch is None:
            raise StopIteration
        self._ahead.append(self._thread.submit(self._load))
        return batch

    def wait_for_first(self) -> None:
        """Returns once the next batch is there; raises what is wrong with it."""
        self._ahead[0].result()

    def close(self) -> None:
        """Stops loading; batches under way are dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)
