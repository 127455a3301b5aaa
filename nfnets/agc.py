"""Adaptive gradient clipping (AGC) for any optax chain; needs jax and optax alone.

Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition Without Normalization"
(arXiv:2102.06171), section 4. For each unit i (an output channel, a row of an embedding, a whole bias)

  g_i ← g_i · λ·max(‖w_i‖, ε) / ‖g_i‖    where    ‖g_i‖ > λ·max(‖w_i‖, ε)

The classifier's weight stays unclipped (section 4.1): our models mark it, `nnx.Param(value, agc=False)`, which is
honoured; other trees need a pattern: `exclude="fc/kernel"`, or `exclude=r"(head|classifier|fc)/(kernel|w)$"`.

  tx = optax.chain(agc(0.01, exclude="fc/kernel"), optax.sgd(0.1, momentum=0.9, nesterov=True))
  print(explain(params, 0.01, exclude="fc/kernel"))  # what is clipped, by how much, in which units, and why

Unit axes are those that stay; the norm runs over all others. They follow from names and shapes, the first rule wins:

  override  `unit_axes={pattern: axes}`.
  stacked   Leading axes that scan or vmap added stay, beside what a rule below says of the rest. A scope (the module,
            or the nearest around it that holds a bias, gain, scale...) is stacked n deep if the smallest such vector
            has n axes too many and all its parameters begin with the same n sizes: (L, H, W, I, O) beside (L, O).
  vector    Biases, gains, scales, and anything of rank <= 1: the whole is one unit.
  rows      Embeddings, positions and tokens, by leaf name: all axes but the last.
  bias      A bias has the shape of its kernel's units: beside (O,) the last axis of that size, which settles most
            transposed kernels (and by name Haiku's conv2_d_transpose/w, (H, W, O, I)); beside (H, K) those two.
  name      Kernels (D, H, K) of query, key, value, q_proj...: H and K.
  rank      The last axis: Dense (I, O); Conv (..., I, O), grouped and depthwise alike; "rank?" where that is a guess.

Shapes cannot settle everything: (L, L, O) beside (L, O) is read as a stack unless named query, key or value, and a
kernel with I = O as (I, O) though it be transposed. Read the table, and give `unit_axes` where it is wrong.
"""

import collections
import difflib
import functools
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Clipping = float | jax.Array | Callable[[jax.Array], Any]
Shape = tuple[int, ...]
Scopes = dict[tuple[str, ...], dict[str, Shape]]  # by each prefix of a path, the shapes below it by path

_VECTORS = frozenset({"bias", "b", "gain", "scale", "offset", "beta", "gamma"})
_ROWS = re.compile(r"(embed|embeddings?|token|^cls)$")
_HEADS = re.compile(r"^(query|key|value|[qkv])(_proj)?$")
_HAIKU_TRANSPOSE = re.compile(r"conv\d_?d_transpose(_\d+)?$")


class Named(NamedTuple):
  """A leaf of a tree and its name; `metadata` is that of the NNX Variable around it, else empty."""

  path: str
  leaf: Any
  metadata: Mapping[str, Any]


class Entry(NamedTuple):
  """What AGC does to one parameter. `clipping` None: its gradient passes; `shape` None: the leaf is None or masked."""

  path: str
  shape: Shape | None
  unit_axes: Shape
  units: int
  clipping: Clipping | None
  why: str


class AGCState(NamedTuple):
  """State of `agc`: a schedule needs the count, `track` the rest (of the latest step); what is not needed is None."""

  count: jax.Array | None = None  # int32 []: steps taken
  paths: dict[str, None] | None = None  # keys: the P clipped parameters, in whose sorted order the arrays are
  clip_fraction: jax.Array | None = None  # float32 [P]: clipped units / units
  max_ratio: jax.Array | None = None  # float32 [P]: largest ‖g‖ / max(‖w‖, eps) before clipping, over finite units
  nonfinite_units: jax.Array | None = None  # int32 [P]: units with NaN or Inf in the gradient


def agc(
  clipping: Clipping | Mapping[str, Clipping] = 0.01,
  eps: float = 1e-3,
  *,
  exclude: str | Sequence[str] | Callable[[str, Any], bool] | None = None,
  unit_axes: Mapping[str, Sequence[int] | str] | None = None,
  track: bool = False,
) -> optax.GradientTransformation:
  """Scales the gradient of each unit down to norm λ·max(‖w‖, eps) where it is larger; all else keeps its bits.

  Put it first in the chain, on the whole tree: before weight decay and momentum, not in a `multi_transform` that hides
  a kernel's bias (`explain` then says "rank" for "bias"). Norms and products are float32 (float64 for float64), the
  result has the gradient's dtype. A unit with NaN or Inf, or a norm beyond the dtype's range, passes unchanged, so that
  the training loop can see it; None, `optax.MaskedNode`, integer and float0 leaves pass. Under `shard_map`, hand over
  whole parameters. In `optax.inject_hyperparams`, a callable `exclude` belongs into static_args.

  Args:
    clipping: λ > 0; a schedule (int32 step, from 0 -> λ); or {regex: λ or schedule}, where the first pattern found in a
      path decides and every parameter that is not excluded needs one.
    eps: floor > 0 of the parameter's norm, so that parameters initialised to zero can move.
    exclude: what passes beside parameters marked `agc=False`: regexes searched in "/"-joined paths, or f(path, leaf).
    unit_axes: {regex: axes that stay, negative ones count from the end}; () or "all" makes the tensor one unit.
    track: keep clip fraction, largest ratio and non-finite units of each parameter, for `agc_metrics`.

  Raises:
    ValueError: at once, bad numbers and regexes; at init, patterns that match no parameter, parameters without
      clipping, bad axes; at update, params=None and trees that differ. TypeError: complex leaves not excluded.
  """
  _check_number("eps", eps)
  decide = functools.partial(explain_entries, clipping=clipping, exclude=exclude, unit_axes=unit_axes)
  decide({})  # checks the arguments
  scheduled = any(map(callable, clipping.values())) if isinstance(clipping, Mapping) else callable(clipping)

  def init(params: Any) -> AGCState:
    entries = decide(params)
    return AGCState(jnp.zeros([], jnp.int32) if scheduled else None, *(_tracked(entries, {}) if track else ()))

  def update(updates: Any, state: AGCState, params: Any = None) -> tuple[Any, AGCState]:
    if params is None:
      raise ValueError("agc compares gradients with parameters: call update(grads, state, params); params is None.")
    entries = {entry.path: entry for entry in decide(params)}
    grads, weights = ({path: leaf for path, leaf, _ in named_leaves(tree)} for tree in (updates, params))
    if odd := sorted(grads.keys() ^ weights.keys()):
      raise ValueError(f"Gradients ({len(grads)} leaves) and parameters ({len(weights)}) differ, as in {odd[:3]}.")
    # Each schedule is asked once a step, not once a parameter.
    schedules = {id(entry.clipping): entry.clipping for entry in entries.values() if callable(entry.clipping)}
    step: Any = state.count  # None only where no schedule asks for it
    now = {key: jnp.reshape(schedule(step), ()) for key, schedule in schedules.items()}
    clipped, rows = [], {}
    for path, grad in grads.items():
      entry = entries[path]
      if entry.clipping is None or _is_hole(grad) or not _is_float(path, grad):
        clipped.append(grad)
        continue
      if jnp.shape(grad) != entry.shape:
        raise ValueError(f"{path}: the gradient has shape {jnp.shape(grad)}, the parameter {entry.shape}.")
      strength = now.get(id(entry.clipping), entry.clipping)
      out, *rows[path] = _clip(grad, weights[path], strength, eps, unit_axes=entry.unit_axes, track=track)
      clipped.append(out)

    count: Any = None if state.count is None else optax.safe_increment(state.count)
    tree = jax.tree.unflatten(jax.tree.structure(updates, is_leaf=_is_hole), clipped)
    return tree, AGCState(count, *(_tracked(entries.values(), rows) if track else ()))

  return optax.GradientTransformation(init, update)  # pyrefly: ignore[bad-argument-type]: names of arguments


def agc_metrics(opt_state: Any) -> dict[str, dict[str, jax.Array]]:
  """{path: {"clip_fraction", "max_ratio", "nonfinite_units"}}, scalars, from every tracking `agc` within opt_state.

  Without a tracking `agc` the result is empty. Outside jit, `agc_metrics(jax.device_get(opt_state))` is the fast way.
  """
  metrics = {}
  for state in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AGCState)):
    if isinstance(state, AGCState) and state.paths is not None:
      if twice := metrics.keys() & state.paths.keys():
        raise ValueError(f"Two tracking agc's clip {min(twice)!r}: read their states one by one.")
      for i, path in enumerate(sorted(state.paths)):
        metrics[path] = {field: getattr(state, field)[i] for field in AGCState._fields[2:]}
  return metrics


def explain(params: Any, clipping: Any = 0.01, *, exclude: Any = None, unit_axes: Any = None) -> str:
  """A table of what `agc` with these arguments does to each parameter (array or ShapeDtypeStruct), and the rule."""
  entries = explain_entries(params, clipping, exclude=exclude, unit_axes=unit_axes)
  rows: list[tuple[str, ...]] = [("parameter", "shape", "unit axes", "units", "clipping", "why")]
  for path, shape, axes, units, value, why in entries:
    cells = ("-",) * 3 if value is None else (axes or "all", units, "schedule" if callable(value) else value)
    rows.append((path or "(root)", "-" if shape is None else str(shape), *map(str, cells), why))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  rows.insert(1, tuple("-" * width for width in widths))
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  on = [entry for entry in entries if entry.clipping is not None]
  lines.append(f"{len(on)} clipped in {sum(entry.units for entry in on)} units, {len(entries) - len(on)} not clipped.")
  if any(entry.why == "rank?" for entry in entries):
    lines.append("rank?: neither bias nor name tells a convolution from a stack; give unit_axes if it is a stack.")
  return "\n".join(lines)


def explain_entries(params: Any, clipping: Any = 0.01, *, exclude: Any = None, unit_axes: Any = None) -> list[Entry]:
  """The rows of `explain`, in tree order: static, from names and shapes. An empty tree only checks the arguments."""
  by_path = isinstance(clipping, Mapping)
  strengths = _rules("clipping", clipping if by_path else {"": clipping})
  for pattern, value in strengths:
    if not callable(value):
      _check_number(f"clipping[{pattern.pattern!r}]" if by_path else "clipping", value)
  overrides = _rules("unit_axes", {} if unit_axes is None else unit_axes)
  exclusions = _rules("exclude", () if exclude is None or callable(exclude) else exclude)
  named = named_leaves(params)
  paths = [path for path, _, _ in named]
  if len(set(paths)) < len(paths):
    raise ValueError(f"Two leaves share a path: {next(path for path in paths if paths.count(path) > 1)!r}.")
  for what, rules in ("clipping", strengths), ("exclude", exclusions), ("unit_axes", overrides):
    for pattern, _ in rules if named else ():
      if not any(map(pattern.search, paths)):
        near = difflib.get_close_matches(pattern.pattern, paths, n=3, cutoff=0.3) or paths[:3]
        raise ValueError(f"{what}: pattern {pattern.pattern!r} matches no parameter. Near it: {', '.join(near)}.")

  scopes: Scopes = collections.defaultdict(dict)
  for path, leaf, _ in named:
    parts = tuple(path.split("/"))
    for depth in range(len(parts) if not _is_hole(leaf) else 0):
      scopes[parts[:depth]][path] = jnp.shape(leaf)
  entries = []
  for path, leaf, metadata in named:
    shape = None if _is_hole(leaf) else jnp.shape(leaf)
    excluded = next((f"pattern {pattern.pattern!r}" for pattern, _ in exclusions if pattern.search(path)), None)
    if callable(exclude) and shape is not None and exclude(path, leaf):
      excluded = getattr(exclude, "__name__", "function")
    if metadata.get("agc") is False:
      excluded = "marked agc=False"
    if shape is None or excluded or not _is_float(path, leaf):
      why = "masked" if shape is None else f"excluded: {excluded}" if excluded else "not a float"
      entries.append(Entry(path, shape, (), 0, None, why))
      continue
    strength = [value for pattern, value in strengths if pattern.search(path)]
    if not strength:
      raise ValueError(f"clipping: no pattern matches {path!r}. Add one (a last '.*' takes the rest) or exclude it.")
    override = next((rule for rule in overrides if rule[0].search(path)), None)
    axes, why = _check_axes(path, shape, *override) if override else _unit_axes(path, shape, scopes)
    entries.append(Entry(path, shape, axes, math.prod(shape[axis] for axis in axes), strength[0], why))
  return entries


def named_leaves(tree: Any) -> list[Named]:
  """Leaves with "/"-joined paths (without the ".value" of NNX Variables and Linen boxes); None and MaskedNode count."""
  named = []
  for outer, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: _is_hole(x) or hasattr(x, "get_metadata")):
    for inner, leaf in jax.tree_util.tree_leaves_with_path(node, is_leaf=_is_hole):
      path = outer + inner[1:]  # a Variable's own key is dropped; for any other leaf `inner` is empty
      path = path[:-1] if path[-1:] == (jax.tree_util.GetAttrKey("value"),) else path
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      named.append(Named(name, leaf, node.get_metadata() if hasattr(node, "get_metadata") else {}))
  return named


def unit_norm(x: jax.Array, unit_axes: Sequence[int]) -> jax.Array:
  """L2 norm in float32 (float64 for float64) over all axes but `unit_axes` (>= 0); the axes summed over become 1."""
  x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  others = tuple(axis for axis in range(x.ndim) if axis not in unit_axes)
  norm = jnp.sqrt(jnp.sum(x * x, axis=others, keepdims=True))
  # Finite values above 1.8e19 have infinite squares in float32: a second sum in the same pass is scaled down for them.
  small = x * 2.0**-64
  return jnp.where(jnp.isinf(norm), jnp.sqrt(jnp.sum(small * small, axis=others, keepdims=True)) * 2.0**64, norm)


@functools.partial(jax.jit, static_argnames=("unit_axes", "track"))  # traced once for all parameters of a shape
def _clip(grad: Any, weight: Any, clipping: Any, eps: Any, *, unit_axes: Shape, track: bool) -> tuple[jax.Array, ...]:
  """The clipped gradient; with track also the fraction of units clipped, the largest ratio, the non-finite units."""
  grad_norm, weight_norm = unit_norm(grad, unit_axes), jnp.maximum(unit_norm(weight, unit_axes), eps)
  finite, max_norm = jnp.isfinite(grad_norm), clipping * weight_norm
  trigger = finite & (grad_norm > max_norm)
  # The floor 1e-6 is the published code's; it matters only where λ·eps is smaller.
  scaled = grad.astype(grad_norm.dtype) * (max_norm / jnp.maximum(grad_norm, 1e-6))
  clipped = jnp.where(trigger, scaled.astype(grad.dtype), grad)
  if not track:
    return (clipped,)
  ratio = jnp.max(grad_norm / weight_norm, initial=0.0, where=finite)
  return clipped, trigger.sum() / max(trigger.size, 1), ratio, (~finite).sum()


def _unit_axes(path: str, shape: Shape, scopes: Scopes) -> tuple[Shape, str]:
  """The axes that stay, and the rule that says so (see the module's docstring)."""
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
      first = min(vectors, key=len)
      stack = max(len(first) - 1, 0)
      # An axis of size 1 is padding, as in Haiku's scales (1, 1, 1, C), or a stack of one: the units are the same.
      while stack and (first[stack - 1] == 1 or any(shape[:stack] != first[:stack] for shape in below.values())):
        stack -= 1
      return stack
  return 0


def _tracked(entries: Iterable[Entry], rows: dict[str, tuple[Any, Any, Any]]) -> tuple[Any, ...]:
  """The fields of AGCState after the count; a parameter without a row had no gradient."""
  paths = sorted(entry.path for entry in entries if entry.clipping is not None)
  columns = ([rows.get(path, (0.0, 0.0, 0))[i] for path in paths] for i in range(3))
  return dict.fromkeys(paths), *map(jnp.array, columns, (jnp.float32, jnp.float32, jnp.int32))


def _is_hole(node: Any) -> bool:
  return node is None or isinstance(node, optax.MaskedNode)


def _is_float(path: str, leaf: Any) -> bool:
  dtype = jnp.result_type(leaf)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    raise TypeError(f"{path}: agc takes real numbers, got {dtype}. Exclude it, or split it into its parts.")
  return jnp.issubdtype(dtype, jnp.floating)


def _rules(what: str, rules: Any) -> list[tuple[re.Pattern, Any]]:
  rules = [rules] if isinstance(rules, str) else rules
  try:
    pairs = rules.items() if isinstance(rules, Mapping) else [(pattern, None) for pattern in rules]
    if any("['" in pattern for pattern, _ in pairs):
      raise re.error("paths are written head/kernel; ['head'] would match single letters")
    return [(re.compile(pattern), value) for pattern, value in pairs]
  except (re.error, TypeError) as error:
    raise ValueError(f"{what}: expected regular expressions, got {rules!r} ({error}).") from error


def _check_number(what: str, value: Any) -> None:
  try:
    good = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    good = good and not isinstance(value, bool) and 0 < float(value) < math.inf
  except jax.errors.ConcretizationTypeError:  # a traced scalar, as inject_hyperparams hands over
    good = True
  if not good:
    raise ValueError(f"{what} must be a positive finite number{' or a schedule' * (what != 'eps')}, got {value!r}.")


def _check_axes(path: str, shape: Shape, pattern: re.Pattern, axes: Any) -> tuple[Shape, str]:
  rank, axes = len(shape), () if axes == "all" else axes
  good = isinstance(axes, Sequence) and all(type(axis) is int and -rank <= axis < rank for axis in axes)
  if not good or len({axis % rank for axis in axes}) < len(axes):
    raise ValueError(f"unit_axes {axes!r} for {path!r} {shape}: not distinct integers in [{-rank}, {rank}), nor 'all'.")
  return tuple(sorted(axis % rank for axis in axes)), f"unit_axes {pattern.pattern!r}"
