"""Accuracy against batch size, for normalizers and for networks without one, with and without adaptive gradient clipping."""

import functools
import math
from typing import Any

import numpy as np

from nfnets.lab import drawing, task, users, verdict
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.progress import Progress
from nfnets.lab.training import Recipe, Trainer, batches

LAMBDAS = (0.01, 0.02, 0.04, 0.08, 0.16)
NETWORKS = {"batch": "batch", "group": "group:4", "layer": "layer", "NF": "nf"}
STEP = 4.0  # from one learning rate of the grid to the next
LARGE = 256  # images

CRITERIA = (
  Criterion(
    name="small",
    claim="At the smallest batch NF, with AGC or without, is better than batch normalization by at least 0.01 of accuracy.",
    low=0.01,
  ),
  Criterion(
    name="middle", claim="At a batch in between NF with AGC is no worse than batch normalization, by more than 0.01.", low=-0.01
  ),
  Criterion(name="large", claim="At the largest batch AGC raises the accuracy of NF by at least 0.01.", low=0.01),
  Criterion(
    name="falls",
    claim="AGC's best threshold falls as batches grow: the rank correlation of batch and best λ is at most -0.4.",
    high=-0.4,
  ),
)
# what is judged of a network of the user's own
YOURS = (
  Criterion(
    name="yours_small",
    claim="Your model: at the smallest batch it is better than batch normalization by at least 0.01.",
    low=0.01,
  ),
  Criterion(
    name="yours_large",
    claim="Your model: at the largest batch it is no worse than NF with AGC at its best λ, by more than 0.01.",
    low=-0.01,
  ),
)


def arms(lambdas: tuple[float, ...], models: tuple[str, ...] = ()) -> dict[str, tuple[str, float]]:
  """{name: (normalizer, or one of a person's `models`; AGC's λ)}."""
  plain = {name: (norm, math.inf) for name, norm in (NETWORKS | {model: model for model in models}).items()}
  return {**plain, **{f"NF + AGC {strength:g}": ("nf", strength) for strength in lambdas}}


def rates(batch: int, settings: Settings) -> list[float]:
  """The grid of learning rates, the same for all: from 0.05 on at 64 images, times the root of batch / 64 elsewhere.

  At the scale small there are three, and where batches are large, and their steps few, two more: a lower and a higher one.
  """
  first, last = (-1, 4) if settings.small and batch >= LARGE else (0, settings.of_scale(3, 4))
  return [0.05 * (batch / 64) ** 0.5 * STEP**k for k in range(first, last)]


def run(settings: Settings, progress: Progress) -> Measured:
  """Trains every network with every batch size, learning rate and seed, for the same number of epochs."""
  sizes = settings.of_scale((4, 32, 256, 1024), (4, 16, 64, 256, 1024))
  width, depth, epochs = settings.of_scale((16, 2, 12), (16, 2, 10))
  lambdas, grids = LAMBDAS, {batch: rates(batch, settings) for batch in sizes}
  data, ways = task.data(settings.data, small=settings.small), arms(lambdas, settings.models)

  @functools.cache
  def trainer(norm: str, batch: int) -> Trainer:
    steps = max(1, epochs * len(data.train[1]) // batch)
    recipe = Recipe(batch=batch, steps=steps, warmup=max(1, steps // 18))
    if norm in settings.models:
      return users.UserTrainer(norm, task.whole(data), recipe)
    config = DeepConfig(depth=depth, width=width, norm=norm, num_classes=data.classes, in_features=data.channels)
    return Trainer(lambda key: Deep(config, key), data, recipe)

  def job(name: str, batch: int, rate: float, seed: int) -> float:
    norm, strength = ways[name]
    made = trainer(norm, batch)
    params, *_ = made.train(made.init(seed), batches(len(data.train[1]), made.recipe, seed), rate, strength)
    return made.test(params, running=True)[0]

  label = lambda name, batch, rate, seed: f"{name}, batch {batch}, rate {rate:.3g}, seed {seed}"
  jobs = {
    label(name, batch, rate, seed): functools.partial(job, name, batch, rate, seed)
    for batch in sizes
    for name in ways
    for rate in grids[batch]
    for seed in range(settings.seeds)
  }
  found = progress.parts(jobs)
  tried = {  # [rates, seeds] each
    (name, batch): np.array([[found[label(name, batch, rate, seed)] for seed in range(settings.seeds)] for rate in grids[batch]])
    for name in ways
    for batch in sizes
  }
  best = {key: int(np.argmax(values.mean(axis=-1))) for key, values in tried.items()}
  accuracy = {name: np.stack([tried[name, batch][best[name, batch]] for batch in sizes]) for name in ways}  # [sizes, seeds]
  return Measured(
    samples=figures(accuracy, sizes, lambdas, data.classes),
    yours=of_model(settings.model, accuracy, lambdas, data.classes) if settings.model else {},
    rows=_rows(accuracy, best, grids),
    draw=lambda figure: draw(figure, accuracy, sizes, lambdas),
    caption=f"Test accuracy after {epochs} epochs of {data.name} by batch size, each at its best of "
    f"{_count(grids)} learning rates (left), and by AGC's λ (right). Shades: all seeds.",
    notes=(
      f"Residual networks of {depth} blocks and {width} channels on {len(data.train[1])} images; learning rates are a factor "
      f"{STEP:g} apart, and the best is that of the mean over seeds. Epochs are equal, so that large batches have few steps.",
      "The best learning rate, and AGC's best λ, are those of the test accuracy that is shown; NF with AGC chooses among "
      f"{len(lambdas)} times as many trainings as the others.",
      "Batch normalization is tested with running statistics of 50 batches of the size that it was trained with, taken after "
      "training, which is kinder to it at the largest size, where training has hardly as many steps.",
      "After a first run epochs, grid and images (patches of 2×2 pixels) were changed; the criteria were not. On 2026-11-30 "
      "large batches got two learning rates more at the scale small, since best ones lay at the grid's ends.",
      "The paper trained NF-ResNet-50 and -200 on ImageNet with batches of 256 to 4,096.",
    ),
  )


def figures(
  accuracy: dict[str, np.ndarray], sizes: tuple[int, ...], lambdas: tuple[float, ...], classes: int
) -> dict[str, list[float]]:
  """The criteria's figures from accuracies [sizes, seeds] at the best learning rate."""
  over = lambda figure, other: verdict.if_learned(figure, accuracy[other].max(axis=0), classes)  # at some size it must learn
  clipped, best = best_lambda(accuracy, lambdas)
  middle = len(sizes) // 2
  small = np.maximum(best[0].mean(), accuracy["NF"][0].mean())
  without_norm = best[0] if small == best[0].mean() else accuracy["NF"][0]
  return {
    "small": over(without_norm - accuracy["batch"][0], "batch"),
    "middle": over(best[middle] - accuracy["batch"][middle], "batch"),
    "large": over(best[-1] - accuracy["NF"][-1], "NF"),
    "falls": [correlation(clipped[:, :, seed]) for seed in range(clipped.shape[-1])],
  }


def best_lambda(accuracy: dict[str, np.ndarray], lambdas: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
  """NF's accuracies with AGC, [λ, sizes, seeds], and those at the λ that is best for each size in the mean, [sizes, seeds]."""
  clipped = np.stack([accuracy[f"NF + AGC {strength:g}"] for strength in lambdas])
  return clipped, clipped[np.argmax(clipped.mean(axis=-1), axis=0), np.arange(clipped.shape[1])]


def of_model(model: str, accuracy: dict[str, np.ndarray], lambdas: tuple[float, ...], classes: int) -> dict[str, list[float]]:
  """The figures of a network of the user's own, from accuracies [sizes, seeds]."""
  theirs, (_, best) = accuracy[model], best_lambda(accuracy, lambdas)
  return {
    "yours_small": verdict.if_learned(theirs[0] - accuracy["batch"][0], accuracy["batch"].max(axis=0), classes),
    "yours_large": verdict.if_learned(theirs[-1] - best[-1], best[-1], classes),
  }


def correlation(clipped: np.ndarray) -> float:
  """The rank correlation of batch size and best λ, of accuracies [λ, sizes]; 0 where the best λ is the same for all sizes."""
  best = np.argmax(clipped, axis=0)
  return verdict.rank_correlation(np.arange(len(best)), best) if np.ptp(best) else 0.0


def _count(grids: dict[int, list[float]]) -> str:
  """How many learning rates there are, in words."""
  counts = sorted({len(grid) for grid in grids.values()})
  return str(counts[0]) if len(counts) == 1 else f"{counts[0]} (from {LARGE} images on {counts[1]})"


def _rows(accuracy: dict[str, np.ndarray], best: dict[tuple[str, int], int], grids: dict[int, list[float]]) -> list[Row]:
  return [
    {
      "network": name,
      "batch": batch,
      "test accuracy": values[i],
      "best learning rate": float(grid[best[name, batch]]),
      "at the grid's end": "yes" if best[name, batch] in (0, len(grid) - 1) else "no",
    }
    for name, values in accuracy.items()
    for i, (batch, grid) in enumerate(grids.items())
  ]


def draw(figure: Any, accuracy: dict[str, np.ndarray], sizes: tuple[int, ...], lambdas: tuple[float, ...]) -> None:
  """Draws two panels."""
  by_size, by_lambda = figure.subplots(1, 2)
  clipped, best = best_lambda(accuracy, lambdas)
  others = {name: values for name, values in accuracy.items() if not name.startswith("NF + AGC")}
  for style, (name, values) in enumerate({**others, "NF + AGC": best}.items()):
    drawing.line(by_size, sizes, values.T, name, style, markers=True)
  by_size.set_xscale("log", base=2)
  by_size.set_xticks(sizes, [str(size) for size in sizes])
  drawing.name_axes(by_size, "batch size, images", "test accuracy")
  drawing.legend(by_size)
  for style, batch in enumerate(sizes):
    drawing.line(by_lambda, lambdas, clipped[:, style].T, f"batch {batch}", style, markers=True)
  by_lambda.set_xscale("log")
  by_lambda.set_xticks(lambdas, [f"{strength:g}" for strength in lambdas])
  by_lambda.minorticks_off()
  drawing.name_axes(by_lambda, "λ of AGC", "test accuracy")
  low, high = by_lambda.get_ylim()
  by_lambda.set_ylim(bottom=low - 0.3 * (high - low))  # room for the legend
  drawing.legend(by_lambda, loc="lower left", fontsize=9, ncols=2)


EXPERIMENT = Experiment(
  name="batch_size",
  title="Batch size",
  paper="Brock et al. 2021 (2102.06171), Brock et al. 2021 (2101.08692)",
  section="2102.06171: section 4.1 and figure 2; 2101.08692: the comparison at batch size 4",
  claim="Batch normalization fails at small batches and networks without it do not; without clipping these fail at large "
  "batches, and with AGC they do not; the best λ falls as batches grow.",
  criteria=CRITERIA,
  minutes=2.5,
  yours=YOURS,
  run=run,
)
