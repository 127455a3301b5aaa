"""From the figures of several seeds to an interval, and from an interval and a criterion to a verdict."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Verdict = Literal["holds", "does not hold", "cannot be told here"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OPEN: Verdict = "cannot be told here"
LEVEL = 0.95
_MOST_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
  """A mean and the interval that is believed to hold the true one; the ends are NaN where one seed cannot give them."""

  mean: float
  low: float
  high: float
  seeds: int


def geometric_mean(values: Sequence[float] | np.ndarray) -> float:
  """The geometric mean of all values ≥ 0; what is below 1e-30 counts as that."""
  return float(np.exp(np.mean(np.log(np.maximum(values, 1e-30)))))


def rank_correlation(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
  """Spearman's rank correlation, in [-1, 1]; NaN where a number is not finite, or all of one side are the same."""
  import scipy.stats

  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  usable = np.isfinite(x).all() and np.isfinite(y).all() and np.ptp(x) > 0 and np.ptp(y) > 0
  return float(scipy.stats.spearmanr(x, y).statistic) if usable else math.nan


def if_learned(figure: Any, accuracy: Any, classes: int) -> Any:
  """A figure, and NaN where the network whose failure would by itself make the figure good has not learned.

  A frozen network has the smoothest landscape, and all are better than a dead one. Learned is what reaches twice the accuracy of
  guessing or, with few classes, half of the way from guessing to 1.

  Args:
    figure, accuracy: numbers, or arrays of one shape.
    classes: how many there are to guess from.
  """
  least = min(2 / classes, (1 + 1 / classes) / 2)
  return np.where(np.asarray(accuracy) >= least, figure, math.nan).tolist()


def bootstrap(samples: Sequence[float], level: float = LEVEL) -> Interval:
  """Computes the percentile bootstrap interval of the mean over seeds (Efron and Tibshirani 1993, chapter 13).

  Up to five seeds, all resamples are taken (5⁵ = 3,125), so that the interval is a function of the samples; beyond, 10,000 of
  them are drawn with a fixed seed. Few seeds make it too short: with three it is about their range, which holds the true mean of
  a symmetric distribution three times out of four, with five about nineteen times out of twenty.

  Args:
    samples: one number a seed.
    level: how much of the resampled means lies within the interval.

  Returns:
    NaN everywhere if any sample is not finite, and NaN ends for a single one.
  """
  values = np.asarray(samples, np.float64)
  if not values.size or not np.isfinite(values).all():
    return Interval(math.nan, math.nan, math.nan, values.size)
  if values.size == 1:
    return Interval(float(values[0]), math.nan, math.nan, 1)
  if values.size <= 5:
    chosen = np.array(list(itertools.product(range(values.size), repeat=values.size)))
  else:
    chosen = np.random.default_rng(0).integers(0, values.size, (_MOST_RESAMPLES, values.size))
  low, high = np.quantile(values[chosen].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
  return Interval(float(values.mean()), float(low), float(high), values.size)


def judge(interval: Interval, low: float, high: float) -> Verdict:
  """Says "holds" if the whole interval lies within [low, high], "does not hold" if all of it lies outside, else that it is open.

  An interval with NaN, of one seed or of a network that gave no numbers, leaves it open.
  """
  if math.isnan(interval.low) or math.isnan(interval.high):
    return OPEN
  if low <= interval.low and interval.high <= high:
    return HOLDS
  return FAILS if interval.high < low or interval.low > high else OPEN


def combine(verdicts: Sequence[Verdict]) -> Verdict:
  """The verdict on a claim of several parts: it holds if all do, and does not hold if one does not; without parts it is open."""
  if FAILS in verdicts:
    return FAILS
  return HOLDS if verdicts and all(part == HOLDS for part in verdicts) else OPEN
