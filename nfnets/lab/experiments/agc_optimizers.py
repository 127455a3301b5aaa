"""Adaptive gradient clipping before optimizers that rescale the gradient themselves, AdamW, Lion and LARS, and behind them."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nfnets.agc import explain_entries, named_leaves, unit_norm
from nfnets.lab import drawing, task, users, verdict
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.progress import Progress
from nfnets.lab.training import CLASSIFIER, MOMENTUM, Params, Recipe, Trainer, batches, clip, units_of

BATCH, LAMBDA = 256, 0.04
# learning rates of each, the last one large
RATES = {"SGD": (0.1, 0.4, 1.6), "AdamW": (0.01, 0.05, 0.25), "Lion": (0.002, 0.012, 0.06), "LARS": (4.0, 16.0, 64.0)}
WAYS = ("none", "before", "behind")  # where AGC stands
OURS = "normalizer-free ResNet"
SAMPLE = 4096  # weights, at most, whose updates are compared from step to step
ByWay = dict[tuple[str, str], np.ndarray]  # (optimizer, way) → numbers

CRITERIA = (
  Criterion(
    name="sgd", claim="SGD at the large learning rate: AGC of the gradient raises test accuracy by at least 0.05.", low=0.05
  ),
  Criterion(
    name="adamw_before",
    claim="AdamW at the large rate: AGC of the gradient changes it by at most 0.05, since Adam divides by the gradient's size.",
    low=-0.05,
    high=0.05,
  ),
  Criterion(
    name="lion_before",
    claim="Lion at the large rate: AGC of the gradient changes it by at most 0.05, since Lion takes signs.",
    low=-0.05,
    high=0.05,
  ),
  Criterion(name="adamw_behind", claim="AGC of AdamW's update instead of the gradient raises it by at least 0.05.", low=0.05),
  Criterion(name="lion_behind", claim="AGC of Lion's update raises it by at least 0.05.", low=0.05),
  Criterion(
    name="sgd_why",
    claim="Why: SGD's steps ‖ΔW‖ / ‖W‖ get shorter by AGC of the gradient, to at most half, at the large rate, in the median "
    "of the first third of the steps.",
    high=0.5,
  ),
  Criterion(name="adamw_why", claim="AdamW's steps do not: they stay between half and twice as long.", low=0.5, high=2.0),
  Criterion(name="lion_why", claim="Nor do Lion's.", low=0.5, high=2.0),
  Criterion(
    name="lars",
    claim="LARS, whose steps are in proportion to the weights, needs no AGC: it changes by at most 0.05.",
    low=-0.05,
    high=0.05,
  ),
  Criterion(
    name="sgd_lars", claim="SGD with AGC is no worse than LARS, each at its best of three rates, by more than 0.01.", low=-0.01
  ),
)
# what is judged of a network of the user's own
YOURS = (
  Criterion(name="yours_sgd", claim="Your model: SGD at the large rate: AGC raises it by at least 0.05.", low=0.05),
  *(
    Criterion(
      name=f"yours_{name.lower()}",
      claim=f"Your model: {name} at the large rate: AGC of the gradient changes it by at most 0.05.",
      low=-0.05,
      high=0.05,
    )
    for name in ("AdamW", "Lion")
  ),
)


def optimizer(name: str, where: str) -> Any:
  """Makes the optimizer of that name with AGC "before" or "behind" it."""
  make = {
    "SGD": lambda schedule: optax.sgd(schedule, momentum=MOMENTUM, nesterov=True),
    "AdamW": lambda schedule: optax.adamw(schedule, weight_decay=1e-4),
    "Lion": lambda schedule: optax.lion(schedule, weight_decay=1e-4),
    "LARS": lambda schedule: optax.lars(schedule, momentum=MOMENTUM, nesterov=True),
  }

  def build(schedule: optax.Schedule, strength: jax.Array, params: Params) -> optax.GradientTransformation:
    inner, agc = make[name](schedule), clip(strength, params)
    return optax.chain(inner, agc) if where == "behind" else optax.chain(agc, inner)

  return build


def run(settings: Settings, progress: Progress) -> Measured:
  """Trains the network with every optimizer, in every way, with every learning rate and seed."""
  data, steps = task.data(settings.data, small=settings.small), settings.of_scale(80, 2000)
  depth, width = settings.of_scale((4, 16), (12, 32))
  config = DeepConfig(depth=depth, width=width, norm="nf", num_classes=data.classes, in_features=data.channels)
  recipe, networks = Recipe(batch=BATCH, steps=steps, warmup=max(5, steps // 20)), (OURS, *settings.models)

  @functools.cache
  def trainer(network: str, name: str, where: str) -> Trainer:
    if network != OURS:
      return users.UserTrainer(network, task.whole(data), recipe, optimizer=optimizer(name, where))
    return Trainer(lambda key: Deep(config, key), data, recipe, optimizer=optimizer(name, where), watch=look)

  def job(network: str, name: str, where: str, rate: float, seed: int) -> list[float]:
    made = trainer(network, name, "before" if where == "none" else where)
    order = batches(len(data.train[1]), made.recipe, seed)
    params, _, seen = made.train(made.init(seed), order, rate, math.inf if where == "none" else LAMBDA)
    lengths, updates = (np.full(steps, np.nan), np.zeros((0, 1))) if seen is None else seen
    return [made.test(params)[0], consecutive(updates), *lengths.tolist()]

  jobs = {
    f"{network}, {name}, AGC {where}, rate {rate:g}, seed {seed}": functools.partial(job, network, name, where, rate, seed)
    for network in networks
    for name, rates in RATES.items()
    for where in WAYS
    for rate in rates
    for seed in range(settings.seeds)
  }
  values = np.array(list(progress.parts(jobs).values()), np.float64)
  found = values.reshape(len(networks), len(RATES), len(WAYS), -1, settings.seeds, 2 + steps)
  by_way = lambda found: {(name, where): found[i, j] for i, name in enumerate(RATES) for j, where in enumerate(WAYS)}
  accuracy = by_way(found[0, ..., 0])  # [rates, seeds] each
  lengths = by_way(found[0, :, :, -1, :, 2:])  # [seeds, steps] each, at the large rate
  theirs = {name: by_way(found[i, ..., 0]) for i, name in enumerate(networks) if name != OURS}
  return Measured(
    samples=figures(accuracy, lengths, data.classes),
    yours={
      f"yours_{name.lower()}": gained(of_theirs, name, "before", data.classes)
      for of_theirs in theirs.values()
      for name in RATES
      if name != "LARS"
    },
    rows=[
      _row(network, name, where, rate, values[i])
      for network, of_network in zip(networks, found, strict=True)
      for (name, where), values in by_way(of_network).items()
      for i, rate in enumerate(RATES[name])
    ],
    draw=lambda figure: draw(figure, accuracy, lengths, theirs),
    caption=f"Normalizer-free residual networks of {depth} blocks on {data.name}, batch {BATCH}, {steps} steps: test accuracy by "
    f"learning rate without AGC, with AGC (λ = {LAMBDA}) of the gradient, and of the optimizer's update; below, at the "
    "large rate, the median ‖ΔW‖ / ‖W‖ of the units of all kernels but the classifier's, and λ in grey. Shades: all seeds.",
    notes=(
      "Where AGC of the gradient changes nothing it may still be of use against single large gradients, whose trace in Adam's "
      "second moment it shortens; such are rare in these short trainings.",
      "The cosine is that of the updates of two consecutive steps, over all kernels but the classifier's, in the median over the "
      f"steps at which it is finite; at most {SAMPLE:,} weights, evenly chosen, are looked at.",
      "Of a person's network the accuracy alone is measured; its dropout, if it has any, is on in tests.",
      "An update that is clipped behind the optimizer has the learning rate in it: λ then bounds the relative change of a step.",
      "After a first run the large learning rates became larger, since at the first ones nothing failed.",
      "Lengths are compared at steps at which they are finite with and without AGC; SGD's without it are so for a few only.",
      "That AGC fails with AdamW and Lion is reported in public threads; no paper claims it.",
    ),
  )


def look(before: Params, after: Params, *_: Any) -> tuple[jax.Array, jax.Array]:
  """`step_length`, and the update of every n-th weight of the same kernels: float32 [at most SAMPLE]."""
  update = jnp.concatenate([(new - old).ravel() for old, new, _ in _kernels(before, after)])
  return step_length(before, after), update[:: -(-update.size // SAMPLE)]


def step_length(before: Params, after: Params) -> jax.Array:
  """The median ‖ΔW‖ / max(‖W‖, 1e-3) of the units of all kernels but the classifier's: float32 []."""
  ratios = [
    (unit_norm(new - old, axes) / jnp.maximum(unit_norm(old, axes), 1e-3)).ravel() for old, new, axes in _kernels(before, after)
  ]
  return jnp.median(jnp.concatenate(ratios))


def _kernels(before: Params, after: Params) -> list[tuple[jax.Array, jax.Array, Any]]:
  """All kernels but the classifier's, before a step and after it, with the axes of a unit."""
  old, new = ({path: leaf for path, leaf, _ in named_leaves(params)} for params in (before, after))
  return [
    (old[entry.path], new[entry.path], entry.unit_axes)
    for entry in explain_entries(before, unit_axes=units_of(before))
    if entry.path.endswith("kernel") and not re.search(CLASSIFIER, entry.path)
  ]


def consecutive(updates: Any) -> float:
  """The median cosine of an update and the one before, of [steps, weights], where it is finite; NaN without any."""
  updates = np.asarray(updates, np.float64)
  with np.errstate(all="ignore"):
    lengths = np.linalg.norm(updates, axis=1)
    cosines = np.sum(updates[1:] * updates[:-1], axis=1) / (lengths[1:] * lengths[:-1])
  finite = cosines[np.isfinite(cosines)]
  return float(np.median(finite)) if finite.size else math.nan


def figures(accuracy: ByWay, lengths: ByWay, classes: int) -> dict[str, list[float]]:
  """The criteria's figures, from accuracies [rates, seeds], and lengths of steps [seeds, steps] at the large learning rates.

  A part that networks which learn nothing would fulfil is NaN where they do not learn.
  """
  ratio = lambda name: [shortened(*pair) for pair in zip(lengths[name, "before"], lengths[name, "none"], strict=True)]
  best = lambda name, where: accuracy[name, where][np.argmax(accuracy[name, where].mean(axis=1))]
  sgd, lars = best("SGD", "before"), best("LARS", "none")
  gain = lambda name, where: gained(accuracy, name, where, classes)
  return {
    "sgd": gain("SGD", "before"),
    "adamw_before": gain("AdamW", "before"),
    "lion_before": gain("Lion", "before"),
    "adamw_behind": gain("AdamW", "behind"),
    "lion_behind": gain("Lion", "behind"),
    "sgd_why": ratio("SGD"),
    "adamw_why": ratio("AdamW"),
    "lion_why": ratio("Lion"),
    "lars": gain("LARS", "before"),
    "sgd_lars": verdict.if_learned(sgd - lars, np.maximum(sgd, lars), classes),
  }


def gained(accuracy: ByWay, name: str, where: str, classes: int) -> list[float]:
  """How much AGC raises the accuracy at the large rate, for each seed; NaN where it is no better than guessing in both ways."""
  clipped, plain = accuracy[name, where][-1], accuracy[name, "none"][-1]
  return verdict.if_learned(clipped - plain, np.maximum(clipped, plain), classes)


def _row(network: str, name: str, where: str, rate: float, found: np.ndarray) -> Row:
  """A row of what was found, [seeds, 2 + steps]."""
  return {
    "network": network,
    "optimizer": name,
    "AGC": where,
    "learning rate": rate,
    "test accuracy": found[:, 0],
    "cosine of consecutive updates": found[:, 1] if network == OURS else "",
  }


def shortened(clipped: np.ndarray, plain: np.ndarray) -> float:
  """The median of clipped / plain, lengths [steps], where both are finite in the first third of the steps; NaN without any."""
  early = slice(0, max(1, len(plain) // 3))
  both = np.isfinite(clipped[early]) & np.isfinite(plain[early])
  return float(np.median(clipped[early][both] / plain[early][both])) if both.any() else math.nan


def draw(figure: Any, accuracy: ByWay, lengths: ByWay, theirs: dict[str, ByWay]) -> None:
  """Draws two panels for each optimizer, and a third for a network of the user's own, whose accuracies are `theirs`."""
  figure.set_size_inches(9.0, 6.0 + 3.0 * len(theirs))
  axes, below, *more = figure.subplots(2 + len(theirs), len(RATES), sharey="row")
  _draw_accuracy(axes, accuracy)
  for row, (network, values) in zip(more, theirs.items(), strict=True):
    _draw_accuracy(row, values, title=network.rpartition("/")[2])
  for lower, (name, rates) in zip(below, RATES.items(), strict=True):
    for style, where in enumerate(WAYS):
      steps = np.arange(1, 1 + lengths[name, where].shape[1])
      drawing.line(lower, steps, np.maximum(lengths[name, where], 1e-8), "", style)
    lower.axhline(LAMBDA, color="0.6", lw=4, alpha=0.5, zorder=0)
    lower.set_yscale("log")
    lower.set_ylim(1e-6, 1e2)
    drawing.name_axes(lower, "step", "‖ΔW‖ / ‖W‖" if lower is below[0] else "", f"rate {rates[-1]:g}")


def _draw_accuracy(axes: Any, accuracy: ByWay, title: str | None = None) -> None:
  """Draws the accuracy by learning rate, a panel an optimizer."""
  for axis, (name, rates) in zip(axes, RATES.items(), strict=True):
    for style, where in enumerate(WAYS):
      drawing.line(axis, rates, accuracy[name, where].T, f"AGC {where}" if where != "none" else "no AGC", style, markers=True)
    axis.set_xscale("log")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.set_ylim(0, 1.02)
    drawing.name_axes(axis, "learning rate", "test accuracy" if axis is axes[0] else "", name)
  drawing.legend(axes[0], loc="best", title=title)


EXPERIMENT = Experiment(
  name="agc_optimizers",
  title="Adaptive gradient clipping and other optimizers",
  paper="Brock et al. 2021 (2102.06171), You et al. 2017 (1708.03888), Chen et al. 2023 (2302.06675)",
  section="Brock: section 4, which uses SGD alone and compares with LARS, no figure; You and Chen: the optimizers LARS and Lion "
  "alone, no section or figure; public reports about AdamW and Lion",
  claim="AGC of the gradient helps SGD at large learning rates and does nothing for AdamW, Lion and LARS, which rescale the "
  "gradient themselves; AGC of their updates helps.",
  criteria=CRITERIA,
  minutes=1.1,
  yours=YOURS,
  run=run,
)
