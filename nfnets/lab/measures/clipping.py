"""How large gradients are beside their weights, ‖G‖ / ‖W‖, by layer and part of a training: histograms and their medians."""

import math

import numpy as np

BINS = np.linspace(-5, 2, 29)  # of log10 ‖G‖ / ‖W‖
PARTS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "last")  # of the steps, equally many each


def summary(log: dict[str, np.ndarray], units: list[int]) -> dict[str, list]:
  """What is kept of a training's log: "clipped" [steps, kernels], and for each of PARTS a histogram [kernels, bins]."""
  logged = np.log10(np.maximum(log["ratios"], 1e-30))  # [steps, units]
  ends = [i * len(logged) // len(PARTS) for i in range(len(PARTS) + 1)]
  parts = {name: logged[start : max(end, start + 1)] for name, start, end in zip(PARTS, ends[:-1], ends[1:], strict=True)}
  return {"clipped": log["clipped"].tolist(), **{name: by_layer(part, units).tolist() for name, part in parts.items()}}


def medians(histograms: np.ndarray) -> np.ndarray:
  """The middle of the bin in which the median lies, of [layers, bins]; NaN where the bins are empty."""
  below = np.cumsum(histograms, axis=1)
  middle = (BINS[:-1] + BINS[1:])[np.argmax(below >= below[:, -1:] / 2, axis=1)] / 2
  return np.where(below[:, -1] > 0, middle, math.nan)


def by_layer(logged: np.ndarray, units: list[int]) -> np.ndarray:
  """Histograms of log10 ‖G‖ / ‖W‖ over BINS, [layers, bins], of all steps; each sums to the share within the bins.

  Args:
    logged: [steps, units], the units of one layer after those of another.
    units: how many each layer has.
  """
  parts = np.split(logged, np.cumsum(units)[:-1], axis=-1)
  return np.stack([np.histogram(part, BINS)[0] / part.size for part in parts])
