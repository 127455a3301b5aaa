"""Parameter groups: which parameters decay, which AGC clips, which are frozen; every parameter is in exactly one."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nfnets.agc import named_leaves
from nfnets.config import OptimConfig
from nfnets.errors import UserError

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
  # Whether the parameters stay as they are.
  frozen: bool = False

  def matches(self, path: str) -> bool:
    """Whether the parameter at this path belongs to the group."""
    matches_any = lambda patterns: any(re.search(pattern, path) for pattern in patterns)
    return matches_any(self.patterns) and not matches_any(self.but_not)


def default_groups(params: Any, config: OptimConfig) -> tuple[ParameterGroup, ...]:
  """The groups of the published recipe: kernels decay, gains and biases do not, and AGC clips all but the classifier.

  Left unclipped are the parameters that carry the model's mark (`agc=False` in the metadata of an `nnx.Param`) and
  those in whose path a pattern of `config.agc_exclude` is found. Those in whose path a pattern of `config.frozen` is found are
  a group of their own. Groups without parameters are left out.

  Args:
    params: tree of arrays or of `jax.ShapeDtypeStruct`: an `nnx.State`, or nested dicts.
    config: `agc_exclude` and `frozen` are read.

  Raises:
    UserError: a pattern of `config.agc_exclude` or `config.frozen` is found in no path, or all parameters are frozen.
  """
  config.validate()
  found = leaves(params)
  asked = [("agc_exclude", pattern) for pattern in config.agc_exclude] + [("frozen", pattern) for pattern in config.frozen]
  for field, pattern in asked:
    if not any(re.search(pattern, path) for path, _, _ in found):
      raise UserError(
        f"OptimConfig.{field}: pattern {pattern!r} is found in none of the {len(found)} parameter paths, such as "
        f"{listing([path for path, _, _ in found])}."
      )
  frozen = {path for path, _, _ in found if is_frozen(config, path)}
  if frozen and len(frozen) == len(found):
    raise UserError(f"OptimConfig.frozen = {config.frozen!r} leaves no parameter to train; freeze fewer.")
  unclipped = [path for path, marked, _ in found if marked or any(re.search(pattern, path) for pattern in config.agc_exclude)]
  groups = [ParameterGroup(name="frozen", patterns=config.frozen, decay=False, clip=False, frozen=True)]
  for name, pattern, decay in (("kernels", KERNELS, True), ("gains and biases", GAINS_AND_BIASES, False)):
    exceptions = tuple(f"^{re.escape(path)}$" for path in unclipped if re.search(pattern, path) and path not in frozen)
    but_not = (*exceptions, *config.frozen)
    groups.append(ParameterGroup(name=name, patterns=(pattern,), but_not=but_not, decay=decay, clip=True))
    groups.append(ParameterGroup(name=f"{name}, unclipped", patterns=exceptions, decay=decay, clip=False))
  return tuple(group for group in groups if any(group.matches(path) for path, _, _ in found))


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
  found = leaves(params)
  names = [group.name for group in groups]
  if len(set(names)) < len(names):
    raise UserError(f"Parameter groups: expected a name of its own for each, got {names}.")
  listed = "; ".join(f"{group.name!r} has patterns {listing(map(repr, group.patterns))}" for group in groups)
  for group in groups:
    for pattern in group.patterns + group.but_not:
      if not any(re.search(pattern, path) for path, _, _ in found):
        raise UserError(f"Pattern {pattern!r} of parameter group {group.name!r} is found in no parameter's path.")

  matching = {path: [group for group in groups if group.matches(path)] for path, _, _ in found}
  orphans = [path for path, owners in matching.items() if not owners]
  if orphans:
    raise UserError(f"In no parameter group: {listing(orphans)}. Groups: {listed}. Widen a pattern or pass `groups`.")
  shared = [f"{path} ({', '.join(group.name for group in owners)})" for path, owners in matching.items() if len(owners) > 1]
  if shared:
    raise UserError(f"In several parameter groups: {listing(shared)}. Groups: {listed}. Use `but_not` to part them.")
  clipped = [path for path, marked, _ in found if marked and matching[path][0].clip]
  if clipped:
    raise UserError(
      f"Marked agc=False by the model, but in a group that clips: {listing(clipped)}. Groups: {listed}. Give them a group with "
      "clip=False."
    )
  return {path: owners[0] for path, owners in matching.items()}


def is_frozen(config: OptimConfig, path: str) -> bool:
  """Whether a pattern of `config.frozen` is found in a parameter's path."""
  return any(re.search(pattern, path) for pattern in config.frozen)


def zero_frozen(config: OptimConfig, grads: Any) -> Any:
  """The gradients, with zeros for frozen parameters: XLA then leaves out what would compute them."""
  if not config.frozen:
    return grads
  mask = by_path(grads, lambda path: is_frozen(config, path))
  return jax.tree.map(lambda grad, frozen: jnp.zeros_like(grad) if frozen else grad, grads, mask)


def by_path(tree: Any, value: Callable[[str], Any]) -> Any:
  """The tree with `value(path)` in the place of every array; it may be one that another transformation has masked."""
  return jax.tree.unflatten(jax.tree.structure(tree), [value(path) for path, _, _ in leaves(tree)])


def clips(config: OptimConfig) -> bool:
  """Whether AGC acts at all."""
  return config.clipping is not None and config.clipping < math.inf


def listing(names: Iterable[str], limit: int = 8) -> str:
  """The names, separated by commas; of those beyond `limit`, only how many they are."""
  names = list(names)
  remainder = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + remainder


def leaves(tree: Any) -> list[tuple[str, bool, int]]:
  """Every array of the tree, in its order: (path, whether the model marks it agc=False, number of elements).

  None and what `optax.masked` hides are left out.
  """
  return [
    (path, metadata.get("agc") is False, math.prod(jnp.shape(leaf)))
    for path, leaf, metadata in named_leaves(tree)
    if jax.tree.leaves(leaf)
  ]
