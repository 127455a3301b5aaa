"""The zoo's table: every variant by name, and how a network is made from its row."""

import dataclasses
import difflib
import importlib
import math
import os
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.errors import UserError
from nfnets.models import activations, layers, nf_regnet, nf_resnet, nfnet, norms, resnet
from nfnets.models.network import Network

Config = nfnet.NFNetConfig | nf_resnet.NFResNetConfig | nf_regnet.NFRegNetConfig | resnet.ResNetConfig

_FAMILIES = (
  (nfnet.NFNet, nfnet.VARIANTS),
  (nf_resnet.NFResNet, nf_resnet.VARIANTS),
  (nf_regnet.NFRegNet, nf_regnet.VARIANTS),
  (resnet.ResNet, resnet.VARIANTS),
)
_VARIANTS: dict[str, tuple[Callable[..., Network], Config]] = {
  name: (network, row) for network, rows in _FAMILIES for name, row in rows.items()
}


class UnknownModelError(UserError):
  """No model has the given name; the message lists similar names."""


class UnknownOverrideError(UserError):
  """The model has no field of the given name; the message lists similar fields, or all."""


class InvalidOverrideError(UserError):
  """A field of the model was given a value that it cannot have."""


def names() -> list[str]:
  """Returns the names of all models, family by family."""
  return list(_VARIANTS)


def variant(name: str, **overrides) -> Config:
  """Returns the named row of the variants' table, a frozen dataclass (depth, width, resolutions, drop_rate, …), with overrides.

  Args:
    name: the model's name; upper or lower case, "-" and "_" do not matter.
    overrides: fields of the row, with other values.

  Raises:
    UnknownModelError, UnknownOverrideError, InvalidOverrideError: no such name, no such field, or a value that it cannot have.
  """
  return _lookup(name, overrides)[1]


def create(
  name: str,
  num_classes: int | None = None,
  *,
  rngs: nnx.Rngs | jax.Array | int = 0,
  dtype=jnp.float32,
  weights: str | os.PathLike[str] | None = None,
  **overrides,
) -> Network:
  """Creates the named network with initialised float32 parameters, or with stored ones.

  `nnx.eval_shape(lambda: create(name))` gives the shapes alone and takes no memory.

  Args:
    name: the model's name, as for `variant`.
    num_classes: the number of logits. None is 1,000, or as stored; another number than the stored one gives the network a new
      classifier, which a warning says.
    rngs: where initial values come from: an nnx.Rngs (its "params" stream), a jax.random key or a seed.
    dtype: what convolutions compute in; statistics, pooling and logits stay float32.
    weights: where stored parameters and statistics are, as for `nfnets.predict.load`: a file (ours, Haiku's, timm's), a workdir,
      hf://OWNER/NAME. The network computes what these weights were trained for, where the row leaves a choice (timm's GELU).
    overrides: fields of the variant's row with other values, such as drop_rate=0.0, remat=True, activation="silu".

  Raises:
    UnknownModelError, UnknownOverrideError, InvalidOverrideError: as `variant`, and for `num_classes` and `dtype`.
    UserError: the weights cannot be read, or are another network's.
  """
  network, config = _lookup(name, overrides)
  if weights is not None:  # what reads files is in a room above this one, and is imported only where it is asked for
    stored_network = importlib.import_module("nfnets.train.initial").stored_network
    return stored_network(variant_name(name), weights, num_classes, rngs=rngs, dtype=dtype, overrides=overrides)
  num_classes = 1000 if num_classes is None else num_classes
  if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
    raise InvalidOverrideError(f"num_classes={num_classes!r}: expected a positive int")
  try:
    floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    floating = False
  if not floating:
    raise InvalidOverrideError(f"dtype={dtype!r}: expected a floating dtype such as float32 or bfloat16")
  key = rngs if isinstance(rngs, jax.Array) else (nnx.Rngs(rngs) if isinstance(rngs, int) else rngs).params()
  return network(config, num_classes, dtype=dtype, rngs=layers.ParamKeys(key))


def variant_name(name: str) -> str:
  """The name as `names` has it; raises UnknownModelError."""
  simplify = lambda text: re.sub(r"[-_\s]", "", text.lower())
  by_key = {simplify(known): known for known in _VARIANTS}
  if (key := simplify(str(name))) in by_key:
    return by_key[key]
  near = [by_key[close] for close in difflib.get_close_matches(key, by_key, n=5, cutoff=0.5)]
  raise UnknownModelError(
    f"unknown model {name!r}; near: {', '.join(near) or 'none'} (nfnets.models.names() lists all {len(_VARIANTS)})"
  )


def _lookup(name: str, overrides: dict[str, Any]) -> tuple[Callable[..., Network], Config]:
  """The network's class and its row with overrides; raises as `variant`."""
  name = variant_name(name)
  network, config = _VARIANTS[name]
  if "norm" in overrides and isinstance(config, nf_resnet.NFResNetConfig):
    config = resnet.with_norm(config)
  fields = typing.get_type_hints(type(config))
  for field, value in overrides.items():
    if field not in fields:
      near = difflib.get_close_matches(field, fields, n=3, cutoff=0.5) or sorted(fields)
      raise UnknownOverrideError(f"{name} has no field {field!r}; near: {', '.join(near)}")
    _check(name, field, value, fields[field])
  changes: dict[str, Any] = {field: tuple(value) if isinstance(value, list) else value for field, value in overrides.items()}
  config = dataclasses.replace(config, **changes)
  if not len(config.depth) == len(config.width) == len(config.stage_strides):
    raise InvalidOverrideError(
      f"{name}: depth={config.depth}, width={config.width} and stage_strides={config.stage_strides} "
      "must have one entry a stage each"
    )
  return resnet.of_norm(config) if isinstance(config, resnet.ResNetConfig) else (network, config)


def _check(name: str, field: str, value, hint) -> None:
  """Raises InvalidOverrideError where `value` does not fit the field's annotation or range."""
  choices = [
    choice
    for option in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,))
    for choice in (typing.get_args(option) if typing.get_origin(option) is typing.Literal else ())
  ]
  is_positive_int = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  element_types = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
  expected = None
  if field == "activation":
    expected = None if value in activations.ACTIVATIONS else "one of " + ", ".join(activations.ACTIVATIONS)
  elif field == "norm" and hint is str:
    norms.parse(value)
  elif choices:
    allowed = value in choices or value is None and type(None) in typing.get_args(hint)
    expected = None if allowed else "one of " + ", ".join(map(repr, choices))
  elif field in ("drop_rate", "stochastic_depth"):
    expected = None if is_number and 0 <= value < 1 else "a probability, 0 ≤ rate < 1"
  elif element_types:
    any_length = Ellipsis in element_types
    fits = isinstance(value, tuple | list) and value and all(map(is_positive_int, value))
    fits = fits and (any_length or len(value) == len(element_types))
    expected = None if fits else "a tuple of positive ints" + ("" if any_length else f", {len(element_types)} of them")
  elif hint is bool:
    expected = None if isinstance(value, bool) else "True or False"
  elif hint in (int, int | None):
    expected = None if is_positive_int(value) or value is None and hint is not int else "a positive int"
  elif hint is float:
    expected = None if is_number and 0 < value < math.inf else "a finite number > 0"
  if expected:
    raise InvalidOverrideError(f"{name}: {field}={value!r}, expected {expected}")
