"""The training step as a compiled program: lowered once for any platform, and what the compiler says of its memory."""

import dataclasses
import importlib.metadata
import platform

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from nfnets import optim
from nfnets.config import Config
from nfnets.train.step import sharding
from nfnets.train.step.state import TrainState
from nfnets.train.step.step import train_step_over

IMAGENET_IMAGES = 1_281_167  # training images of ILSVRC 2012: the schedule needs an epoch's length, and no dataset is loaded here


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProgramMemory:
  """Bytes on one device, from the compiler; aliased: outputs in the place of the donated state."""

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int

  @property
  def data(self) -> int:
    """arguments + outputs - aliased + temporaries."""
    return self.arguments + self.outputs - self.aliased + self.temporaries

  @property
  def total(self) -> int:
    """`data` and the code."""
    return self.data + self.code


def make_optimizer(config: Config, params: nnx.State) -> optax.GradientTransformation:
  """The run's optimizer, with ImageNet's length of an epoch."""
  per_epoch = IMAGENET_IMAGES / config.batch
  return optim.make_optimizer(
    config.optim, params, batch=config.batch, steps_per_epoch=per_epoch, total_steps=max(1, round(config.epochs * per_epoch))
  )


def lower(config: Config, graph: nnx.GraphDef, state: TrainState, mesh: Mesh, size: int) -> jax.stages.Lowered:
  """The training loop's own step for images of `size` pixels a side, lowered for the platform of `mesh`.

  state: arrays or shapes. Images mixed with others, if config.data.mix says so, bring their second label and ratio.
  """
  batch = {
    "image": jax.ShapeDtypeStruct((config.batch, size, size, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((config.batch,), jnp.int32),
  }
  if config.data.mix != "none":
    batch["mix_label"] = batch["label"]
    batch["ratio"] = jax.ShapeDtypeStruct((config.batch,), jnp.float32)
  like = sharding.place(mesh, state, shard=config.shard)
  return train_step_over(config, mesh, graph, make_optimizer(config, state.params), like).lower(like, batch)


def memory(compiled: jax.stages.Compiled) -> ProgramMemory | None:
  """The compiler's plan of the memory; None where the backend does not report it."""
  analysis = compiled.memory_analysis()
  parts = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp", "code": "generated_code"}
  sizes = {name: getattr(analysis, f"{part}_size_in_bytes", None) for name, part in parts.items()}
  return None if None in sizes.values() else ProgramMemory(**sizes)


def cost(program: jax.stages.Lowered | jax.stages.Compiled, name: str) -> float | None:
  """XLA's own count of one device, "flops" (element-wise work included) or "bytes accessed"; None where it has none."""
  count = (program.cost_analysis() or {}).get(name, -1.0)
  return count if count > 0 else None


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether a compiler or an allocator says that the devices have too little memory."""
  return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def versions(*more: str) -> dict[str, str]:
  """Of JAX, the packages that make the step, `more` where they are installed, and Python."""
  found = {}
  for name in ("jax", "jaxlib", "flax", "optax", *more):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {**found, "python": platform.python_version()}


def size_text(count: float) -> str:
  """Bytes in words, e.g. "1.50 GiB"."""
  return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
