"""Informative forward propagation: how alike random networks make different images, by depth, width and group size."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnets.lab import drawing, linear, norms, task, users
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Settings
from nfnets.lab.measures.geometry import similarity
from nfnets.lab.progress import Progress
from nfnets.lab.training import Recipe, Trainer, batches

SAMPLES = 4  # of the orthogonality gap, as in Daneshmand et al. 2021
BURN_IN = 50  # layers before the average
WIDTHS = (16, 32, 64, 128, 256, 512)
SQUARE = (8, 16, 32, 64)  # widths with as many samples, for the rank
GROUP_WIDTH, GROUP_DEPTH, GROUP_SAMPLES = 32, 20, 32
GROUPS = (32, 16, 8, 4, 2, 1)
TRAINING = Recipe(batch=64, steps=100)  # of the same networks with half the layers
LAST, RATE = 20, 0.05  # steps whose loss is averaged

CRITERIA = (
  Criterion(
    name="gap_slope",
    claim="In linear networks with batch normalization the orthogonality gap, averaged over layers, falls with the width at "
    "least as 1 / sqrt(width), the theorem's bound: the log-log slope is at most -0.4.",
    high=-0.4,
  ),
  Criterion(
    name="gap_inverse",
    claim="It is inversely proportional to the width, as the abstract says: the log-log slope is -1.",
    low=-1.2,
    high=-0.8,
  ),
  Criterion(
    name="rank_slope",
    claim="With as many samples as channels, the effective rank grows at least as sqrt(width): the log-log slope is at least "
    "0.5.",
    low=0.5,
  ),
  Criterion(
    name="rank_without", claim="Without normalization it collapses: in the last layer it is at most 1.5 at width 32.", high=1.5
  ),
  Criterion(
    name="group_cosine",
    claim="In networks with ReLU, larger groups make images more alike: the rank correlation of group size and cosine is "
    "above 0.8.",
    low=0.8,
  ),
  Criterion(
    name="group_rank",
    claim="Their stable rank falls as groups grow: the rank correlation of group size and stable rank is at most -0.8.",
    high=-0.8,
  ),
  Criterion(
    name="group_speed",
    claim="And they train slower: the rank correlation of group size and training loss after a hundred steps is at least 0.5.",
    low=0.5,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Measures linear networks by depth and width, and networks with ReLU by group size."""
  depth = settings.of_scale(200, 500)
  gaps = np.zeros((settings.seeds, len(WIDTHS), depth))
  ranks = {norm: np.zeros((settings.seeds, len(SQUARE), depth)) for norm in ("batch_uncentred", "none")}
  groups = np.zeros((settings.seeds, len(GROUPS), 3))
  jobs = len(WIDTHS) + 2 * len(SQUARE) + len(GROUPS)
  for i, width in enumerate(WIDTHS):
    gaps[:, i] = _linear("batch_uncentred", width, SAMPLES, depth, settings)["orthogonality_gap"]
    progress((i + 1) / jobs)
  for j, norm in enumerate(ranks):
    for i, width in enumerate(SQUARE):
      ranks[norm][:, i] = _linear(norm, width, width, depth, settings)["effective_rank"]
      progress((len(WIDTHS) + j * len(SQUARE) + i + 1) / jobs)
  for i, count in enumerate(GROUPS):
    groups[:, i, :2] = _grouped(count, settings)
    progress((jobs - len(GROUPS) + i + 1) / jobs)
  losses = progress.parts({f"groups {count}": functools.partial(_trained, count, settings) for count in GROUPS})
  groups[..., 2] = np.array(list(losses.values())).T
  theirs = _user(settings)
  return Measured(
    samples=figures(gaps, ranks, groups),
    rows=_rows(gaps, ranks, groups) + theirs,
    draw=lambda figure: draw(figure, gaps, ranks, groups),
    caption=f"Random networks on {task.name(settings.data)}. Left: orthogonality gap of {SAMPLES} samples by layer. Middle: "
    f"its average over layers {BURN_IN} to {depth} and the effective rank, by width. Right: group normalization with ReLU, "
    f"{GROUP_DEPTH} layers, and the training loss of such a network of {GROUP_DEPTH // 2} layers after {TRAINING.steps} "
    "steps. Shades: all seeds.",
    notes=(
      "The theorem bounds the gap by a term in 1 / sqrt(width); the abstract calls it inversely proportional to the width. "
      "Both are judged.",
      "Batch normalization divides by the root mean square here and does not centre, as in the papers' analysis.",
      "Lubana et al. bound the rank from below by a constant, which they leave open, times sqrt(width / group size). One width "
      "cannot refute that; the exponent that fits here stands in the table.",
      "Groups of one channel, instance normalization, train slowly for the other reason that Lubana et al. give: exploding "
      "gradients, which the experiment backward shows.",
    ),
  )


def _linear(norm: str, width: int, samples: int, depth: int, settings: Settings) -> dict[str, np.ndarray]:
  """The measures of `linear.layer_similarities`, [seeds, depth] each; images are brought to the width by a random matrix."""

  @jax.jit
  def look(pixels: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    inputs = pixels @ jax.random.normal(jax.random.fold_in(key, 1), (pixels.shape[1], width)) / pixels.shape[1] ** 0.5
    return linear.layer_similarities(norm, inputs, depth, key)

  runs = []
  for seed in range(settings.seeds):
    pixels = task.images(settings.data, samples, seed=seed)[0][..., 0].reshape(samples, -1)
    runs.append(jax.device_get(look(pixels, jax.random.key(seed))))
  return {name: np.stack([run[name] for run in runs]).astype(np.float64) for name in runs[0]}


def _grouped(groups: int, settings: Settings) -> np.ndarray:
  """Cosine and stable rank behind the last layer of a plain network with group normalization, [seeds, 2]."""
  config = DeepConfig(depth=GROUP_DEPTH, width=GROUP_WIDTH, norm=f"group:{groups}", residual=False)

  @jax.jit
  def look(images: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    network = Deep(config, key)
    features, _ = network.run(images)
    return similarity(network.activation(norms.normalize(network.norm, features, None)))

  shown = lambda seed: task.images(settings.data, GROUP_SAMPLES, seed=seed)[0]
  runs = [jax.device_get(look(shown(seed), jax.random.key(seed))) for seed in range(settings.seeds)]
  return np.array([[run["cosine"], run["stable_rank"]] for run in runs], np.float64)


def _trained(groups: int, settings: Settings) -> list[float]:
  """The mean training loss of the last steps of a plain network with group normalization, a number a seed."""
  data = task.data(settings.data)
  shape = {"depth": GROUP_DEPTH // 2, "width": GROUP_WIDTH, "in_features": data.channels, "num_classes": data.classes}
  config = DeepConfig(norm=f"group:{groups}", residual=False, **shape)
  trainer = Trainer(lambda key: Deep(config, key), data, TRAINING)
  runs = [
    trainer.train(trainer.init(seed), batches(len(data.train[1]), TRAINING, seed), RATE)[1] for seed in range(settings.seeds)
  ]
  return [float(losses[-LAST:].mean()) for losses in runs]


def _slope(x: Any, y: Any) -> float:
  """The slope of a straight line through log y over log x."""
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def figures(gaps: np.ndarray, ranks: dict[str, np.ndarray], groups: np.ndarray) -> dict[str, list[float]]:
  """The criteria's figures, a number a seed, from gaps and ranks [seeds, widths, depth], groups [seeds, sizes, 3]."""
  burn_in = min(BURN_IN, gaps.shape[-1] // 2)
  gap = gaps[..., burn_in:].mean(axis=-1)
  rank = ranks["batch_uncentred"][..., burn_in:].mean(axis=-1)
  slopes = [_slope(WIDTHS, seed) for seed in gap]
  order = groups.argsort(axis=1).argsort(axis=1)
  correlations = lambda ranks: [float(np.corrcoef(np.arange(len(GROUPS)), seed)[0, 1]) for seed in ranks]
  return {
    "gap_slope": slopes,
    "gap_inverse": slopes,
    "rank_slope": [_slope(SQUARE, seed) for seed in rank],
    "rank_without": list(ranks["none"][:, SQUARE.index(32), -1]),
    "group_cosine": correlations(order[..., 0]),
    "group_rank": correlations(order[..., 1]),
    "group_speed": correlations(order[..., 2]),
  }


def _rows(gaps: np.ndarray, ranks: dict[str, np.ndarray], groups: np.ndarray) -> list[dict[str, Any]]:
  row = lambda network, width, measure, value: {"network": network, "width": width, "measure": measure, "mean": float(value)}
  rows = [row("linear, batch", width, "orthogonality gap", gaps[:, i, BURN_IN:].mean()) for i, width in enumerate(WIDTHS)]
  for norm, values in ranks.items():
    name = "linear, batch" if norm != "none" else "linear, none"
    rows += [row(name, width, "effective rank, last layer", values[:, i, -1].mean()) for i, width in enumerate(SQUARE)]
  for i, count in enumerate(GROUPS):
    name = f"ReLU, groups of {GROUP_WIDTH // count}"
    rows += [
      row(name, GROUP_WIDTH, "cosine", groups[:, i, 0].mean()),
      row(name, GROUP_WIDTH, "stable rank", groups[:, i, 1].mean()),
      row(name, GROUP_WIDTH, "training loss", groups[:, i, 2].mean()),
    ]
  exponent = np.mean([_slope(GROUPS, seed) for seed in groups[..., 1]])
  return [*rows, row("ReLU, all groups", GROUP_WIDTH, "exponent of stable rank over width / group size", exponent)]


def _user(settings: Settings) -> list[dict[str, Any]]:
  """How alike the user's own network makes images: its logits, and the pooled features of a network of nfnets.models."""
  if settings.model is None:
    return []
  network, side, arguments = users.user_model(settings.model, seed=0, classes=task.classes(settings.data))
  images, _ = task.images(settings.data, GROUP_SAMPLES, side=side)
  outputs = getattr(network, "outputs", None)
  model: Any = nnx.clone(network)
  features = {"logits": model(images, **arguments)} if outputs is None else model.outputs(images, **arguments)
  return [
    {"network": f"{settings.model}: {place}", "width": int(value.shape[-1]), "measure": name, "mean": float(measured)}
    for place, value in features.items()
    for name, measured in similarity(value).items()
  ]


def draw(figure: Any, gaps: np.ndarray, ranks: dict[str, np.ndarray], groups: np.ndarray) -> None:
  """Draws three panels."""
  by_depth, by_width, by_group = figure.subplots(1, 3)
  layers = np.arange(1, gaps.shape[-1] + 1)
  for style, width in enumerate((16, 64, 512)):
    drawing.line(by_depth, layers, gaps[:, WIDTHS.index(width)], f"batch, width {width}", style)
  by_depth.set_xscale("log")
  by_depth.set_yscale("log")
  drawing.name_axes(by_depth, "layer", "orthogonality gap", "linear, by depth")
  drawing.legend(by_depth)
  gap = gaps[..., BURN_IN:].mean(axis=-1)
  drawing.line(by_width, WIDTHS, gap, "gap, batch", 0, markers=True)
  drawing.line(by_width, SQUARE, ranks["batch_uncentred"][..., -1], "effective rank, batch", 1, markers=True)
  drawing.line(by_width, SQUARE, ranks["none"][..., -1], "effective rank, none", 3, markers=True)
  for power, dashes in ((-0.5, "-"), (-1.0, ":")):
    guide = gap[:, 0].mean() * (np.array(WIDTHS) / WIDTHS[0]) ** power
    by_width.plot(WIDTHS, guide, color="0.6", lw=4, alpha=0.5, ls=dashes, label=f"width^{power:g}", zorder=0)
  by_width.set_xscale("log", base=2)
  by_width.set_yscale("log")
  by_width.set_ylim(top=1000)
  drawing.name_axes(by_width, "width (channels)", "gap, or effective rank", "linear, by width")
  drawing.legend(by_width, loc="upper right")
  sizes = [GROUP_WIDTH // count for count in GROUPS]
  drawing.line(by_group, sizes, groups[..., 0], "cosine", 0, markers=True)
  drawing.line(by_group, sizes, 1 / groups[..., 1], "1 / stable rank", 1, markers=True)
  drawing.line(by_group, sizes, groups[..., 2], "training loss", 2, markers=True)
  by_group.set_xscale("log", base=2)
  by_group.set_xticks(sizes, list(map(str, sizes)))
  by_group.set_ylim(0, 2.6)
  drawing.name_axes(by_group, "channels in a group", "cosine, 1 / rank, or loss", "ReLU, by group size")
  drawing.legend(by_group, loc="upper left")


EXPERIMENT = Experiment(
  name="informative",
  title="Informative forward propagation",
  paper="Daneshmand et al. 2020 (2003.01652) and 2021 (2106.03970), Lubana et al. 2021 (2106.05956)",
  section="Daneshmand 2020: theorem 2; 2021: theorem 1 and figure 2; Lubana: section 4",
  claim="At initialization batch normalization keeps the features of different images apart, the more so the wider the network, "
  "while without it they become one; group normalization does it less the larger its groups are, and trains slower.",
  criteria=CRITERIA,
  minutes=1.0,
  run=run,
)
