"""Measures of a classifier over a split, from its logits, in float64: means with their standard errors, calibration, temperature.

The expected calibration error is that of Guo et al. 2017 ("On Calibration of Modern Neural Networks"); its adaptive form has bins
of equal numbers of images, as in Nixon et al. 2019 ("Measuring Calibration in Deep Learning").
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

BINS = 15
_ROWS = 4096  # images whose float64 logits are in memory at once
_RESAMPLES = 200  # of the bootstrap that the standard error of a calibration error comes from
_HOTTEST = 50.0  # temperatures are looked for from 1 / this to this
_Z = 1.959964  # of a normal distribution's central 95 %


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PerImage:
  """What is kept of every image, in the order of the split.

  Attributes:
    label, predicted: int64 [n].
    rank: int64 [n], 1 + the number of other classes whose logit is at least the label's, so that ties count against it.
    confidence: float64 [n], the probability of the predicted class.
    loss: float64 [n], cross-entropy in nats.
    brier: float64 [n], the squared distance between probabilities and label, in [0, 2] with softmax.
  """

  label: np.ndarray
  predicted: np.ndarray
  rank: np.ndarray
  confidence: np.ndarray
  loss: np.ndarray
  brier: np.ndarray

  @property
  def correct(self) -> np.ndarray:
    """Whether the label has the largest logit by itself: bool [n]."""
    return self.rank == 1

  def __len__(self) -> int:
    return len(self.label)


def per_image(logits: np.ndarray, labels: np.ndarray, *, kind: str = "softmax", temperature: float = 1.0) -> PerImage:
  """Measures every image.

  Args:
    logits: float [n, classes], finite.
    labels: int [n].
    kind: "softmax", or "sigmoid" (each class a yes or no of its own; the loss is summed over classes).
    temperature: the logits are divided by it.
  """
  rows: dict[str, list[np.ndarray]] = {name: [] for name in ("predicted", "rank", "confidence", "loss", "brier")}
  for part, own in _parts(logits, labels):
    part = part / temperature
    index = np.arange(len(part))
    score = part[index, own]
    if kind == "softmax":
      normaliser = _logsumexp(part)
      probabilities, loss = np.exp(part - normaliser[:, None]), normaliser - score
    else:
      probabilities, loss = _sigmoid(part), np.logaddexp(0, part).sum(axis=1) - score
    predicted = part.argmax(axis=1)
    rows["predicted"].append(predicted)
    rows["rank"].append((part >= score[:, None]).sum(axis=1))
    rows["confidence"].append(probabilities[index, predicted])
    rows["loss"].append(loss)
    rows["brier"].append((probabilities**2).sum(axis=1) - 2 * probabilities[index, own] + 1)
  return PerImage(label=labels.astype(np.int64), **{name: np.concatenate(values) for name, values in rows.items()})


def summarize(images: PerImage) -> dict[str, float | int]:
  """Means over the images, each with the standard error "NAME_se", and the calibration errors.

  Returns:
    {"count", "top1", "top5", "loss", "brier", "ece", "adaptive_ece"} and the standard errors of all but the count. An error of a
    mean is the sample's deviation / √n; that of a calibration error comes from a bootstrap with a fixed seed.
  """
  values = {"top1": images.correct, "top5": images.rank <= 5, "loss": images.loss, "brier": images.brier}
  count = len(images)
  result: dict[str, float | int] = {"count": count}
  for name, value in values.items():
    result[name] = float(np.mean(value))
    result[f"{name}_se"] = float(np.std(value, ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
  for name, adaptive in (("ece", False), ("adaptive_ece", True)):
    result[name], result[f"{name}_se"] = calibration_error(images.confidence, images.correct, adaptive=adaptive)
  return result


def calibration_error(
  confidence: np.ndarray, correct: np.ndarray, *, bins: int = BINS, adaptive: bool = False
) -> tuple[float, float]:
  """The expected calibration error Σ_bins n_bin / n · |accuracy − mean confidence|, and its bootstrap standard error.

  Args:
    confidence: float [n], in [0, 1].
    correct: bool [n].
    bins: their number; of equal width (lower edge < confidence ≤ upper edge), or with `adaptive` of equal numbers of images.
    adaptive: see `bins`.
  """
  order = np.argsort(confidence, kind="stable")
  confidence, gap = confidence[order], correct[order] - confidence[order]
  rng = np.random.default_rng(0)
  count = len(gap)

  def error(index: np.ndarray) -> float:
    """Of the images with these places in the order of confidence, which rise."""
    places = np.arange(count) * bins // count if adaptive else bin_of(confidence[index], bins)
    return float(np.abs(np.bincount(places, gap[index], minlength=bins)).sum() / count)

  samples = [error(np.sort(rng.integers(count, size=count))) for _ in range(_RESAMPLES)]
  return error(np.arange(count)), float(np.std(samples, ddof=1))


def bin_of(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
  """The bin of equal width that each confidence lies in: int [n], from 0; an upper edge belongs to the bin below it."""
  return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def reliability(images: PerImage, bins: int = BINS) -> list[dict[str, Any]]:
  """Accuracy and mean confidence of each bin of equal width; None where it has no images."""
  places = bin_of(images.confidence, bins)
  rows: list[dict[str, Any]] = []
  for place in range(bins):
    here = places == place
    count = int(here.sum())
    means = [float(value[here].mean()) if count else None for value in (images.correct, images.confidence)]
    rows.append({"low": place / bins, "high": (place + 1) / bins, "count": count, "accuracy": means[0], "confidence": means[1]})
  return rows


def per_class(images: PerImage, num_classes: int) -> list[tuple[int, float | None]]:
  """(images, top-1 accuracy) of each class; None without images."""
  counts = np.bincount(images.label, minlength=num_classes)
  right = np.bincount(images.label, images.correct, minlength=num_classes)
  return [(int(count), float(good / count) if count else None) for count, good in zip(counts, right, strict=True)]


def confused_pairs(images: PerImage, limit: int = 20) -> list[tuple[int, int, int]]:
  """(label, predicted, images) of the pairs of different classes that are confused most often, the most frequent first."""
  wrong = images.predicted != images.label
  pairs, counts = np.unique(np.stack([images.label[wrong], images.predicted[wrong]], axis=1), axis=0, return_counts=True)
  order = np.argsort(-counts, kind="stable")[:limit]
  return [(int(pairs[i][0]), int(pairs[i][1]), int(counts[i])) for i in order]


def most_confidently_wrong(images: PerImage, limit: int = 40) -> list[int]:
  """The numbers of the wrong images with the largest confidence, in that order."""
  wrong = np.flatnonzero(images.predicted != images.label)
  return wrong[np.argsort(-images.confidence[wrong], kind="stable")][:limit].tolist()


def fit_temperature(logits: np.ndarray, labels: np.ndarray, *, kind: str = "softmax") -> float:
  """The temperature, in [1/50, 50], that gives the least mean loss (Guo et al. 2017, section 4.2).

  The loss is convex in the inverse temperature, so that the search finds its one minimum. Where every image is right there is
  none: the colder the better.
  """
  from scipy import optimize

  def loss(log_inverse: float) -> float:
    total = 0.0
    for part, own in _parts(logits, labels):
      part = part * np.exp(log_inverse)
      normaliser = _logsumexp(part) if kind == "softmax" else np.logaddexp(0, part).sum(axis=1)
      total += float((normaliser - part[np.arange(len(part)), own]).sum())
    return total / len(labels)

  edge = np.log(_HOTTEST)
  found = optimize.minimize_scalar(loss, bounds=(-edge, edge), method="bounded", options={"xatol": 1e-6})
  return float(np.exp(-found.x))


def temperature_scaling(logits: np.ndarray, labels: np.ndarray, *, kind: str = "softmax") -> dict[str, float | int] | None:
  """Fits the temperature on every second image, from the first, and measures it on the others.

  Returns:
    {"temperature", "fitted_on", "measured_on"} (images) and of the measured half "loss_before", "loss_after", "ece_before",
    "ece_after"; None for fewer than two images, and where the loss of the first half has no minimum, see `fit_temperature`.
  """
  if len(labels) < 2:
    return None
  temperature = fit_temperature(logits[::2], labels[::2], kind=kind)
  if not 1.01 / _HOTTEST < temperature < _HOTTEST / 1.01:
    return None
  result: dict[str, float | int] = {"temperature": temperature, "fitted_on": len(labels[::2]), "measured_on": len(labels[1::2])}
  for when, value in (("before", 1.0), ("after", temperature)):
    images = per_image(logits[1::2], labels[1::2], kind=kind, temperature=value)
    result[f"loss_{when}"] = float(images.loss.mean())
    result[f"ece_{when}"] = calibration_error(images.confidence, images.correct)[0]
  return result


# ---- comparisons


def interval(right: int, count: int) -> tuple[float, float]:
  """Wilson's 95 % confidence interval of a share."""
  share, z2 = right / count, _Z**2
  centre = (share + z2 / (2 * count)) / (1 + z2 / count)
  half = _Z / (1 + z2 / count) * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
  return float(centre - half), float(centre + half)


def compare(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
  """Compares two classifiers on the same images by McNemar's exact test.

  Args:
    first, second: bool [n], whether each was right.

  Returns:
    "difference" of the accuracies (second - first) with its 95 % "interval", the numbers of images that "only_first" and
    "only_second" had right, and the two-sided "p" that both are equally often right where they differ.
  """
  from scipy import stats

  only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
  count, differing = len(first), only_first + only_second
  difference = (only_second - only_first) / count
  half = _Z * np.sqrt(max(0.0, differing - (only_second - only_first) ** 2 / count)) / count
  return {
    "difference": difference,
    "interval": (float(difference - half), float(difference + half)),
    "only_first": only_first,
    "only_second": only_second,
    "p": float(stats.binomtest(only_first, differing).pvalue) if differing else 1.0,
  }


# ---- arithmetic


def _parts(logits: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for start in range(0, len(logits), _ROWS):
    yield logits[start : start + _ROWS].astype(np.float64), labels[start : start + _ROWS]


def _logsumexp(rows: np.ndarray) -> np.ndarray:
  largest = rows.max(axis=1)
  return largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1))


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return np.exp(-np.logaddexp(0, -x))
