"""The measures of an evaluation against slow float64 references that take one image after the other."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import linear_model

from nfnets.evaluation import metrics


def made(count: int = 500, classes: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Logits of a classifier that is often right and too sure of it, and the labels."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, count)
  logits = 3 * rng.normal(size=(count, classes)) + 4 * np.eye(classes)[labels]
  return logits.astype(np.float32), labels


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_per_image_against_one_image_after_the_other(kind, monkeypatch):
  monkeypatch.setattr(metrics, "_ROWS", 77)
  logits, labels = made()
  images = metrics.per_image(logits, labels, kind=kind)
  for i, (row, label) in enumerate(zip(logits.astype(np.float64).tolist(), labels.tolist(), strict=True)):
    total = math.fsum(math.exp(x) for x in row)
    if kind == "softmax":
      shares = [math.exp(x) / total for x in row]
      loss = -math.log(shares[label])
    else:
      shares = [1 / (1 + math.exp(-x)) for x in row]
      loss = -math.fsum(math.log(p if j == label else 1 - p) for j, p in enumerate(shares))
    assert images.predicted[i] == max(range(len(row)), key=lambda j: row[j])
    assert images.rank[i] == sum(x >= row[label] for x in row)
    assert images.confidence[i] == pytest.approx(max(shares), rel=1e-12)
    assert images.loss[i] == pytest.approx(loss, rel=1e-9)
    assert images.brier[i] == pytest.approx(math.fsum((p - (j == label)) ** 2 for j, p in enumerate(shares)), rel=1e-9, abs=1e-12)


def test_summary_and_standard_errors():
  logits, labels = made()
  images = metrics.per_image(logits, labels)
  summary = metrics.summarize(images)
  for name, values in (("top1", images.rank == 1), ("top5", images.rank <= 5), ("loss", images.loss), ("brier", images.brier)):
    assert summary[name] == pytest.approx(np.mean(values))
    assert summary[f"{name}_se"] == pytest.approx(stats.sem(values))
  assert summary["count"] == 500
  # The error of the calibration error resembles the spread over data sets that are drawn anew.
  again = [metrics.per_image(*made(seed=seed)) for seed in range(1, 60)]
  spread = np.std([metrics.calibration_error(each.confidence, each.correct)[0] for each in again])
  assert summary["ece_se"] == pytest.approx(spread, rel=0.3)


def test_ties_count_against_the_label():
  images = metrics.per_image(np.zeros((2, 7), np.float32), np.asarray([0, 6]))
  assert images.rank.tolist() == [7, 7] and not images.correct.any()


def test_calibration_errors_by_hand():
  """Four bins: equal width puts 0.2, 0.25 | 0.3 | 0.9, 1.0 together (an upper edge belongs below), equal numbers otherwise."""
  confidence, correct = np.asarray([0.9, 0.25, 0.2, 1.0, 0.3]), np.asarray([True, False, True, False, True])
  expected = (abs(1 - 0.45) + abs(1 - 0.3) + abs(1 - 1.9)) / 5
  assert metrics.calibration_error(confidence, correct, bins=4)[0] == pytest.approx(expected)
  adaptive = (abs(1 - 0.45) + abs(1 - 0.3) + abs(1 - 0.9) + abs(0 - 1.0)) / 5  # sorted and cut: 2, 1, 1, 1 images
  assert metrics.calibration_error(confidence, correct, bins=4, adaptive=True)[0] == pytest.approx(adaptive)
  assert metrics.bin_of(np.asarray([0.0, 1 / 15, 0.5, 1.0])).tolist() == [0, 0, 7, 14]


def test_reliability_adds_up_to_the_calibration_error():
  images = metrics.per_image(*made())
  rows = [row for row in metrics.reliability(images) if row["count"]]
  error = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(images)
  assert error == pytest.approx(metrics.calibration_error(images.confidence, images.correct)[0])
  assert sum(row["count"] for row in rows) == len(images)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_temperature_is_where_the_loss_has_its_minimum(kind):
  logits, labels = made()
  temperature = metrics.fit_temperature(logits, labels, kind=kind)
  losses = [metrics.per_image(logits, labels, kind=kind, temperature=temperature * by).loss.mean() for by in (0.99, 1, 1.01)]
  assert losses[1] < min(losses[0], losses[2])


def test_temperature_of_two_classes_is_a_logistic_regressions():
  rng = np.random.default_rng(1)
  margin = 4 * rng.normal(size=2000)
  labels = (rng.random(2000) < 1 / (1 + np.exp(-margin / 2.5))).astype(int)  # true temperature 2.5
  logits = np.stack([np.zeros_like(margin), margin], axis=1)
  fitted = linear_model.LogisticRegression(C=np.inf, fit_intercept=False).fit(margin[:, None], labels)
  assert metrics.fit_temperature(logits, labels) == pytest.approx(1 / fitted.coef_[0, 0], rel=1e-3)


def test_temperature_is_measured_on_the_other_half():
  logits, labels = made()
  result = metrics.temperature_scaling(logits, labels)
  other = metrics.per_image(logits[1::2], labels[1::2], temperature=metrics.fit_temperature(logits[::2], labels[::2]))
  assert result["loss_after"] == pytest.approx(other.loss.mean())
  assert result["loss_after"] < result["loss_before"] and result["ece_after"] < result["ece_before"]
  assert (result["fitted_on"], result["measured_on"]) == (250, 250)
  assert metrics.temperature_scaling(logits[:1], labels[:1]) is None


def test_comparison_against_a_test_by_hand():
  """10 images only the first has right, 2 only the second: p = 2 · P(at most 2 of 12 tosses)."""
  first = np.asarray([True] * 60 + [True] * 10 + [False] * 2 + [False] * 28)
  second = np.asarray([True] * 60 + [False] * 10 + [True] * 2 + [False] * 28)
  result = metrics.compare(first, second)
  assert result["p"] == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
  assert (result["difference"], result["only_first"], result["only_second"]) == (-0.08, 10, 2)
  error = np.std(second.astype(float) - first) / 10
  assert result["interval"] == pytest.approx((-0.08 - 1.959964 * error, -0.08 + 1.959964 * error))
  assert metrics.compare(first, first)["p"] == 1.0


def test_interval_is_wilsons():
  expected = stats.binomtest(37, 50).proportion_ci(method="wilson")
  assert metrics.interval(37, 50) == pytest.approx((expected.low, expected.high), rel=1e-5)


def test_lists_of_mistakes_and_classes():
  labels = np.asarray([0, 0, 0, 1, 2, 2])
  predicted = np.asarray([1, 1, 0, 2, 0, 2])
  confidence = np.asarray([0.6, 0.9, 1.0, 0.7, 0.9, 1.0])
  zero = np.zeros(6)
  rank = np.where(labels == predicted, 1, 2)
  images = metrics.PerImage(label=labels, predicted=predicted, rank=rank, confidence=confidence, loss=zero, brier=zero)
  assert metrics.confused_pairs(images) == [(0, 1, 2), (1, 2, 1), (2, 0, 1)]
  assert metrics.most_confidently_wrong(images, 3) == [1, 4, 3]
  assert metrics.per_class(images, 4) == [(3, pytest.approx(1 / 3)), (1, 0.0), (2, 0.5), (0, None)]
