"""Makes the normalizer-free twin of a batch-normalized ResNet and compares both: signal, gradients, likeness, training."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnets import models
from nfnets.errors import UserError
from nfnets.lab import drawing, task, twin, users, verdict
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.measures.geometry import similarity
from nfnets.lab.measures.signals import gradient_norms, signal
from nfnets.lab.progress import Progress
from nfnets.lab.training import Recipe
from nfnets.lab.zoo import ZooTrainer

BATCH, RATES = 64, (0.05, 0.2)
DEFAULT = "resnet_tiny"
KINDS = ("batch", "NF")
# how they are trained: kind, AGC's λ, whether it clips the branches' gains; NF by the printed recipe, and in two other ways
WAYS: dict[str, tuple[str, float, bool]] = {
  "batch": ("batch", math.inf, True),
  "NF": ("NF", twin.clipping(BATCH), False),
  "NF, gains clipped": ("NF", twin.clipping(BATCH), True),
  "NF, no AGC": ("NF", math.inf, True),
}
SHAPE: dict[str, Any] = {"depth": (2, 2, 2), "width": (32, 64, 64)}

CRITERIA = (
  Criterion(
    name="forward",
    claim="In the twin the signal keeps its size: log2 of the mean square behind blocks varies by at most 2.",
    high=2.0,
  ),
  Criterion(
    name="backward",
    claim="Its gradients neither explode nor vanish: the largest over the smallest gradient of a block's kernels is at most 10.",
    high=10.0,
  ),
  Criterion(
    name="alike", claim="It makes images no more alike: the cosine of pooled features is higher by at most 0.1.", high=0.1
  ),
  Criterion(
    name="accuracy",
    claim="In the same short training, with AGC, it does as well: test accuracy is lower by at most 0.02.",
    low=-0.02,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Measures and trains both networks with every seed."""
  name, side, make = pair(settings)
  images, labels = task.images(settings.data, 64, side=side)
  steps = settings.of_scale(150, 3000)
  train = [task.images(settings.data, split=split, side=side) for split in ("train", "test")]
  data = task.Data(task.name(settings.data), task.classes(settings.data), *train)

  @functools.cache
  def trainer(way: str, rate: float) -> ZooTrainer:
    kind, strength, scalars = WAYS[way]
    recipe = Recipe(batch=BATCH, steps=steps, warmup=steps // 10)
    return ZooTrainer(lambda key: make(kind, key, False), data, recipe, rate, strength, scalars)

  def fit(way: str, rate: float, seed: int) -> float:
    made = trainer(way, rate)
    return made.accuracy(made.fit(seed))

  seeds = range(settings.seeds)
  looks = {
    f"{kind}, seed {seed}": functools.partial(look, make(kind, jax.random.key(seed), True), images, labels)
    for kind in KINDS
    for seed in seeds
  }
  fits = {
    f"{way}, rate {rate:g}, seed {seed}": functools.partial(fit, way, rate, seed)
    for way in WAYS
    for rate in RATES
    for seed in seeds
  }
  found = progress.parts({**looks, **fits})
  runs = {kind: [found[f"{kind}, seed {seed}"] for seed in seeds] for kind in KINDS}
  accuracy = {way: np.array([[found[f"{way}, rate {rate:g}, seed {seed}"] for seed in seeds] for rate in RATES]) for way in WAYS}
  best = {way: values[np.argmax(values.mean(axis=1))] for way, values in accuracy.items()}
  return Measured(
    samples=figures(runs, best, data.classes),
    rows=[_row(way, runs.get(way, []), values) for way, values in best.items()],
    draw=lambda figure: draw(figure, runs, best),
    caption=f"{name} and its normalizer-free twin on {task.name(settings.data)}, at initialization: mean square behind each "
    "block, share of it that lies in the channels' means, length of the gradient of each block's kernels, cosine and stable rank "
    f"of different images' features behind each block; test accuracy after {steps} steps. Shades: all seeds.",
    notes=(
      *(
        ()
        if settings.model in (None, name)
        else (f"{settings.model} has no twin: see nfnets.lab.twin; {name} stands in its place.",)
      ),
      *twin.recipe_changes(),
      f"Here the twin has AGC with the λ for batches of {BATCH}, {twin.clipping(BATCH):g}, of all but the classifier's weight "
      f"and the branches' gains; else both train alike, with the better of the learning rates {RATES[0]:g} and {RATES[1]:g}. Two "
      "other ways to train it stand beside it. Till 2026-11-30 it had no clipping, and then, in one run, AGC of the gains, too.",
      "After a first run the part on the signal, which had asked for a mean square near 1, became one on its spread.",
      "Before training, the twin's branches have a gain of 1 here, so that they can be seen; they are initialised with 0.",
    ),
  )


def pair(settings: Settings) -> tuple[str, int, Callable[[str, jax.Array, bool], nnx.Module]]:
  """What is compared: the network's name, pixels a side, and (kind "batch" or "NF", key, whether branches are open) → network."""
  chosen = settings.model or DEFAULT
  if ":" in chosen and users.takes_kit(function := users.user_function(chosen)):

    def build(kind: str, key: jax.Array, opened: bool) -> nnx.Module:
      return function(kit=twin.BatchNormKit(key) if kind == "batch" else twin.NormFreeKit(key, gain=1.0 if opened else 0.0))

    return chosen, getattr(build("batch", jax.random.key(0), True), "image_size", 8), build
  name = chosen if ":" not in chosen and twin.has_twin(models.variant(chosen)) else DEFAULT
  shape = SHAPE if name == DEFAULT and settings.scale == "small" else {}

  def make(kind: str, key: jax.Array, opened: bool) -> nnx.Module:
    create = models.create if kind == "batch" else twin.nf_twin
    network = create(name, task.classes(settings.data), rngs=key, drop_rate=0.0, stochastic_depth=0.0, **shape)
    if opened:
      users.open_branches(network, 0)
    return network

  return name, 8 if name == DEFAULT else min(32, models.variant(name).train_resolution), make


def look(network: nnx.Module, images: jax.Array, labels: jax.Array) -> dict[str, Any]:
  """Measures a network at initialization.

  Returns "power" (mean square), "share" of the channels' squared means in it, "gradient", "cosines" of different images and
  "ranks" (stable ones) by block, and of its output what `similarity` gives.
  """
  seen, norms = signal(network, images, train=True), gradient_norms(network, images, labels, train=True)
  places, likeness = block_paths(network), signal(network, images, measure=similarity, train=True)
  power = [seen[path]["var"] + seen[path]["mean_sq"] for path in places]
  share = [seen[path]["mean_sq"] / max(total, 1e-30) for path, total in zip(places, power, strict=True)]
  of_block = lambda path: [norm for name, norm in norms.items() if name.startswith(f"{path}/") and name.endswith("kernel")]
  gradient = [float(np.sqrt(np.sum(np.square(of_block(path))))) for path in places]
  graph, state = nnx.split(network)

  def features(images: jax.Array) -> jax.Array:
    copy: Any = nnx.merge(graph, state, copy=True)
    return copy.outputs(images, train=True)["pool"] if isinstance(copy, models.Network) else copy(images, train=True)

  alike = {name: float(value) for name, value in similarity(jax.jit(features)(images)).items()}
  by_block = lambda name: [likeness[path][name] for path in places]
  return {
    "power": power,
    "share": share,
    "gradient": gradient,
    "cosines": by_block("cosine"),
    "ranks": by_block("stable_rank"),
    **alike,
  }


def block_paths(network: nnx.Module) -> list[str]:
  """The paths of the residual blocks, in order: those of a zoo's network, or the modules that hold a Junction of a kit.

  Raises:
    UserError: there are none.
  """
  if isinstance(network, models.Network):
    return [f"blocks/{i}" for i in range(len(network.blocks))]
  found = ["/".join(map(str, path[:-1])) for path, module in nnx.iter_modules(network) if isinstance(module, twin.Junction)]
  if not found:
    raise UserError("the network has no block made with kit.block(); see nfnets.lab.twin")
  return sorted(found, key=lambda path: [int(part) if part.isdigit() else part for part in path.split("/")])


def figures(runs: dict[str, list[dict[str, Any]]], best: dict[str, np.ndarray], classes: int) -> dict[str, list[float]]:
  """The criteria's figures, a number a seed; NaN where no block has a gradient, or the twin did not learn afterwards."""
  spread = lambda gradient: max(gradient) / max(min(gradient), 1e-30) if max(gradient) > 0 else math.nan
  twins = lambda values: verdict.if_learned(values, best["NF"], classes)
  return {
    "forward": twins([float(np.ptp(np.log2(run["power"]))) for run in runs["NF"]]),
    "backward": twins([spread(run["gradient"]) for run in runs["NF"]]),
    "alike": twins([nf["cosine"] - batch["cosine"] for nf, batch in zip(runs["NF"], runs["batch"], strict=True)]),
    "accuracy": verdict.if_learned(best["NF"] - best["batch"], best["batch"], classes),
  }


def _row(way: str, values: list[dict[str, Any]], accuracy: np.ndarray) -> Row:
  """A row of the table; a way to train that is no network of its own has nothing to show at initialization."""
  seen = lambda figure: [figure(run) for run in values] or ""
  return {
    "network": way,
    "mean square, first block": seen(lambda run: run["power"][0]),
    "last block": seen(lambda run: run["power"][-1]),
    "share of squared means, last block": seen(lambda run: run["share"][-1]),
    "gradient, first block": seen(lambda run: run["gradient"][0]),
    "gradient, last block": seen(lambda run: run["gradient"][-1]),
    "cosine of features": seen(lambda run: run["cosine"]),
    "their stable rank": seen(lambda run: run["stable_rank"]),
    "their orthogonality gap": seen(lambda run: run["orthogonality_gap"]),
    "test accuracy": accuracy,
  }


def draw(figure: Any, runs: dict[str, list[dict[str, Any]]], best: dict[str, np.ndarray]) -> None:
  """Draws six panels."""
  figure.set_size_inches(9.0, 6.0)
  (power, share, gradient), (cosine, rank, accuracy) = figure.subplots(2, 3)
  panels = {"power": power, "share": share, "gradient": gradient, "cosines": cosine, "ranks": rank}
  for style, (kind, values) in enumerate(runs.items()):
    blocks = np.arange(1, 1 + len(values[0]["power"]))
    for name, axis in panels.items():
      drawing.line(axis, blocks, [run[name] for run in values], kind, style, markers=True)
  for axis, name in ((power, "mean square"), (gradient, "‖gradient‖ of the kernels")):
    axis.set_yscale("log")
    drawing.name_axes(axis, "block", name)
  share.set_ylim(0, 1)
  drawing.name_axes(share, "block", "share of squared means")
  drawing.name_axes(cosine, "block", "cosine of different images")
  drawing.name_axes(rank, "block", "stable rank")
  drawing.legend(power)
  for place, values in enumerate(best.values()):
    accuracy.barh(-place, values.mean(), color="0.25" if place == 0 else "0.75", edgecolor="k")
    accuracy.plot([values.min(), values.max()], [-place, -place], color="#d55e00", lw=2)
  accuracy.set_yticks(range(0, -len(best), -1), list(best), fontsize=9)
  accuracy.set_xlim(0, 1.02)
  drawing.name_axes(accuracy, "test accuracy", "")


EXPERIMENT = Experiment(
  name="nfify",
  title="The normalizer-free twin of a network",
  paper="Brock et al. 2021 (2101.08692, 2102.06171)",
  section="2101.08692: sections 3 and 4, figures 1 and 2; 2102.06171: section 4, no figure",
  claim="A batch-normalized ResNet has a normalizer-free twin of the same shape whose signal and gradients are as stable, and "
  "that trains as well.",
  criteria=CRITERIA,
  minutes=1.2,
  run=run,
)
