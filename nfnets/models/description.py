"""Describes a network: its stages with shapes, parameters and multiply-adds, all counted exactly on the traced program."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from nfnets.models.network import Network
from nfnets.models.registry import create, variant


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
  """One row of the table: the stem, a stage, the tail or the classifier."""

  name: str
  # 0 but for stages
  blocks: int
  parameters: int
  # output [height, width, channels], or [features], by resolution in pixels
  shapes: dict[int, tuple[int, ...]]
  # multiply-adds an image, by resolution in pixels
  macs: dict[int, int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
  """A network's stages; `str()` makes a table of them. FLOPs are twice the multiply-adds."""

  name: str
  num_classes: int
  # see norms.py; "nf": normalizer-free, with alpha and beta
  norm: str
  # pixels a side by use, such as {"train": 192, "test": 256}
  resolutions: dict[str, int]
  stages: list[Stage]

  @property
  def parameters(self) -> int:
    """The number of parameters of all stages."""
    return sum(stage.parameters for stage in self.stages)

  @property
  def macs(self) -> dict[int, int]:
    """Multiply-adds an image of all stages, by resolution in pixels."""
    return {size: sum(stage.macs[size] for stage in self.stages) for size in self.resolutions.values()}

  def __str__(self) -> str:
    shape_text = lambda shape: " × ".join(map(str, shape))
    header = ["stage", "blocks", "parameters"] + [
      column for use, size in self.resolutions.items() for column in (f"{use}: {size} px", "multiply-adds")
    ]
    rows = [
      [stage.name, str(stage.blocks or ""), f"{stage.parameters:,}"]
      + [
        cell for size in self.resolutions.values() for cell in (shape_text(stage.shapes[size]), f"{stage.macs[size] / 1e9:.3f} G")
      ]
      for stage in self.stages
    ]
    rows.append(
      ["total", str(sum(stage.blocks for stage in self.stages)), f"{self.parameters:,}"]
      + [cell for size in self.resolutions.values() for cell in ("", f"{self.macs[size] / 1e9:.3f} G")]
    )
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    line = lambda cells: "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    rule = "-" * len(line(header))
    totals = "; ".join(
      f"{size} px: {2 * self.macs[size] / 1e9:.2f} GFLOP = 2 × {self.macs[size] / 1e9:.2f} G multiply-adds"
      for size in self.resolutions.values()
    )
    return "\n".join(
      [
        f"{self.name}, {self.num_classes} classes, norm={self.norm}",
        line(header),
        rule,
        *map(line, rows[:-1]),
        rule,
        line(rows[-1]),
        f"A forward pass, an image (convolutions and matrix products). {totals}.",
        'Papers and the release quote multiply-adds as "FLOPs"; a training step costs about 3 forward passes.',
      ]
    )


def describe(name: str, num_classes: int = 1000, *, resolutions: dict[str, int] | None = None, **overrides) -> Description:
  """Describes a network without making its parameters, so that it costs no memory.

  Args:
    name, num_classes, overrides: as for `models.create`, with the same errors.
    resolutions: {use: pixels a side}, the resolutions to describe; None = the variant's for training and testing.
  """
  config = variant(name, **overrides)
  if resolutions is None:
    same = config.train_resolution == config.test_resolution
    resolutions = (
      {"train and test": config.train_resolution} if same else {"train": config.train_resolution, "test": config.test_resolution}
    )
  network = nnx.eval_shape(lambda: create(name, num_classes, **overrides))
  stage_of = _stage_names(config.depth)
  parameters = collections.Counter()
  for path, param in nnx.to_flat_state(nnx.state(network, nnx.Param)):
    parameters[stage_of("/".join(map(str, path)))] += math.prod(param.shape)
  traced = {size: _trace(network, size, stage_of) for size in set(resolutions.values())}
  names = ["stem", *(f"stage {i + 1}" for i in range(len(config.depth))), "tail", "fc"]
  stages = [
    Stage(
      name=stage,
      blocks=config.depth[i - 1] if stage.startswith("stage") else 0,
      parameters=parameters[stage],
      shapes={size: traced[size][0][stage] for size in traced},
      macs={size: traced[size][1][stage] for size in traced},
    )
    for i, stage in enumerate(names)
  ]
  norm = getattr(config, "norm", "nf")
  return Description(name=name, num_classes=num_classes, norm=norm, resolutions=resolutions, stages=stages)


def _stage_names(depth: tuple[int, ...]):
  """Makes the function from a parameter's path, or from a scope's name, to the name of its row in the table."""
  stage_of_block = [f"stage {i + 1}" for i, blocks in enumerate(depth) for _ in range(blocks)]

  def stage_of(path: str) -> str:
    top, *rest = path.split("/")
    if top == "blocks":
      return stage_of_block[int(rest[0])]
    return {"stem": "stem", "bias1": "stem", "fc": "fc", "bias2": "fc"}.get(top, "tail")

  return stage_of


def _trace(network: Network, size: int, stage_of) -> tuple[dict[str, tuple[int, ...]], collections.Counter]:
  """Traces the network on one image of size × size; returns (output shape by stage, multiply-adds by stage)."""
  shapes: dict[str, tuple[int, ...]] = {}

  def tap(name: str, x: jax.Array) -> None:
    if name in ("stem", "pool", "logits") or name.count("/") == 1 and name.startswith("blocks/"):
      shapes[{"pool": "tail", "logits": "fc"}.get(name, stage_of(name))] = x.shape[1:]

  graph, state = nnx.split(network)
  program = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state).outputs(x, tap=tap)["logits"])(
    state, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  )
  macs = collections.Counter()
  for scope, count in multiply_adds(program.jaxpr):
    macs[stage_of(scope)] += count
  return shapes, macs


def multiply_adds(jaxpr, scope: str = ""):
  """Yields (named scope, multiply-adds) of every convolution and matrix product in a jaxpr and the jaxprs within it.

  Where the program differs between platforms, its default is counted: a grouped convolution as such, not the CPU's form of it.
  """
  for eqn in jaxpr.eqns:
    eqn_scope = str(eqn.source_info.name_stack) or scope
    if eqn.primitive.name == "conv_general_dilated":
      kernel = eqn.invars[1].aval.shape
      spec = eqn.params["dimension_numbers"].rhs_spec  # (out, in, *space)
      yield eqn_scope, math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[spec[0]]
    elif eqn.primitive.name == "dot_general":
      contracted, _ = eqn.params["dimension_numbers"][0]
      left = eqn.invars[0].aval.shape
      yield eqn_scope, math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    params = eqn.params
    if params.get("branches_platforms"):  # of jax.lax.platform_dependent, whose default comes last
      params = {"default": params["branches"][-1]}
    for value in params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from multiply_adds(inner, eqn_scope)
