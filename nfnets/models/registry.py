"""The zoo's table: every variant by name, and how a network is made from its row."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.errors import UserError
from nfnets.models import layers, nf_regnet, nf_resnet, nfnet, resnet
from nfnets.models.network import Network

Config = nfnet.NFNetConfig | nf_resnet.NFResNetConfig | nf_regnet.NFRegNetConfig | resnet.ResNetConfig

_FAMILIES = (
  (nfnet.NFNet, nfnet.VARIANTS),
  (nf_resnet.NFResNet, nf_resnet.VARIANTS),
  (nf_regnet.NFRegNet, nf_regnet.VARIANTS),
  (resnet.ResNet, resnet.VARIANTS),
  (resnet.FixupResNet, resnet.FIXUP_VARIANTS),
)
_VARIANTS: dict[str, tuple[Callable[..., Network], Config]] = {
  name: (network, row) for network, rows in _FAMILIES for name, row in rows.items()
}


class UnknownModelError(UserError):
  """No model has this name; the message lists near ones."""


class UnknownOverrideError(UserError):
  """This model has no field of that name; the message lists near ones, or all."""


class InvalidOverrideError(UserError):
  """A field of the model was given a value that it cannot have."""


def names() -> list[str]:
  """All model names, family by family."""
  return list(_VARIANTS)


def variant(name: str, **overrides) -> Config:
  """The named row of the variant table, with overrides: a frozen dataclass (depth, width, resolutions, drop_rate, …).

  Case, "-" and "_" in `name` do not matter. Raises UnknownModelError, UnknownOverrideError or InvalidOverrideError.
  """
  return _lookup(name, overrides)[1]


def create(
  name: str, num_classes: int = 1000, *, rngs: nnx.Rngs | jax.Array | int = 0, dtype=jnp.float32, **overrides
) -> Network:
  """The named network with initialised float32 parameters.

  rngs: an nnx.Rngs (its "params" stream is used), a jax.random key or a seed. dtype: what convolutions compute in; statistics,
  pooling and logits stay float32. overrides: fields of the variant's row, e.g. drop_rate=0.0, remat=True, activation="silu".
  Abstractly, for shapes without memory: `nnx.eval_shape(lambda: create(name))`.
  Raises UnknownModelError, UnknownOverrideError or InvalidOverrideError, each naming near matches.
  """
  network, config = _lookup(name, overrides)
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


def _lookup(name: str, overrides: dict[str, Any]) -> tuple[Callable[..., Network], Config]:
  squeeze = lambda text: re.sub(r"[-_\s]", "", text.lower())
  by_key = {squeeze(known): known for known in _VARIANTS}
  known = by_key.get(squeeze(str(name)))
  if known is None:
    near = [by_key[key] for key in difflib.get_close_matches(squeeze(str(name)), by_key, n=5, cutoff=0.5)]
    raise UnknownModelError(
      f"unknown model {name!r}; near: {', '.join(near) or 'none'} (nfnets.models.names() lists all {len(_VARIANTS)})"
    )
  network, config = _VARIANTS[known]
  fields = typing.get_type_hints(type(config))
  for field, value in overrides.items():
    if field not in fields:
      near = difflib.get_close_matches(field, fields, n=3, cutoff=0.5) or sorted(fields)
      raise UnknownOverrideError(f"{known} has no field {field!r}; near: {', '.join(near)}")
    _check(known, field, value, fields[field])
  changes: dict[str, Any] = {field: tuple(value) if isinstance(value, list) else value for field, value in overrides.items()}
  config = dataclasses.replace(config, **changes)
  if not len(config.depth) == len(config.width) == len(config.stage_strides):
    raise InvalidOverrideError(
      f"{known}: depth={config.depth}, width={config.width} and stage_strides={config.stage_strides} "
      "must have one entry a stage each"
    )
  return network, config


def _check(name: str, field: str, value, hint) -> None:
  """Raises InvalidOverrideError where `value` does not fit the field's annotation or range."""
  choices = [
    c
    for option in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,))
    for c in (typing.get_args(option) if typing.get_origin(option) is typing.Literal else ())
  ]
  whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1
  number = isinstance(value, int | float) and not isinstance(value, bool)
  sizes = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
  expected = None
  if field == "activation":
    expected = None if value in layers.ACTIVATIONS else "one of " + ", ".join(layers.ACTIVATIONS)
  elif choices:
    allowed = value in choices or value is None and type(None) in typing.get_args(hint)
    expected = None if allowed else "one of " + ", ".join(map(repr, choices))
  elif field in ("drop_rate", "stochastic_depth"):
    expected = None if number and 0 <= value < 1 else "a probability, 0 ≤ rate < 1"
  elif sizes:
    several = isinstance(value, tuple | list) and value and all(map(whole, value))
    fits = several and (Ellipsis in sizes or len(value) == len(sizes))
    expected = None if fits else "a tuple of positive ints" + ("" if Ellipsis in sizes else f", {len(sizes)} of them")
  elif hint is bool:
    expected = None if isinstance(value, bool) else "True or False"
  elif hint in (int, int | None):
    expected = None if whole(value) or value is None and hint is not int else "a positive int"
  elif hint is float:
    expected = None if number and 0 < value < math.inf else "a finite number > 0"
  if expected:
    raise InvalidOverrideError(f"{name}: {field}={value!r}, expected {expected}")
