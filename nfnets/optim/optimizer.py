"""The optimizer: AGC, weight decay, momentum (or Adam, or LARS) and the learning rate, as a chain of optax."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nfnets.agc import agc
from nfnets.config import OptimConfig
from nfnets.errors import UserError
from nfnets.optim.blocks import by_block
from nfnets.optim.depth import layer_rates
from nfnets.optim.groups import ParameterGroup, by_path, clips, default_groups, leaves, listing, parameter_groups
from nfnets.optim.schedule import make_schedule


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
  Decay and trust ratio act on groups with `decay`, AGC on groups with `clip`. With `layer_decay`, a last link "layers" multiplies
  the update (see `layer_rates`). Groups that are frozen have updates of zero, from a first link "frozen", and no moments. The
  state is a dict by link name: `state["agc"]` holds what AGC tracks.

  Args:
    config: see `OptimConfig`.
    params: tree of arrays or of `jax.ShapeDtypeStruct`, as `optimizer.init` will get: an `nnx.State` of `nnx.Param`, or nested
      dicts. Only names, shapes and marks are read. Moments are float32 for float32 parameters.
    batch, steps_per_epoch, total_steps: see `make_schedule`.
    groups: parameter groups; None = `default_groups(params, config)`.

  Raises:
    UserError: a field is invalid, the schedule does not fit (`make_schedule`), a parameter is not in exactly one group
      (`parameter_groups`), the layers are not known (`layer_rates`); at init or update, the tree has a parameter that `params`
      lacks.
  """
  schedule = make_schedule(config, batch=batch, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
  owners = parameter_groups(params, default_groups(params, config) if groups is None else groups)
  mask = functools.partial(_mask, owners, lambda group: group.decay)
  decay = optax.add_decayed_weights(config.weight_decay, mask=mask)
  learning_rate = optax.scale_by_learning_rate(schedule)
  links = {**_freeze(owners), **_agc(config, owners)}
  if config.name == "sgd":
    links |= {"decay": decay, **_momentum(config, owners), "learning_rate": learning_rate}
  elif config.name == "lars":
    trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=config.trust_coefficient), mask)
    links |= {"decay": decay, "trust": trust, "learning_rate": learning_rate, **_momentum(config, owners)}
  else:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32)
    links |= {"adam": _moving(adam, owners), "decay": decay, "learning_rate": learning_rate}
  if config.layer_decay != 1:
    links["layers"] = _scaled(layer_rates(params, config))
  return optax.named_chain(*links.items())


def _agc(config: OptimConfig, owners: Mapping[str, ParameterGroup]) -> dict[str, optax.GradientTransformation]:
  """AGC's link of the chain, by name; {} where nothing is clipped."""
  if config.clipping is None or not clips(config):
    return {}
  unclipped = {path for path, group in owners.items() if not group.clip}
  return {
    "agc": by_block(agc(config.clipping, config.agc_eps, exclude=lambda path, _: path in unclipped, track=config.agc_track))
  }


def _momentum(config: OptimConfig, owners: Mapping[str, ParameterGroup]) -> dict[str, optax.GradientTransformation]:
  """The momentum's link of the chain, by name; {} without momentum."""
  if config.momentum == 0:
    return {}
  # Here nesterov=False means heavy-ball momentum. The published SGD takes False for Nesterov, and only None for heavy-ball.
  nesterov = config.name == "sgd" if config.nesterov is None else config.nesterov
  return {"momentum": _moving(optax.trace(config.momentum, nesterov=nesterov, accumulator_dtype=jnp.float32), owners)}


def _freeze(owners: Mapping[str, ParameterGroup]) -> dict[str, optax.GradientTransformation]:
  """The link that gives frozen parameters gradients of zero, by name; {} where none is frozen."""
  frozen = functools.partial(_mask, owners, lambda group: group.frozen)
  return {"frozen": optax.masked(optax.set_to_zero(), frozen)} if _any_frozen(owners) else {}


def _moving(link: optax.GradientTransformation, owners: Mapping[str, ParameterGroup]) -> optax.GradientTransformation:
  """The link with moments for those parameters alone that are not frozen."""
  return optax.masked(link, functools.partial(_mask, owners, lambda group: not group.frozen)) if _any_frozen(owners) else link


def _any_frozen(owners: Mapping[str, ParameterGroup]) -> bool:
  return any(group.frozen for group in owners.values())


def _scaled(rates: Mapping[str, float]) -> optax.GradientTransformation:
  """The link that multiplies each parameter's update by its factor."""
  return optax.stateless(lambda updates, _: jax.tree.map(operator.mul, updates, by_path(updates, rates.__getitem__)))


def _mask(owners: Mapping[str, ParameterGroup], test: Callable[[ParameterGroup], bool], tree: Any) -> Any:
  """Whether the group of each parameter passes a test."""
  if unknown := [path for path, _, _ in leaves(tree) if path not in owners]:
    raise UserError(f"This optimizer was made for other parameters; it does not know {listing(unknown)}. Make it for these.")
  return by_path(tree, lambda path: test(owners[path]))
