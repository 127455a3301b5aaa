"""Training a ResNet without any normalizer: alpha/beta with scaled WS, Dynamic Tanh, Derf, Fixup and SkipInit, side by side."""

import functools
import math
from typing import Any

import numpy as np

from nfnets.lab import drawing, task, users, verdict
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.progress import Progress
from nfnets.lab.training import Recipe, Trainer, batches

BATCH, LAMBDA = 64, 0.16
RATES = (0.005, 0.02, 0.08, 0.32, 1.28)
# name: (normalizer, AGC's λ)
NETWORKS = {
  "batch": ("batch", math.inf),
  "NF": ("nf", LAMBDA),
  "DyT": ("dyt", math.inf),
  "Derf": ("derf", math.inf),
  "Fixup": ("fixup", math.inf),
  "SkipInit": ("skipinit", math.inf),
  "SkipInit 1/√d": ("skipinit_root", math.inf),
  "none": ("none", math.inf),
}

CRITERIA = (
  Criterion(
    name="dyt",
    claim="Dynamic Tanh cannot replace batch normalization in a ResNet: the accuracy falls by at least 0.01.",
    low=0.01,
  ),
  Criterion(name="nf", claim="NF can: its accuracy is no lower, by more than 0.01.", low=-0.01),
  Criterion(name="nf_dyt", claim="NF is better than Dynamic Tanh by at least 0.01.", low=0.01),
  Criterion(name="derf", claim="Derf is no worse than Dynamic Tanh, by more than 0.01.", low=-0.01),
  Criterion(name="fixup", claim="Fixup trains as well as batch normalization: no lower by more than 0.01.", low=-0.01),
  Criterion(name="skipinit", claim="So does SkipInit, whose branches begin with 0.", low=-0.01),
  Criterion(name="skipinit_root", claim="And SkipInit with 1 / sqrt(blocks) at the beginning.", low=-0.01),
)
# what is judged of a network of the user's own
YOURS = (
  Criterion(
    name="yours",
    claim="Your model trains as well as the network with batch normalization: no lower by more than 0.01.",
    low=-0.01,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Trains every network with every learning rate and seed."""
  data, steps = task.data(settings.data, small=settings.small), settings.of_scale(200, 5000)
  depth, width = settings.of_scale((6, 16), (16, 32))
  networks = NETWORKS | {name: (name, math.inf) for name in settings.models}
  recipe = Recipe(batch=BATCH, steps=steps, warmup=max(5, steps // 20))

  @functools.cache
  def trainer(norm: str) -> Trainer:
    if norm in settings.models:
      return users.UserTrainer(norm, task.whole(data), recipe)
    config = DeepConfig(depth=depth, width=width, norm=norm, convs=2, num_classes=data.classes, in_features=data.channels)
    return Trainer(lambda key: Deep(config, key), data, recipe)

  def job(name: str, rate: float, seed: int) -> list[float]:
    norm, strength = networks[name]
    made = trainer(norm)
    params, losses, _ = made.train(made.init(seed), batches(len(data.train[1]), made.recipe, seed), rate, strength)
    return [made.test(params, running=True)[0], *losses.tolist()]

  jobs = {
    f"{name}, rate {rate:g}, seed {seed}": functools.partial(job, name, rate, seed)
    for name in networks
    for rate in RATES
    for seed in range(settings.seeds)
  }
  found = np.array(list(progress.parts(jobs).values())).reshape(len(networks), len(RATES), settings.seeds, -1)
  accuracy = dict(zip(networks, found[..., 0], strict=True))  # [rates, seeds]
  losses = dict(zip(networks, found[..., 1:], strict=True))  # [rates, seeds, steps]
  best = {name: best_rate(values) for name, values in accuracy.items()}
  at_best = {name: values[best[name]] for name, values in accuracy.items()}
  return Measured(
    samples=figures(at_best, data.classes),
    yours={"yours": over(at_best, settings.model, "batch", data.classes)} if settings.model else {},
    rows=[_row(name, i, values[i], best[name]) for name, values in accuracy.items() for i in range(len(RATES))],
    draw=lambda figure: draw(figure, accuracy, {name: values[best[name]] for name, values in losses.items()}),
    caption=f"Residual networks of {depth} blocks with two convolutions of {width} channels on {data.name}, batch {BATCH}, "
    f"{steps} steps. Left: test accuracy by learning rate. Right: training loss at each one's best rate, mean of ten steps. "
    "Shades: all seeds.",
    notes=(
      f"Each has the same {len(RATES)} learning rates, the same batches and steps; the best is that of the mean over seeds. "
      f"NF has AGC with λ = {LAMBDA}, the others no clipping. Fixup has no biases but its scalar ones and the classifier's, "
      "which take a tenth of the learning rate, as do its scales. "
      "Batch normalization is tested with running statistics of 50 batches, taken after training.",
      "The figures that are claimed are from ResNet-50 on ImageNet: 76.2 % with batch normalization, 68.9 % with Dynamic Tanh.",
    ),
  )


def best_rate(accuracy: np.ndarray) -> int:
  """The learning rate with the highest mean over seeds, of [rates, seeds]; what is not finite counts as lowest."""
  return int(np.argmax(np.nan_to_num(accuracy.mean(axis=1), nan=-1.0)))


def figures(accuracy: dict[str, np.ndarray], classes: int) -> dict[str, list[float]]:
  """The criteria's figures from accuracies [seeds] at the best learning rate."""
  pairs = {
    "dyt": ("batch", "DyT"),
    "nf": ("NF", "batch"),
    "nf_dyt": ("NF", "DyT"),
    "derf": ("Derf", "DyT"),
    "fixup": ("Fixup", "batch"),
    "skipinit": ("SkipInit", "batch"),
    "skipinit_root": ("SkipInit 1/√d", "batch"),
  }
  return {name: over(accuracy, *pair, classes) for name, pair in pairs.items()}


def over(accuracy: dict[str, np.ndarray], one: str, other: str, classes: int) -> list[float]:
  """How much more accurate one network is than another, for each seed; NaN where the other one has not learned."""
  return verdict.if_learned(accuracy[one] - accuracy[other], accuracy[other], classes)


def _row(name: str, number: int, accuracy: np.ndarray, best: int) -> Row:
  shown = "" if number != best else "yes" if 0 < best < len(RATES) - 1 else "yes, at the grid's end"
  return {"network": name, "learning rate": RATES[number], "test accuracy": accuracy, "best": shown}


def draw(figure: Any, accuracy: dict[str, np.ndarray], losses: dict[str, np.ndarray]) -> None:
  """Draws two panels."""
  by_rate, curves = figure.subplots(1, 2)
  for style, (name, values) in enumerate(accuracy.items()):
    drawing.line(by_rate, RATES, values.T, name, style, markers=True)
    smooth = np.stack([np.convolve(seed, np.ones(10) / 10, mode="valid") for seed in losses[name]])
    drawing.line(curves, np.arange(smooth.shape[1]) + 10, np.maximum(smooth, 1e-6), name, style)
  by_rate.set_xscale("log")
  by_rate.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
  by_rate.minorticks_off()
  drawing.name_axes(by_rate, "learning rate", "test accuracy")
  by_rate.set_ylim(-0.55, 1.02)  # room for the legend
  by_rate.set_yticks(np.linspace(0, 1, 6))
  drawing.legend(by_rate, loc="lower left", ncols=2)
  curves.set_yscale("log")
  drawing.name_axes(curves, "step", "training loss, nats")


EXPERIMENT = Experiment(
  name="without_norm",
  title="Training without any normalizer",
  paper="Zhu et al. 2025 (2503.10622), Brock et al. 2021 (2102.06171), Zhang et al. 2019 (1901.09321), "
  "De & Smith 2020 (2002.10444)",
  section="Zhu: the limitations, Dynamic Tanh in the place of batch normalization in ResNet-50, no figure; Brock: section 4; "
  "Zhang: section 3; De & Smith: section 4; all but Brock from memory; Derf is not of these papers",
  claim="In a ResNet Dynamic Tanh cannot replace batch normalization, while alpha/beta with scaled weight standardization and "
  "AGC can, and so can Fixup and SkipInit.",
  criteria=CRITERIA,
  minutes=1.9,
  yours=YOURS,
  run=run,
)
