"""The edge of stability: the sharpness of the loss rises until gradient descent is about to diverge, and stays there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets.lab import drawing, task
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Progress, Settings
from nfnets.lab.measures.curvature import sharpness_of

RATE = 0.3
EVERY = 25  # steps between two measurements of the sharpness
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
    name="rises", claim="It rises towards that: in the plain network the median of the last third is above the start.", low=1.0
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Trains every network with every seed by full-batch gradient descent on squared errors, and measures on the way."""
  steps = settings.of_scale(400, 4000)
  count, width, depth = settings.of_scale((128, 8, 3), (1437, 32, 8))
  makers = {name: _maker(DeepConfig(depth=depth, width=width, **fields)) for name, fields in NETWORKS.items()}
  sides, arguments = dict.fromkeys(makers, 8), dict.fromkeys(makers, {})
  if settings.model is not None:
    name = settings.model
    makers["your model"] = lambda seed: task.user_model(name, seed=seed)[0]
    _, sides["your model"], arguments["your model"] = task.user_model(name, seed=0)
  curves, done = {}, 0
  for name, make in makers.items():
    images, labels = task.images(count, side=sides[name])
    runs = []
    for seed in range(settings.seeds):
      runs.append(_descend(make(seed), images, labels, steps, arguments[name]))
      done += 1
      progress(done / (settings.seeds * len(makers)))
    curves[name] = np.array(runs)  # [seeds, measurements, 2]
  return Measured(
    samples=figures({name: curves[name] for name in NETWORKS}),
    rows=[_row(name, values) for name, values in curves.items()],
    draw=lambda figure: draw(figure, curves),
    caption=f"Full-batch gradient descent with learning rate {RATE} on {count} digits: largest eigenvalue of the Hessian, in "
    "units of 2 / learning rate (left), and the loss (right). Shades: all seeds.",
    notes=(
      "Beyond 1 a quadratic with that curvature would diverge. Real losses do not: they fall on, in small jumps.",
      f"Smaller networks and fewer images than the paper's 5,000 of CIFAR-10: {depth} blocks of {width} channels.",
    ),
  )


def _maker(config: DeepConfig) -> Any:
  return lambda seed: Deep(config, jax.random.key(seed))


def _descend(network: nnx.Module, images: jax.Array, labels: jax.Array, steps: int, arguments: dict) -> np.ndarray:
  """Trains, and returns float64 [measurements, 2]: sharpness × rate / 2, and the loss, the first before any step."""
  graph, params, rest = nnx.split(network, nnx.Param, ...)
  targets = jax.nn.one_hot(labels, 10)

  def loss(params: nnx.State) -> jax.Array:
    model: Any = nnx.merge(graph, params, rest, copy=True)
    return 0.5 * jnp.mean(jnp.sum((model(images, **arguments).astype(jnp.float32) - targets) ** 2, axis=-1))

  @jax.jit
  def descend(params: nnx.State) -> nnx.State:
    step = lambda params, _: (jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(loss)(params)), None)
    return jax.lax.scan(step, params, None, length=EVERY)[0]

  measure, value = sharpness_of(loss, iterations=16), jax.jit(loss)
  found = [(measure(params) * RATE / 2, float(value(params)))]
  for _ in range(steps // EVERY):
    params = descend(params)
    found.append((measure(params) * RATE / 2, float(value(params))))
  return np.array(found, np.float64)


def last_third(curves: np.ndarray) -> list[float]:
  """The median of the sharpness over the last third of the measurements, for each seed, of [seeds, measurements, 2]."""
  return [float(np.median(seed[-(len(seed) // 3) :, 0])) for seed in curves]


def figures(curves: dict[str, np.ndarray]) -> dict[str, list[float]]:
  """The criteria's figures, a number a seed."""
  medians = {name: last_third(values) for name, values in curves.items()}
  rises = [late / max(start, 1e-12) for late, start in zip(medians["plain"], curves["plain"][:, 0, 0], strict=True)]
  return {**medians, "rises": rises}


def _row(name: str, values: np.ndarray) -> dict[str, Any]:
  return {
    "network": name,
    "sharpness × rate / 2 at the start": float(values[:, 0, 0].mean()),
    "median of the last third": float(np.mean(last_third(values))),
    "loss at the start": float(values[:, 0, 1].mean()),
    "loss at the end": float(values[:, -1, 1].mean()),
  }


def draw(figure: Any, curves: dict[str, np.ndarray]) -> None:
  """Draws two panels."""
  sharp, loss = figure.subplots(1, 2)
  for style, (name, values) in enumerate(curves.items()):
    steps = np.arange(values.shape[1]) * EVERY
    drawing.line(sharp, steps, values[..., 0], name, style)
    drawing.line(loss, steps, values[..., 1], name, style)
  sharp.axhline(1, color="0.6", lw=4, alpha=0.5, zorder=0)
  sharp.set_ylim(0, 2.5)
  drawing.name_axes(sharp, "step", "sharpness × learning rate / 2", "")
  drawing.legend(sharp, loc="upper right")
  loss.set_yscale("log")
  drawing.name_axes(loss, "step", "half squared error an image", "")
  drawing.legend(loss)


EXPERIMENT = Experiment(
  name="stability_edge",
  title="Edge of stability",
  paper="Cohen et al. 2021 (2103.00065)",
  section="section 3 and figures 1 and 5; networks with batch normalization in its appendix",
  claim="Under full-batch gradient descent the largest eigenvalue of the Hessian rises to 2 / learning rate and hovers there, "
  "in plain networks, with batch normalization, and with alpha/beta.",
  criteria=CRITERIA,
  minutes=1.5,
  run=run,
)
