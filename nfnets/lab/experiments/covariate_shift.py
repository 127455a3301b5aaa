"""Internal covariate shift: batch normalization does not reduce it, and noise that adds to it does not harm."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfnets.lab import drawing, task, users, verdict
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.linear import LinearNetwork
from nfnets.lab.measures.shift import covariate_shift, layer_numbers
from nfnets.lab.progress import Progress
from nfnets.lab.task import Data
from nfnets.lab.training import Recipe, Trainer, batches
from nfnets.lab.vgg import VGG, VGGConfig

BATCH, EVERY = 128, 10
GUEST = "--model"  # the kind of a person's own network
RATES = {"VGG": 0.02, "linear": 0.005, GUEST: 0.02}
NETWORKS = (("VGG", "none"), ("VGG", "batch"), ("VGG", "noisy_batch"), ("linear", "none"), ("linear", "batch"))
LAYER = 2  # of the VGG, whose distribution is followed
Name = tuple[str, str]  # kind and normalizer
Runs = dict[Name, list[dict[str, Any]]]  # for each seed what its training brought
BINS = np.linspace(-4, 4, 33)  # of what that layer's normalizer gives; what lies beyond counts in the outermost ones

CRITERIA = (
  Criterion(
    name="vgg_shift",
    claim="VGG: the relative shift ‖G - G'‖ / ‖G‖ with batch normalization is at least 0.8 of that without, so not reduced.",
    low=0.8,
  ),
  Criterion(
    name="vgg_absolute",
    claim="VGG: so is the shift itself, ‖G - G'‖, in the geometric mean over layers and steps: at least 0.8 of that without.",
    low=0.8,
  ),
  Criterion(
    name="vgg_cosine",
    claim="VGG: the cosine of G and G' with batch normalization exceeds that without by at most 0.05.",
    high=0.05,
  ),
  Criterion(
    name="linear_shift",
    claim="Deep linear network: the relative shift with batch normalization is at least 0.8 of that without.",
    low=0.8,
  ),
  Criterion(
    name="jumps",
    claim="Noise after batch normalization makes the distribution of a layer's inputs jump more than it does without any "
    "normalization: the ratio is at least 1.",
    low=1.0,
  ),
  Criterion(
    name="noisy_as_batch",
    claim="With that noise batch normalization trains as well: test accuracy falls by at most 0.05.",
    low=-0.05,
  ),
  Criterion(
    name="noisy_above_none", claim="It trains better than without normalization: test accuracy is higher by at least 0.", low=0.0
  ),
)
# what is judged of a network of the user's own
YOURS = (
  Criterion(
    name="yours",
    claim="Your model trains as well as the VGG without normalization, however much it shifts: test accuracy is lower by at most "
    "0.05.",
    low=-0.05,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Trains every network with every seed and looks at each tenth step."""
  steps = settings.of_scale(300, 3000)
  data = task.data(settings.data, small=settings.small)

  @functools.cache
  def trainer(kind: str, norm: str) -> Trainer:
    return _trainer(kind, norm, data, steps, settings)

  def job(kind: str, norm: str, seed: int) -> dict[str, Any]:
    made = trainer(kind, norm)
    order = batches(len(data.train[1]), made.recipe, seed)
    params, losses, seen = made.train(made.init(seed), order, RATES[kind], seed=seed)
    return {
      "accuracy": made.test(params, running=True)[0],
      "loss": losses.tolist(),
      **{name: value.tolist() for name, value in seen.items()},
    }

  networks = [*NETWORKS, *((GUEST, name) for name in settings.models)]
  jobs = {
    f"{kind}, {norm}, seed {seed}": functools.partial(job, kind, norm, seed)
    for kind, norm in networks
    for seed in range(settings.seeds)
  }
  found = progress.parts(jobs)
  runs = {(kind, norm): [found[f"{kind}, {norm}, seed {seed}"] for seed in range(settings.seeds)] for kind, norm in networks}
  return Measured(
    samples=figures(runs, data.classes),
    yours={"yours": compared(runs, data.classes, (GUEST, settings.model), ("VGG", "none"), "accuracy")} if settings.model else {},
    rows=[_row(kind, norm, values) for (kind, norm), values in runs.items()],
    draw=lambda figure: draw(figure, runs),
    caption=f"Training on {data.name}, batch {BATCH}. Above: shift ‖G - G'‖ of a layer's gradient by the update of the layers "
    "before it, the same over the gradient's length, and the cosine of the gradients before and after, means over layers. "
    "Below: the shift by layer, mean over steps; histograms of what the third layer's normalizer gives by step, all channels, "
    "first seed, without normalization, with it, and with noise; what is beyond 4 lies in the outermost bins. Shades: all seeds.",
    notes=(
      "The shift is that of definition 2.1, by the network's own step, on the images of that step; it is divided by the "
      "gradient's length, since gradients of different networks are of different length. The first layer has none.",
      f"VGG with four convolutions, deep linear network of {_depth(settings)} layers; gradient descent with Nesterov's momentum, "
      f"learning rates {RATES['VGG']} and {RATES['linear']}, the same with and without normalization.",
      "The strength of the noise is from memory of the paper's appendix. Tests are without noise, and with running statistics of "
      "50 batches, taken after training.",
      "After a first run the VGG's learning rate became 0.02 instead of 0.1, with which it died without normalization.",
    ),
  )


def _depth(settings: Settings) -> int:
  return settings.of_scale(8, 25)


def _trainer(kind: str, norm: str, data: Data, steps: int, settings: Settings) -> Trainer:
  recipe = Recipe(batch=BATCH, steps=steps)
  if kind == GUEST:
    made = users.UserTrainer(norm, task.whole(data), recipe, every=EVERY)
    return _watched(made, made.layer_numbers(), False)
  shape = data.train[0].shape[1:]
  config = VGGConfig(width=settings.of_scale((16, 32), (32, 64)), norm=norm, num_classes=data.classes, in_features=data.channels)
  inputs, width = int(np.prod(shape)), settings.of_scale(32, 128)
  make = (
    (lambda key: VGG(config, key))
    if kind == "VGG"
    else (lambda key: LinearNetwork(inputs, width, _depth(settings), norm, key, num_classes=data.classes))
  )
  made = Trainer(make, data, recipe, every=EVERY)
  return _watched(made, layer_numbers(made.init(0)), kind == "VGG")


def _watched(made: Trainer, numbers: Any, vgg: bool) -> Trainer:
  """Lets a trainer watch the shift of layers with these numbers, and in a VGG a layer's inputs, each number of an image."""

  def watch(before: Any, after: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    seen = covariate_shift(lambda params: made.loss(params, images, labels, key), before, after, numbers)
    if vgg:
      inner = made.model(before).run(images, key=key)[1][LAYER]
      seen |= {"mean": jnp.mean(inner, axis=0).ravel(), "std": jnp.std(inner, axis=0).ravel()}
      inside = jnp.clip(inner.ravel(), BINS[0], BINS[-1])
      seen["histogram"] = jnp.histogram(inside, jnp.array(BINS))[0] / inside.size
    return seen

  made.watch = watch
  return made


def relative_shift(run: dict[str, Any]) -> np.ndarray:
  """‖G - G'‖ / ‖G‖, the mean over layers but the first one: float64 [steps looked at]."""
  shift, norm = np.array(run["shift"]), np.array(run["norm"])
  return np.mean(shift[:, 1:] / np.maximum(norm[:, 1:], 1e-30), axis=1)


def mean_shift(run: dict[str, Any]) -> float:
  """‖G - G'‖, the geometric mean over steps and layers but the first one."""
  return verdict.geometric_mean(np.array(run["shift"])[:, 1:])


def unrest(run: dict[str, Any]) -> float:
  """How far the means over images move between two looks, in standard deviations: the mean over units and time, > 0."""
  mean, std = np.array(run["mean"]), np.array(run["std"])
  return max(float(np.mean(np.abs(np.diff(mean, axis=0)) / np.maximum(std[1:], 1e-12))), 1e-30)


def compared(runs: Runs, classes: int, one: Name, other: Name, measure: str) -> list[float]:
  """A measure of one network over that of another, or of cosine and accuracy the difference; NaN where one has not learned.

  What the accuracy of a network is after all, is for the part on it to say, so that only the other one has to learn there.
  """
  measures: dict[str, Any] = {
    "relative": lambda run: verdict.geometric_mean(relative_shift(run)),
    "absolute": mean_shift,
    "unrest": unrest,
    "cosine": lambda run: float(np.mean(np.array(run["cosine"])[:, 1:])),
    "accuracy": lambda run: run["accuracy"],
  }
  pairs = list(zip(runs[one], runs[other], strict=True))
  values = [tuple(map(measures[measure], pair)) for pair in pairs]
  learned = [min(run["accuracy"] for run in (pair[1:] if measure == "accuracy" else pair)) for pair in pairs]
  figure = [a - b if measure in ("cosine", "accuracy") else a / b for a, b in values]
  return verdict.if_learned(figure, learned, classes)


def figures(runs: Runs, classes: int) -> dict[str, list[float]]:
  """The criteria's figures, a number a seed."""
  none, batch, noisy = ("VGG", "none"), ("VGG", "batch"), ("VGG", "noisy_batch")
  pairs = {
    "vgg_shift": (batch, none, "relative"),
    "vgg_absolute": (batch, none, "absolute"),
    "vgg_cosine": (batch, none, "cosine"),
    "linear_shift": (("linear", "batch"), ("linear", "none"), "relative"),
    "jumps": (noisy, none, "unrest"),
    "noisy_as_batch": (noisy, batch, "accuracy"),
    "noisy_above_none": (noisy, none, "accuracy"),
  }
  return {name: compared(runs, classes, *pair) for name, pair in pairs.items()}


def _row(kind: str, norm: str, values: list[dict[str, Any]]) -> Row:
  return {
    "network": norm if kind == GUEST else f"{kind}, {norm}",
    "test accuracy": [run["accuracy"] for run in values],
    "relative shift": [verdict.geometric_mean(relative_shift(run)) for run in values],
    "shift ‖G - G'‖": [mean_shift(run) for run in values],
    "cosine": [np.array(run["cosine"])[:, 1:].mean() for run in values],
    "unrest of a layer's inputs": [unrest(run) for run in values] if kind == "VGG" else None,
  }


def draw(figure: Any, runs: Runs) -> None:
  """Draws three measures by step, the shift by layer, and a layer's distribution over time in three small panels."""
  figure.set_size_inches(9.0, 6.6)
  upper, lower = figure.subfigures(2, 1)
  above, (by_layer, *below) = upper.subplots(1, 3), lower.subplots(1, 4)
  measures = {
    "‖G - G'‖": lambda run: np.array(run["shift"])[:, 1:].mean(axis=1),
    "‖G - G'‖ / ‖G‖": relative_shift,
    "cosine of G and G'": lambda run: np.array(run["cosine"])[:, 1:].mean(axis=1),
  }
  for style, ((kind, norm), values) in enumerate(runs.items()):
    steps = np.arange(len(values[0]["shift"])) * EVERY
    label = norm if kind == GUEST else f"{kind}, {norm.replace('_', ' ')}"
    for axis, measure in zip(above, measures.values(), strict=True):
      drawing.line(axis, steps, [measure(run) for run in values], label, style)
    layers = [np.array(run["shift"])[:, 1:].mean(axis=0) for run in values]
    drawing.line(by_layer, 2 + np.arange(len(layers[0])), layers, label, style, markers=True)
  for axis, quantity in zip(above, measures, strict=True):
    drawing.name_axes(axis, "step", quantity)
  for axis in (*above[:2], by_layer):
    axis.set_yscale("log")
  above[0].set_ylim(top=300 * 10 ** (len(runs) - len(NETWORKS)) * above[0].get_ylim()[1])  # room for the legend
  drawing.legend(above[0], loc="upper right", fontsize=8)
  by_layer.set_xticks(range(2, 2 + max(len(values[0]["shift"][0]) - 1 for values in runs.values()), 2))
  drawing.name_axes(by_layer, "layer", "‖G - G'‖")
  for axis, norm in zip(below, ("none", "batch", "noisy_batch"), strict=True):
    shares = np.array(runs["VGG", norm][0]["histogram"]).T  # [bins, looks]
    extent = (0, shares.shape[1] * EVERY, BINS[0], BINS[-1])
    axis.imshow(shares, aspect="auto", interpolation="nearest", cmap="gray_r", origin="lower", extent=extent, vmin=0, vmax=0.2)
    drawing.name_axes(axis, "step", "value" if norm == "none" else "", norm.replace("_", " "))
    axis.grid(False)


EXPERIMENT = Experiment(
  name="covariate_shift",
  title="Internal covariate shift",
  paper="Santurkar et al. 2018 (1805.11604)",
  section="section 2, definition 2.1; figures 1 to 3, whose numbers are from memory",
  claim="Batch normalization does not reduce internal covariate shift, and with noise that makes the distributions of layers' "
  "inputs jump it still trains as well.",
  criteria=CRITERIA,
  minutes=0.8,
  yours=YOURS,
  run=run,
)
