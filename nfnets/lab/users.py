"""The network that a person names with --model: how it is made, called, and trained beside the purpose-made ones."""

import importlib.util
import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets import models
from nfnets.errors import UserError
from nfnets.lab import task
from nfnets.lab.measures.signals import signal
from nfnets.lab.training import Params, Recipe, Trainer
from nfnets.lab.twin import BatchNormKit
from nfnets.lab.zoo import ZooTrainer

Array = jax.Array


class UserNetwork(nnx.Module):
  """A person's network, called as those of this room are, network(images, key=key) or network(images, train=False) → logits.

  It gets images of its own size. Dropout, where it has any, drops the same units at each step. A call raises UserError where the
  logits have fewer columns than there are classes.
  """

  def __init__(self, name: str, seed: int, classes: int):
    self.network, self.side, arguments = user_model(name, seed=seed, classes=classes)
    self.name, self.classes, self.takes_train, self.uses_running_statistics = name, classes, "train" in arguments, False

  def __call__(self, images: Array, *, key: Array | None = None, train: bool | None = None) -> Array:
    network: Any = self.network
    train = not self.uses_running_statistics if train is None else train  # see lab.norms
    if not self.takes_train:
      (network.train if train else network.eval)()
    logits = network(task.resized(images, self.side), **({"train": train} if self.takes_train else {}))
    check_logits(self.name, logits, self.classes)
    return logits


class UserTrainer(Trainer):
  """Trains the network that --model names; arguments are those of `Trainer`, with the name in place of `make`."""

  def __init__(self, name: str, data: task.Data, recipe: Recipe, **options: Any):
    self._made = lambda seed: UserNetwork(name, seed, data.classes)
    super().__init__(lambda key: self._made(0), data, recipe, **options)

  def init(self, seed: int) -> Params:
    """New weights, made outside a compiled program, as a person's code may want it."""
    return nnx.to_pure_dict(nnx.split(self._made(seed), nnx.Param, ...)[1])

  def layer_numbers(self) -> Params:
    """The number of each parameter's layer, from the images on: a block or another top-level part of the network is a layer."""
    shown = self._made(0)
    seen = signal(shown, self.data.train[0][:2])
    owners = [_part(path) for path, _ in jax.tree.leaves_with_path(self.init(0))]
    order = [part for part in dict.fromkeys(_part(path.split(":")[0].split("/")) for path in seen) if part in owners]
    order += [part for part in dict.fromkeys(owners) if part not in order]  # what gave no output
    return jax.tree.map_with_path(lambda path, _: order.index(_part(path)), self.init(0))


class UserZooTrainer(ZooTrainer):
  """Trains it with running statistics; arguments are those of `ZooTrainer`, with the name in place of `make`."""

  def __init__(self, name: str, data: task.Data, recipe: Recipe, rate: float):
    self._made = lambda seed: UserNetwork(name, seed, data.classes)
    super().__init__(lambda key: self._made(0), data, recipe, rate)

  def init(self, seed: int) -> nnx.State:
    """New weights and statistics, made outside a compiled program."""
    return nnx.state(self._made(seed))


def operations(name: str, classes: int) -> float:
  """Operations of one image's forward and backward pass, as three times those of the forward pass that XLA counts."""
  graph, state = nnx.split(UserNetwork(name, 0, classes))
  shape = jax.ShapeDtypeStruct((1, task.SIDE, task.SIDE, 3), jnp.float32)
  costs: Any = jax.jit(lambda state, images: nnx.merge(graph, state)(images)).lower(state, shape).cost_analysis()
  return 3 * float(costs["flops"])


def _part(path: Sequence[Any]) -> tuple[str, ...]:
  """The beginning of a path below "network" that names a block ("blocks", "3") or another part of a network ("stem",)."""
  names = [str(getattr(part, "key", part)) for part in path][1:]
  first = next((i for i, name in enumerate(names) if name.isdigit()), 0)
  return tuple(names[: first + 1])


def user_model(name: str, *, seed: int, classes: int = 10, opened: bool = False) -> tuple[nnx.Module, int, dict[str, Any]]:
  """Makes the network that a user names, with new weights.

  Args:
    name: a name of nfnets.models, or FILE.py:FUNCTION, where FUNCTION(seed), or FUNCTION(kit) with a parameter of that name (see
      lab.twin), returns an nnx.Module; its attribute `image_size`, if it has one, says how many pixels a side it takes.
    seed: of its weights.
    classes: how many a network of nfnets.models tells apart; FUNCTION decides that itself. Such a network is made without dropout
      and stochastic depth.
    opened: whether branches that begin with 0, and a classifier that does, are set to values with which something can be seen at
      initialization: see `open_branches`.

  Returns:
    The network; the side of its images, pixels; and the arguments that say that it trains.

  Raises:
    UserError: there is no such model, file or function, or it makes something else.
  """
  file, colon, function = name.rpartition(":")
  if not colon:
    network = models.create(name, classes, rngs=seed, drop_rate=0.0, stochastic_depth=0.0)
    if opened:
      open_branches(network, seed)
    return network, min(32, models.variant(name).train_resolution), _arguments(network)
  make = user_function(name)
  try:
    network = make(kit=BatchNormKit(seed)) if takes_kit(make) else make(seed)
  except Exception as error:  # whatever a person's code raises is theirs to mend
    call = "FUNCTION(kit=…)" if takes_kit(make) else f"FUNCTION({seed})"
    raise UserError(f"--model={name}: {call} fails: {_told(error)}") from error
  if not isinstance(network, nnx.Module):
    raise UserError(f"--model={name}: expected an nnx.Module from that function, got {type(network).__name__}")
  network.train()
  return network, getattr(network, "image_size", 32), _arguments(network)


def labelled_model(name: str, *, seed: int, classes: int, opened: bool = False) -> tuple[nnx.Module, int, dict[str, Any]]:
  """Makes it as `user_model` does, for use with labels; raises UserError also where it cannot be called or has too few logits."""
  network, side, arguments = user_model(name, seed=seed, classes=classes, opened=opened)
  graph, state = nnx.split(network)
  call: Any = lambda state, images: nnx.merge(graph, state)(images, **arguments)
  shape = (2, side, side, 3)
  try:
    logits = jax.eval_shape(call, state, jax.ShapeDtypeStruct(shape, jnp.float32))
  except Exception as error:  # as above
    raise UserError(f"--model={name}: it cannot be called with images {list(shape)}: {_told(error)}") from error
  check_logits(name, logits, classes)
  return network, side, arguments


def check_logits(name: str, logits: Any, classes: int) -> None:
  """Raises UserError where the logits of the network that --model names are no [batch, classes] or have too few columns."""
  if getattr(logits, "ndim", None) != 2:
    shape = getattr(logits, "shape", type(logits).__name__)
    raise UserError(f"--model={name}: expected logits [batch, classes], got {shape}")
  if logits.shape[-1] < classes:
    raise UserError(f"--model={name}: expected logits of at least {classes} classes, got {logits.shape[-1]}")


def _arguments(network: nnx.Module) -> dict[str, Any]:
  """What says in a call of the network that it trains; nothing where train() and eval() alone do."""
  return {"train": True} if "train" in inspect.signature(type(network).__call__).parameters else {}


def open_branches(network: models.Network, seed: int) -> None:
  """Sets what a network of the zoo initialises to 0 to values with which something can be seen, in place."""
  for _, module in nnx.iter_modules(network):
    if getattr(module, "skip_gain", None) is not None:
      module.skip_gain[...] = jnp.ones(())  # at 0 blocks would add nothing
  kernel = network.fc.kernel
  if not np.any(kernel[...]):  # no gradient would pass a classifier of zeros
    kernel[...] = jax.random.normal(jax.random.key(seed), kernel.shape) * kernel.shape[0] ** -0.5


def _told(error: Exception) -> str:
  """An error in one line."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"


def note(model: str | None) -> tuple[str, ...]:
  """What a reader must know of a network of nfnets.models that was measured at initialization; nothing of another one."""
  if model is None or ":" in model:
    return ()
  return (
    f"{model} is measured with gains of 1 where its branches begin with 0, and with a random classifier where that does, so that "
    "something can be seen; it has no dropout and no stochastic depth here.",
  )


def takes_kit(function: Callable[..., Any]) -> bool:
  """Whether a user's function has a parameter that is called kit."""
  return "kit" in inspect.signature(function).parameters


def user_function(name: str) -> Callable[..., Any]:
  """The function that FILE.py:FUNCTION names; raises UserError."""
  file, _, function = name.rpartition(":")
  if not pathlib.Path(file).is_file():
    raise UserError(f"--model={name}: no file {file}; expected a name of nfnets.models or FILE.py:FUNCTION")
  spec = importlib.util.spec_from_file_location("nfnets_lab_user_model", file)
  if spec is None or spec.loader is None:
    raise UserError(f"--model={name}: {file} is no Python file")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:  # whatever a person's file raises is theirs to mend
    raise UserError(f"--model={name}: {file} cannot be run: {_told(error)}") from error
  make = getattr(module, function, None)
  if not callable(make):
    raise UserError(f"--model={name}: no function {function} in {file}")
  return make
