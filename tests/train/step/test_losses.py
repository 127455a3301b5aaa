"""Compares losses and metrics with float64 NumPy references and the published definitions."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from nfnets.train.step import losses

BATCH, CLASSES = 12, 7


@pytest.fixture
def batch():
  draw = np.random.default_rng(0)
  return {
    "logits": draw.normal(scale=3, size=(BATCH, CLASSES)).astype(np.float32),
    "labels": draw.integers(0, CLASSES, BATCH).astype(np.int32),
    "mix_labels": draw.integers(0, CLASSES, BATCH).astype(np.int32),
    "ratio": draw.uniform(size=BATCH).astype(np.float32),
  }


def reference_targets(labels, smoothing=0.0, mix_labels=None, ratio=None):
  eye = np.eye(CLASSES)
  targets = eye[labels]
  if mix_labels is not None:
    ratio = np.asarray(ratio, np.float64)[:, None]
    targets = ratio * targets + (1 - ratio) * eye[mix_labels]
  return targets * (1 - smoothing) + smoothing / CLASSES


def reference_loss(logits, targets, kind):
  logits = np.asarray(logits, np.float64)
  if kind == "softmax":
    return -(targets * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1)
  p = 1 / (1 + np.exp(-logits))
  return -(targets * np.log(p) + (1 - targets) * np.log1p(-p)).sum(-1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_cross_entropy_equals_float64_reference(batch, kind, smoothing, mixed):
  mix = {"mix_labels": batch["mix_labels"], "ratio": batch["ratio"]} if mixed else {}
  got = losses.cross_entropy(batch["logits"], batch["labels"], label_smoothing=smoothing, kind=kind, **mix)
  want = reference_loss(batch["logits"], reference_targets(batch["labels"], smoothing, **mix), kind)
  assert got.dtype == jnp.float32 and got.shape == (BATCH,)
  np.testing.assert_allclose(got, want, rtol=2e-6)


def test_distributions_as_labels_equal_their_integers(batch):
  eye = np.eye(CLASSES, dtype=np.float32)
  for kind in ("softmax", "sigmoid"):
    dense = losses.cross_entropy(
      batch["logits"], eye[batch["labels"]], mix_labels=eye[batch["mix_labels"]], ratio=batch["ratio"], kind=kind
    )
    sparse = losses.cross_entropy(
      batch["logits"], batch["labels"], mix_labels=batch["mix_labels"], ratio=batch["ratio"], kind=kind
    )
    np.testing.assert_array_equal(dense, sparse)


def test_ratio_may_be_one_number_and_its_ends_are_the_plain_labels(batch):
  def mixed(ratio):
    return losses.cross_entropy(batch["logits"], batch["labels"], mix_labels=batch["mix_labels"], ratio=ratio)

  np.testing.assert_array_equal(mixed(1.0), losses.cross_entropy(batch["logits"], batch["labels"]))
  np.testing.assert_array_equal(mixed(0.0), losses.cross_entropy(batch["logits"], batch["mix_labels"]))
  np.testing.assert_array_equal(mixed(0.3), mixed(np.full(BATCH, 0.3, np.float32)))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_low_precision_logits_are_computed_in_float32(batch, kind):
  half = jnp.asarray(batch["logits"], jnp.bfloat16)
  got = losses.cross_entropy(half, batch["labels"], kind=kind)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, losses.cross_entropy(half.astype(jnp.float32), batch["labels"], kind=kind))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_huge_logits_stay_finite(kind):
  logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
  value, grads = jax.value_and_grad(lambda x: losses.cross_entropy(x, jnp.array([0, 0]), kind=kind).sum())(logits)
  assert 2e4 <= float(value) <= 3e4 + 1 and bool(jnp.isfinite(grads).all())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_masked_images_cost_nothing_and_pass_no_gradient(batch, kind):
  mask = np.arange(BATCH) < 9
  logits, labels = batch["logits"].copy(), batch["labels"].copy()
  logits[9], logits[10], labels[11] = np.nan, np.inf, -1
  loss = lambda x: losses.cross_entropy(x, labels, label_smoothing=0.1, kind=kind, mask=mask)
  got = loss(logits)
  want = losses.cross_entropy(batch["logits"], batch["labels"], label_smoothing=0.1, kind=kind)
  np.testing.assert_array_equal(got, np.where(mask, want, 0))
  grads = jax.grad(lambda x: loss(x).sum())(logits)
  assert np.isfinite(grads).all() and not np.any(grads[9:]) and np.all(np.any(grads[:9], axis=-1))
  np.testing.assert_array_equal(
    loss(logits), losses.cross_entropy(logits, labels, label_smoothing=0.1, kind=kind, mask=mask.astype(np.float32))
  )


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_outside_the_classes_shows_as_nan_and_is_never_correct(batch, label):
  labels = batch["labels"].copy()
  labels[3] = label
  got = losses.cross_entropy(batch["logits"], labels, label_smoothing=0.1)
  np.testing.assert_array_equal(np.isnan(got), np.arange(BATCH) == 3)
  counted = losses.topk_correct(batch["logits"], labels, k=(CLASSES,))
  assert counted[f"top{CLASSES}"] == BATCH - 1 and counted["count"] == BATCH


def reference_topk(logits, labels, k):
  """Follows the published definition: the label is among the last k of an argsort."""
  orders = np.argsort(logits, axis=-1, kind="stable")
  return sum(label in order[-k:] for order, label in zip(orders, labels, strict=True))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(1, 9), k=st.integers(1, 12))
def test_topk_equals_argsort_without_ties(seed, classes, k):
  draw = np.random.default_rng(seed)
  logits = np.stack([draw.permutation(classes) for _ in range(BATCH)]).astype(np.float32) - 3
  labels = draw.integers(0, classes, BATCH)
  mask = draw.integers(0, 2, BATCH).astype(bool)
  got = losses.topk_correct(logits, labels, k=(1, k), mask=mask)
  assert got["top1"] == reference_topk(logits[mask], labels[mask], 1)
  assert got[f"top{k}"] == reference_topk(logits[mask], labels[mask], k)
  assert got["count"] == mask.sum() and all(value.dtype == jnp.int32 for value in got.values())


def test_ties_and_nans_are_not_correct():
  labels = np.arange(CLASSES)
  for fill in (0.0, np.nan, np.inf, -np.inf):
    constant = np.full((CLASSES, CLASSES), fill, np.float32)
    got = losses.topk_correct(constant, labels)
    assert got["top1"] == got["top5"] == 0 and got["count"] == CLASSES
  one_nan = np.eye(CLASSES, dtype=np.float32)
  one_nan[:, -1] = np.nan
  assert losses.topk_correct(one_nan, labels, k=(CLASSES,))[f"top{CLASSES}"] == 0
  tied_pair = np.array([[2.0, 2.0, 1.0]], np.float32)
  for label, top1, top2 in ((0, 0, 1), (1, 0, 1), (2, 0, 0)):
    got = losses.topk_correct(tied_pair, np.array([label]), k=(1, 2, 9))
    assert (got["top1"], got["top2"], got["top9"]) == (top1, top2, 1)


def test_sums_over_any_split_into_batches_are_the_same(batch):
  losses_ = losses.cross_entropy(batch["logits"], batch["labels"])
  whole = losses.metric_sums(batch["logits"], batch["labels"], losses_)
  padded = lambda rows: np.concatenate([rows, np.full((2, *rows.shape[1:]), -7, rows.dtype)])
  total = None
  for start in range(0, BATCH, 5):
    rows = slice(start, min(start + 5, BATCH))
    mask = np.arange(rows.stop - rows.start + 2) < rows.stop - rows.start
    logits, labels = padded(batch["logits"][rows]), padded(batch["labels"][rows])
    part = losses.metric_sums(logits, labels, losses.cross_entropy(logits, labels, mask=mask), mask)
    total = part if total is None else jax.tree.map(operator.add, total, part)
  assert total["count"] == BATCH and total["top1"] == whole["top1"] and total["top5"] == whole["top5"]
  summary = losses.summarize(total)
  assert list(summary) == ["loss", "top1", "top5", "count"] and summary["count"] == BATCH
  want = reference_loss(batch["logits"], reference_targets(batch["labels"]), "softmax").mean()
  np.testing.assert_allclose(summary["loss"], want, rtol=1e-6)
  assert summary["top1"] == reference_topk(batch["logits"], batch["labels"], 1) / BATCH
  assert summary["top5"] == reference_topk(batch["logits"], batch["labels"], 5) / BATCH


def test_a_nan_loss_of_a_masked_image_does_not_reach_the_sum(batch):
  mask = np.arange(BATCH) > 0
  values = np.where(mask, 1.0, np.nan).astype(np.float32)
  assert losses.metric_sums(batch["logits"], batch["labels"], values, mask)["loss_sum"] == BATCH - 1


def test_jit_over_all_devices_equals_eager(batch):
  devices = np.array(jax.devices()[: 4 if jax.device_count() >= 4 else 1])
  mesh = jax.sharding.Mesh(devices, ("data",))

  def step(batch):
    mix = {"mix_labels": batch["mix_labels"], "ratio": batch["ratio"]}
    values = losses.cross_entropy(batch["logits"], batch["labels"], label_smoothing=0.1, **mix)
    return values, losses.metric_sums(batch["logits"], batch["labels"], values)

  values, sums = step(batch)
  sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  jit_values, jit_sums = jax.jit(step)(sharded)
  np.testing.assert_allclose(jit_values, values, rtol=1e-6)
  np.testing.assert_allclose(jit_sums.pop("loss_sum"), sums.pop("loss_sum"), rtol=1e-6)
  assert jax.device_get(jit_sums) == jax.device_get(sums)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kind": "hinge"}, "kind = 'hinge': expected 'softmax' or 'sigmoid'"),
    ({"label_smoothing": 1.0}, r"label_smoothing = 1.0: expected a number in \[0, 1\)"),
    ({"label_smoothing": float("nan")}, "label_smoothing = nan"),
    ({"mix_labels": np.zeros(BATCH, int)}, "got mix_labels without ratio"),
    ({"ratio": 0.5}, "got ratio without mix_labels"),
    ({"mix_labels": np.zeros(BATCH, int), "ratio": np.zeros((BATCH, 1))}, r"ratio \(12, 1\)"),
    ({"mix_labels": np.zeros(3, int), "ratio": 0.5}, r"mix_labels \(3,\)"),
    ({"labels": np.zeros(3, int)}, r"logits \(12, 7\) need labels of the same batch: got labels \(3,\)"),
    ({"labels": np.zeros((BATCH, 3), np.float32)}, r"labels must be int \[batch\] or float \[batch, 7\]"),
    ({"labels": np.zeros(BATCH, np.float32)}, "labels must be int"),
    ({"logits": np.zeros((BATCH, 2, CLASSES))}, r"logits must be float \[batch, num_classes\]"),
    ({"logits": np.zeros((BATCH, CLASSES), int)}, "logits must be float"),
    ({"mask": np.ones((BATCH, 1))}, r"mask must be bool \(12,\)"),
  ],
)
def test_bad_arguments_of_cross_entropy(batch, change, message):
  arguments = {"logits": batch["logits"], "labels": batch["labels"], **change}
  with pytest.raises(ValueError, match=message):
    losses.cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_bad_arguments_of_metrics(batch):
  logits, labels = batch["logits"], batch["labels"]
  with pytest.raises(ValueError, match=r"k = \(0,\): expected whole numbers >= 1"):
    losses.topk_correct(logits, labels, k=(0,))
  with pytest.raises(ValueError, match=r"labels must be int \(12,\)"):
    losses.topk_correct(logits, np.eye(CLASSES)[labels])
  with pytest.raises(ValueError, match=r"one per image \(12,\): got \(\)"):
    losses.metric_sums(logits, labels, np.float32(3))
  with pytest.raises(ValueError, match="count = 0"):
    losses.summarize({"loss_sum": 0.0, "count": 0})
  with pytest.raises(ValueError, match="need a 'count'"):
    losses.summarize({"loss_sum": 0.0})
