"""A training step in the configuration's dtype beside the same step in float32, in a process of its own (see turns.py).

A process of its own gives the memory of both steps back to the device, where others then measure.
"""

import dataclasses
import types
from typing import Any

import jax
import numpy as np

from nfnets import models
from nfnets.config import Config
from nfnets.config.text import from_json
from nfnets.measure import program, runs
from nfnets.train.step import sharding

BATCH = 8
LOSS_TOLERANCE, LEAST_COSINE = 0.02, 0.9  # of a step in bfloat16 against the same one in float32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
  """One step in the configuration's dtype beside one in float32, from the same weights on the same noise."""

  model: str
  dtype: str
  loss: float
  loss_float32: float
  cosine: float  # of the two updates of all parameters

  @property
  def right(self) -> bool:
    close = abs(self.loss - self.loss_float32) <= LOSS_TOLERANCE * abs(self.loss_float32)
    return close and self.cosine >= LEAST_COSINE


def start(job: dict[str, Any]) -> types.SimpleNamespace:
  """Checks the step of the run that job["config"] has as JSON; the facts are the fields of a Check. It takes no turns."""
  return types.SimpleNamespace(facts=dataclasses.asdict(check_step(from_json(job["config"]))))


def check_step(config: Config) -> Check:
  """Takes a step in the configuration's dtype and the same in float32, of BATCH images, with what is random left out.

  On a GPU, XLA takes the first kernel that it thinks good instead of trying all, which takes a minute for a large network.
  """
  size = config.data.image_size or models.variant(config.model.name).train_resolution
  classes, _ = program.class_count(config)
  mesh = sharding.make_mesh(jax.devices()[:1])
  options = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else {}
  found = {}
  for dtype in (config.model.dtype, "float32"):
    model = dataclasses.replace(config.model, dtype=dtype, drop_rate=0.0, stochastic_depth=0.0)
    # The first learning rate of a warm-up is 0, with which nothing would move.
    optim = dataclasses.replace(config.optim, warmup_epochs=0, agc_track=False)
    changed = dataclasses.replace(config, model=model, optim=optim, batch=BATCH)
    with runs.explained_out_of_memory(BATCH, size, mesh.devices.flat[0].device_kind):
      ready = runs.prepare(changed, mesh, size, classes, compiler_options=options)
      before = jax.tree.map(np.asarray, ready.run.state.params)
      ready.run.seconds_per_step(1)
    moved = jax.tree.map(lambda after, start: np.asarray(after, np.float64) - start, ready.run.state.params, before)
    found[dtype] = ready.run.check(), np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved)])
  (loss, update), (loss_float32, update_float32) = found[config.model.dtype], found["float32"]
  sizes = np.linalg.norm(update) * np.linalg.norm(update_float32)
  cosine = float(update @ update_float32 / sizes) if sizes else float("nan")
  return Check(model=config.model.name, dtype=config.model.dtype, loss=loss, loss_float32=loss_float32, cosine=cosine)
