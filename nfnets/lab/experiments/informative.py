"""Informative forward propagation: how alike random networks make different images, by depth, width and group size."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnets.lab import drawing, linear, norms, task, users, verdict
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Settings
from nfnets.lab.measures.geometry import similarity
from nfnets.lab.progress import Progress
from nfnets.lab.training import Recipe, Trainer, batches

SAMPLES = 4  # of the orthogonality gap, as in Daneshmand et al. 2021
BURN_IN = 50  # layers before the average
WIDTHS = (16, 32, 64, 128, 256, 512)
SQUARE = (8, 16, 32, 64)  # widths with as many samples, for the ranks
SHOWN = 32  # the width whose cosine and rank are drawn by layer
GROUP_WIDTHS, GROUP_DEPTH, GROUP_SAMPLES = (16, 32, 64), 20, 32
GROUPS = (32, 16, 8, 4, 2, 1)  # of the middle width, at which networks with groups are trained, too
TRAINING = Recipe(batch=64, steps=100)  # of the same networks with half the layers
LAST, RATE = 20, 0.05  # steps whose loss is averaged
MEASURES = ("cosine", "stable_rank", "orthogonality_gap")  # of networks with groups
Linears = dict[tuple[str, int], dict[str, np.ndarray]]  # (normalizer, width) → measures [seeds, layers]
Groups = dict[tuple[int, int], dict[str, np.ndarray]]  # (width, groups) → MEASURES [seeds]
Theirs = dict[str, list[dict[str, dict[str, float]]]]  # a person's network → for each seed: place → "width" and measures

CRITERIA = (
  Criterion(
    name="gap_slope",
    claim="In linear networks with batch normalization the orthogonality gap, averaged over layers, falls with the width about "
    "as fast as the theorem's bound, 1 / sqrt(width), or faster: the log-log slope is at most -0.4.",
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
  Criterion(name="rank_stable", claim="So does the stable rank, tr / ‖·‖₂: the log-log slope is at least 0.5.", low=0.5),
  Criterion(
    name="rank_without", claim="Without normalization it collapses: in the last layer it is at most 1.5 at width 32.", high=1.5
  ),
  Criterion(
    name="group_cosine",
    claim="In networks with ReLU, larger groups make images more alike: the rank correlation of group size and cosine is "
    "at least 0.8.",
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
YOURS = (
  Criterion(
    name="apart",
    claim="Your model keeps images apart: the cosine of different images' features before the classifier, or of the logits where "
    "these alone are seen, is at most 0.95.",
    high=0.95,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Measures linear networks by depth and width, and networks with ReLU by group size and width."""
  depth, seeds = settings.of_scale(200, 500), range(settings.seeds)
  wide = {
    f"linear, width {width}": functools.partial(_linear, "batch_uncentred", width, SAMPLES, depth, settings) for width in WIDTHS
  }
  square = {
    f"linear, {norm}, {width} samples": functools.partial(_linear, norm, width, width, depth, settings)
    for norm in ("batch_uncentred", "none")
    for width in SQUARE
  }
  pairs = [(width, groups) for width in GROUP_WIDTHS for groups in GROUPS if groups <= width]
  grouped = {f"width {width}, groups {groups}": functools.partial(_grouped, width, groups, settings) for width, groups in pairs}
  data = task.data(settings.data, small=settings.small)

  @functools.cache
  def trainer(groups: int) -> Trainer:
    shape = {"depth": GROUP_DEPTH // 2, "width": GROUP_WIDTHS[1], "in_features": data.channels, "num_classes": data.classes}
    return Trainer(lambda key: Deep(DeepConfig(norm=f"group:{groups}", residual=False, **shape), key), data, TRAINING)

  def loss(groups: int, seed: int) -> float:
    made = trainer(groups)
    return float(made.train(made.init(seed), batches(len(data.train[1]), TRAINING, seed), RATE)[1][-LAST:].mean())

  trained = {f"groups {groups}, seed {seed}": functools.partial(loss, groups, seed) for groups in GROUPS for seed in seeds}
  looks = {f"{name}, seed {seed}": functools.partial(_user, name, seed, settings) for name in settings.models for seed in seeds}
  found = progress.parts({**wide, **square, **grouped, **trained, **looks})
  arrays = lambda part: {name: np.array(values) for name, values in part.items()}
  gaps = np.stack([np.array(found[name]["orthogonality_gap"]) for name in wide], axis=1)  # [seeds, widths, layers]
  linears = {
    (norm, width): arrays(found[f"linear, {norm}, {width} samples"]) for norm in ("batch_uncentred", "none") for width in SQUARE
  }
  groups = {(width, count): arrays(found[f"width {width}, groups {count}"]) for width, count in pairs}
  losses = np.array([[found[f"groups {count}, seed {seed}"] for count in GROUPS] for seed in seeds])  # [seeds, sizes]
  theirs = {name: [found[f"{name}, seed {seed}"] for seed in seeds] for name in settings.models}
  return Measured(
    samples=figures(gaps, linears, groups, losses),
    yours={"apart": [apart(run) for run in theirs[settings.model]]} if settings.model else {},
    rows=_rows(gaps, linears, groups, losses) + _user_rows(theirs),
    draw=lambda figure: draw(figure, gaps, linears, groups, losses, theirs),
    caption=f"Random networks on {task.name(settings.data)}. Above, linear ones: orthogonality gap of {SAMPLES} samples by "
    f"layer; cosine and stable rank of {SHOWN} samples by layer at width {SHOWN}; gap and ranks by width, averaged over layers "
    f"{BURN_IN} to {depth}. Below, group normalization with ReLU: {GROUP_DEPTH} layers of {GROUP_WIDTHS[1]} channels by group "
    f"size; stable rank by width over group size; training loss of {GROUP_DEPTH // 2} layers after {TRAINING.steps} steps by "
    "the cosine at initialization, a point a group size. Shades and bars: all seeds.",
    notes=(
      "The theorem bounds the gap by 1 / sqrt(width), the abstract calls it inversely proportional to it: both are judged.",
      "Batch normalization divides by the root mean square here and does not centre, as in the papers' analysis.",
      "Lubana et al. bound the rank from below by a constant, which they leave open, times sqrt(width / group size). A smaller "
      "exponent does not refute that; the one that fits here stands in the table.",
      "Groups of one channel, instance normalization, train slowly for the other reason that Lubana et al. give: exploding "
      "gradients, which the experiment backward shows.",
      "The effective rank, tr² / ‖·‖²_F, is the paper's own measure. The first run was judged by the stable rank alone.",
      "Cosine and stable rank of networks with groups are two views of one matrix of inner products, and hardly differ.",
      *users.note(settings.model),
    ),
  )


def _linear(norm: str, width: int, samples: int, depth: int, settings: Settings) -> dict[str, list]:
  """The measures of `linear.layer_similarities`, [seeds, depth] each; images are brought to the width by a random matrix."""

  @jax.jit
  def look(pixels: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    inputs = pixels @ jax.random.normal(jax.random.fold_in(key, 1), (pixels.shape[1], width)) / pixels.shape[1] ** 0.5
    return linear.layer_similarities(norm, inputs, depth, key)

  runs = []
  for seed in range(settings.seeds):
    pixels = task.images(settings.data, samples, seed=seed)[0].mean(axis=-1).reshape(samples, -1)
    runs.append(jax.device_get(look(pixels, jax.random.key(seed))))
  return {name: [run[name].tolist() for run in runs] for name in runs[0]}


def _grouped(width: int, groups: int, settings: Settings) -> dict[str, list[float]]:
  """MEASURES behind the last layer of a plain network with group normalization, a number a seed."""
  config = DeepConfig(depth=GROUP_DEPTH, width=width, norm=f"group:{groups}", residual=False)

  @jax.jit
  def look(images: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    network = Deep(config, key)
    features, _ = network.run(images)
    return similarity(network.activation(norms.normalize(network.norm, features, None)))

  shown = lambda seed: task.images(settings.data, GROUP_SAMPLES, seed=seed)[0]
  runs = [jax.device_get(look(shown(seed), jax.random.key(seed))) for seed in range(settings.seeds)]
  return {name: [float(run[name]) for run in runs] for name in MEASURES}


def _slope(x: Any, y: Any) -> float:
  """The slope of a straight line through log y over log x."""
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def by_size(groups: Groups, measure: str) -> np.ndarray:
  """A measure of the networks of the middle width, [seeds, group sizes], sizes rising."""
  return np.stack([groups[GROUP_WIDTHS[1], count][measure] for count in GROUPS], axis=1)


def settled(values: np.ndarray) -> np.ndarray:
  """The mean over layers from the burn-in on, of [..., layers]."""
  return values[..., min(BURN_IN, values.shape[-1] // 2) :].mean(axis=-1)


def figures(gaps: np.ndarray, linears: Linears, groups: Groups, losses: np.ndarray) -> dict[str, list[float]]:
  """The criteria's figures, a number a seed, from gaps [seeds, widths, layers], measures, and losses [seeds, sizes]."""
  slopes = [_slope(WIDTHS, seed) for seed in settled(gaps)]
  ranks = lambda measure: np.stack([settled(linears["batch_uncentred", width][measure]) for width in SQUARE], axis=1)
  return {
    "gap_slope": slopes,
    "gap_inverse": slopes,
    "rank_slope": [_slope(SQUARE, seed) for seed in ranks("effective_rank")],
    "rank_stable": [_slope(SQUARE, seed) for seed in ranks("stable_rank")],
    "rank_without": list(linears["none", 32]["effective_rank"][:, -1]),
    "group_cosine": correlations(by_size(groups, "cosine")),
    "group_rank": correlations(by_size(groups, "stable_rank")),
    "group_speed": correlations(losses),
  }


def correlations(values: np.ndarray, other: np.ndarray | None = None) -> list[float]:
  """The rank correlation of values [seeds, points] with others, or with their order, for each seed."""
  others = np.broadcast_to(np.arange(values.shape[1]), values.shape) if other is None else other
  return [verdict.rank_correlation(one, two) for one, two in zip(others, values, strict=True)]


def exponents(groups: Groups) -> list[float]:
  """The slope of log stable rank over log (width / group size), which is the number of groups, for each seed, over all widths."""
  counts = [count for _, count in groups]
  return [_slope(counts, seed) for seed in np.stack([values["stable_rank"] for values in groups.values()], axis=1)]


def _rows(gaps: np.ndarray, linears: Linears, groups: Groups, losses: np.ndarray) -> list[dict[str, Any]]:
  row = lambda network, width, measure, value: {"network": network, "width": width, "measure": measure, "value": value}
  rows = [row("linear, batch", width, "orthogonality gap", settled(gaps[:, i])) for i, width in enumerate(WIDTHS)]
  for (norm, width), values in linears.items():
    name = "linear, batch" if norm != "none" else "linear, none"
    rows += [row(name, width, key.replace("_", " "), settled(value)) for key, value in values.items()]
  for (width, count), values in groups.items():
    rows += [row(f"ReLU, groups of {width // count}", width, key.replace("_", " "), value) for key, value in values.items()]
  middle = GROUP_WIDTHS[1]
  rows += [row(f"ReLU, groups of {middle // count}", middle, "training loss", losses[:, i]) for i, count in enumerate(GROUPS)]
  for key in MEASURES:
    measure = f"rank correlation of {key.replace('_', ' ')} and training loss"
    rows.append(row("ReLU, all groups", middle, measure, correlations(by_size(groups, key), losses)))
  return [*rows, row("ReLU, all groups", "all", "exponent of stable rank over width / group size", exponents(groups))]


def _user(name: str, seed: int, settings: Settings) -> dict[str, dict[str, float]]:
  """How alike the user's own network makes images: its logits, and the features of a network of nfnets.models."""
  network, side, arguments = users.user_model(name, seed=seed, classes=task.classes(settings.data), opened=True)
  images, _ = task.images(settings.data, GROUP_SAMPLES, seed=seed, side=side)
  outputs = getattr(network, "outputs", None)
  model: Any = nnx.clone(network)
  features = {"logits": model(images, **arguments)} if outputs is None else model.outputs(images, **arguments)
  measured = lambda value: {key: float(number) for key, number in similarity(value).items()}
  return {place: {"width": value.shape[-1], **measured(value)} for place, value in features.items()}


def apart(run: dict[str, dict[str, float]]) -> float:
  """The cosine of different images at the last place before the classifier; NaN where all that is seen there is 0."""
  place = run["pool" if "pool" in run else "logits"]
  return place["cosine"] if np.isfinite(place["stable_rank"]) else float("nan")


def _user_rows(theirs: Theirs) -> list[dict[str, Any]]:
  return [
    {
      "network": f"{name}: {place}",
      "width": values["width"],
      "measure": key.replace("_", " "),
      "value": [run[place][key] for run in runs],
    }
    for name, runs in theirs.items()
    for place, values in runs[0].items()
    for key in values
    if key != "width"
  ]


def _draw_measures(axis: Any, x: Sequence[float], measures: dict[str, np.ndarray]) -> None:
  """Draws MEASURES, [seeds, points] each, over x."""
  drawing.line(axis, x, measures["cosine"], "cosine", 0, markers=True)
  drawing.line(axis, x, 1 / measures["stable_rank"], "1 / stable rank", 1, markers=True)
  drawing.line(axis, x, measures["orthogonality_gap"], "orthogonality gap", 2, markers=True)
  axis.set_ylim(0, 1.6)


def draw(figure: Any, gaps: np.ndarray, linears: Linears, groups: Groups, losses: np.ndarray, theirs: Theirs) -> None:
  """Draws six panels, and a seventh for a network of the user's own."""
  figure.set_size_inches(12.0 if theirs else 9.0, 6.6)
  (by_depth, alike, by_width, *more), (sizes_panel, ratios, speed, *empty) = figure.subplots(2, 4 if theirs else 3)
  for axis in empty:
    axis.remove()
  for axis, (name, runs) in zip(more, theirs.items(), strict=True):
    places = list(runs[0])
    values = {key: np.array([[run[place][key] for place in places] for run in runs]) for key in MEASURES}
    _draw_measures(axis, range(len(places)), values)
    axis.set_xticks(range(len(places)), places)
    drawing.name_axes(axis, "place", "cosine, 1 / rank, or gap", "your model")
    drawing.legend(axis, loc="upper left", title=name.rpartition("/")[2])
  layers = np.arange(1, gaps.shape[-1] + 1)
  for style, width in enumerate((16, 64, 512)):
    drawing.line(by_depth, layers, gaps[:, WIDTHS.index(width)], f"batch, width {width}", style)
  for style, (norm, name) in enumerate((("batch_uncentred", "batch"), ("none", "none"))):
    measured = linears[norm, SHOWN]
    drawing.line(alike, layers, measured["cosine"], f"cosine, {name}", 2 * style)
    drawing.line(alike, layers, 1 / measured["stable_rank"], f"1 / stable rank, {name}", 2 * style + 1)
  for axis, quantity, title in (
    (by_depth, "orthogonality gap", "linear, by depth"),
    (alike, "cosine, or 1 / rank", "linear, by depth"),
  ):
    axis.set_xscale("log")
    axis.set_yscale("log" if axis is by_depth else "linear")
    drawing.name_axes(axis, "layer", quantity, title)
    drawing.legend(axis)
  alike.set_ylim(-0.1, 1.9)
  gap = settled(gaps)
  drawing.line(by_width, WIDTHS, gap, "gap, batch", 0, markers=True)
  of_width = lambda norm, measure: np.stack([settled(linears[norm, width][measure]) for width in SQUARE], axis=1)
  drawing.line(by_width, SQUARE, of_width("batch_uncentred", "effective_rank"), "effective rank, batch", 1, markers=True)
  drawing.line(by_width, SQUARE, of_width("batch_uncentred", "stable_rank"), "stable rank, batch", 2, markers=True)
  drawing.line(by_width, SQUARE, of_width("none", "effective_rank"), "effective rank, none", 3, markers=True)
  for power, dashes in ((-0.5, "-"), (-1.0, ":")):
    guide = gap[:, 0].mean() * (np.array(WIDTHS) / WIDTHS[0]) ** power
    by_width.plot(WIDTHS, guide, color="0.6", lw=4, alpha=0.5, ls=dashes, label=f"width^{power:g}", zorder=0)
  by_width.set_xscale("log", base=2)
  by_width.set_yscale("log")
  by_width.set_ylim(top=3000)
  drawing.name_axes(by_width, "width (channels)", "gap, or rank", "linear, by width")
  drawing.legend(by_width, loc="upper right")
  sizes = [GROUP_WIDTHS[1] // count for count in GROUPS]
  _draw_measures(sizes_panel, sizes, {key: by_size(groups, key) for key in MEASURES})
  sizes_panel.set_xscale("log", base=2)
  sizes_panel.set_xticks(sizes, list(map(str, sizes)))
  drawing.name_axes(sizes_panel, "channels in a group", "cosine, 1 / rank, or gap", "ReLU, by group size")
  drawing.legend(sizes_panel, loc="upper left")
  for style, width in enumerate(GROUP_WIDTHS):
    counts = [count for wide, count in groups if wide == width]
    values = np.stack([groups[width, count]["stable_rank"] for count in counts], axis=1)
    drawing.line(ratios, counts, values, f"width {width}", style, markers=True)
  ratios.plot(GROUPS, np.sqrt(GROUPS), color="0.6", lw=4, alpha=0.5, label="root", zorder=0)
  ratios.set_xscale("log", base=2)
  ratios.set_yscale("log", base=2)
  ratios.set_ylim(top=30)
  drawing.name_axes(ratios, "width / group size", "stable rank", "ReLU, groups")
  drawing.legend(ratios, loc="upper left")
  cosines = by_size(groups, "cosine")
  for i, size in enumerate(sizes):
    x, y = cosines[:, i], losses[:, i]
    speed.plot([x.mean()] * 2, [y.min(), y.max()], color="0.5", lw=1.5)
    speed.plot([x.min(), x.max()], [y.mean()] * 2, color="0.5", lw=1.5)
    speed.plot(x.mean(), y.mean(), "ko", ms=4)
    speed.annotate(str(size), (x.mean(), y.mean()), xytext=(4, 4), textcoords="offset points", fontsize=9)
  drawing.name_axes(speed, "cosine at initialization", "training loss, nats", "by channels in a group")


EXPERIMENT = Experiment(
  name="informative",
  title="Informative forward propagation",
  paper="Daneshmand et al. 2020 (2003.01652) and 2021 (2106.03970), Lubana et al. 2021 (2106.05956)",
  section="Daneshmand 2020: theorem 2, from memory; 2021: theorem 1 and figure 2; Lubana: section 4, from memory",
  claim="At initialization batch normalization keeps the features of different images apart, the more so the wider the network, "
  "while without it they become one; group normalization does it less the larger its groups are, and trains slower.",
  criteria=CRITERIA,
  minutes=1.1,
  yours=YOURS,
  run=run,
)
