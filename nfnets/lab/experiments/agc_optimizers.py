"""Adaptive gradient clipping before optimizers that rescale the gradient themselves, AdamW, Lion and LARS, and behind them."""

import functools
import math
from typing import Any

import jax
import numpy as np
import optax

from nfnets.lab import drawing, task, users
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.progress import Progress
from nfnets.lab.training import MOMENTUM, Params, Recipe, Trainer, batches, clip

BATCH, LAMBDA = 256, 0.04
# learning rates of each, the last one large
RATES = {"SGD": (0.1, 0.4, 1.6), "AdamW": (0.01, 0.05, 0.25), "Lion": (0.002, 0.012, 0.06), "LARS": (4.0, 16.0, 64.0)}
WAYS = ("none", "before", "behind")  # where AGC stands
OURS = "normalizer-free ResNet"

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
    name="lars",
    claim="LARS, whose steps are in proportion to the weights, needs no AGC: it changes by at most 0.05.",
    low=-0.05,
    high=0.05,
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
  data, steps = task.data(settings.data), settings.of_scale(80, 2000)
  depth, width = settings.of_scale((4, 16), (12, 32))
  config = DeepConfig(depth=depth, width=width, norm="nf", num_classes=data.classes, in_features=data.channels)
  recipe, networks = Recipe(batch=BATCH, steps=steps, warmup=max(5, steps // 20)), (OURS, *settings.models)

  @functools.cache
  def trainer(network: str, name: str, where: str) -> Trainer:
    if network != OURS:
      return users.UserTrainer(network, task.whole(data), recipe, optimizer=optimizer(name, where))
    return Trainer(lambda key: Deep(config, key), data, recipe, optimizer=optimizer(name, where))

  def job(network: str, name: str, where: str, rate: float, seed: int) -> float:
    made = trainer(network, name, "before" if where == "none" else where)
    order = batches(len(data.train[1]), made.recipe, seed)
    params, *_ = made.train(made.init(seed), order, rate, math.inf if where == "none" else LAMBDA)
    return made.test(params)[0]

  jobs = {
    f"{network}, {name}, AGC {where}, rate {rate:g}, seed {seed}": functools.partial(job, network, name, where, rate, seed)
    for network in networks
    for name, rates in RATES.items()
    for where in WAYS
    for rate in rates
    for seed in range(settings.seeds)
  }
  values = np.array(list(progress.parts(jobs).values()), np.float64)
  found = values.reshape(len(networks), len(RATES), len(WAYS), -1, settings.seeds)
  by_way = lambda found: {(name, where): found[i, j] for i, name in enumerate(RATES) for j, where in enumerate(WAYS)}
  accuracy = by_way(found[0])  # [rates, seeds] each
  return Measured(
    samples=figures(accuracy),
    rows=[
      _row(network, name, where, rate, values[i])
      for network, of_network in zip(networks, found, strict=True)
      for (name, where), values in by_way(of_network).items()
      for i, rate in enumerate(RATES[name])
    ],
    draw=lambda figure: draw(figure, accuracy),
    caption=f"Normalizer-free residual networks of {depth} blocks on {data.name}, batch {BATCH}, {steps} steps: test accuracy by "
    f"learning rate without AGC, with AGC (λ = {LAMBDA}) of the gradient, and of the optimizer's update. Shades: all seeds.",
    notes=(
      "Where AGC of the gradient changes nothing it may still be of use against single large gradients, whose trace in Adam's "
      "second moment it shortens; such are rare in these short trainings.",
      "An update that is clipped behind the optimizer has the learning rate in it: λ then bounds the relative change of a step.",
      "That AGC fails with AdamW and Lion is reported in public threads; no paper claims it.",
    ),
  )


def figures(accuracy: dict[tuple[str, str], np.ndarray]) -> dict[str, list[float]]:
  """The criteria's figures at the large learning rates, from accuracies [rates, seeds]."""
  gain = lambda name, where: list(accuracy[name, where][-1] - accuracy[name, "none"][-1])
  return {
    "sgd": gain("SGD", "before"),
    "adamw_before": gain("AdamW", "before"),
    "lion_before": gain("Lion", "before"),
    "adamw_behind": gain("AdamW", "behind"),
    "lion_behind": gain("Lion", "behind"),
    "lars": gain("LARS", "before"),
  }


def _row(network: str, name: str, where: str, rate: float, accuracy: np.ndarray) -> Row:
  return {
    "network": network,
    "optimizer": name,
    "AGC": where,
    "learning rate": rate,
    "test accuracy": float(accuracy.mean()),
    "lowest": float(accuracy.min()),
    "highest": float(accuracy.max()),
  }


def draw(figure: Any, accuracy: dict[tuple[str, str], np.ndarray]) -> None:
  """Draws a panel for each optimizer."""
  axes = figure.subplots(1, len(RATES), sharey=True)
  for axis, (name, rates) in zip(axes, RATES.items(), strict=True):
    for style, where in enumerate(WAYS):
      drawing.line(axis, rates, accuracy[name, where].T, f"AGC {where}" if where != "none" else "no AGC", style, markers=True)
    axis.set_xscale("log")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.set_ylim(0, 1.02)
    drawing.name_axes(axis, "learning rate", "test accuracy" if axis is axes[0] else "", name)
  drawing.legend(axes[0], loc="lower left")


EXPERIMENT = Experiment(
  name="agc_optimizers",
  title="Adaptive gradient clipping and other optimizers",
  paper="Brock et al. 2021 (2102.06171), You et al. 2017 (1708.03888), Chen et al. 2023 (2302.06675)",
  section="Brock: section 4, which uses SGD alone and compares with LARS; public reports about AdamW and Lion",
  claim="AGC of the gradient helps SGD at large learning rates and does nothing for AdamW, Lion and LARS, which rescale the "
  "gradient themselves; AGC of their updates helps.",
  criteria=CRITERIA,
  minutes=1.4,
  run=run,
)
