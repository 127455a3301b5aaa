"""Classification losses and metrics: one value per image, then sums and counts, divided once at the end.

Everything is computed in float32 whatever the precision of the model. Images that only fill up a batch are masked: they
count for nothing, whatever their logits and labels hold, and pass no gradient (not even NaN) back.
"""

import operator
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax


def target_distribution(
  labels: jax.Array,
  num_classes: int,
  *,
  label_smoothing: float = 0.0,
  mix_labels: jax.Array | None = None,
  ratio: jax.Array | float | None = None,
) -> jax.Array:
  """The distribution over classes that the loss compares the logits with.

  y = ratio · onehot(labels) + (1 − ratio) · onehot(mix_labels), then y · (1 − s) + s / num_classes. The smoothing is
  that of Szegedy et al. 2016 ("Rethinking the Inception Architecture", section 7), the mixing that of mixup and cutmix.

  Args:
    labels: int [batch], or a distribution float [batch, num_classes].
    num_classes: number of classes.
    label_smoothing: s, in [0, 1).
    mix_labels: the labels of the images mixed in, in either form of `labels`; needs `ratio`.
    ratio: weight of `labels` against `mix_labels`, float [batch] or one number, in [0, 1].

  Returns:
    float32 [batch, num_classes]. A row whose integer label is outside [0, num_classes) is NaN, so that the loss shows
    it (as values are unknown under jit, it cannot raise).

  Raises:
    ValueError: smoothing out of range, `mix_labels` and `ratio` not given together, or shapes that do not fit.
  """
  if not 0.0 <= label_smoothing < 1.0:
    raise ValueError(f"label_smoothing = {label_smoothing!r}: expected a number in [0, 1).")
  if (mix_labels is None) != (ratio is None):
    given, missing = ("ratio", "mix_labels") if mix_labels is None else ("mix_labels", "ratio")
    raise ValueError(f"Mixed labels need both mix_labels and ratio: got {given} without {missing}.")
  targets = _one_hot(labels, num_classes, "labels")
  if mix_labels is not None:
    mixed = _one_hot(mix_labels, num_classes, "mix_labels")
    ratio = jnp.asarray(ratio, jnp.float32)
    if mixed.shape != targets.shape or ratio.shape not in ((), targets.shape[:1]):
      raise ValueError(
        f"labels, mix_labels and ratio must share one batch: got labels {jnp.shape(labels)}, "
        f"mix_labels {jnp.shape(mix_labels)}, ratio {ratio.shape}."
      )
    ratio = ratio[..., None]
    targets = ratio * targets + (1.0 - ratio) * mixed
  return optax.smooth_labels(targets, label_smoothing)


def cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  *,
  label_smoothing: float = 0.0,
  mix_labels: jax.Array | None = None,
  ratio: jax.Array | float | None = None,
  kind: str = "softmax",
  mask: jax.Array | None = None,
) -> jax.Array:
  """Cross-entropy of every image.

  Args:
    logits: float [batch, num_classes], any precision; computed in float32.
    labels, label_smoothing, mix_labels, ratio: see `target_distribution`.
    kind: "softmax" (classes exclude one another), or "sigmoid" (each class a yes or no of its own; the sum over
      classes, not the mean, so that the gradient of a logit keeps softmax's scale).
    mask: bool or 0/1 [batch]; images where it is False cost 0. None = all count.

  Returns:
    float32 [batch], in nats. For a mean, divide the sum by the number of unmasked images, not by the batch.

  Raises:
    ValueError: unknown `kind`, or shapes that do not fit.
  """
  if kind not in ("softmax", "sigmoid"):
    raise ValueError(f"kind = {kind!r}: expected 'softmax' or 'sigmoid'.")
  logits = _check_logits(logits)
  num_classes = logits.shape[-1]
  targets = target_distribution(labels, num_classes, label_smoothing=label_smoothing, mix_labels=mix_labels, ratio=ratio)
  if targets.shape != logits.shape:
    raise ValueError(f"logits {logits.shape} need labels of the same batch: got labels {jnp.shape(labels)}.")
  if mask is not None:
    mask = _check_mask(mask, logits)
    # Mask inputs as well as output: a NaN in a padded row would otherwise reach the gradients as 0 · NaN.
    logits = jnp.where(mask[:, None], logits, 0.0)
    targets = jnp.where(mask[:, None], targets, 0.0)
  if kind == "softmax":
    losses = optax.softmax_cross_entropy(logits, targets)
  else:
    losses = optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)
  return losses if mask is None else jnp.where(mask, losses, 0.0)


def topk_correct(
  logits: jax.Array, labels: jax.Array, k: Sequence[int] = (1, 5), mask: jax.Array | None = None
) -> dict[str, jax.Array]:
  """Counts the images whose label is among the k largest logits.

  A label's rank is 1 + the number of other classes whose logit is at least as large, so that ties count against it: a
  constant row, as a dead network gives, is wrong unless k reaches all classes, and a row with a NaN is always wrong. An
  argsort (as in the published code) gives ties and NaNs to the classes with the largest indices. Without either, both
  agree. A k above the number of classes means all classes.

  Args:
    logits: float [batch, num_classes].
    labels: int [batch].
    k: the k's to count, each >= 1.
    mask: bool or 0/1 [batch]; images where it is False do not count. None = all count.

  Returns:
    {"top1": int32 [], "top5": int32 [], ..., "count": int32 []}: sums of correct images, and the number counted.

  Raises:
    ValueError: a k below 1, or shapes or label types that do not fit.
  """
  if not k or any(operator.index(rank) < 1 for rank in k):
    raise ValueError(f"k = {tuple(k)!r}: expected whole numbers >= 1.")
  logits = _check_logits(logits)
  labels = jnp.asarray(labels)
  if labels.shape != logits.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be int {logits.shape[:1]}, one per image: got {labels.dtype} {labels.shape}.")
  counted = jnp.ones(labels.shape, bool) if mask is None else _check_mask(mask, logits)
  num_classes = logits.shape[-1]
  valid = (labels >= 0) & (labels < num_classes) & ~jnp.isnan(logits).any(axis=-1)
  own = jnp.take_along_axis(logits, jnp.clip(labels, 0, num_classes - 1)[:, None], axis=-1)
  rank = (logits >= own).sum(axis=-1)  # The label itself counts: rank >= 1.
  sums = {f"top{limit}": (valid & counted & (rank <= limit)).sum(dtype=jnp.int32) for limit in k}
  return {**sums, "count": counted.sum(dtype=jnp.int32)}


def metric_sums(logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array | None = None) -> dict[str, jax.Array]:
  """Loss, top-1 and top-5 of a batch as sums, with the count to divide by.

  Sums of several batches add up leaf by leaf (`jax.tree.map(operator.add, a, b)`); `summarize` divides.

  Args:
    logits: float [batch, num_classes].
    labels: int [batch]; where labels are mixed, `gradients.heavier_label`.
    losses: float [batch], as `cross_entropy` returns them.
    mask: bool or 0/1 [batch]; images where it is False do not count. None = all count.

  Returns:
    {"loss_sum": float32 [], "top1": int32 [], "top5": int32 [], "count": int32 []}.
  """
  losses = jnp.asarray(losses, jnp.float32)
  if losses.shape != jnp.shape(logits)[:1]:
    raise ValueError(f"losses must be one per image {jnp.shape(logits)[:1]}: got {losses.shape}.")
  if mask is not None:
    losses = jnp.where(_check_mask(mask, logits), losses, 0.0)
  return {"loss_sum": losses.sum(), **topk_correct(logits, labels, mask=mask)}


def summarize(sums: Mapping[str, jax.Array | float]) -> dict[str, float | int]:
  """Divides sums by their count, once, on the host.

  Args:
    sums: sums of `metric_sums` or `topk_correct`, added over batches.

  Returns:
    {"loss": mean in nats, "top1": fraction, "top5": fraction, "count": images}; "_sum" is cut off the names.

  Raises:
    ValueError: there is no "count", or it is 0.
  """
  if "count" not in sums:
    raise ValueError(f"sums need a 'count' to divide by: got {sorted(sums)}.")
  count = int(sums["count"])
  if count == 0:
    raise ValueError("No image was counted (count = 0), so there is no mean; check the split and the mask.")
  means = {name.removesuffix("_sum"): float(value) / count for name, value in sums.items() if name != "count"}
  return {**means, "count": count}


def _check_logits(logits: jax.Array) -> jax.Array:
  logits = jnp.asarray(logits)
  if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(f"logits must be float [batch, num_classes]: got {logits.dtype} {logits.shape}.")
  return logits.astype(jnp.float32)


def _check_mask(mask: jax.Array, logits: jax.Array) -> jax.Array:
  mask = jnp.asarray(mask)
  if mask.shape != logits.shape[:1]:
    raise ValueError(f"mask must be bool {logits.shape[:1]}, one per image: got {mask.dtype} {mask.shape}.")
  return mask.astype(bool)


def _one_hot(labels: jax.Array, num_classes: int, name: str) -> jax.Array:
  labels = jnp.asarray(labels)
  if jnp.issubdtype(labels.dtype, jnp.integer) and labels.ndim == 1:
    valid = (labels >= 0) & (labels < num_classes)
    return jnp.where(valid[:, None], jax.nn.one_hot(labels, num_classes, dtype=jnp.float32), jnp.nan)
  if jnp.issubdtype(labels.dtype, jnp.floating) and labels.ndim == 2 and labels.shape[-1] == num_classes:
    return labels.astype(jnp.float32)
  raise ValueError(f"{name} must be int [batch] or float [batch, {num_classes}]: got {labels.dtype} {labels.shape}.")
