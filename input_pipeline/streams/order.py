"""Which examples a process prepares, and the checks that all streams share. Needs neither TensorFlow nor JAX."""

import dataclasses

from vivi_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Order:
    """The endless order of a stream's examples, and one process's share of every global batch.

    Example i = step * batch_size + row is a pure function of (seed, i), see sampling.py. Process p of P prepares rows
    [p * b, (p + 1) * b) of each batch, b = batch_size / P. So the data depend neither on the number of processes nor on
    the step a run resumes from.

    An epoch of N videos is N examples, each video once, and the next epoch follows without a gap: where batch_size does
    not divide N, one batch holds the end of an epoch and the beginning of the next. The order is such that no batch
    holds a video twice, there neither: the other videos of a batch are the negatives of contrastive losses.

    Raises:
      DataError: an impossible value.
    """

    seed: int  # decides, with the example's number, all that is random; 0 or more
    batch_size: int  # examples in the global batch, over all processes
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.batch_size < 1:
            raise DataError(f"batch_size={self.batch_size}: must be 1 or more")
        if self.seed < 0:
            raise DataError(f"seed={self.seed}: must be 0 or more")
        if self.batch_size % self.process_count:
            raise DataError(
                f"batch_size={self.batch_size} does not divide among {self.process_count} processes; "
                f"use a multiple of {self.process_count}"
            )

    @property
    def rows(self) -> int:
        """Examples of a batch that this process prepares."""
        return self.batch_size // self.process_count

    def example(self, n: int) -> int:
        """The n-th example of this process -> its number i in the global order."""
        step, row = divmod(n, self.rows)
        return step * self.batch_size + self.process_index * self.rows + row

    def span(self, first_step: int, num_steps: int | None) -> tuple[int, int | None]:
        """(first n, the one behind the last) of some steps of this process; None: without end."""
        start = first_step * self.rows
        return start, None if num_steps is None else start + num_steps * self.rows


def check_values(*, min_crop_area: float, **counts: int) -> None:
    """Raises DataError for values no data could meet; `counts` are any that must be 1 or more."""
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"{name}={value}: must be 1 or more")
    if not 0 < min_crop_area <= 1:
        raise DataError(f"min_crop_area={min_crop_area}: it is a share of the image's area, above 0 and at most 1")


def check_enough(count: int, batch_size: int, what: str, remedy: str, *, key: str = "batch_size") -> None:
    """Raises DataError unless there are as many examples as a batch has; config.KEY says how many."""
    # A batch with the same video twice would hold false negatives, so this is refused and not padded.
    if count < batch_size:
        lower = f"lower --config.{key} (to {1 << count.bit_length() - 1}), or " if count > 1 else ""
        raise DataError(f"{count} {what}, fewer than a batch of {batch_size}: {lower}{remedy}")
