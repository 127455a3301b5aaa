"""Times `nfnets.agc` beside `optax.adaptive_grad_clip` and beside no clipping, on a network's parameters.

    from nfnets.measure import clipping
    print(clipping.compare_clipping(config, rounds=3, steps=50))

Every row is one compiled program that takes its buffers over, as a training step does: the clipping by itself, and the clipping
before SGD with Nesterov momentum, which is what it adds to a step. All programs take turns in one process, and each call starts
from what the call before it returned. All clip every parameter, the classifier's too, since optax knows no exception.
"""

import dataclasses
import datetime
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.table import Table

from nfnets import agc
from nfnets.config import Config
from nfnets.errors import UserError
from nfnets.measure import program
from nfnets.measure.step_report import Spread
from nfnets.train.step.state import build_network

NONE, OPTAX, OURS, TRACKED = "no clipping", "optax.adaptive_grad_clip", "nfnets.agc", "nfnets.agc, track=True"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
  """What one program took: seconds of tracing and compiling, and milliseconds a call, by the median of each round."""

  compile_s: float
  ms: Spread


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClippingReport:
  """Holds all figures; `table()` is for people, `to_json()` for json.dumps.

  Attributes:
    alone: {row: what the clipping by itself took}.
    with_sgd: {row: what the clipping, SGD and the new parameters took}.
    round_ratios: our milliseconds / optax's, both alone, one for each round.
    difference: the largest difference between our clipped gradients and optax's, over the largest of optax's.
  """

  model: str
  parameters: int
  arrays: int
  clipping: float
  eps: float
  device_kind: str
  rounds: int
  steps: int
  alone: dict[str, Timed]
  with_sgd: dict[str, Timed]
  round_ratios: tuple[float, ...]
  difference: float
  versions: dict[str, str]
  date: str

  def to_json(self) -> dict[str, Any]:
    """Returns all figures by name."""
    return {"benchmark": "agc", **dataclasses.asdict(self)}

  def table(self) -> Table:
    """A row for each way of clipping."""
    title = (
      f"{self.model}: {self.parameters:,} parameters in {self.arrays} arrays, float32, lambda {self.clipping:g}; "
      f"{self.device_kind}; medians of {self.rounds} rounds of {self.steps}"
    )
    table = Table("", title=title, title_justify="left")
    for column in ("alone, ms", "compile, s", "with SGD, ms", "compile, s", "over no clipping, ms"):
      table.add_column(column, justify="right")
    plain = self.with_sgd[NONE].ms.median
    for row, timed in self.with_sgd.items():
      alone = self.alone.get(row)
      cells = ("", "") if alone is None else (f"{alone.ms.median:.4g}", f"{alone.compile_s:.2f}")
      more = "" if row == NONE else f"{timed.ms.median - plain:+.3g}"
      table.add_row(row, *cells, f"{timed.ms.median:.4g}", f"{timed.compile_s:.2f}", more)
    return table

  def __str__(self) -> str:
    ratios = Spread.of(self.round_ratios)
    return (
      f"ours / optax, alone: × {ratios.median:.3f} ({ratios.minimum:.3f} to {ratios.maximum:.3f} over {self.rounds} rounds); "
      f"clipped gradients are equal to {self.difference:.1e} of the largest\n"
      f"with {program.versions_text(self.versions)}; {self.date}"
    )


def compare_clipping(
  config: Config, *, rounds: int = 3, steps: int = 50, warmup: int = 5, say: Callable[[str], None] = lambda line: None
) -> ClippingReport:
  """Times the ways of clipping on the parameters of `config.model`, float32, on this machine's first device.

  Gradients are a tenth of the parameters and a little more, so that with the recipes' lambda all units are clipped.

  Args:
    config: the run; lambda and epsilon are config.optim's.
    rounds, steps, warmup: rounds in which every program runs `steps` times in a row, after `warmup` calls.
    say: gets a line as each phase begins.

  Raises:
    UserError: the config has no AGC, or optax's clipping cannot take its parameters.
  """
  config.validate()
  strength, eps = config.optim.clipping, config.optim.agc_eps
  if strength is None or not math.isfinite(strength):
    raise UserError(f"bench agc needs AGC, but config.optim.clipping={strength}; set it, e.g. to 0.01")
  classes, source = program.class_count(config)
  say(f"{config.model.name} with {classes} classes, {source}")
  network = build_network(config.model, classes, seed=config.seed)
  params = jax.block_until_ready(nnx.to_pure_dict(nnx.state(network, nnx.Param)))
  ways = {
    NONE: None,
    OPTAX: optax.adaptive_grad_clip(strength, eps),
    OURS: agc(strength, eps),
    TRACKED: agc(strength, eps, track=True),
  }
  say(f"compiling {2 * len(ways) - 1} programs")
  alone = {name: _Program(way, params) for name, way in ways.items() if way is not None}
  sgd = optax.sgd(0.1, momentum=0.9, nesterov=True)
  chains = {name: sgd if way is None else optax.chain(way, sgd) for name, way in ways.items()}
  with_sgd = {name: _Program(chain, params, apply=True) for name, chain in chains.items()}
  difference = _difference(*(alone[name].buffers[0] for name in (OURS, OPTAX)))  # after one call of each
  programs = [*alone.values(), *with_sgd.values()]
  for each in programs:
    each.seconds(warmup)
  for number in range(rounds):
    say(f"round {number + 1} of {rounds}: {steps} calls of each, in turn")
    for each in programs if number % 2 == 0 else reversed(programs):
      each.rounds.append(1e3 * each.seconds(steps))
  return ClippingReport(
    model=config.model.name,
    parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
    arrays=len(jax.tree.leaves(params)),
    clipping=strength,
    eps=eps,
    device_kind=jax.devices()[0].device_kind,
    rounds=rounds,
    steps=steps,
    alone={name: each.timed() for name, each in alone.items()},
    with_sgd={name: each.timed() for name, each in with_sgd.items()},
    round_ratios=tuple(a / b for a, b in zip(alone[OURS].rounds, alone[OPTAX].rounds, strict=True)),
    difference=difference,
    versions=program.versions(),
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  )


class _Program:
  """One compiled transformation and its buffers. With `apply` its updates change the parameters, else they are gradients."""

  def __init__(self, transform: optax.GradientTransformation, params: Any, *, apply: bool = False):
    def call(grads: Any, params: Any, state: Any) -> Any:
      updates, state = transform.update(grads, state, params)
      return (grads, optax.apply_updates(params, updates), state) if apply else (updates, params, state)

    grads = jax.tree.map(lambda leaf: 0.1 * leaf + 1e-3, params)
    self.buffers = (grads, jax.tree.map(jnp.copy, params), transform.init(params))
    begin = time.perf_counter()
    self.compiled = jax.jit(call, donate_argnums=(0, 1, 2)).lower(*self.buffers).compile()
    self.compile_s = time.perf_counter() - begin
    self.rounds: list[float] = []
    self.buffers = jax.block_until_ready(self.compiled(*self.buffers))

  def seconds(self, steps: int) -> float:
    """Calls it `steps` times in a row, waits for the last, and returns the mean seconds of a call."""
    begin = time.perf_counter()
    for _ in range(steps):
      self.buffers = self.compiled(*self.buffers)
    jax.block_until_ready(self.buffers)
    return (time.perf_counter() - begin) / steps

  def timed(self) -> Timed:
    """What was measured."""
    return Timed(compile_s=self.compile_s, ms=Spread.of(self.rounds))


def _difference(ours: Any, theirs: Any) -> float:
  """The largest difference between two trees over the largest number of the second."""
  largest = lambda tree: max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))
  return largest(jax.tree.map(jnp.subtract, ours, theirs)) / largest(theirs)
