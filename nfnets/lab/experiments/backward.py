"""Stable backward propagation: how the gradient's norm changes from the last layer to the first, at initialization."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nfnets.lab import drawing, task, users, verdict
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.measures.signals import gradient_norms
from nfnets.lab.progress import Progress

DEPTHS = (12, 24, 48)
WIDTH = 32
GROUPS = (32, 16, 8, 4, 2, 1)  # channels of a group are WIDTH / GROUPS; 32 is instance, 1 is layer normalization
NETWORKS: dict[str, dict[str, Any]] = {
  "batch": {"norm": "batch", "residual": False},
  **{f"group of {WIDTH // groups}": {"norm": f"group:{groups}", "residual": False} for groups in GROUPS},
  "none": {"norm": "none", "residual": False},
  "batch, residual": {"norm": "batch"},
  "alpha/beta, residual": {"norm": "nf"},
}
INSTANCE, LAYER = f"group of {WIDTH // GROUPS[0]}", f"group of {WIDTH // GROUPS[-1]}"

CRITERIA = (
  Criterion(
    name="batch_factor",
    claim="Plain networks with batch normalization: the squared gradient grows by pi / (pi - 1) = 1.47 a layer towards the "
    "input.",
    low=1.3,
    high=1.65,
  ),
  Criterion(
    name="instance_factor",
    claim="With instance normalization, groups of one channel, it explodes too: by at least 1.2 a layer.",
    low=1.2,
  ),
  Criterion(
    name="group_order",
    claim="Larger groups are milder: the rank correlation of group size and factor is at most -0.8.",
    high=-0.8,
  ),
  Criterion(
    name="instance_above_layer",
    claim="One group of all channels (layer normalization) has a factor lower by at least 0.1 than groups of one.",
    low=0.1,
  ),
  Criterion(
    name="nf_factor",
    claim="In a residual network with alpha/beta and scaled weight standardization nothing explodes: 0.95 to 1.05 a block.",
    low=0.95,
    high=1.05,
  ),
  Criterion(
    name="nf_batch",
    claim="Its factor is no higher than that of the residual network with batch normalization, by more than 0.05.",
    high=0.05,
  ),
)
# what is judged of a network of the user's own
YOURS = (
  Criterion(
    name="even",
    claim="Your model: gradients neither explode nor vanish: the norms of the first and the last quarter of the kernels' ones, "
    "geometric means, differ at most tenfold; this is log10 of the ratio.",
    low=-1.0,
    high=1.0,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Measures every network at every depth with every seed."""
  images, labels = task.images(settings.data, settings.of_scale(32, 256))
  scale = settings.of_scale(1, 4)  # of widths; groups get as many channels more
  seeds, classes = range(settings.seeds), task.classes(settings.data)
  for name in settings.models:
    users.labelled_model(name, seed=0, classes=classes)  # an error comes before anything is measured

  def job(name: str, depth: int) -> list:
    config = DeepConfig(depth=depth, width=WIDTH * scale, num_classes=classes, **NETWORKS[name])
    return block_gradients(config, images, labels, settings.seeds).tolist()

  def look(name: str, seed: int) -> dict[str, float]:
    model, side, arguments = users.labelled_model(name, seed=seed, classes=classes, opened=True)
    return gradient_norms(model, *task.images(settings.data, len(images), side=side), **arguments)

  names = [(name, depth) for depth in DEPTHS for name in NETWORKS]
  jobs = {f"{name}, {depth} blocks": functools.partial(job, name, depth) for name, depth in names}
  looks = {f"{name}, seed {seed}": functools.partial(look, name, seed) for name in settings.models for seed in seeds}
  found = progress.parts({**jobs, **looks})
  measured = {key: np.array(found[part]) for key, part in zip(names, jobs, strict=True)}  # (network, depth) → [seeds, depth]
  theirs = {name: [found[f"{name}, seed {seed}"] for seed in seeds] for name in settings.models}
  deepest = {name: measured[name, DEPTHS[-1]] for name in NETWORKS}
  return Measured(
    samples=figures(deepest),
    yours={"even": [quarters(run) for run in theirs[settings.model]]} if settings.model else {},
    rows=[_row(name, depth, values) for (name, depth), values in measured.items()]
    + [
      {"network": f"{name}: {path}", "blocks": "", "factor a block": "", "first / last": [run[path] for run in runs]}
      for name, runs in theirs.items()
      for path in runs[0]
    ],
    draw=lambda figure: draw(figure, deepest, theirs),
    caption=f"Squared gradient of the kernels of each of {DEPTHS[-1]} blocks, over that of the last one (left); the factor by "
    "which it grows a block towards the input, by the number of channels in a group (right). Shades: all seeds.",
    notes=(
      "The factor is fitted to the blocks between the second and the last but one. Kernels are alike in all layers, so that "
      "their gradients follow those of the activations.",
      f"Groups are counted at width {WIDTH}" + (f"; here all widths are {scale} times that." if scale > 1 else "."),
      "In residual networks with batch normalization gradients grow by a power of the depth only.",
    )
    + (("Rows of your model hold the norm of each parameter's gradient.", *users.note(settings.model)) if theirs else ()),
  )


def block_gradients(config: DeepConfig, images: jax.Array, labels: jax.Array, seeds: int) -> np.ndarray:
  """Measures ‖∂L/∂W‖² of each block's kernels, with the mean cross-entropy L: float64 [seeds, depth]."""
  graph, _ = nnx.split(nnx.eval_shape(lambda: Deep(config, jax.random.key(0))))
  make = jax.jit(lambda key: nnx.split(Deep(config, key))[1])

  @jax.jit
  def look(state: nnx.State) -> jax.Array:
    network = nnx.merge(graph, state, copy=True)
    template, params, rest = nnx.split(network, nnx.Param, ...)

    def loss(params: nnx.State) -> jax.Array:
      logits = nnx.merge(template, params, rest, copy=True)(images)
      return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))

    grads = nnx.to_pure_dict(jax.grad(loss)(params))["blocks"][0]["convs"]
    kernels = [leaf for leaf in jax.tree.leaves(grads) if leaf.ndim == 5]
    return jnp.sum(jnp.stack([jnp.sum(leaf**2, axis=(1, 2, 3, 4)) for leaf in kernels]), axis=0)

  return np.stack([np.asarray(look(make(jax.random.key(seed))), np.float64) for seed in range(seeds)])


def factors(squared: np.ndarray) -> list[float]:
  """The factor by which the squared gradient grows a block towards the input, for each seed, from [seeds, depth]."""
  inner = slice(1, -1)
  blocks = np.arange(squared.shape[1])[inner]
  return [float(np.exp(-np.polyfit(blocks, np.log(seed[inner]), 1)[0])) for seed in squared]


def figures(deepest: dict[str, np.ndarray]) -> dict[str, list[float]]:
  """The criteria's figures, a number a seed, from [seeds, depth] by network."""
  by_name = {name: np.array(factors(squared)) for name, squared in deepest.items()}
  by_size = np.stack([by_name[f"group of {WIDTH // groups}"] for groups in GROUPS])  # sizes rise
  sizes = np.arange(len(GROUPS))
  return {
    "batch_factor": list(by_name["batch"]),
    "instance_factor": list(by_name[INSTANCE]),
    "group_order": [verdict.rank_correlation(sizes, column) for column in by_size.T],
    "instance_above_layer": list(by_name[INSTANCE] - by_name[LAYER]),
    "nf_factor": list(by_name["alpha/beta, residual"]),
    "nf_batch": list(by_name["alpha/beta, residual"] - by_name["batch, residual"]),
  }


def quarters(norms: dict[str, float]) -> float:
  """log10 of the geometric mean of the first quarter of the kernels' norms over that of the last one; NaN where one has none."""
  kernels = [norm for path, norm in norms.items() if path.endswith("kernel")] or list(norms.values())
  many = max(1, len(kernels) // 4)
  if not max(kernels[:many]) > 0 or not max(kernels[-many:]) > 0:
    return float("nan")
  return float(np.log10(verdict.geometric_mean(kernels[:many]) / verdict.geometric_mean(kernels[-many:])))


def _row(name: str, depth: int, squared: np.ndarray) -> Row:
  return {"network": name, "blocks": depth, "factor a block": factors(squared), "first / last": squared[:, 0] / squared[:, -1]}


def draw(figure: Any, deepest: dict[str, np.ndarray], theirs: dict[str, list[dict[str, float]]]) -> None:
  """Draws two panels, and a third for a network of the user's own."""
  layers, groups, *more = np.atleast_1d(figure.subplots(1, 3 if theirs else 2, width_ratios=(1.3, 1, 1)[: 3 if theirs else 2]))
  shown = ("batch", INSTANCE, LAYER, "none", "batch, residual", "alpha/beta, residual")
  labels = {INSTANCE: "instance", LAYER: "layer"}
  for style, name in enumerate(shown):
    squared = deepest[name]
    blocks = np.arange(1, squared.shape[1] + 1)
    drawing.line(layers, blocks, squared / squared[:, -1:], labels.get(name, name), style)
  layers.set_yscale("log")
  drawing.name_axes(layers, "block (1 is next to the input)", "squared gradient / that of the last block", "")
  drawing.legend(layers)
  sizes = [WIDTH // count for count in GROUPS]
  values = np.transpose([factors(deepest[f"group of {size}"]) for size in sizes])
  drawing.line(groups, sizes, values, "group normalization", 0, markers=True)
  for style, name in ((1, "batch"), (5, "alpha/beta, residual")):
    drawing.line(groups, sizes, np.repeat(np.array(factors(deepest[name]))[:, None], len(sizes), axis=1), name, style)
  groups.axhline(np.pi / (np.pi - 1), color="0.6", lw=4, alpha=0.5, zorder=0)
  groups.text(sizes[-1], np.pi / (np.pi - 1), "pi / (pi - 1)", ha="right", va="bottom", fontsize=9)
  groups.set_xscale("log", base=2)
  groups.set_xticks(sizes, list(map(str, sizes)))
  drawing.name_axes(groups, "channels in a group", "factor a block", "")
  groups.set_ylim(top=1.25 * groups.get_ylim()[1])  # room for the legend
  drawing.legend(groups, loc="upper right")
  for axis, (name, runs) in zip(more, theirs.items(), strict=True):
    norms = [[max(norm, 1e-12) for norm in run.values()] for run in runs]
    drawing.line(axis, np.arange(len(runs[0])), norms, name.rpartition("/")[2], 0)
    axis.set_yscale("log")
    drawing.name_axes(axis, "parameter, in order", "norm of its gradient", "your model")
    drawing.legend(axis)


EXPERIMENT = Experiment(
  name="backward",
  title="Stable backward propagation",
  paper="Yang et al. 2019 (1902.08129), Lubana et al. 2021 (2106.05956)",
  section="Yang: the theorems on gradient explosion, no figure; Lubana: section 5, the speed-stability trade-off of group "
  "normalization, no figure; all from memory",
  claim="At initialization gradients of plain networks explode towards the input with batch and with instance normalization, "
  "less so the larger the groups that are normalized, and not at all in residual networks with alpha/beta and scaled weight "
  "standardization.",
  criteria=CRITERIA,
  minutes=0.8,
  yours=YOURS,
  run=run,
)
