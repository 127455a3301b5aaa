"""Scaling: the loss of normalizer-free networks against the compute that they were trained with."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnets import models
from nfnets.lab import drawing, task, users, verdict
from nfnets.lab.experiment import Criterion, Experiment, Measured, Settings
from nfnets.lab.progress import Progress
from nfnets.lab.training import Recipe, Trainer, batches

BATCH, LAMBDA = 64, 0.16
RATES = (0.05, 0.2)
Shape = tuple[int, int]  # width, number of blocks

CRITERIA = (
  Criterion(
    name="slope",
    claim="The lowest held-out loss for its compute falls: the slope of log loss over log compute is at most -0.1.",
    high=-0.1,
  ),
  Criterion(
    name="straight",
    claim="It falls along a straight line: the share of the variance that the line explains is at least 0.9.",
    low=0.9,
  ),
  Criterion(
    name="larger",
    claim="More compute wants larger networks: the rank correlation of compute and width is higher along the line than over all "
    "networks, in which wide ones take more compute anyway, by at least 0.05.",
    low=0.05,
  ),
)
# what is judged of a network of the user's own
YOURS = (Criterion(name="yours", claim="Your model: the slope of log loss over log compute is at most -0.1, too.", high=-0.1),)


def run(settings: Settings, progress: Progress) -> Measured:
  """Trains every network for every budget with every learning rate and seed."""
  shapes = settings.of_scale(((4, 1), (8, 1), (16, 1), (24, 2)), ((8, 1), (16, 2), (32, 3), (64, 4), (128, 6)))
  epochs = settings.of_scale((2, 4, 8), (1, 2, 4, 8, 16, 32))
  data = task.data(settings.data, cut=False, small=settings.small)
  count, side = len(data.train[1]), data.train[0].shape[1]

  @functools.cache
  def trainer(shape: Shape | str, budget: int) -> Trainer:
    steps = budget * count // BATCH
    recipe = Recipe(batch=BATCH, steps=steps, warmup=max(2, steps // 20))
    if isinstance(shape, str):
      return users.UserTrainer(shape, data, recipe)
    return Trainer(lambda key: SmallNFNet(shape, data.classes, key), data, recipe)

  def job(shape: Shape | str, budget: int, rate: float, seed: int) -> float:
    made = trainer(shape, budget)
    params, *_ = made.train(made.init(seed), batches(count, made.recipe, seed), rate, LAMBDA)
    return made.test(params)[1]

  keys = [(shape, budget) for shape in (*shapes, *settings.models) for budget in epochs]
  jobs = {
    f"{_name(shape)}, epochs {budget}, rate {rate:g}, seed {seed}": functools.partial(job, shape, budget, rate, seed)
    for shape, budget in keys
    for rate in RATES
    for seed in range(settings.seeds)
  }
  found = np.array(list(progress.parts(jobs).values())).reshape(len(keys), len(RATES), settings.seeds)
  losses = found[np.arange(len(keys)), np.argmin(np.nan_to_num(found.mean(axis=-1), nan=np.inf), axis=-1)].T  # [seeds, networks]
  an_image: dict[Shape | str, float] = {shape: operations(shape, data.classes, side) for shape in shapes}
  an_image |= {name: users.operations(name, data.classes) for name in settings.models}
  compute = np.array([an_image[shape] * budget * count for shape, budget in keys])
  widths = np.array([shape[0] for shape in shapes for _ in epochs])
  family = slice(len(widths))  # without the person's own network
  return Measured(
    samples=figures(compute[family], losses[:, family], widths, data.classes),
    yours={"yours": [fit(compute[len(widths) :], loss[len(widths) :])[0] for loss in losses]} if settings.model else {},
    rows=[
      {"network": _name(shape), "epochs": budget, "operations": float(operations_), "held-out loss": column}
      for (shape, budget), operations_, column in zip(keys, compute, losses.T, strict=True)
    ],
    draw=lambda figure: draw(figure, compute, losses, keys),
    caption=f"Held-out loss on {data.name} of NFNets of two stages and of several widths and depths, each trained for several "
    "numbers of epochs with a schedule of its own, against the operations of training. Grey: the line through the lowest ones. "
    "Shades: all seeds.",
    notes=(
      f"Compute is six times the multiply-adds of the forward pass. The better of {len(RATES)} learning rates "
      f"is taken; AGC has λ = {LAMBDA}.",
      f"The paper pre-trained NFNets of up to 110 thousand TPU-core hours on JFT-4B; {count} images that are seen several times "
      "are another matter, and say how the method behaves, not which exponent large data has.",
    ),
  )


def _name(shape: Shape | str) -> str:
  return shape if isinstance(shape, str) else f"width {shape[0]}, {2 * shape[1]} blocks"


def overrides(shape: Shape) -> dict[str, Any]:
  """What makes an nfnet_digits one of the family: two stages, the second of twice the width."""
  width, depth = shape
  return {
    "width": (width, 2 * width),
    "depth": (depth, depth),
    "stage_strides": (1, 2),
    "group_width": min(8, width // 2),
    "drop_rate": 0.0,
  }


class SmallNFNet(nnx.Module):
  """One of the family, called as networks of this room are."""

  def __init__(self, shape: Shape, classes: int, key: jax.Array):
    self.network = models.create("nfnet_digits", classes, rngs=key, **overrides(shape))

  def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    """Computes logits, float32 [batch, classes], of images [batch, height, width, 3]; there is no noise."""
    return self.network(images, train=True)


def operations(shape: Shape, classes: int, side: int) -> float:
  """Multiplications and additions of one image's forward and backward pass, the backward pass as two forward ones."""
  return 6.0 * models.describe("nfnet_digits", classes, resolutions={"train": side}, **overrides(shape)).macs[side]


def frontier(compute: np.ndarray, loss: np.ndarray) -> np.ndarray:
  """Numbers of the networks whose loss is below that of all that took no more compute, by rising compute."""
  order = np.argsort(compute, kind="stable")
  best = np.minimum.accumulate(loss[order])
  return order[np.concatenate([[True], loss[order][1:] < best[:-1]])]


def fit(compute: np.ndarray, loss: np.ndarray) -> tuple[float, float, float]:
  """(Slope, intercept, share of the variance explained) of log10 loss over log10 compute; NaN with fewer than three networks."""
  if len(compute) < 3:
    return (float("nan"),) * 3
  x, y = np.log10(compute), np.log10(loss)
  slope, intercept = np.polyfit(x, y, 1)
  return float(slope), float(intercept), float(1 - np.var(y - slope * x - intercept) / np.var(y))


def figures(compute: np.ndarray, losses: np.ndarray, widths: np.ndarray, classes: int) -> dict[str, list[float]]:
  """The criteria's figures from losses [seeds, networks]; NaN where one of the lowest is no better than guessing."""
  found: dict[str, list[float]] = {"slope": [], "straight": [], "larger": []}
  for loss in losses:
    lowest = frontier(compute, loss)
    slope, _, explained = fit(compute[lowest], loss[lowest])
    distinct = len(set(widths[lowest])) > 1
    larger = verdict.rank_correlation(compute[lowest], widths[lowest]) if distinct else 0.0
    values = (slope, explained, larger - verdict.rank_correlation(compute, widths))
    for name, value in zip(found, values, strict=True):
      found[name].append(value if loss[lowest].max() < np.log(classes) else float("nan"))
  return found


def draw(figure: Any, compute: np.ndarray, losses: np.ndarray, keys: list[tuple[Any, int]]) -> None:
  """Draws loss against compute, a line a network."""
  axis = figure.subplots()
  for style, shape in enumerate(dict.fromkeys(shape for shape, _ in keys)):
    at = [i for i, key in enumerate(keys) if key[0] == shape]
    drawing.line(axis, compute[at], losses[:, at], _name(shape), style, markers=True)
  family = [i for i, (shape, _) in enumerate(keys) if not isinstance(shape, str)]
  compute, mean = compute[family], losses[:, family].mean(axis=0)
  lowest = frontier(compute, mean)
  slope, intercept, _ = fit(compute[lowest], mean[lowest])
  ends = np.array([compute.min(), compute.max()])
  axis.plot(ends, 10**intercept * ends**slope, color="0.6", lw=4, alpha=0.5, zorder=0, label=f"means, slope {slope:.2f}")
  axis.set_xscale("log")
  axis.set_yscale("log")
  drawing.name_axes(axis, "operations of training", "held-out loss, nats")
  drawing.legend(axis, loc="lower left")


EXPERIMENT = Experiment(
  name="scaling",
  title="Scaling",
  paper="Smith et al. 2023 (2310.16764)",
  section="section 2 and figure 2, from memory",
  claim="The held-out loss of normalizer-free networks falls as a power of the compute of training, and more compute wants "
  "larger networks.",
  criteria=CRITERIA,
  minutes=2.0,
  yours=YOURS,
  run=run,
)
