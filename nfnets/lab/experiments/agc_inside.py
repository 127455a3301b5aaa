"""Adaptive gradient clipping from inside: what it clips, where, when, and what becomes of training without it."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nfnets import models
from nfnets.agc import agc, agc_metrics, explain_entries, named_leaves, unit_norm
from nfnets.config import DataConfig
from nfnets.lab import drawing, task, training, users, verdict
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.measures.clipping import BINS, PARTS, medians, summary
from nfnets.lab.progress import Progress

BATCH, WARMUP = 256, 10
SMALL, LARGE = 0.1, 1.6  # learning rates; the large one is that of the paper's ablation
LAMBDA, THRESHOLD = 0.04, 1.0
LADDER = 4.0  # by which both are made smaller and larger
# one block a stage; at the scale full as many as in NFNet-F0
NETWORK: dict[str, Any] = {"depth": (1, 1, 1, 1), "width": (32, 64, 64, 64), "stage_strides": (1, 2, 2, 1)}
LARGE_NETWORK = {**NETWORK, "depth": (1, 2, 6, 3), "width": (64, 128, 256, 256)}
STAGES = tuple(f"stage {i + 1}" for i in range(4))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
  """One way to train: the learning rate, AGC's λ (infinite: none), the threshold of global clipping, and what AGC leaves out."""

  rate: float = LARGE
  strength: float = math.inf
  threshold: float = math.inf
  exempt: str = "^fc/kernel$"
  # a stage that AGC leaves out as well, from 0
  stage: int | None = None

  def left_out(self, depth: tuple[int, ...]) -> str:
    """The pattern of what AGC leaves out, in a network with so many blocks a stage."""
    if self.stage is None:
      return self.exempt
    first = sum(depth[: self.stage])
    blocks = "|".join(map(str, range(first, first + depth[self.stage])))
    return f"{self.exempt}|^blocks/({blocks})/"


_agc = functools.partial(Arm, strength=LAMBDA)
ARMS = {
  "none": Arm(),
  "AGC": _agc(),
  "global": Arm(threshold=THRESHOLD),
  "none, small rate": Arm(rate=SMALL),
  "AGC, small rate": _agc(rate=SMALL),
  f"AGC, λ / {LADDER:g}": Arm(strength=LAMBDA / LADDER),
  f"AGC, λ × {LADDER:g}": Arm(strength=LAMBDA * LADDER),
  f"global / {LADDER:g}": Arm(threshold=THRESHOLD / LADDER),
  f"global / {LADDER**2:g}": Arm(threshold=THRESHOLD / LADDER**2),
  f"global × {LADDER:g}": Arm(threshold=THRESHOLD * LADDER),
  "head clipped, too": _agc(exempt="^$"),
  "without stem": _agc(exempt="^fc/kernel$|^stem/"),
  **{f"without {stage}": _agc(stage=i) for i, stage in enumerate(STAGES)},
  "without all stages": _agc(exempt="^fc/kernel$|^blocks/"),
}

CRITERIA = (
  Criterion(
    name="gain_large",
    claim=f"At the large learning rate {LARGE}, AGC raises test accuracy above that without clipping by at least 0.05.",
    low=0.05,
  ),
  Criterion(
    name="gain_small",
    claim=f"At the small learning rate {SMALL}, it changes little: accuracies differ by at most 0.03.",
    low=-0.03,
    high=0.03,
  ),
  Criterion(
    name="sensitivity",
    claim=f"Over a {LADDER**2:g}-fold range of thresholds global clipping varies more than AGC: the ranges of accuracy differ "
    "by 0 or more.",
    low=0.0,
  ),
  Criterion(
    name="best",
    claim="At its best threshold AGC is no worse than global clipping at its best of four, by more than 0.01 of accuracy.",
    low=-0.01,
  ),
  Criterion(
    name="head",
    claim="The classifier's weight should not be clipped: leaving it out of AGC does not lower the accuracy by more than 0.01.",
    low=-0.01,
  ),
  Criterion(name="stem", claim="The stem may go unclipped: that changes the accuracy by at most 0.03.", low=-0.03, high=0.03),
  Criterion(
    name="stages", claim="The four stages need it: with all of them unclipped the accuracy is lower by at least 0.05.", low=0.05
  ),
)
# what is judged of a network of the user's own
YOURS = (
  Criterion(
    name="yours",
    claim="Your model: at the large learning rate AGC lowers the training loss at the end by at least 0.05.",
    low=0.05,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Trains the network in every way with every seed."""
  steps = settings.of_scale(200, 1000)
  shape = settings.of_scale(NETWORK, LARGE_NETWORK)
  make = lambda seed: models.create("nf_resnet_tiny", task.classes(settings.data), rngs=seed, **shape)
  trainer = Trainer(make(0), 8, {"train": True}, settings.data)
  theirs = lambda name, seed: users.labelled_model(name, seed=seed, classes=task.classes(settings.data))
  guests = {name: Trainer(*theirs(name, 0), settings.data) for name in settings.models}

  def job(name: str, seed: int) -> dict[str, Any]:
    accuracy, log = trainer.train(trainer.split(make(seed)), ARMS[name], trainer.batches(steps, seed), shape["depth"])
    return {"accuracy": accuracy, **(summary(log, list(trainer.units.values())) if name == "AGC" else {})}

  def visit(name: str, seed: int) -> dict[str, Any]:
    guest, network = guests[name], theirs(name, seed)[0]  # AGC leaves its classifier out if that is called fc
    order = guest.batches(settings.of_scale(20, 1000), seed)
    (accuracy, log), (_, plain) = (guest.train(guest.split(network), ARMS[arm], order) for arm in ("AGC", "none"))
    return {"accuracy": accuracy, "gain": lower(plain["loss"], log["loss"]), **summary(log, list(guest.units.values()))}

  seeds = range(settings.seeds)
  jobs = {f"{name}, seed {seed}": functools.partial(job, name, seed) for name in ARMS for seed in seeds}
  visits = {f"{name}, seed {seed}": functools.partial(visit, name, seed) for name in guests for seed in seeds}
  found = progress.parts({**jobs, **visits})
  runs = {name: [found[f"{name}, seed {seed}"] for seed in seeds] for name in guests}
  accuracy = {name: np.array([found[f"{name}, seed {seed}"]["accuracy"] for seed in seeds]) for name in ARMS}
  logs = [found[f"AGC, seed {seed}"] for seed in seeds]
  rows = [_row(name, values) for name, values in accuracy.items()] + _layer_rows("AGC", list(trainer.units), logs)
  for name, of_seeds in runs.items():
    rows += [_row(f"{name}, AGC", [run["accuracy"] for run in of_seeds]), *_layer_rows(name, list(guests[name].units), of_seeds)]
  return Measured(
    samples=figures(accuracy, task.classes(settings.data)),
    yours={"yours": [run["gain"] for run in runs[settings.model]]} if settings.model else {},
    rows=rows,
    draw=lambda figure: draw(figure, accuracy, logs, list(trainer.units), runs),
    caption=f"NF-ResNet with four stages on {task.name(settings.data)}, batch {BATCH}, {steps} steps. Left: test accuracy by "
    "what is clipped, squares without AGC, lines from the lowest to the highest seed. Then the share of units clipped by "
    "layer and step, mean over seeds. Below: ‖G‖ / ‖W‖ of the units whose gradient is not 0, by layer, in the first and the last "
    "eighth of the steps; dotted: λ.",
    notes=(
      f"AGC has λ = {LAMBDA}, global clipping the threshold {THRESHOLD}. Differences are taken between trainings with the same "
      "weights at the start and the same batches.",
      f"Training is short: what only slows it down, as clipping does at the learning rate {SMALL}, shows as a lower accuracy.",
      "The last column has the medians of log10 ‖G‖ / ‖W‖ in each eighth of the steps, of histograms whose bins are a quarter "
      "wide, over the units of a layer whose gradient is not 0 and all seeds.",
      "After a first run the part on both at their best thresholds was added, and later a fourth one of global clipping, since "
      "the lowest of three had been the best.",
      "The paper trained NF-ResNets on ImageNet with batches of 4,096; here a small network sees fifteen hundred images.",
    ),
  )


class Trainer:
  """Trains copies of one network by SGD with Nesterov's momentum; what an Arm says is an argument of one compiled run."""

  def __init__(self, network: nnx.Module, side: int, arguments: dict[str, Any], config: DataConfig | None):
    self._graph, params, self._rest = nnx.split(network, nnx.Param, ...)
    self._arguments, self._template = arguments, params
    self.entries = explain_entries(nnx.to_pure_dict(params))
    self.names = [entry.path for entry in self.entries if entry.clipping is not None]
    self.kernels = {entry.path: entry.unit_axes for entry in self.entries if len(entry.shape or ()) > 1}
    self.units = {entry.path: entry.units for entry in self.entries if entry.path in self.kernels}
    self._train_images = task.images(config, side=side)
    self._run = jax.jit(self._descend)
    tested, labels = task.images(config, split="test", side=side)
    self._right = jax.jit(lambda params: jnp.mean(jnp.argmax(self._logits(params, tested), axis=-1) == labels))

  def split(self, network: nnx.Module) -> dict[str, Any]:
    """The parameters of a network as plain arrays, without the mark that keeps AGC away from the classifier."""
    return nnx.to_pure_dict(nnx.split(network, nnx.Param, ...)[1])

  def batches(self, steps: int, seed: int) -> jax.Array:
    """Image numbers, int32 [steps, BATCH]: permutations of the training images, one after the other."""
    return training.batches(len(self._train_images[1]), training.Recipe(batch=BATCH, steps=steps), seed)

  def train(
    self, params: dict[str, Any], arm: Arm, batches: jax.Array, depth: tuple[int, ...] = ()
  ) -> tuple[float, dict[str, np.ndarray]]:
    """Trains with batches int32 [steps, BATCH] of image numbers; `depth`, blocks a stage, counts where a stage is left out.

    Returns:
      The test accuracy, and by step: "loss" [steps], "clipped" [steps, kernels] and "ratios" [steps, units], ‖G‖ / ‖W‖
      of every unit of every kernel.
    """
    strengths = jnp.array([math.inf if re.search(arm.left_out(depth), name) else arm.strength for name in self.names])
    params, log = self._run(params, strengths, jnp.float32(arm.threshold), jnp.float32(arm.rate), batches)
    return float(self._right(params)), jax.device_get(log)

  def _logits(self, params: dict[str, Any], images: jax.Array) -> jax.Array:
    state = jax.tree.map(lambda x: x, self._template)
    nnx.replace_by_pure_dict(state, params)
    model: Any = nnx.merge(self._graph, state, self._rest, copy=True)
    return model(images, **self._arguments).astype(jnp.float32)

  def _descend(self, params: dict[str, Any], strengths: jax.Array, threshold: jax.Array, rate: jax.Array, batches: jax.Array):
    by_path = {f"^{re.escape(name)}$": (lambda count, i=i: strengths[i]) for i, name in enumerate(self.names)}
    clip, (images, labels), steps = agc(by_path, track=True), self._train_images, len(batches)

    def loss(params: dict[str, Any], chosen: jax.Array) -> jax.Array:
      logits = self._logits(params, images[chosen])
      return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]))

    def step(carry: tuple, batch: tuple[jax.Array, jax.Array]) -> tuple[tuple, dict[str, jax.Array]]:
      params, momentum, state = carry
      chosen, number = batch
      # Without the barrier XLA fuses every gradient into each of the norms that read it, and compiles for a minute longer.
      value, grads = jax.lax.optimization_barrier(jax.value_and_grad(loss)(params, chosen))
      log = {"loss": value, "ratios": self._ratios(grads, params)}
      grads, state = clip.update(grads, state, params)
      log["clipped"] = jnp.stack([agc_metrics(state)[name]["clip_fraction"] for name in self.kernels])
      norm = optax.tree.norm(grads)
      grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, threshold / norm), grads)
      now = rate * jnp.minimum((number + 1) / WARMUP, 0.5 * (1 + jnp.cos(jnp.pi * number / steps)))
      momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
      params = jax.tree.map(lambda p, m, g: p - now * (g + 0.9 * m), params, momentum, grads)
      return (params, momentum, state), log

    start = (params, jax.tree.map(jnp.zeros_like, params), clip.init(params))
    (params, _, _), log = jax.lax.scan(step, start, (batches, jnp.arange(steps)))
    return params, log

  def _ratios(self, grads: Any, params: Any) -> jax.Array:
    """Computes ‖G‖ / max(‖W‖, 1e-3) of every unit of every kernel: float32 [units]."""
    leaves = {path: leaf for path, leaf, _ in named_leaves(grads)}
    weights = {path: leaf for path, leaf, _ in named_leaves(params)}
    norms = lambda tree: jnp.concatenate([unit_norm(tree[path], axes).ravel() for path, axes in self.kernels.items()])
    return norms(leaves) / jnp.maximum(norms(weights), 1e-3)


def figures(accuracy: dict[str, np.ndarray], classes: int) -> dict[str, list[float]]:
  """The criteria's figures from test accuracies, [seeds] each: differences of trainings that began alike.

  A part that networks which learn nothing would fulfil is NaN where they do not learn.
  """
  spread = lambda names: np.ptp(np.stack([accuracy[name] for name in names]), axis=0)
  globals_ = ("global", f"global / {LADDER:g}", f"global × {LADDER:g}")
  agcs = ("AGC", f"AGC, λ / {LADDER:g}", f"AGC, λ × {LADDER:g}")
  best = lambda names: np.max(np.stack([accuracy[name] for name in names]), axis=0)
  gain = lambda one, other: verdict.if_learned(accuracy[one] - accuracy[other], best((one, other)), classes)
  both = np.minimum(best(agcs), best(globals_))
  tuned = best(agcs), best((*globals_, f"global / {LADDER**2:g}"))
  return {
    "gain_large": list(accuracy["AGC"] - accuracy["none"]),
    "gain_small": gain("AGC, small rate", "none, small rate"),
    "sensitivity": verdict.if_learned(spread(globals_) - spread(agcs), both, classes),
    "best": verdict.if_learned(tuned[0] - tuned[1], np.maximum(*tuned), classes),
    "head": gain("AGC", "head clipped, too"),
    "stem": gain("AGC", "without stem"),
    "stages": list(accuracy["AGC"] - accuracy["without all stages"]),
  }


def lower(plain: np.ndarray, clipped: np.ndarray) -> float:
  """By how much the loss of the last quarter of the steps, a median of at most 100, is lower with clipping than without."""
  late = slice(-max(1, len(plain) // 4), None)
  ends = (min(100.0, float(np.nan_to_num(np.median(losses[late]), nan=100.0))) for losses in (plain, clipped))
  return next(ends) - next(ends)


def _row(training: str, value: Any, medians: str = "") -> Row:
  return {"training": training, "test accuracy, or share": value, "medians of eighths": medians}


def _layer_rows(name: str, layers: list[str], logs: list[dict[str, Any]]) -> list[Row]:
  """The share of units that AGC clips in each layer, a number a seed, and the medians of the eighths of the steps."""
  clipped = np.array([np.mean(log["clipped"], axis=0) for log in logs])  # [seeds, layers]
  by_part = np.array([medians(np.mean([log[part] for log in logs], axis=0)) for part in PARTS])  # [parts, layers]
  texts = [", ".join(f"{value:.1f}" for value in layer) for layer in by_part.T]
  return [_row(f"{name}: {layer}, units clipped", clipped[:, i], texts[i]) for i, layer in enumerate(layers)]


def draw(
  figure: Any,
  accuracy: dict[str, np.ndarray],
  logs: list[dict[str, Any]],
  layers: list[str],
  theirs: dict[str, list[dict[str, Any]]],
) -> None:
  """Draws four panels, and two for a network of the user's own; `logs` and those of `theirs` are of `summary`, one a seed."""
  figure.set_size_inches(9.0, 7.2 + 3.0 * len(theirs))
  (arms, clipped), below, *more = figure.subplots(2 + len(theirs), 2)
  names = list(accuracy)[::-1]
  for i, name in enumerate(names):
    values = accuracy[name]
    arms.plot([values.min(), values.max()], [i, i], color="0.5", lw=2)
    arms.plot(values.mean(), i, "s" if name.startswith(("none", "global")) else "o", color="k", ms=5)
  arms.set_yticks(range(len(names)), names, fontsize=8)
  arms.set_xlim(0, 1.02)
  drawing.name_axes(arms, "test accuracy", "", "")
  mean = lambda field: np.mean([np.array(log[field]) for log in logs], axis=0)
  labels = [name.removesuffix("/kernel").replace("blocks/", "") for name in layers]
  image = clipped.imshow(mean("clipped").T, aspect="auto", interpolation="nearest", cmap="gray_r", vmin=0, vmax=1)
  clipped.set_yticks(range(len(labels)), labels, fontsize=8)
  clipped.set_xlabel("step")
  figure.colorbar(image, ax=clipped, label="share of units clipped by AGC")
  extent = (BINS[0], BINS[-1], len(layers) - 0.5, -0.5)
  for axis, part in zip(below, ("first", "last"), strict=True):
    image = axis.imshow(mean(part), aspect="auto", interpolation="nearest", cmap="gray_r", vmin=0, vmax=0.3, extent=extent)
    axis.set_yticks(range(len(labels)), labels if part == "first" else [""] * len(labels), fontsize=8)
    axis.axvline(np.log10(LAMBDA), color="#d55e00", ls=":", lw=1.5)
    drawing.name_axes(axis, "log10 ‖G‖ / ‖W‖", "", f"{part} eighth of the steps")
    axis.grid(False)
  figure.colorbar(image, ax=below[1], label="share of the layer's units")
  for (shares, ratios), (name, runs) in zip(more, theirs.items(), strict=True):
    kernels = np.arange(len(runs[0]["first"]))
    drawing.line(shares, kernels, [np.mean(run["clipped"], axis=0) for run in runs], name.rpartition("/")[2], 0)
    for style, part in enumerate((PARTS[0], PARTS[-1])):
      drawing.line(ratios, kernels, [medians(run[part]) for run in runs], f"{part} eighth of the steps", style)
    drawing.name_axes(shares, "kernel, in order", "share of units clipped by AGC", "your model")
    drawing.name_axes(ratios, "kernel, in order", "median of log10 ‖G‖ / ‖W‖", "your model")
    for axis in (shares, ratios):
      drawing.legend(axis)


EXPERIMENT = Experiment(
  name="agc_inside",
  title="Adaptive gradient clipping from inside",
  paper="Brock et al. 2021 (2102.06171)",
  section="section 4 and figure 2",
  claim="AGC makes large learning rates possible where training without clipping fails, changes little at small ones, and "
  "depends less on its threshold than global clipping; the stem may go unclipped, the stages may not, and the classifier "
  "should.",
  criteria=CRITERIA,
  minutes=0.6,
  yours=YOURS,
  run=run,
)
