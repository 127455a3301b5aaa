"""The weights that a run begins with: drawn from its seed, or those of a file or of another run."""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from nfnets import models
from nfnets.config import Config, ModelConfig
from nfnets.train.checkpoints import retention
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.evaluate import saved_config
from nfnets.train.step.state import build_network
from nfnets.weights.errors import WeightsError
from nfnets.weights.network import build, fill, headless, without_head
from nfnets.weights.reader import read
from nfnets.weights.remote import local
from nfnets.weights.stored import Stored

CONVERTED = ("model.safetensors", "model.npz")  # what a folder that `launch.convert` wrote, or the hub, holds


def initial_network(config: Config, num_classes: int, say: Callable[[str], None]) -> models.Network:
  """Makes the network with the weights that `config.init` asks for; all processes of a run call it together.

  Raises:
    UserError: config.init.weights cannot be read, belongs to another network, or has other classes without config.init.new_head.
  """
  network = build_network(config.model, num_classes, seed=config.seed)
  if not config.init.weights:
    return network
  stored = read_weights(config.init.weights)
  state, arrays = nnx.state(network, nnx.Any(nnx.Param, nnx.BatchStat)), stored.arrays
  if config.init.new_head:
    state, arrays = without_head(state), headless(arrays)
  elif stored.num_classes != num_classes:
    raise WeightsError(
      f"config.init.weights={config.init.weights} has {stored.num_classes:,} classes, the dataset {num_classes:,}; "
      "expected as many, or config.init.new_head=True for a new classifier"
    )
  nnx.update(network, fill(state, arrays, stored.source))
  say(f"begins with the weights {stored.source}{', and a new classifier' if config.init.new_head else ''}")
  theirs, ours = ((tuple(data.mean), tuple(data.std)) for data in (stored.preprocessing or stored.config.data, config.data))
  if theirs != ours:
    say(
      f"{stored.source} was trained on images normalised with mean {theirs[0]} and std {theirs[1]}, this run has mean {ours[0]} "
      f"and std {ours[1]}: set config.data.mean and config.data.std as they were, unless another scale is meant"
    )
  return network


def stored_network(
  name: str,
  source: str | os.PathLike[str],
  num_classes: int | None = None,
  *,
  rngs: Any = 0,
  dtype: Any = None,
  overrides: Mapping[str, Any] | None = None,
) -> models.Network:
  """Makes a network with the weights of `source`; `nfnets.models.create(name, weights=source)` is the front door.

  Args:
    name: the variant that the weights must be of.
    source: as for `read_weights`.
    num_classes: None keeps the stored classifier, as does its own number; another gives a new one, drawn from `rngs`.
    rngs, dtype, overrides: as for `nfnets.models.create`; overrides come on top of those that the weights were trained with.

  Raises:
    UserError: the weights cannot be read, or are another network's.
  """
  stored = read_weights(source)
  model = stored.config.model
  if model.name != name:
    raise WeightsError(f"{stored.source} holds the weights of {model.name}, not of {name}; expected create({model.name!r}, …)")
  model = ModelConfig(name=name, dtype=model.dtype, overrides={**model.all_overrides(), **(overrides or {})})
  stored = dataclasses.replace(stored, config=dataclasses.replace(stored.config, model=model))
  if num_classes == stored.num_classes:
    num_classes = None
  if num_classes is not None:
    said = f"{stored.source}: a new classifier of {num_classes:,} classes instead of the {stored.num_classes:,}"
    warnings.warn(said, stacklevel=3)
  return build(stored, num_classes=num_classes, dtype=dtype, rngs=rngs)


def read_weights(source: str | os.PathLike[str], *, weights: str | None = None, best: bool = False) -> Stored:
  """Reads the weights of a network, and what belongs to them.

  Args:
    source: a file of weights (see nfnets.weights.reader), a folder of `launch.convert`, hf://OWNER/NAME or a
      published file's address (see nfnets.weights.remote), a workdir, or WORKDIR/checkpoints/STEP.
    weights: of a run, "params" or "ema"; None takes the average where it was kept.
    best: of a workdir, the best step by the run's own evaluations instead of the newest.

  Raises:
    UserError: with its kinds WeightsError and CheckpointError: nothing is there, or it is damaged.
  """
  path = pathlib.Path(local(source))
  if not path.exists():
    raise WeightsError(f"{path} is not there; expected a file of weights, a workdir, or WORKDIR/checkpoints/STEP")
  path = next((path / name for name in CONVERTED if (path / name).is_file()), path)
  if not path.is_dir():
    if weights is not None or best:
      raise WeightsError(f"{path} is one file of weights; weights={weights!r} and best={best} choose among those of a run")
    return read(path)
  reader, (directory, asked) = CheckpointReader(str(path)), retention.locate(str(path))
  step = reader.choose(retention.best_step(directory, asked) if best else asked)
  if step is None:
    raise WeightsError(f"{path}: no checkpoint there; expected a workdir that training has written to")
  meta = reader.meta(step)
  which = weights or ("ema" if meta["shapes"]["ema"] else "params")
  if which not in ("params", "ema"):
    raise WeightsError(f"weights={weights!r}: expected 'params' or 'ema'")
  return Stored(
    source=f"{which} of {reader.path(step)}",
    arrays=reader.restore_weights(step, which),
    config=saved_config(meta, str(reader.path(step))),
    num_classes=meta["num_classes"],
    class_names=tuple(meta["data"].get("class_names", ())),
  )
