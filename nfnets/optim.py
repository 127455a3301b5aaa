"""Parameter groups, learning-rate schedule, optimizer and parameter averaging, all from one `OptimConfig`.

  ParameterGroup, default_groups   which parameters decay, and which AGC clips
  parameter_groups                 assigns every parameter to one group; describe_groups prints them as a table
  peak_lr, make_schedule           compute the learning rate
  make_optimizer                   chains AGC, weight decay, momentum (or Adam, or LARS) and the learning rate
  ema_update                       updates the parameters' exponential moving average (EMA)

A training step is

  updates, opt_state = optimizer.update(grads, opt_state, params)    # optimizer = make_optimizer(config, params, ...)
  params = optax.apply_updates(params, updates)
  ema = ema_update(ema, params, step, config.ema_decay)              # step = 0 at the first update

and equals the published one (Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition Without
Normalization", 2102.06171): AGC, then weight decay into the gradient, then Nesterov momentum, then the learning rate, then the
average.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nfnets.agc import agc, named_leaves
from nfnets.config import OptimConfig
from nfnets.errors import UserError

# ---- parameter groups

# The leaf names of our models, of Flax and of Haiku. As published, gains, biases, scales and offsets do not decay.
KERNELS = r"(^|/)(kernel|embedding|w)$"
GAINS_AND_BIASES = r"(^|/)(\w*gain|bias\w*|scale|offset|b)$"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
  """Parameters that the optimizer treats alike.

  A parameter belongs to the group when a pattern is found in its path (`re.search` on names joined with "/", such as
  "blocks/3/conv1/kernel") and no pattern of `but_not` is.
  """

  name: str
  patterns: tuple[str, ...]
  but_not: tuple[str, ...] = ()
  # Whether weight decay (and the trust ratio of LARS) applies.
  decay: bool
  # Whether AGC applies.
  clip: bool

  def matches(self, path: str) -> bool:
    """Whether the parameter at this path belongs to the group."""
    matches_any = lambda patterns: any(re.search(pattern, path) for pattern in patterns)
    return matches_any(self.patterns) and not matches_any(self.but_not)


def default_groups(params: Any, config: OptimConfig) -> tuple[ParameterGroup, ...]:
  """The groups of the published recipe: kernels decay, gains and biases do not, and AGC clips all but the classifier.

  Left unclipped are the parameters that carry the model's mark (`agc=False` in the metadata of an `nnx.Param`) and
  those in whose path a pattern of `config.agc_exclude` is found. Groups without parameters are left out.

  Args:
    params: tree of arrays or of `jax.ShapeDtypeStruct`: an `nnx.State`, or nested dicts.
    config: `agc_exclude` is read.

  Raises:
    UserError: a pattern of `config.agc_exclude` is found in no path.
  """
  config.validate()
  leaves = _leaves(params)
  for pattern in config.agc_exclude:
    if not any(re.search(pattern, path) for path, _, _ in leaves):
      raise UserError(
        f"OptimConfig.agc_exclude: pattern {pattern!r} is found in none of the {len(leaves)} parameter paths, such as "
        f"{_listing([path for path, _, _ in leaves])}."
      )
  unclipped = [path for path, marked, _ in leaves if marked or any(re.search(pattern, path) for pattern in config.agc_exclude)]
  groups = []
  for name, pattern, decay in (("kernels", KERNELS, True), ("gains and biases", GAINS_AND_BIASES, False)):
    exceptions = tuple(f"^{re.escape(path)}$" for path in unclipped if re.search(pattern, path))
    groups.append(ParameterGroup(name=name, patterns=(pattern,), but_not=exceptions, decay=decay, clip=True))
    groups.append(ParameterGroup(name=f"{name}, unclipped", patterns=exceptions, decay=decay, clip=False))
  return tuple(group for group in groups if any(group.matches(path) for path, _, _ in leaves))


def parameter_groups(params: Any, groups: Sequence[ParameterGroup]) -> dict[str, ParameterGroup]:
  """Assigns every parameter to its group.

  Args:
    params: tree of arrays or of `jax.ShapeDtypeStruct`.
    groups: the groups; see `default_groups`.

  Returns:
    {path: group} for every leaf, in the tree's order.

  Raises:
    UserError: a parameter is in no group or in several, a pattern is found in no path, two groups share a name, or a
      group clips a parameter that its model marks as not to be clipped.
  """
  leaves = _leaves(params)
  names = [group.name for group in groups]
  if len(set(names)) < len(names):
    raise UserError(f"Parameter groups: expected a name of its own for each, got {names}.")
  listed = "; ".join(f"{group.name!r} has patterns {_listing(map(repr, group.patterns))}" for group in groups)
  for group in groups:
    for pattern in group.patterns + group.but_not:
      if not any(re.search(pattern, path) for path, _, _ in leaves):
        raise UserError(f"Pattern {pattern!r} of parameter group {group.name!r} is found in no parameter's path.")

  matching = {path: [group for group in groups if group.matches(path)] for path, _, _ in leaves}
  orphans = [path for path, owners in matching.items() if not owners]
  if orphans:
    raise UserError(f"In no parameter group: {_listing(orphans)}. Groups: {listed}. Widen a pattern or pass `groups`.")
  shared = [f"{path} ({', '.join(group.name for group in owners)})" for path, owners in matching.items() if len(owners) > 1]
  if shared:
    raise UserError(f"In several parameter groups: {_listing(shared)}. Groups: {listed}. Use `but_not` to part them.")
  clipped = [path for path, marked, _ in leaves if marked and matching[path][0].clip]
  if clipped:
    raise UserError(
      f"Marked agc=False by the model, but in a group that clips: {_listing(clipped)}. Groups: {listed}. Give them a group with "
      "clip=False."
    )
  return {path: owners[0] for path, owners in matching.items()}


def describe_groups(params: Any, config: OptimConfig, groups: Sequence[ParameterGroup] | None = None) -> str:
  """A table of the parameter groups for the start of a run: patterns, tensors, parameters, weight decay, AGC clipping.

  Arguments and errors are those of `make_optimizer`.
  """
  groups = default_groups(params, config) if groups is None else groups
  owners = parameter_groups(params, groups)
  sizes = {path: size for path, _, size in _leaves(params)}
  rows = [("group", "patterns", "tensors", "parameters", "weight decay", "AGC clipping")]
  for group in groups:
    paths = [path for path, owner in owners.items() if owner == group]
    rows.append(
      (
        group.name,
        _listing(group.patterns, limit=2) + (f" but not {_listing(group.but_not, limit=2)}" if group.but_not else ""),
        f"{len(paths):,}",
        f"{sum(sizes[path] for path in paths):,}",
        f"{config.weight_decay:g}" if group.decay else "0",
        f"{config.clipping:g}" if group.clip and _clips(config) else "off",
      )
    )
  rows.append(("all", "", f"{len(sizes):,}", f"{sum(sizes.values()):,}", "", ""))
  widths = [max(len(row[column]) for row in rows) for column in range(6)]
  align = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust)
  return "\n".join(
    "  ".join(fit(cell, width) for fit, cell, width in zip(align, row, widths, strict=True)).rstrip() for row in rows
  )


# ---- learning rate


def peak_lr(config: OptimConfig, batch: int) -> float:
  """The learning rate at the end of the warm-up: base_lr · batch / 256 (Goyal et al. 2017), or base_lr if not scaled.

  Args:
    config: `base_lr` and `scale_lr` are read.
    batch: images a step, over all devices.

  Raises:
    UserError: batch < 1.
  """
  if batch < 1:
    raise UserError(f"batch = {batch!r}: expected the number of images a step, at least 1.")
  return config.base_lr * batch / 256 if config.scale_lr else config.base_lr


def make_schedule(config: OptimConfig, *, batch: int, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
  """Linear warm-up from 0 to the peak, then half a cosine down to `end_lr` (or the peak to the end, for "constant").

  Step 0 has learning rate 0 when there is a warm-up, as in the published runs; the peak falls on step
  warmup_epochs · steps_per_epoch, which need not be whole. From `total_steps` on the value stays at `end_lr`.

  Args:
    config: `base_lr`, `scale_lr`, `end_lr`, `warmup_epochs` and `schedule` are read.
    batch: images a step, over all devices.
    steps_per_epoch: images of the training set / batch; fractions are kept.
    total_steps: length of the training, in steps; exact up to 2**24.

  Returns:
    schedule: step (int or int []) → learning rate, float32 [].

  Raises:
    UserError: a number is out of range, the warm-up leaves no step after it, or the end is above the peak.
  """
  config.validate()
  peak, end = peak_lr(config, batch), config.end_lr
  if not 0 < steps_per_epoch < math.inf:
    raise UserError(f"steps_per_epoch = {steps_per_epoch!r}: expected a finite number > 0.")
  if total_steps < 1:
    raise UserError(f"total_steps = {total_steps!r}: expected at least 1.")
  warmup = config.warmup_epochs * steps_per_epoch
  if warmup >= total_steps:
    raise UserError(
      f"The warm-up of {config.warmup_epochs:g} epochs ({warmup:g} steps) does not end within the training of "
      f"{total_steps} steps. Lower OptimConfig.warmup_epochs or train for longer."
    )
  if end > peak:
    raise UserError(f"OptimConfig.end_lr = {end:g} is above the peak learning rate {peak:g}; lower it.")

  def schedule(step: Any) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    value = jnp.float32(peak)
    if config.schedule == "cosine":
      # sin² of the share that remains, not (1 + cos)/2 of the share that is done: the same curve, but exact to the last step.
      remaining = jnp.clip((total_steps - step) / (total_steps - warmup), 0.0, 1.0)
      value = end + (peak - end) * jnp.sin(0.5 * jnp.pi * remaining) ** 2
    if warmup > 0:
      value = jnp.where(step <= warmup, peak * (step / warmup), value)
    return value

  return schedule


# ---- optimizer


def make_optimizer(
  config: OptimConfig,
  params: Any,
  *,
  batch: int,
  steps_per_epoch: float,
  total_steps: int,
  groups: Sequence[ParameterGroup] | None = None,
) -> optax.GradientTransformation:
  """The optimizer as a named optax chain.

  Order of the links, for gradient g, parameter w, weight decay d and learning rate r:
    sgd:   agc → decay (g + d·w) → momentum (m = μ·m + g; Nesterov g + μ·m) → learning_rate (−r·g)
    lars:  agc → decay → trust (g · η‖w‖/‖g‖) → learning_rate → momentum. You et al. 2017 (1708.03888): the rate goes into the
           buffer; as in optax, the ratio divides by ‖g + d·w‖, where the paper has ‖g‖ + d·‖w‖
    adamw: agc → adam → decay → learning_rate. Loshchilov and Hutter 2019: decay r·d·w, outside the moments
  Decay and trust ratio act on groups with `decay`, AGC on groups with `clip`. The state is a dict by link name: `state["agc"]`
  holds what AGC tracks.

  Args:
    config: see `OptimConfig`.
    params: tree of arrays or of `jax.ShapeDtypeStruct`, as `optimizer.init` will get: an `nnx.State` of `nnx.Param`, or nested
      dicts. Only names, shapes and marks are read. Moments are float32 for float32 parameters.
    batch, steps_per_epoch, total_steps: see `make_schedule`.
    groups: parameter groups; None = `default_groups(params, config)`.

  Raises:
    UserError: a field is invalid, the schedule does not fit (`make_schedule`), a parameter is not in exactly one group
      (`parameter_groups`); at init or update, the tree has a parameter that `params` lacks.
  """
  schedule = make_schedule(config, batch=batch, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
  owners = parameter_groups(params, default_groups(params, config) if groups is None else groups)
  mask = functools.partial(_decay_mask, owners)
  decay = optax.add_decayed_weights(config.weight_decay, mask=mask)
  learning_rate = optax.scale_by_learning_rate(schedule)
  links = _agc(config, owners)
  if config.name == "sgd":
    links |= {"decay": decay, **_momentum(config), "learning_rate": learning_rate}
  elif config.name == "lars":
    trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=config.trust_coefficient), mask)
    links |= {"decay": decay, "trust": trust, "learning_rate": learning_rate, **_momentum(config)}
  else:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32)
    links |= {"adam": adam, "decay": decay, "learning_rate": learning_rate}
  return optax.named_chain(*links.items())


def _agc(config: OptimConfig, owners: Mapping[str, ParameterGroup]) -> dict[str, optax.GradientTransformation]:
  """AGC's link of the chain, by name; {} where nothing is clipped."""
  if config.clipping is None or not _clips(config):
    return {}
  unclipped = {path for path, group in owners.items() if not group.clip}
  return {"agc": agc(config.clipping, config.agc_eps, exclude=lambda path, _: path in unclipped, track=config.agc_track)}


def _momentum(config: OptimConfig) -> dict[str, optax.GradientTransformation]:
  """The momentum's link of the chain, by name; {} without momentum."""
  if config.momentum == 0:
    return {}
  # Here nesterov=False means heavy-ball momentum. The published SGD takes False for Nesterov, and only None for heavy-ball.
  nesterov = config.name == "sgd" if config.nesterov is None else config.nesterov
  return {"momentum": optax.trace(config.momentum, nesterov=nesterov, accumulator_dtype=jnp.float32)}


def _decay_mask(owners: Mapping[str, ParameterGroup], tree: Any) -> Any:
  """Whether each parameter decays; told by path, so that trees fit that another transformation has masked or annotated."""
  paths = [path for path, _, _ in _leaves(tree)]
  if unknown := [path for path in paths if path not in owners]:
    raise UserError(f"This optimizer was made for other parameters; it does not know {_listing(unknown)}. Make it for these.")
  return jax.tree.unflatten(jax.tree.structure(tree), [owners[path].decay for path in paths])


# ---- average


def ema_update(ema: Any, params: Any, step: jax.Array | int, decay: float) -> Any:
  """One step of the parameters' exponential moving average, with the decay warmed up as min(decay, (1 + t)/(10 + t)).

  Args:
    ema: the average so far, float32; the initial parameters before the first step.
    params: the parameters after this step's update, of the same structure.
    step: t, the number of updates before this one: 0 at the first, so that its decay is 0.1. (As the published code
      counts; TensorFlow 1's rule.)
    decay: the decay in the long run, in [0, 1), as a Python number.

  Returns:
    The new average, float32. Jittable.
  """
  # The weight of the new value comes from 1 - decay in double precision: float32(0.99999) leaves 1.0014e-5, not 1e-5.
  weight = jnp.maximum(1.0 - decay, 9.0 / (10.0 + jnp.asarray(step, jnp.float32)))

  def blend(old: jax.Array, new: jax.Array) -> jax.Array:
    old = jnp.asarray(old, jnp.float32)
    return old + weight * (jnp.asarray(new, jnp.float32) - old)

  return jax.tree.map(blend, ema, params)


def _clips(config: OptimConfig) -> bool:
  """Whether AGC acts at all."""
  return config.clipping is not None and config.clipping < math.inf


def _listing(names: Iterable[str], limit: int = 8) -> str:
  """The names, separated by commas; of those beyond `limit`, only how many they are."""
  names = list(names)
  remainder = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + remainder


def _leaves(tree: Any) -> list[tuple[str, bool, int]]:
  """Every array of the tree, in its order: (path, whether the model marks it agc=False, number of elements).

  None and what `optax.masked` hides are left out.
  """
  return [
    (path, metadata.get("agc") is False, math.prod(jnp.shape(leaf)))
    for path, leaf, metadata in named_leaves(tree)
    if jax.tree.leaves(leaf)
  ]
