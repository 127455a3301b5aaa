"""The landscape of the loss: smoother along the gradient with batch normalization, and how it is without."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfnets.lab import drawing, norms, task, users, verdict
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.measures.landscape import along_gradient, batch_norm_bound, plane
from nfnets.lab.progress import Progress
from nfnets.lab.training import Recipe, Trainer, batches, cross_entropy
from nfnets.lab.vgg import VGG, VGGConfig

BATCH, EVERY, RATE = 128, 10, 0.02
STEPS = (0.5, 1.0, 2.0, 4.0)  # of the learning rate, along the gradient
NETWORKS = {"none": "none", "batch": "batch", "L1": "lp:1", "L∞": "lp:inf", "scaled WS": "scaled_weight_std"}
RESIDUAL = {"ResNet, none": "none", "ResNet, batch": "batch", "NF": "nf"}  # since a VGG has no branches for alpha and beta
PICTURED = ("none", "batch", "scaled WS", "NF")
LAYER = 2  # of the VGG, on which the theorem is checked
PLACES = np.linspace(-1, 1, 17)
Runs = dict[str, list[dict[str, Any]]]  # network → for each seed what its training brought

CRITERIA = (
  Criterion(
    name="smoothness",
    claim="The effective β-smoothness without normalization is larger than with batch normalization: the ratio is at least 1.",
    low=1.0,
  ),
  Criterion(
    name="change",
    claim="The gradient changes more along its own direction, in its own length, without batch normalization than with it: the "
    "ratio is at least 1.",
    low=1.0,
  ),
  Criterion(
    name="range",
    claim="The loss varies more along the gradient without batch normalization: the ratio of the ranges is at least 1.",
    low=1.0,
  ),
  Criterion(
    name="lp",
    claim="L1 and L∞ normalization smooth as well: the smaller ratio of their β, none over normalized, is at least 1.",
    low=1.0,
  ),
  Criterion(
    name="scaled_ws",
    claim="So does scaled weight standardization without any normalization of activations (ours, not the paper's): the ratio is "
    "at least 1.",
    low=1.0,
  ),
  Criterion(
    name="nf",
    claim="So does alpha/beta with scaled weight standardization in a residual network: the ratio, over the same network without "
    "normalization, is at least 1.",
    low=1.0,
  ),
  Criterion(
    name="theorem",
    claim="Theorem 4.1 holds on a layer of the trained network: the largest ratio of its left and right side is at most 1.",
    high=1.001,
  ),
)
# what is judged of a network of the user's own
YOURS = (
  Criterion(
    name="yours",
    claim="Your model's landscape is as smooth: β of the VGG without normalization over yours is at least 1.",
    low=1.0,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Trains every network with every seed, looks along the gradient at each tenth step and around the end."""
  steps = settings.of_scale(200, 3000)
  data, recipe = task.data(settings.data, small=settings.small), Recipe(batch=BATCH, steps=steps)
  names = [*NETWORKS, *RESIDUAL, *settings.models]
  shape = {"num_classes": data.classes, "in_features": data.channels}

  @functools.cache
  def trainer(name: str) -> Trainer:
    if name in settings.models:
      made = users.UserTrainer(name, task.whole(data), recipe, every=EVERY)
    elif name in RESIDUAL:
      depth, width = settings.of_scale((4, 16), (12, 32))
      deep = DeepConfig(depth=depth, width=width, norm=RESIDUAL[name], **shape)
      made = Trainer(lambda key: Deep(deep, key), data, recipe, every=EVERY)
    else:
      vgg = VGGConfig(width=settings.of_scale((16, 32), (32, 64)), norm=NETWORKS[name], **shape)
      made = Trainer(lambda key: VGG(vgg, key), data, recipe, every=EVERY)
    made.watch = lambda before, after, images, labels, key: along_gradient(
      lambda params: made.loss(params, images, labels, key), before, RATE * jnp.array(STEPS)
    )
    return made

  def job(name: str, seed: int) -> dict[str, Any]:
    made = trainer(name)
    params, losses, seen = made.train(made.init(seed), batches(len(data.train[1]), made.recipe, seed), RATE)
    values: dict[str, Any] = {"accuracy": made.test(params, running=True)[0], "loss": losses.tolist()}
    values |= {key: value.tolist() for key, value in seen.items()}
    images, labels = data.train[0][:256], data.train[1][:256]
    if name == "batch":
      values["theorem"] = theorem(made, params, images, labels)
    if name in PICTURED and seed == 0:
      loss = lambda params: made.loss(params, images, labels)
      stacked = "^blocks/" if name in RESIDUAL else None  # a Deep network holds equal blocks in one array
      look = jax.jit(lambda params: plane(loss, params, jax.random.key(1), jnp.array(PLACES), stacked=stacked))
      values["plane"] = np.asarray(look(params)).tolist()
    return values

  jobs = {f"{name}, seed {seed}": functools.partial(job, name, seed) for name in names for seed in range(settings.seeds)}
  found = progress.parts(jobs)
  runs = {name: [found[f"{name}, seed {seed}"] for seed in range(settings.seeds)] for name in names}
  return Measured(
    samples=figures(runs, data.classes),
    yours={"yours": ratios(runs, data.classes, settings.model, "smoothness")} if settings.model else {},
    rows=[_row(name, values) for name, values in runs.items()],
    draw=lambda figure: draw(figure, runs),
    caption=f"VGG and residual networks on {data.name}, batch {BATCH}. Above: effective β-smoothness, change of the gradient "
    f"over its length, and range of the loss, at {STEPS[0]:g} to {STEPS[-1]:g} learning rates along the gradient. Below: log10 "
    "of the loss of three VGGs and of NF, on 256 training images around the end of training, on a plane of two random "
    "directions, each filter's as long as the filter; first seed. Shades: all seeds.",
    notes=(
      f"The learning rate is {RATE} for all, so that points lie at the same multiples of the gradient, as in the paper.",
      "The theorem's sides are equal but for rounding and for the small number that is added to the variance; the left one is "
      "the trained network's own gradient through its normalizer.",
      "Ratios are those of geometric means over the steps that were looked at. Batch and L_p normalization are tested with "
      "running statistics of 50 batches, taken after training.",
    ),
  )


def theorem(made: Trainer, params: Any, images: jax.Array, labels: jax.Array) -> float:
  """The largest left / right of theorem 4.1 over the channels of a layer; channels whose gradient is zero are left out."""

  @jax.jit
  def sides(params: Any) -> tuple[jax.Array, jax.Array]:
    network = made.model(params)
    norm: Any = network.norms[LAYER]
    y, _ = network.run(images, upto=LAYER)
    z, back = jax.vjp(lambda y: norms.normalize(made.model(params).norms[LAYER], y, None), y)
    outer = jax.grad(lambda z: cross_entropy(made.model(params).run(z, start=LAYER)[0], labels))(z)
    flat = lambda x: x.reshape(-1, y.shape[-1])
    _, right = batch_norm_bound(flat(outer), flat(y), norm.norm.scale[...], norms.EPSILON)
    return jnp.sum(flat(back(outer)[0]) ** 2, axis=0), right

  left, right = (np.asarray(side, np.float64) for side in sides(params))
  alive = right > 1e-12 * max(right.max(), 1e-30)
  return float(np.max(left[alive] / right[alive])) if alive.any() else math.nan


def mean(run: dict[str, Any], name: str) -> float:
  """The geometric mean over time of "smoothness", "change" (over the gradient's length) or "range" (of the loss)."""
  value = {
    "smoothness": np.array(run["smoothness"]),
    "change": np.array(run["change"]) / np.maximum(run["gradient"], 1e-12),
    "range": np.array(run["highest"]) - np.array(run["lowest"]),
  }[name]
  return verdict.geometric_mean(value)


def ratios(runs: Runs, classes: int, name: str, measure: str, base: str = "none") -> list[float]:
  """The measure of the network `base` over that of the network `name`, for each seed; NaN where one of both has not learned."""
  values = [mean(a, measure) / mean(b, measure) for a, b in zip(runs[base], runs[name], strict=True)]
  accuracy = [min(a["accuracy"], b["accuracy"]) for a, b in zip(runs[base], runs[name], strict=True)]
  return verdict.if_learned(values, accuracy, classes)


def figures(runs: Runs, classes: int) -> dict[str, list[float]]:
  """The criteria's figures, a number a seed."""
  over = functools.partial(ratios, runs, classes)
  return {
    **{measure: over("batch", measure) for measure in ("smoothness", "change", "range")},
    "lp": list(np.minimum(over("L1", "smoothness"), over("L∞", "smoothness"))),
    "scaled_ws": over("scaled WS", "smoothness"),
    "nf": over("NF", "smoothness", "ResNet, none"),
    "theorem": verdict.if_learned([run["theorem"] for run in runs["batch"]], [run["accuracy"] for run in runs["batch"]], classes),
  }


def _row(name: str, values: list[dict[str, Any]]) -> Row:
  average = lambda measure: [mean(run, measure) for run in values]
  return {
    "network": name,
    "test accuracy": [run["accuracy"] for run in values],
    "effective β": average("smoothness"),
    "change of the gradient / its length": average("change"),
    "change of the gradient": [verdict.geometric_mean(run["change"]) for run in values],
    "range of the loss": average("range"),
    "loss at the end": [run["loss"][-1] for run in values],
  }


def draw(figure: Any, runs: dict[str, list[dict[str, Any]]]) -> None:
  """Draws three curves above and four planes below."""
  figure.set_size_inches(9, 6.0)
  upper, lower = figure.subfigures(2, 1, height_ratios=(1.4, 1))
  above, below = upper.subplots(1, 3), lower.subplots(1, 4)
  measures = {
    "effective β": lambda run: run["smoothness"],
    "‖change‖ / ‖gradient‖": lambda run: np.array(run["change"]) / np.array(run["gradient"]),
    "range of the loss, nats": lambda run: np.array(run["highest"]) - np.array(run["lowest"]),
  }
  for axis, (title, measure) in zip(above, measures.items(), strict=True):
    for style, (name, values) in enumerate(runs.items()):
      steps = np.arange(len(values[0]["gradient"])) * EVERY
      drawing.line(axis, steps, [measure(run) for run in values], name, style)
    axis.set_yscale("log")
    drawing.name_axes(axis, "step", title)
  upper.legend(*above[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, handlelength=2.6)
  for axis, name in zip(below, PICTURED, strict=True):
    values = np.array(runs[name][0]["plane"])
    shown = axis.contour(PLACES, PLACES, np.log10(np.maximum(values, 1e-6)).T, levels=10, cmap="gray", linewidths=1)
    axis.clabel(shown, fontsize=7, fmt="%.1f")
    axis.plot(0, 0, "k+")
    axis.set_aspect("equal")
    drawing.name_axes(axis, "direction 1", "direction 2" if axis is below[0] else "", name)


EXPERIMENT = Experiment(
  name="landscape",
  title="Landscape of the loss",
  paper="Santurkar et al. 2018 (1805.11604), Li et al. 2018 (1712.09913)",
  section="Santurkar: section 3.2, figure 4, theorem 4.1; Li: section 4, from memory",
  claim="Batch normalization makes the loss smoother along the gradient, as do other normalizations that do not control "
  "distributions, and scaled weight standardization, with alpha/beta in residual networks; theorem 4.1 holds on a layer.",
  criteria=CRITERIA,
  minutes=1.0,
  yours=YOURS,
  run=run,
)
