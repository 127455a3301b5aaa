"""The edge of stability: the sharpness of the loss rises until gradient descent is about to diverge, and stays there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets.lab import drawing, task, users
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Settings
from nfnets.lab.measures.curvature import batch_sharpness, sharpness_of
from nfnets.lab.progress import Progress

RATE = 0.05  # at which all begin below the edge
RATES = {"batch": 0.2, "alpha/beta": 0.1}  # of networks that begin flatter
LOOKS = 16  # measurements of the sharpness after the first one
BATCH = 16  # images a step of stochastic gradient descent
# "plain" has the paper's tanh
NETWORKS: dict[str, dict[str, Any]] = {
  "plain": {"norm": "none", "residual": False, "activation": "tanh"},
  "batch": {"norm": "batch", "residual": False},
  "alpha/beta": {"norm": "nf"},
}
_LOW, _HIGH = 0.8, 1.2

CRITERIA = tuple(
  Criterion(
    name=name,
    claim=f"{words}: the median of sharpness × learning rate / 2 over the last third of training is about 1.",
    low=_LOW,
    high=_HIGH,
  )
  for name, words in (
    ("plain", "A plain network with tanh"),
    ("batch", "With batch normalization"),
    ("alpha/beta", "A residual network with alpha/beta and scaled weight standardization"),
  )
) + (
  Criterion(
    name="rises",
    claim="It rises to that: in the plain network, where it begins below the edge and ends at no less than 0.8 of it, the median "
    "of the last third is at least 1.5 times the start.",
    low=1.5,
  ),
  Criterion(
    name="stochastic",
    claim=f"Under stochastic gradient descent with {BATCH} images the batch sharpness, not the largest eigenvalue, hovers there: "
    "its median × learning rate / 2 over the last third is about 1 in the plain network.",
    low=_LOW,
    high=_HIGH,
  ),
)
# what is judged of a network of the user's own
YOURS = (
  Criterion(
    name="yours",
    claim="Your model: the median of sharpness × learning rate / 2 over the last third of training is about 1.",
    low=_LOW,
    high=_HIGH,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Trains every network with every seed by full-batch gradient descent on squared errors, and measures on the way."""
  steps = settings.of_scale(1600, 16000)
  epochs = steps // 2  # with small batches
  count, width, depth = settings.of_scale((128, 8, 3), (1437, 32, 8))
  shape = {"depth": depth, "width": width, "num_classes": task.classes(settings.data)}
  makers = {name: _maker(DeepConfig(**shape, **fields)) for name, fields in NETWORKS.items()}
  sides, arguments = dict.fromkeys(makers, 8), dict.fromkeys(makers, {})
  if settings.model is not None:
    model, make = settings.model, functools.partial(users.labelled_model, settings.model, classes=shape["num_classes"])
    makers[model] = lambda seed: make(seed=seed)[0]
    _, sides[model], arguments[model] = make(seed=0)
  plain = DeepConfig(**shape, **NETWORKS["plain"])

  def job(name: str, seed: int) -> list:
    images, labels = task.images(settings.data, count, side=sides[name])
    return _descend(makers[name](seed), images, labels, steps, arguments[name], RATES.get(name, RATE)).tolist()

  def noisy_job(seed: int) -> list:
    images, labels = task.images(settings.data, count)
    return _wander(_maker(plain)(seed), images, labels, epochs, seed).tolist()

  seeds = range(settings.seeds)
  jobs = {f"{name}, seed {seed}": functools.partial(job, name, seed) for name in makers for seed in seeds}
  noisy = {f"SGD, seed {seed}": functools.partial(noisy_job, seed) for seed in seeds}
  found = progress.parts({**jobs, **noisy})
  curves = {name: np.array([found[f"{name}, seed {seed}"] for seed in seeds]) for name in makers}  # [seeds, measurements, 2]
  stochastic = np.array([found[name] for name in noisy])  # [seeds, measurements, 3]
  return Measured(
    samples=figures({name: curves[name] for name in NETWORKS}, stochastic),
    yours={"yours": last_third(curves[settings.model])} if settings.model else {},
    rows=[_row(name, values) for name, values in [*curves.items(), ("plain, batch sharpness of SGD", stochastic[..., [0, 2]])]],
    draw=lambda figure: draw(figure, curves, stochastic, steps, epochs),
    caption=f"Gradient descent on {count} images of {task.name(settings.data)}, learning rate {RATE}, but with batch "
    f"normalization {RATES['batch']} and with alpha/beta {RATES['alpha/beta']}. Left: largest eigenvalue of the Hessian, in "
    f"units of 2 / learning rate, with all images a step. Middle: the plain network with {BATCH} images a step: the same, and "
    "batch sharpness. Right: the loss with all images. Shades: all seeds.",
    notes=(
      "Beyond 1 a quadratic with that curvature would diverge. Real losses do not: they fall on, in small jumps.",
      "After a first run the training with small batches became eight times longer. Till 2026-11-30 the learning rate was 0.3, "
      "with which the plain network began beyond the edge and could only come down, and training a quarter as long.",
      f"Smaller networks and fewer images than the paper's 5,000 of CIFAR-10: {depth} blocks of {width} channels.",
    ),
  )


def _maker(config: DeepConfig) -> Any:
  return lambda seed: Deep(config, jax.random.key(seed))


def _descend(network: nnx.Module, images: jax.Array, labels: jax.Array, steps: int, arguments: dict, rate: float) -> np.ndarray:
  """Trains, and returns float64 [measurements, 2]: sharpness × rate / 2, and the loss, the first before any step."""
  params, squared = _squared_error(network, arguments)
  loss = lambda params: squared(params, images, labels)

  @jax.jit
  def descend(params: nnx.State) -> nnx.State:
    step = lambda params, _: (jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params)), None)
    return jax.lax.scan(step, params, None, length=steps // LOOKS)[0]

  measure, value = sharpness_of(loss, iterations=16), jax.jit(loss)
  found = [(measure(params) * rate / 2, float(value(params)))]
  for _ in range(LOOKS):
    params = descend(params)
    found.append((measure(params) * rate / 2, float(value(params))))
  return np.array(found, np.float64)


def _squared_error(network: nnx.Module, arguments: dict) -> tuple[nnx.State, Any]:
  """(Parameters, (params, images, labels) → half the squared error of an image, float32 [])."""
  graph, params, rest = nnx.split(network, nnx.Param, ...)

  def loss(params: nnx.State, images: jax.Array, labels: jax.Array) -> jax.Array:
    model: Any = nnx.merge(graph, params, rest, copy=True)
    outputs = model(images, **arguments).astype(jnp.float32)
    return 0.5 * jnp.mean(jnp.sum((outputs - jax.nn.one_hot(labels, outputs.shape[-1])) ** 2, axis=-1))

  return params, loss


def _wander(network: nnx.Module, images: jax.Array, labels: jax.Array, epochs: int, seed: int) -> np.ndarray:
  """Trains with BATCH images a step.

  Returns float64 [measurements, 3]: batch sharpness and sharpness, both × rate / 2, and the loss.
  """
  params, loss = _squared_error(network, {})
  count = len(labels) // BATCH
  cut = lambda x: x[: count * BATCH].reshape(count, BATCH, *x.shape[1:])

  @jax.jit
  def descend(params: nnx.State, key: jax.Array) -> nnx.State:
    def step(params: nnx.State, key: jax.Array) -> tuple[nnx.State, None]:
      chosen = jax.random.choice(key, len(labels), (BATCH,), replace=False)
      grads = jax.grad(loss)(params, images[chosen], labels[chosen])
      return jax.tree.map(lambda p, g: p - RATE * g, params, grads), None

    return jax.lax.scan(step, params, jax.random.split(key, epochs // LOOKS * count))[0]

  sharp = sharpness_of(loss, iterations=16)
  noisy = jax.jit(lambda params: batch_sharpness(loss, params, cut(images), cut(labels)))
  value, found = jax.jit(loss), []
  for number in range(LOOKS + 1):
    measured = (float(noisy(params)), sharp(params, 0, images, labels))
    found.append((*(RATE / 2 * x for x in measured), float(value(params, images, labels))))
    params = descend(params, jax.random.fold_in(jax.random.key(seed), number))
  return np.array(found, np.float64)


def last_third(curves: np.ndarray) -> list[float]:
  """The median of the sharpness over the last third of the measurements, for each seed, of [seeds, measurements, 2]."""
  return [float(np.median(seed[-(len(seed) // 3) :, 0])) for seed in curves]


def figures(curves: dict[str, np.ndarray], stochastic: np.ndarray) -> dict[str, list[float]]:
  """The criteria's figures, a number a seed, from curves of `_descend` and of `_wander` with a first axis for the seeds."""
  medians = {name: last_third(values) for name, values in curves.items()}
  rises = [risen(start, late) for start, late in zip(curves["plain"][:, 0, 0], medians["plain"], strict=True)]
  return {**medians, "rises": rises, "stochastic": last_third(stochastic)}


def risen(start: float, late: float) -> float:
  """How many times the start the sharpness became; 0 if it stays below the edge, NaN if it starts beyond it."""
  if not start < 1:
    return float("nan")
  return late / max(start, 1e-12) if late >= _LOW else 0.0


def _row(name: str, values: np.ndarray) -> dict[str, Any]:
  return {
    "network": name,
    "sharpness × rate / 2 at the start": values[:, 0, 0],
    "median of the last third": last_third(values),
    "loss at the start": values[:, 0, 1],
    "loss at the end": values[:, -1, 1],
  }


def draw(figure: Any, curves: dict[str, np.ndarray], stochastic: np.ndarray, steps: int, epochs: int) -> None:
  """Draws three panels; training took so many steps, or so many epochs with small batches."""
  sharp, noisy, loss = figure.subplots(1, 3)
  for style, (name, values) in enumerate(curves.items()):
    places = np.arange(values.shape[1]) * steps / LOOKS
    drawing.line(sharp, places, values[..., 0], name, style)
    drawing.line(loss, places, values[..., 1], name, style)
  places = np.arange(stochastic.shape[1]) * epochs / LOOKS
  drawing.line(noisy, places, stochastic[..., 0], "batch sharpness", 0)
  drawing.line(noisy, places, stochastic[..., 1], "largest eigenvalue", 1)
  for axis, title in ((sharp, "all images a step"), (noisy, f"plain, {BATCH} images a step")):
    axis.axhline(1, color="0.6", lw=4, alpha=0.5, zorder=0)
    axis.set_ylim(0, 2.5)
    drawing.name_axes(axis, "step" if axis is sharp else "epoch", "sharpness × learning rate / 2", title)
    drawing.legend(axis, loc="upper right")
  loss.set_yscale("log")
  drawing.name_axes(loss, "step", "half squared error an image", "")


EXPERIMENT = Experiment(
  name="stability_edge",
  title="Edge of stability",
  paper="Cohen et al. 2021 (2103.00065), Edge of Stochastic Stability 2024 (2412.20553)",
  section="Cohen: section 3 and figures 1 and 5; networks with batch normalization in its appendix; 2412.20553: its definition "
  "of batch sharpness, no figure",
  claim="Under full-batch gradient descent the largest eigenvalue of the Hessian rises to 2 / learning rate and hovers there, "
  "in plain networks, with batch normalization, and with alpha/beta; with small batches the batch sharpness does.",
  criteria=CRITERIA,
  minutes=1.9,
  yours=YOURS,
  run=run,
)
