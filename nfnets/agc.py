"""Adaptive gradient clipping (AGC) for any optax chain. This file needs jax and optax alone, so that it can be copied.

Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition Without Normalization" (2102.06171), section 4.
The docstring of `agc` has the formula and the rules for units. `_unit_axes` decides the axes of a parameter's units (`_stack`
those that scan or vmap added), `explain` shows what was decided, and `_clip` does the arithmetic of one parameter.
"""

import collections
import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Clipping = float | jax.Array | Callable[[jax.Array], Any]
ClippingByPath = Clipping | Mapping[str, Clipping]
Exclude = str | Sequence[str] | Callable[[str, Any], bool] | None
UnitAxes = Mapping[str, Sequence[int] | str] | None
Shape = tuple[int, ...]
Scopes = dict[tuple[str, ...], dict[str, Shape]]  # {each prefix of the paths: {path: shape} of all that lies below it}
_is_absent = lambda node: node is None or isinstance(node, optax.MaskedNode)  # what stands for no array in a tree
_VECTORS = frozenset({"bias", "b", "gain", "scale", "offset", "beta", "gamma"})
_ROWS = re.compile(r"(embed|embeddings?|token|^cls)$")
_HEADS = re.compile(r"^(query|key|value|[qkv])(_proj)?$")
_HAIKU_TRANSPOSE = re.compile(r"conv\d_?d_transpose(_\d+)?$")


class Named(NamedTuple):
  """A leaf of a tree with its "/"-joined path; `metadata` is that of the NNX Variable around it, and empty without one."""

  path: str
  leaf: Any
  metadata: Mapping[str, Any]


class Entry(NamedTuple):
  """What AGC does to one parameter, and which rule says so."""

  path: str
  shape: Shape | None  # None where the tree has no array: None or optax.MaskedNode
  unit_axes: Shape  # the axes that stay when norms are taken
  units: int
  clipping: Clipping | None  # None where the gradient passes unchanged
  why: str


class AGCState(NamedTuple):
  """State of `agc`. A schedule needs the count, `track` all other fields, of the latest step; what nobody needs is None."""

  count: jax.Array | None = None  # int32 []: steps taken
  paths: dict[str, None] | None = None  # keys: the P clipped parameters; the arrays below follow their sorted order
  clip_fraction: jax.Array | None = None  # float32 [P]: clipped units / units
  max_ratio: jax.Array | None = None  # float32 [P]: largest ‖g‖ / max(‖w‖, eps) before clipping, over finite units
  nonfinite_units: jax.Array | None = None  # int32 [P]: units whose gradient's norm is NaN or infinite


def agc(
  clipping: ClippingByPath = 0.01, eps: float = 1e-3, *, exclude: Exclude = None, unit_axes: UnitAxes = None, track: bool = False
) -> optax.GradientTransformation:
  """Scales the gradient of each unit down where it is large beside the unit's weights; all else keeps its bits.

  For each unit i (an output channel, a row of an embedding, a whole bias), with λ = `clipping` and ε = `eps`

    g_i ← g_i · λ·max(‖w_i‖, ε) / ‖g_i‖    where    ‖g_i‖ > λ·max(‖w_i‖, ε)

  Put it first in the chain, `optax.chain(agc(0.01, exclude="fc/kernel"), optax.sgd(0.1, momentum=0.9))`, before weight decay and
  momentum, on the whole tree: a `multi_transform` that hides a kernel's bias takes away what the rule "bias" below needs.
  The classifier's weight stays unclipped (section 4.1). Our models mark it, `nnx.Param(value, agc=False)`, which is honoured;
  other trees need a pattern: `exclude="fc/kernel"`, or `exclude=r"(head|classifier|fc)/(kernel|w)$"`.

  Unit axes are those that stay; the norm runs over all others. They follow from names and shapes, and the first rule wins:

    override  `unit_axes={pattern: axes}`.
    stacked   Leading axes that scan or vmap added stay, beside what a rule below says of the rest. A scope (the module, or the
              nearest around it that holds a bias, gain, scale...) is stacked n deep if the smallest such vector has n axes too
              many and all its parameters begin with the same n sizes: (L, H, W, I, O) beside (L, O).
    vector    Biases, gains, scales, and anything of rank <= 1: the whole is one unit.
    rows      Embeddings, positions and tokens, by leaf name: all axes but the last.
    bias      A bias has the shape of its kernel's units: beside (O,) the last axis of that size, which settles most transposed
              kernels (and by name Haiku's conv2_d_transpose/w, (H, W, O, I)); beside (H, K) those two.
    name      Kernels (D, H, K) of query, key, value, q_proj...: H and K.
    rank      The last axis: Dense (I, O); Conv (..., I, O), grouped and depthwise alike; "rank?" where that is a guess.

  Shapes cannot settle everything: (L, L, O) beside (L, O) is read as a stack unless named query, key or value, and a kernel with
  I = O as (I, O) even where it is transposed. Read the table of `explain`, and give `unit_axes` where it is wrong.

  Norms and products are float32 (float64 for float64), the result has the gradient's dtype. What is not finite stays visible: a
  unit with NaN passes unchanged, one of infinite norm is multiplied by zero, which makes NaN of Inf. So a unit whose squares
  overflow, from a norm of 1.8e19 on in float32, is zero for a step. None, `optax.MaskedNode`, integer and float0 leaves pass.
  Under `shard_map`, hand over whole parameters; to `optax.inject_hyperparams`, name a callable `exclude` as static.

  Args:
    clipping: λ > 0; a schedule (int32 step, from 0 → λ); or {regex: λ or schedule}, of which the first found in a path decides.
    eps: floor > 0 of the parameter's norm, so that parameters initialised to zero can move.
    exclude: what passes beside parameters marked `agc=False`: regexes searched in "/"-joined paths, or f(path, leaf) → bool.
    unit_axes: {regex: axes that stay, negative ones count from the end}; () or "all" makes the tensor one unit.
    track: keeps the clip fraction, the largest ratio and the non-finite units of each parameter, for `agc_metrics`.

  Raises:
    ValueError: numbers, regexes, axes, patterns or trees do not fit, a parameter has no clipping, or params=None at update.
    TypeError: a complex leaf is not excluded.
  """
  _check_number("eps", eps)
  decide = functools.partial(explain_entries, clipping=clipping, exclude=exclude, unit_axes=unit_axes, params_alone=False)
  decide({})  # a tree without leaves only checks the arguments
  scheduled = any(map(callable, clipping.values())) if isinstance(clipping, Mapping) else callable(clipping)

  def init(params: Any) -> Any:  # an AGCState; optax's type of a state does not allow for None in it
    entries = decide(params)
    return AGCState(jnp.zeros([], jnp.int32) if scheduled else None, *(_tracked(entries, {}) if track else ()))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    if params is None:
      raise ValueError("agc compares gradients with parameters: call update(grads, state, params); params is None.")
    entries = decide(params)
    clipped, statistics = _clip_tree(updates, params, entries, state.count, eps, track)
    count: Any = None if state.count is None else optax.safe_increment(state.count)
    return clipped, AGCState(count, *(_tracked(entries, statistics) if track else ()))

  return optax.GradientTransformation(init, update)


def agc_metrics(opt_state: Any) -> dict[str, dict[str, jax.Array]]:
  """Reads {path: {"clip_fraction", "max_ratio", "nonfinite_units"}}, scalars of the latest step, from `agc` with track=True.

  Outside jit, hand over `jax.device_get(opt_state)`: it is faster. Raises ValueError if nothing, or one path twice, is tracked.
  """
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AGCState))
  states: list[Any] = [node for node in nodes if isinstance(node, AGCState) and node.paths is not None]
  if not states:
    raise ValueError("agc_metrics: nothing is tracked in this optimizer's state; make it with agc(..., track=True).")
  metrics = {}
  for state in states:
    if repeated := metrics.keys() & state.paths.keys():
      raise ValueError(f"agc_metrics: two agc's with track=True clip {min(repeated)!r}; read their states one by one.")
    for i, path in enumerate(sorted(state.paths)):
      metrics[path] = {field: getattr(state, field)[i] for field in AGCState._fields[2:]}
  return metrics


def explain(params: Any, clipping: ClippingByPath = 0.01, *, exclude: Exclude = None, unit_axes: UnitAxes = None) -> str:
  """A table of what `agc` with these arguments does to each parameter, and why; of NNX Variables, `nnx.Param` alone counts."""
  entries = explain_entries(params, clipping, exclude=exclude, unit_axes=unit_axes)
  rows: list[tuple[str, ...]] = [("parameter", "shape", "unit axes", "units", "clipping", "why")]
  for path, shape, axes, units, strength, why in entries:
    cells = ("-",) * 3 if strength is None else (axes or "all", units, "schedule" if callable(strength) else strength)
    rows.append((path or "(root)", "-" if shape is None else str(shape), *map(str, cells), why))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  rows.insert(1, tuple("-" * width for width in widths))
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  units = [entry.units for entry in entries if entry.clipping is not None]
  lines.append(f"{len(units)} clipped in {sum(units)} units, {len(entries) - len(units)} not clipped.")
  if any(entry.why == "rank?" for entry in entries):
    lines.append("rank?: neither bias nor name tells a convolution from a stack; give unit_axes if it is a stack.")
  return "\n".join(lines)


def explain_entries(
  params: Any, clipping: ClippingByPath = 0.01, *, exclude: Exclude = None, unit_axes: UnitAxes = None, params_alone: bool = True
) -> list[Entry]:
  """The rows of `explain`, in tree order; with params_alone=False, as `agc` decides, they are of NNX Variables of every kind."""
  by_path = isinstance(clipping, Mapping)
  strengths = _rules("clipping", clipping if by_path else {"": clipping})
  for pattern, strength in strengths:
    if not callable(strength):
      _check_number(f"clipping[{pattern.pattern!r}]" if by_path else "clipping", strength)
  overrides = _rules("unit_axes", {} if unit_axes is None else unit_axes)
  exclusions = _rules("exclude", () if exclude is None or callable(exclude) else exclude)
  named = named_leaves(params, params_alone=params_alone)
  paths = [path for path, _, _ in named]
  if len(set(paths)) < len(paths):
    raise ValueError(f"Two leaves share a path: {next(path for path in paths if paths.count(path) > 1)!r}.")
  for argument, rules in ("clipping", strengths), ("exclude", exclusions), ("unit_axes", overrides):
    for pattern, _ in rules if named else ():
      if not any(map(pattern.search, paths)):
        near = difflib.get_close_matches(pattern.pattern, paths, n=3, cutoff=0.3) or paths[:3]
        raise ValueError(f"{argument}: pattern {pattern.pattern!r} matches no parameter. Near it: {', '.join(near)}.")
  scopes: Scopes = collections.defaultdict(dict)
  for path, leaf, _ in named:
    parts = tuple(path.split("/"))
    for depth in range(len(parts) if not _is_absent(leaf) else 0):
      scopes[parts[:depth]][path] = jnp.shape(leaf)
  entries = []
  for path, leaf, metadata in named:
    shape = None if _is_absent(leaf) else jnp.shape(leaf)
    excluded = next((f"pattern {pattern.pattern!r}" for pattern, _ in exclusions if pattern.search(path)), None)
    if callable(exclude) and shape is not None and exclude(path, leaf):
      excluded = getattr(exclude, "__name__", "function")
    if metadata.get("agc") is False:
      excluded = "marked agc=False"
    if shape is None or excluded or not _is_float(path, leaf):
      why = "masked" if shape is None else f"excluded: {excluded}" if excluded else "not a float"
      entries.append(Entry(path, shape, (), 0, None, why))
      continue
    strength = next((strength for pattern, strength in strengths if pattern.search(path)), None)
    if strength is None:
      raise ValueError(f"clipping: no pattern matches {path!r}. Add one (a last '.*' takes the rest) or exclude it.")
    override = next((rule for rule in overrides if rule[0].search(path)), None)
    axes, why = _check_axes(path, shape, *override) if override else _unit_axes(path, shape, scopes)
    entries.append(Entry(path, shape, axes, math.prod(shape[axis] for axis in axes), strength, why))
  return entries


def named_leaves(tree: Any, *, params_alone: bool = False) -> list[Named]:
  """Every leaf, None and MaskedNode included, with its path, which leaves out the ".value" of NNX Variables and Linen boxes."""
  named = []
  for outer, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: _is_absent(x) or hasattr(x, "get_metadata")):
    kinds = {kind.__name__ for kind in type(node).__mro__}  # by name, since flax is not imported
    if params_alone and "Variable" in kinds and "Param" not in kinds:
      continue  # a running statistic, a random key...
    for inner, leaf in jax.tree_util.tree_leaves_with_path(node, is_leaf=_is_absent):
      path = outer + inner[1:]  # a Variable's own key is dropped; for any other leaf `inner` is empty
      path = path[:-1] if path[-1:] == (jax.tree_util.GetAttrKey("value"),) else path
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      named.append(Named(name, leaf, node.get_metadata() if hasattr(node, "get_metadata") else {}))
  return named


def unit_norm(x: jax.Array, unit_axes: Sequence[int]) -> jax.Array:
  """The L2 norm over all axes but `unit_axes` (each >= 0), in float32 (float64 for float64); the axes summed over get size 1."""
  x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  others = tuple(axis for axis in range(x.ndim) if axis not in unit_axes)
  return jnp.sqrt(jnp.sum(x * x, axis=others, keepdims=True))


def _clip_tree(updates: Any, params: Any, entries: Sequence[Entry], count: Any, eps: float, track: bool) -> tuple[Any, dict]:
  """The clipped gradients, as a tree like `updates`, and with track {path: statistics} of those that could be clipped."""
  grads, weights = ({path: leaf for path, leaf, _ in named_leaves(tree)} for tree in (updates, params))
  if unmatched := sorted(grads.keys() ^ weights.keys()):
    raise ValueError(f"Gradients ({len(grads)} leaves) and parameters ({len(weights)}) differ, as in {unmatched[:3]}.")
  schedules = {id(entry.clipping): entry.clipping for entry in entries if callable(entry.clipping)}  # each called once a step
  scheduled = {key: jnp.reshape(schedule(count), ()) for key, schedule in schedules.items()}
  by_path = {entry.path: entry for entry in entries}
  clipped, statistics = dict(grads), {}
  for path, grad in grads.items():
    entry = by_path[path]
    if entry.clipping is None or _is_absent(grad) or not _is_float(path, grad):
      continue
    if jnp.shape(grad) != entry.shape:
      raise ValueError(f"{path}: the gradient has shape {jnp.shape(grad)}, the parameter {entry.shape}.")
    strength = scheduled.get(id(entry.clipping), entry.clipping)
    clipped[path], *statistics[path] = _clip(grad, weights[path], strength, eps, unit_axes=entry.unit_axes, track=track)
  return jax.tree.unflatten(jax.tree.structure(updates, is_leaf=_is_absent), list(clipped.values())), statistics


@functools.partial(jax.jit, static_argnames=("unit_axes", "track"))  # so that parameters of one shape are traced once
def _clip(grad: Any, weight: Any, clipping: Any, eps: Any, *, unit_axes: Shape, track: bool) -> tuple[jax.Array, ...]:
  """The clipped gradient; with track also the fraction of units clipped, the largest ratio and the number of non-finite units."""
  grad_norm, weight_norm = unit_norm(grad, unit_axes), unit_norm(weight, unit_axes)
  # Where its square overflows, the weights' norm is at least the square root of the largest number.
  weight_norm = jnp.clip(weight_norm, eps, math.sqrt(jnp.finfo(weight_norm.dtype).max))
  finite, max_norm = jnp.isfinite(grad_norm), clipping * weight_norm
  trigger = grad_norm > max_norm
  # The floor 1e-6 is the published code's; it matters only where λ·eps is smaller.
  scaled = grad.astype(grad_norm.dtype) * (max_norm / jnp.maximum(grad_norm, 1e-6))
  clipped = jnp.where(trigger, scaled.astype(grad.dtype), grad)
  if not track:
    return (clipped,)
  ratio = jnp.max(grad_norm / weight_norm, initial=0.0, where=finite)
  return clipped, (trigger & finite).sum() / max(trigger.size, 1), ratio, (~finite).sum()


def _unit_axes(path: str, shape: Shape, scopes: Scopes) -> tuple[Shape, str]:
  """The axes that stay, and the name of the rule that says so (see `agc`)."""
  *scope, name = path.split("/")
  module = scope[-1] if scope else ""
  siblings = scopes[tuple(scope)]
  bias = next((siblings[key] for key in ("/".join((*scope, name)) for name in ("bias", "b")) if key in siblings), ())
  is_heads = bool(_HEADS.search(module))
  unstacked = is_heads and len(bias) > 1 and max(siblings.values(), key=len)[1:] == bias  # (D, H, K) beside (H, K)
  stack = 0 if unstacked else _stack(scope, scopes)
  rest, rank, out = shape[stack:], len(shape) - stack, tuple(size for size in bias[stack:] if size > 1)
  if name in _VECTORS or rank <= 1:
    axes, why = (), "vector"
  elif _ROWS.search(name):
    axes, why = range(rank - 1), "rows"
  elif name == "w" and _HAIKU_TRANSPOSE.search(module) and out in ((), rest[-2:-1]):
    axes, why = (rank - 2,), "name"
  elif len(out) == 1 and out[0] in rest:
    axes, why = (max(axis for axis in range(rank) if rest[axis] == out[0]),), "bias"
  elif len(out) > 1 and rest[-len(out) :] == out:
    axes, why = range(rank - len(out), rank), "bias"
  elif is_heads and rank == 3 and rest[0] > 1:
    axes, why = (1, 2), "name"
  else:
    axes, why = (rank - 1,), "rank" if rank in (2, 4) or stack else "rank?"
  return (*range(stack), *(stack + axis for axis in axes)), f"{why}, stacked {stack}" if stack else why


def _stack(scope: list[str], scopes: Scopes) -> int:
  """Number of leading axes that scan or vmap added, judged by the innermost scope that holds a vector."""
  for depth in range(len(scope), -1, -1):
    below = scopes[tuple(scope[:depth])]
    vectors = [shape for path, shape in below.items() if path.split("/")[-1] in _VECTORS]
    if vectors:
      shortest = min(vectors, key=len)
      stack = max(len(shortest) - 1, 0)
      # An axis of size 1 is padding, as in Haiku's scales (1, 1, 1, C), or a stack of one: units are the same without it.
      while stack and (shortest[stack - 1] == 1 or any(shape[:stack] != shortest[:stack] for shape in below.values())):
        stack -= 1
      return stack
  return 0


def _tracked(entries: Sequence[Entry], statistics: Mapping[str, Sequence[Any]]) -> tuple[Any, ...]:
  """The fields of AGCState after the count; a clipped parameter without statistics had no gradient, and gets zeros."""
  paths = sorted(entry.path for entry in entries if entry.clipping is not None)
  columns = ([statistics.get(path, (0.0, 0.0, 0))[i] for path in paths] for i in range(3))
  return dict.fromkeys(paths), *map(jnp.array, columns, (jnp.float32, jnp.float32, jnp.int32))


def _is_float(path: str, leaf: Any) -> bool:
  dtype = jnp.result_type(leaf)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    raise TypeError(f"{path}: agc takes real numbers, got {dtype}. Exclude it, or split it into its real and imaginary parts.")
  return jnp.issubdtype(dtype, jnp.floating)


def _rules(argument: str, rules: Any) -> list[tuple[re.Pattern, Any]]:
  rules = [rules] if isinstance(rules, str) else rules
  try:
    pairs = rules.items() if isinstance(rules, Mapping) else [(pattern, None) for pattern in rules]
    if any("['" in pattern for pattern, _ in pairs):
      raise re.error("paths are written head/kernel; ['head'] would match single letters")
    return [(re.compile(pattern), value) for pattern, value in pairs]
  except (re.error, TypeError) as error:
    raise ValueError(f"{argument}: expected regular expressions, got {rules!r} ({error}).") from error


def _check_number(argument: str, value: Any) -> None:
  try:
    scalar = isinstance(value, int | float) or getattr(value, "shape", None) == ()
    valid = scalar and not isinstance(value, bool) and 0 < float(value) < math.inf
  except jax.errors.ConcretizationTypeError:  # a traced scalar, such as inject_hyperparams hands over, has no value yet
    valid = True
  if not valid:
    raise ValueError(f"{argument} must be a positive finite number{' or a schedule' * (argument != 'eps')}, got {value!r}.")


def _check_axes(path: str, shape: Shape, pattern: re.Pattern, axes: Any) -> tuple[Shape, str]:
  rank, axes = len(shape), () if axes == "all" else axes
  valid = isinstance(axes, Sequence) and all(type(axis) is int and -rank <= axis < rank for axis in axes)
  if not valid or len({axis % rank for axis in axes}) < len(axes):
    raise ValueError(f"unit_axes {axes!r} for {path!r} {shape}: not distinct integers in [{-rank}, {rank}), nor 'all'.")
  return tuple(sorted(axis % rank for axis in axes)), f"unit_axes {pattern.pattern!r}"
