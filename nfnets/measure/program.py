"""Lowers the training step for any platform, and reads the memory and the counts of the compiled program."""

import dataclasses
import importlib.metadata
import platform
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from nfnets import optim
from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.train.step import sharding
from nfnets.train.step.state import TrainState
from nfnets.train.step.step import train_step_over

IMAGENET_IMAGES = 1_281_167  # training images of ILSVRC 2012, for the schedule's length of an epoch, since no dataset is loaded


# Classes of the data sets that the recipes name, since no dataset is loaded.
CLASSES = {"digits": 10, "synthetic": 1000, "cifar10": 10, "cifar100": 100, "imagenet2012": 1000}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProgramMemory:
  """Holds a program's bytes on one device, as the compiler plans them; aliased: outputs that replace the donated state."""

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int

  @property
  def data(self) -> int:
    """All bytes but the code's: arguments + outputs - aliased + temporaries."""
    return self.arguments + self.outputs - self.aliased + self.temporaries

  @property
  def total(self) -> int:
    """All bytes: `data` and the code."""
    return self.data + self.code

  def parts_text(self) -> str:
    """Puts the sum `data` into words."""
    return (
      f"arguments {size_text(self.arguments)} + outputs {size_text(self.outputs)} - aliased {size_text(self.aliased)} "
      f"+ temporaries {size_text(self.temporaries)}"
    )


def class_count(config: Config) -> tuple[int, str]:
  """Returns how many classes the network has, and words for where the number comes from; no dataset is loaded.

  Raises:
    UserError: neither config.data.num_classes says it nor is the dataset one of `CLASSES`.
  """
  if config.data.num_classes is not None:
    return config.data.num_classes, "as config.data.num_classes or --classes says"
  if config.data.name not in CLASSES:
    raise UserError(
      f"config.data.num_classes is not set, and how many classes config.data.name={config.data.name!r} has is not known without "
      "reading it; give --classes=N"
    )
  return CLASSES[config.data.name], f"as the dataset {config.data.name} has"


def make_optimizer(config: Config, params: nnx.State) -> optax.GradientTransformation:
  """Makes the run's optimizer for an epoch as long as ImageNet's."""
  per_epoch = IMAGENET_IMAGES / config.batch
  return optim.make_optimizer(
    config.optim, params, batch=config.batch, steps_per_epoch=per_epoch, total_steps=max(1, round(config.epochs * per_epoch))
  )


def lower(config: Config, graph: nnx.GraphDef, state: TrainState, mesh: Mesh, size: int) -> jax.stages.Lowered:
  """Lowers the training loop's own step for the platform of `mesh`.

  Args:
    config: the run. Where config.data.mix mixes images, the batch holds their second label and ratio too.
    graph: the network's modules.
    state: arrays or their shapes.
    mesh: the devices.
    size: pixels of a side of the images.
  """
  batch = {
    "image": jax.ShapeDtypeStruct((config.batch, size, size, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((config.batch,), jnp.int32),
  }
  if config.data.mix != "none":
    batch["mix_label"] = batch["label"]
    batch["ratio"] = jax.ShapeDtypeStruct((config.batch,), jnp.float32)
  placed = sharding.place(mesh, state, shard=config.shard)
  step = train_step_over(config, mesh, graph, make_optimizer(config, state.params), placed)
  return step.lower(placed, batch)  # pyrefly: ignore[missing-attribute] (it is what jax.jit returns, declared as a plain function)


def memory(compiled: jax.stages.Compiled) -> ProgramMemory | None:
  """Returns the compiler's plan of the memory; None where the backend does not report it."""
  analysis: Any = compiled.memory_analysis()  # None, or without these sizes, on some backends
  try:
    return ProgramMemory(
      arguments=analysis.argument_size_in_bytes,
      outputs=analysis.output_size_in_bytes,
      aliased=analysis.alias_size_in_bytes,
      temporaries=analysis.temp_size_in_bytes,
      code=analysis.generated_code_size_in_bytes,
    )
  except AttributeError:
    return None


def cost(program: jax.stages.Lowered | jax.stages.Compiled, name: str) -> float | None:
  """Returns XLA's own count of one device's "flops" (element-wise work included) or "bytes accessed"; None where it has none."""
  count = (program.cost_analysis() or {}).get(name, -1.0)
  return count if count > 0 else None


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
  """Says whether a compiler or an allocator raised `error` because the devices have too little memory."""
  return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def compilation_cache() -> str | None:
  """Returns JAX's directory of compiled programs, from which a compilation may be read instead; None without one."""
  return jax.config.jax_compilation_cache_dir  # pyrefly: ignore[missing-attribute] (JAX adds its options as it is imported)


def versions(*packages: str) -> dict[str, str]:
  """Returns the versions of JAX, the packages that make the step, other `packages` where installed, and Python."""
  numbers = {}
  for name in ("jax", "jaxlib", "flax", "optax", *packages):
    try:
      numbers[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {**numbers, "python": platform.python_version()}


def versions_text(numbers: dict[str, str]) -> str:
  """Lists packages with their versions."""
  return ", ".join(f"{name} {number}" for name, number in numbers.items())


def size_text(count: float) -> str:
  """Puts a number of bytes into words, e.g. "1.50 GiB"."""
  return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
