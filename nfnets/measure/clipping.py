"""Times `nfnets.agc` beside `optax.adaptive_grad_clip` and beside no clipping, on a network's parameters.

    report = clipping.compare_clipping(config, rounds=3, steps=50)
    rich.print(report.table(), report)

Every row is one compiled program that takes its buffers over, as a training step does: the clipping by itself, and the clipping
before SGD with Nesterov momentum, which is what it adds to a step. All programs take turns in one process, and each call starts
from what the call before it returned. All clip every parameter, the classifier's too, since optax knows no exception.
"""

import dataclasses
import datetime
import math
import statistics
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
from nfnets.measure.runs import Run
from nfnets.measure.step_report import Spread
from nfnets.train.step.state import build_network

NONE, OPTAX, OURS, TRACKED = "no clipping", "optax.adaptive_grad_clip", "nfnets.agc", "nfnets.agc, track=True"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
  """What one program took: seconds of tracing and compiling, and the mean milliseconds of a call in each round."""

  compile_s: float
  rounds_ms: tuple[float, ...]

  @property
  def ms(self) -> float:
    """The median of the rounds."""
    return statistics.median(self.rounds_ms)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClippingReport:
  """Holds all figures; `table()` is for people, `to_json()` for json.dumps.

  Attributes:
    alone: {row: what the clipping by itself took}.
    with_sgd: {row: what the clipping, SGD and the new parameters took}.
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
  difference: float
  versions: dict[str, str]
  date: str

  @property
  def round_ratios(self) -> tuple[float, ...]:
    """Our milliseconds / optax's, both alone, one for each round."""
    return tuple(ours / theirs for ours, theirs in zip(self.alone[OURS].rounds_ms, self.alone[OPTAX].rounds_ms, strict=True))

  def to_json(self) -> dict[str, Any]:
    """Returns all figures by name."""
    return {"benchmark": "agc", **dataclasses.asdict(self), "round_ratios": self.round_ratios}

  def table(self) -> Table:
    """A row for each way of clipping."""
    title = (
      f"{self.model}: {self.parameters:,} parameters in {self.arrays} arrays, float32, lambda {self.clipping:g}; "
      f"{self.device_kind}; medians of {self.rounds} rounds of {self.steps}"
    )
    table = Table("", title=title, title_justify="left")
    for column in ("alone, ms", "compile, s", "with SGD, ms", "compile, s", "over no clipping, ms"):
      table.add_column(column, justify="right")
    plain = self.with_sgd[NONE].ms
    for row, timed in self.with_sgd.items():
      alone = self.alone.get(row)
      cells = ("", "") if alone is None else (f"{alone.ms:.4g}", f"{alone.compile_s:.2f}")
      more = "" if row == NONE else f"{timed.ms - plain:+.3g}"
      table.add_row(row, *cells, f"{timed.ms:.4g}", f"{timed.compile_s:.2f}", more)
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
    UserError: the config has no AGC, or the number of its classes is not known.
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
  states: list[Any] = [alone[name].run.state for name in (OURS, OPTAX)]  # after one call of each
  difference = _difference(*(grads for grads, _, _ in states))
  programs = [*alone.values(), *with_sgd.values()]
  for each in programs:
    each.run.seconds_per_step(warmup)
  for number in range(rounds):
    say(f"round {number + 1} of {rounds}: {steps} calls of each, in turn")
    for each in programs if number % 2 == 0 else reversed(programs):
      each.rounds_ms.append(1e3 * each.run.seconds_per_step(steps))
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
    difference=difference,
    versions=program.versions(),
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  )


class _Program:
  """One compiled transformation. With `apply` its updates change the parameters, else they are the next call's gradients."""

  def __init__(self, transform: optax.GradientTransformation, params: Any, *, apply: bool = False):
    def call(state: Any, batch: Any) -> tuple[Any, dict]:
      grads, params, inner = state
      updates, inner = transform.update(grads, inner, params)
      return (grads, optax.apply_updates(params, updates), inner) if apply else (updates, params, inner), batch

    grads = jax.tree.map(lambda leaf: 0.1 * leaf + 1e-3, params)
    state: Any = (grads, jax.tree.map(jnp.copy, params), transform.init(params))
    begin = time.perf_counter()
    compiled = jax.jit(call, donate_argnums=0).lower(state, {}).compile()
    self.compile_s, self.rounds_ms = time.perf_counter() - begin, []
    self.run = Run(step=compiled, state=state, batch={})
    self.run.seconds_per_step(1)

  def timed(self) -> Timed:
    """What was measured."""
    return Timed(compile_s=self.compile_s, rounds_ms=tuple(self.rounds_ms))


def _difference(ours: Any, theirs: Any) -> float:
  """The largest difference between two trees over the largest number of the second."""
  largest = lambda tree: max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))
  return largest(jax.tree.map(jnp.subtract, ours, theirs)) / largest(theirs)
