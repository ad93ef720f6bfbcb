"""Paired comparison by seed: mean difference, its standard error and confidence interval, and a paired t-test."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from benchmarks.small_paper.directions import NO_EFFECT, Direction

LEVEL = 0.05  # of the test, two-sided
VERDICTS = ("agrees", "disagrees", "undecided", "not finished")


class Comparison(NamedTuple):
    """Of the differences by seed.

    Attributes:
      seeds: number of seeds that have all trainings of the direction.
      diverged: number of wanted seeds of which a training diverged: they are in no mean.
      mean, error: of the differences, and its standard error; nan below one and two seeds.
      low, high: 95 % confidence interval of the mean (Student's t).
      p: two-sided paired t-test of "no difference"; 1 where all differences are 0.
      verdict: one of VERDICTS.
    """

    seeds: int
    diverged: int
    mean: float
    error: float
    low: float
    high: float
    p: float
    verdict: str


def compare(direction: Direction, values: Mapping[str, Mapping[int, float | None]], seeds: Sequence[int]) -> Comparison:
    """Compares over `seeds`.

    Args:
      values: setting -> seed -> the direction's measure; None: diverged; missing: not trained.

    With a seed missing, or fewer than two of them left, the verdict is "not finished".
    """
    of_seed = {seed: [values.get(setting, {}).get(seed, math.nan) for setting in direction.contrast] for seed in seeds}
    diverged = sum(any(value is None for value in row) for row in of_seed.values())
    differences = [
        sum(weight * value for weight, value in zip(direction.contrast.values(), row, strict=True) if value is not None)
        for row in of_seed.values()
        if None not in row
    ]
    done = [difference for difference in differences if not math.isnan(difference)]
    mean, error, low, high, p = paired_t(done)
    if len(done) < len(differences) or len(done) < 2:
        verdict = "not finished"
    else:
        verdict = verdict_of(direction.sign, mean, low, high, p)
    return Comparison(len(done), diverged, mean, error, low, high, p, verdict)


def paired_t(differences: Sequence[float]) -> tuple[float, float, float, float, float]:
    """(mean, standard error, ends of the 95 % interval, p) of differences by pair.

    >>> [round(x, 4) for x in paired_t([1.0, 2.0, 3.0])]
    [2.0, 0.5774, -0.4841, 4.4841, 0.0742]
    """
    n = len(differences)
    if n == 0:
        return math.nan, math.nan, math.nan, math.nan, math.nan
    mean = statistics.fmean(differences)
    if n == 1:
        return mean, math.nan, math.nan, math.nan, math.nan
    error = statistics.stdev(differences) / math.sqrt(n)
    reach = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    if error == 0:
        return mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0
    return mean, error, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, n - 1))


def verdict_of(sign: int, mean: float, low: float, high: float, p: float) -> str:
    """ "agrees", "disagrees" or "undecided"; "no effect" (sign 0) is agreed with by an interval within +-NO_EFFECT."""
    if sign == 0:
        if -NO_EFFECT < low and high < NO_EFFECT:
            return "agrees"
        return "disagrees" if p < LEVEL else "undecided"
    if p >= LEVEL:
        return "undecided"
    return "agrees" if mean * sign > 0 else "disagrees"
