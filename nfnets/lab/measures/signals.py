"""What the signal does on its way through a network, and what comes back: statistics of every layer's output, gradient norms."""

import collections
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nfnets.agc import named_leaves
from nfnets.models import Network

Array = jax.Array


def moments(x: Array) -> dict[str, Array]:
  """Computes "mean", "var" and "mean_sq", the squared channel mean, of an activation, float32 [] (Brock et al. 2021a, section 3).

  Args:
    x: [batch, …, channels]. The mean is over everything; the variance and the squared mean are those of each channel, over batch
      and space, averaged over channels. Their sum is the mean square: the variance over random weights that theory speaks of,
      since over weights every channel's mean is zero.
  """
  x = x.astype(jnp.float32)
  others = tuple(range(x.ndim - 1))
  channel_mean = jnp.mean(x, axis=others)
  return {"mean": jnp.mean(channel_mean), "var": jnp.mean(jnp.var(x, axis=others)), "mean_sq": jnp.mean(channel_mean**2)}


def signal(
  model: Any, images: Array, *, measure: Callable[[Array], dict[str, Array]] = moments, **arguments: Any
) -> dict[str, dict[str, float]]:
  """Measures the output of every submodule of any Flax module while it looks at some images.

  A copy of the model is watched; the model itself stays as it is. Each call of a submodule is seen, also under jit, remat and
  scan inside of the model; where scan or vmap call a submodule several times, the mean of its figures is given. Networks of
  `nfnets.models` are asked for their taps too ("blocks/3/residual", "pool"). A normalizer should use the statistics of these
  images: pass train=True, or call model.train() before.

  Args:
    model: an nnx.Module, or a Linen module that is bound, `module.bind(variables)`; called as model(images, **arguments). A
      `linen.scan` in it needs check_constancy_invariants=False, since newer Flax takes what is looked at for a carried constant.
    images: [batch, height, width, channels], as the model takes them.
    measure: turns an output, [batch, …, channels], into figures by name, float32 [] each; `lab.similarity` is another one.
    arguments: further ones of the call, such as train=True and rngs; to Linen's `apply` rngs are handed over as such.

  Returns:
    {path of the submodule, "" for the model itself, with ":2" behind it for a second call: figures of `measure`, {"mean", "var",
    "mean_sq"} of `moments`}, in the order in which the outputs arise. What returns no floating array of at least two axes is left
    out.

  Raises:
    TypeError: the model is neither.
  """
  order: list[str] = []
  seen: dict[str, list[dict[str, Any]]] = {}

  def note(name: str, x: Any) -> None:
    """Is called while the model is traced; the numbers come when it runs, which scan and remat make another time and place."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 2:
      return
    order.append(name)
    jax.debug.callback(lambda figures: seen.setdefault(name, []).append(figures), measure(x))

  if not isinstance(model, nnx.Module):
    state, forward = _linen(model, arguments, note)
  else:
    graph, state = nnx.split(_watched(nnx.clone(model), note))

    def forward(state: Any, images: Array) -> Array:
      watched: Any = nnx.merge(graph, state)
      if isinstance(watched, Network):
        tapped = lambda name, x: None if name in order else note(name, x)
        return watched.outputs(images, tap=tapped, **arguments)["logits"]
      return watched(images, **arguments)

  jax.block_until_ready(jax.jit(forward)(state, images))
  jax.effects_barrier()
  mean = lambda calls: {figure: float(np.mean([call[figure] for call in calls])) for figure in calls[0]}
  return _numbered({name: mean(seen[name]) for name in dict.fromkeys(order) if name in seen})


def _numbered(found: dict[str, Any]) -> dict[str, Any]:
  """Numbers the calls of each submodule anew: a scan may trace its body more often than it runs it."""
  counts: collections.Counter[str] = collections.Counter()
  renamed = {}
  for name, value in found.items():
    path = re.sub(r":\d+$", "", name)
    counts[path] += 1
    renamed[path if counts[path] == 1 else f"{path}:{counts[path]}"] = value
  return renamed


def _watched(model: nnx.Module, note: Callable[[str, Any], None]) -> nnx.Module:
  """Gives every submodule a class of its own, whose __call__ hands the output to `note`; the path lies in that class.

  NNX keeps classes in its graph definitions, so that a submodule is known again after split and merge.
  """
  for path, module in list(nnx.iter_modules(model)):
    kind = type(module)
    if callable(module):
      call: Any = kind.__call__
      watched = type(kind)(kind.__name__, (kind,), {"__call__": _noting(call, "/".join(map(str, path)), note)})
      object.__setattr__(module, "__class__", watched)
  return model


def _noting(call: Callable, path: str, note: Callable[[str, Any], None]) -> Callable:
  calls = 0

  @functools.wraps(call)
  def noted(self, *args, **kwargs):
    nonlocal calls
    out = call(self, *args, **kwargs)
    calls += 1
    note(path if calls == 1 else f"{path}:{calls}", out)
    return out

  return noted


def _linen(model: Any, arguments: dict[str, Any], note: Callable[[str, Any], None] | None = None) -> tuple[Any, Callable]:
  """(Variables, function of variables and images → output) of a bound Linen module, whose submodules' outputs `note` gets."""
  import flax.linen as linen  # not everybody needs it

  if not isinstance(model, linen.Module) or model.scope is None:
    raise TypeError(f"expected an nnx.Module or a bound Linen module, module.bind(variables), got {type(model).__name__}")
  module, variables = model.unbind()
  calls: collections.Counter[str] = collections.Counter()

  def noting(function: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    out = function(*args, **kwargs)
    if note is not None and context.method_name == "__call__":
      path = "/".join(context.module.path)
      calls[path] += 1
      note(path if calls[path] == 1 else f"{path}:{calls[path]}", out)
    return out

  def forward(variables: Any, images: Array) -> Array:
    moving = [name for name in variables if name != "params"]  # running statistics, which training moves
    with linen.intercept_methods(noting):
      return module.apply(variables, images, mutable=moving, **arguments)[0]

  return variables, forward


def gradient_norms(model: Any, images: Array, labels: Array, **arguments: Any) -> dict[str, float]:
  """Measures the L2 norm of the mean cross-entropy's gradient with respect to each parameter of any Flax module.

  Args:
    model: turns images into logits [batch, classes]; an nnx.Module or a bound Linen module. It stays as it is.
    images: [batch, height, width, channels], as the model takes them.
    labels: int [batch].
    arguments: further ones of the call, such as train=True.

  Returns:
    {"/"-joined path of the parameter: norm}, in the model's order.

  Raises:
    TypeError: the model is neither.
  """
  if isinstance(model, nnx.Module):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    forward: Callable[[Any], Any] = lambda params: nnx.merge(graph, params, rest, copy=True)(images, **arguments)
  else:
    variables, apply = _linen(model, arguments)
    params, forward = variables["params"], lambda params: apply({**variables, "params": params}, images)

  @jax.jit
  def norms(params: Any) -> list[Array]:
    def loss(params: Any) -> Array:
      logits = forward(params)
      return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels))

    return [jnp.linalg.norm(leaf.astype(jnp.float32).ravel()) for _, leaf, _ in named_leaves(jax.grad(loss)(params))]

  names = [path for path, _, _ in named_leaves(params)]
  return dict(zip(names, map(float, jax.device_get(norms(params))), strict=True))
