"""What batch normalization computes in evaluation depends on whose statistics it uses; a network without it has one function."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets import models
from nfnets.lab import drawing, task, users, verdict
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.progress import Progress
from nfnets.lab.training import Recipe
from nfnets.lab.zoo import ZooTrainer

BATCH, RATE = 64, 0.1
NETWORKS = {"batch": "resnet_tiny", "NF": "nf_resnet_tiny"}
SHIFT = (0.5, 0.8)  # contrast × and brightness +, in standard deviations of pixels
WAYS = ("running", "batches", "one class", "single", "shifted, running", "shifted, batches")

CRITERIA = (
  Criterion(
    name="nf_same",
    claim="NF computes in training what it computes in evaluation: the largest difference of a logit is at most 1e-5 of the "
    "largest logit.",
    high=1e-5,
  ),
  Criterion(
    name="single",
    claim="Batch normalization with the statistics of single images loses at least 0.1 of accuracy against running statistics.",
    low=0.1,
  ),
  Criterion(
    name="mix",
    claim="With the statistics of batches of one class it loses at least 0.05 against those of mixed batches.",
    low=0.05,
  ),
  Criterion(
    name="shift",
    claim="On images of other brightness and contrast statistics of the batch are better than running ones by at least 0.02.",
    low=0.02,
  ),
  Criterion(
    name="nf_mix",
    claim="NF gives the same accuracy whatever the batches are: it differs by at most 0.003.",
    low=-0.003,
    high=0.003,
  ),
)
# what is judged of a network of the user's own
YOURS = (
  Criterion(
    name="yours",
    claim="Your model computes in training what it computes in evaluation: the largest difference of a logit is at most 1e-5 of "
    "the largest logit.",
    high=1e-5,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Trains both networks with every seed and evaluates them in every way."""
  data, steps = task.data(settings.data, cut=False, small=settings.small), settings.of_scale(120, 3000)

  shape = settings.of_scale({"depth": (1, 1, 1), "width": (32, 64, 64)}, {"depth": (2, 2, 2), "width": (64, 128, 128)})

  recipe, names = Recipe(batch=BATCH, steps=steps, warmup=steps // 10), [*NETWORKS, *settings.models]

  @functools.cache
  def trainer(name: str) -> ZooTrainer:
    if name not in NETWORKS:
      return users.UserZooTrainer(name, data, recipe, RATE)
    make = lambda key: models.create(NETWORKS[name], data.classes, rngs=key, **shape)
    return ZooTrainer(make, data, recipe, RATE)

  def job(name: str, seed: int) -> dict[str, float]:
    made = trainer(name)
    return Ways(made).evaluate(made.fit(seed))

  jobs = {f"{name}, seed {seed}": functools.partial(job, name, seed) for name in names for seed in range(settings.seeds)}
  found = progress.parts(jobs)
  runs = {name: [found[f"{name}, seed {seed}"] for seed in range(settings.seeds)] for name in names}
  return Measured(
    samples=figures(runs, data.classes),
    yours={"yours": learned(runs[settings.model], "difference", data.classes)} if settings.model else {},
    rows=[_row(name, values) for name, values in runs.items()],
    draw=lambda figure: draw(figure, runs),
    caption=f"Test accuracy on {data.name} of a small ResNet with batch normalization and of its twin without, by the statistics "
    f"that a normalizer uses: running ones, those of {BATCH} mixed images, of images of one class, of a single image; and on "
    "images of other brightness and contrast. Bars: mean over seeds; lines: lowest to highest.",
    notes=(
      f"Networks: {NETWORKS['batch']} and {NETWORKS['NF']}, narrowed, {steps} steps of the same SGD without clipping, which such "
      "small batches do not need; running statistics move by a tenth a step.",
      f"The other brightness and contrast are {SHIFT[0]} times the image plus {SHIFT[1]}, in standard deviations of pixels.",
      "Single images still have statistics over space; in the last layers these are few numbers.",
    ),
  )


class Ways:
  """The test accuracy of a trained network by the statistics that it uses."""

  def __init__(self, trainer: ZooTrainer):
    self._data, self._logits = trainer.data, trainer.logits
    self._alone = jax.jit(jax.vmap(lambda state, image: trainer.logits(state, image[None], True)[0], in_axes=(None, 0)))

  def evaluate(self, state: nnx.State) -> dict[str, float]:
    """The test accuracy in every way, and "difference": of logits in training and evaluation, over the largest logit."""
    images, labels = self._data.test
    shifted = SHIFT[0] * images + SHIFT[1]
    by_class = np.argsort(np.asarray(labels), kind="stable")
    right = lambda logits, which: float(jnp.mean(jnp.argmax(logits, axis=-1) == which))
    once = {train: self._logits(state, images[:BATCH], train) for train in (True, False)}
    size = jnp.max(jnp.abs(once[False]))
    return {
      "running": right(self._logits(state, images, False), labels),
      "batches": right(self._in_batches(state, images), labels),
      "one class": right(self._one_class(state), labels[by_class]),
      "single": right(self._alone(state, images), labels),
      "shifted, running": right(self._logits(state, shifted, False), labels),
      "shifted, batches": right(self._in_batches(state, shifted), labels),
      "difference": float(jnp.max(jnp.abs(once[True] - once[False])) / size),
    }

  def _in_batches(self, state: nnx.State, images: jax.Array) -> jax.Array:
    return jnp.concatenate([self._logits(state, images[i : i + BATCH], True) for i in range(0, len(images), BATCH)])

  def _one_class(self, state: nnx.State) -> jax.Array:
    """Logits of the test images, sorted by their classes, of which each batch has one."""
    images, labels = self._data.test
    parts = [images[np.flatnonzero(np.asarray(labels) == label)] for label in range(self._data.classes)]
    return jnp.concatenate([self._in_batches(state, part) for part in parts if len(part)])


def figures(runs: dict[str, list[dict[str, float]]], classes: int) -> dict[str, list[float]]:
  """The criteria's figures, a number a seed."""
  return {
    "nf_same": learned(runs["NF"], "difference", classes),
    "single": learned(runs["batch"], "running", classes, "single"),
    "mix": learned(runs["batch"], "batches", classes, "one class"),
    "shift": learned(runs["batch"], "shifted, batches", classes, "shifted, running"),
    "nf_mix": learned(runs["NF"], "batches", classes, "one class"),
  }


def learned(runs: list[dict[str, float]], one: str, classes: int, other: str = "") -> list[float]:
  """A figure of each seed, less another one if that is named; NaN where the network has not learned."""
  values = [run[one] - (run[other] if other else 0.0) for run in runs]
  return verdict.if_learned(values, [run["running"] for run in runs], classes)


def _row(name: str, values: list[dict[str, float]]) -> Row:
  return {"network": name, **{key: [run[key] for run in values] for key in (*WAYS, "difference")}}


def draw(figure: Any, runs: dict[str, list[dict[str, float]]]) -> None:
  """Draws bars of the accuracy in every way."""
  axis = figure.subplots()
  for i, (name, values) in enumerate(runs.items()):
    found = np.array([[run[way] for way in WAYS] for run in values])
    width = 0.8 / len(runs)
    mean, places = found.mean(axis=0), np.arange(len(WAYS)) + width * (i - (len(runs) - 1) / 2)
    axis.bar(places, mean, 0.9 * width, color=("0.25", "0.75", "white")[i], edgecolor="k", label=name)
    axis.errorbar(places, mean, [mean - found.min(axis=0), found.max(axis=0) - mean], fmt="none", color="#d55e00", capsize=3)
  axis.set_xticks(range(len(WAYS)), [way.replace(", ", ",\n") for way in WAYS])
  axis.set_ylim(0, 1.15)
  drawing.name_axes(axis, "whose statistics", "test accuracy")
  drawing.legend(axis, loc="upper right", ncols=len(runs))


EXPERIMENT = Experiment(
  name="train_test",
  title="Training and evaluation",
  paper="Brock et al. 2021 (2101.08692), Ioffe 2017 (1702.03275), Schneider et al. 2020 (2006.16971)",
  section="Brock: section 1; Ioffe: sections 1 and 4, minibatches that are not independent; Schneider: sections 1 and 2; no "
  "figures; all but Brock from memory",
  claim="What a batch-normalized network answers depends on the images beside an image and on whose statistics are used; a "
  "normalizer-free network answers the same.",
  criteria=CRITERIA,
  minutes=0.3,
  yours=YOURS,
  run=run,
)
