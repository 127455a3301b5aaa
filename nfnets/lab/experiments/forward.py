"""Stable forward propagation: how the signal's variance grows with depth at initialization, with and without normalization."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnets.lab import drawing, task, users
from nfnets.lab.deep import Deep, DeepConfig
from nfnets.lab.experiment import Criterion, Experiment, Measured, Row, Settings
from nfnets.lab.measures.signals import moments, signal
from nfnets.lab.progress import Progress

DEPTHS = (16, 100, 1000)
ALPHA = 0.2
STAGES = 4
# name in the table: (norm, stages, width at the small scale, whether the signal is rescaled because it would leave float32)
OTHERS = {  # of which the claim says nothing
  "group": ("group:8", 1, 32, False),
  "L1": ("lp:1", 1, 32, False),
  "L∞": ("lp:inf", 1, 16, False),
  "ghost": ("ghost:8", 1, 32, False),
  "noisy batch": ("noisy_batch", 1, 32, False),
  "Dynamic Tanh": ("dyt", 1, 32, False),
  "Derf": ("derf", 1, 32, False),
  "WS": ("weight_std", 1, 32, True),
  "scaled WS": ("scaled_weight_std", 1, 16, True),
}
NETWORKS = {
  "batch": ("batch", 1, 64, False),
  "layer": ("layer", 1, 32, False),
  "instance": ("instance", 1, 32, False),
  "none": ("none", 1, 32, True),
  "weight norm": ("weight_norm", 1, 32, True),
  "SkipInit": ("skipinit_root", 1, 32, False),
  "alpha/beta, scaled WS": ("nf", STAGES, 64, False),
  "alpha/beta, no WS": ("nf_without_ws", STAGES, 64, False),
  **OTHERS,
}

CRITERIA = (
  Criterion(
    name="batch_slope",
    claim="With batch normalization the variance at block l is l: a straight line through depth 1,000 has the slope 1.",
    low=0.9,
    high=1.1,
  ),
  Criterion(
    name="batch_exponent", claim="It grows linearly: in a log-log plot over blocks 10 to 1,000 the slope is 1.", low=0.9, high=1.1
  ),
  Criterion(
    name="norms_exponent",
    claim="Layer and instance normalization let it grow linearly at most, too: the larger slope of the two is at most 1.",
    high=1.1,
  ),
  Criterion(
    name="none_factor",
    claim="Without normalization each block doubles it: the mean factor of the 1,000 blocks is 2.",
    low=1.9,
    high=2.1,
  ),
  Criterion(
    name="nf_slope",
    claim="With alpha/beta and scaled weight standardization a block adds alpha² within a stage: the slope over alpha² is 1.",
    low=0.8,
    high=1.25,
  ),
  Criterion(
    name="nf_reset",
    claim="A transition starts it again: behind the first block of stages 2 to 4 it is 1 + alpha², of which this is the ratio.",
    low=0.8,
    high=1.25,
  ),
  Criterion(
    name="mean_share",
    claim="Scaled weight standardization stops the mean shift: at depth 1,000 squared channel means are under a tenth of the "
    "signal.",
    high=0.1,
  ),
  Criterion(name="mean_share_without", claim="Without it they are at least three tenths.", low=0.3),
  Criterion(
    name="weight_norm_factor",
    claim="Weight normalization, which acts on parameters, lets the variance grow exponentially: by at least 1.2 a block.",
    low=1.2,
  ),
  Criterion(
    name="skip_init",
    claim="SkipInit with 1 / sqrt(1,000) bounds it: behind all blocks it is (1 + 1 / 1,000)^1,000 = 2.72, of which this is the "
    "ratio.",
    low=0.8,
    high=1.25,
  ),
)
# what is judged of a network of the user's own
YOURS = (
  Criterion(
    name="growth",
    claim="Your model: the mean square grows no faster than by one and the same amount a submodule: log2 of the largest over the "
    "first, less log2 of the number of submodules, is at most 0.",
    high=0.0,
  ),
)


def run(settings: Settings, progress: Progress) -> Measured:
  """Measures every network at every depth with every seed."""
  batch = settings.of_scale(32, 256)
  images, _ = task.images(settings.data, batch)

  def job(name: str, depth: int) -> list:
    norm, stages, width, rescale = NETWORKS[name]
    config = DeepConfig(depth=depth, width=settings.of_scale(width, 128), norm=norm, stages=stages, alpha=ALPHA)
    return profile(config, images, settings.seeds, rescale=rescale).tolist()

  names = [(name, depth) for depth in DEPTHS for name in NETWORKS]
  jobs = {f"{name}, {depth} blocks": functools.partial(job, name, depth) for name, depth in names}
  seeds = range(settings.seeds)
  looks = {f"{name}, seed {seed}": functools.partial(_user, settings, batch, seed) for name in settings.models for seed in seeds}
  found = progress.parts({**jobs, **looks})
  # (network, depth) → [seeds, depth, 4]
  measured = {key: np.array(found[part]) for key, part in zip(names, jobs, strict=True)}
  theirs = {name: [found[f"{name}, seed {seed}"] for seed in seeds] for name in settings.models}
  samples = figures({name: measured[name, 1000] for name in NETWORKS})
  rows = [_row(name, depth, values) for (name, depth), values in measured.items()]
  rows += [_user_row(name, path, [run[path] for run in runs]) for name, runs in theirs.items() for path in runs[0]]
  return Measured(
    samples=samples,
    yours={"growth": [growth(run) for run in theirs[settings.model]]} if settings.model else {},
    rows=rows,
    draw=lambda figure: draw(figure, {name: measured[name, 1000] for name in NETWORKS}, theirs),
    caption="Networks of 1,000 blocks at initialization: mean square of the skip path, on the right of normalizers that the "
    "claim does not speak of; of the residual branches, and of the skip path under alpha/beta in four stages, linear; the share "
    "of the skip path's mean square that lies in the channels' means. Shades: all seeds.",
    notes=(
      "Theory speaks of the variance over random weights. Over weights every channel's mean is zero, so that it is the mean "
      "square of the signal: variance of the channels plus squared mean of the channels.",
      "In a network of finite width, factors of blocks scatter; their mean is 2, their geometric mean is less, so that the "
      "line of the unnormalized network falls behind 2^l.",
      "Images are scaled so that the first block's input has the mean square 1, of which all these theories start. Without "
      "that, the smooth patches of digits lose a third of it in the standardized stem, and alpha/beta stays by that third "
      "below its line.",
      "SkipInit's gains begin at 1 / sqrt(blocks) here, at 0 in most networks, which leaves nothing to see; L2 is batch "
      "normalization, and Fixup's branches begin at 0.",
      "After a first run images were scaled, three networks made wider (64 channels instead of 32), and the part on layer and "
      "instance normalization was added.",
      "Numbers beyond float32 are followed in logarithms: unnormalized networks with ReLU are homogeneous.",
      *users.note(settings.model),
    ),
  )


def profile(config: DeepConfig, images: jax.Array, seeds: int, *, rescale: bool) -> np.ndarray:
  """Measures one network with several seeds.

  Returns:
    float64 [seeds, depth, 4]: log2 of the mean square, log2 of the channel variance, the share of squared channel means in the
    mean square, and log2 of the mean square of the residual branch.
  """
  graph, _ = nnx.split(nnx.eval_shape(lambda: Deep(config, jax.random.key(0))))
  make = jax.jit(lambda key: nnx.split(Deep(config, key))[1])

  @jax.jit
  def look(state: nnx.State) -> Any:
    network = nnx.merge(graph, state, copy=True)
    unit = images / jnp.sqrt(jnp.mean(network.stem(images) ** 2))  # the stem is linear
    probe = lambda out, branch: tuple(tuple(moments(x).values()) for x in (out, branch))
    return network.run(unit, key=jax.random.key(1), probe=probe, rescale=rescale)[1]

  found = []
  for seed in range(seeds):
    seen = look(make(jax.random.key(seed)))
    scale, ((_, var, mean_sq), (_, branch_var, branch_mean_sq)) = seen if rescale else (jnp.zeros(config.depth), seen)
    power = np.asarray(var + mean_sq, np.float64)
    branch = np.asarray(branch_var + branch_mean_sq, np.float64)
    logs = [np.log2(x) + 2 * np.asarray(scale, np.float64) for x in (power, np.asarray(var, np.float64), branch)]
    found.append(np.stack([logs[0], logs[1], np.asarray(mean_sq) / power, logs[2]], axis=-1))
  return np.stack(found)


def figures(profiles: dict[str, np.ndarray]) -> dict[str, list[float]]:
  """The criteria's figures of the deepest networks, a number a seed, from `profile`'s arrays by network."""
  blocks = np.arange(1, 1001)
  power = {name: np.exp2(values[..., 0]) for name, values in profiles.items() if not NETWORKS[name][3]}
  factor = lambda name: [float(np.mean(np.exp2(np.diff(seed[:, 0])))) for seed in profiles[name]]
  late = blocks >= 10
  exponents = lambda name: [float(np.polyfit(np.log(blocks[late]), np.log(seed[late]), 1)[0]) for seed in power[name]]
  per_stage = len(blocks) // STAGES
  starts = np.arange(STAGES) * per_stage
  nf = power["alpha/beta, scaled WS"]
  slopes = lambda seed: [np.polyfit(np.arange(per_stage), seed[start : start + per_stage], 1)[0] for start in starts]
  return {
    "batch_slope": [float(np.polyfit(blocks, seed, 1)[0]) for seed in power["batch"]],
    "batch_exponent": exponents("batch"),
    "norms_exponent": list(np.maximum(exponents("layer"), exponents("instance"))),
    "none_factor": factor("none"),
    "nf_slope": [float(np.mean(slopes(seed))) / ALPHA**2 for seed in nf],
    "nf_reset": [float(np.mean(seed[starts[1:]])) / (1 + ALPHA**2) for seed in nf],
    "mean_share": [float(seed[-1, 2]) for seed in profiles["alpha/beta, scaled WS"]],
    "mean_share_without": [float(seed[-1, 2]) for seed in profiles["alpha/beta, no WS"]],
    "weight_norm_factor": factor("weight norm"),
    "skip_init": [float(seed[-1]) / (1 + 1 / len(blocks)) ** len(blocks) for seed in power["SkipInit"]],
  }


def _row(name: str, depth: int, values: np.ndarray) -> Row:
  return {
    "network": name,
    "blocks": depth,
    "log2 mean square, first": values[:, 0, 0],
    "last": values[:, -1, 0],
    "log2 of the branch, first": values[:, 0, 3],
    "of the branch, last": values[:, -1, 3],
    "share of squared means, last": values[:, -1, 2],
  }


def _user(settings: Settings, batch: int, seed: int = 0) -> dict[str, dict[str, float]]:
  """The signal in the user's own network."""
  if settings.model is None:
    return {}
  model, side, arguments = users.user_model(settings.model, seed=seed, classes=task.classes(settings.data), opened=True)
  return signal(model, task.images(settings.data, batch, side=side)[0], **arguments)


def growth(run: dict[str, dict[str, float]]) -> float:
  """log2 of the largest mean square behind a submodule over the first one, less log2 of their number.

  What overflows counts as 2^128; NaN where the first one is 0.
  """
  power = np.minimum(np.nan_to_num([value["var"] + value["mean_sq"] for value in run.values()], nan=np.inf), 2.0**128)
  return float(np.log2(power.max() / power[0] / len(power))) if power[0] > 0 else float("nan")


def _user_row(model: str, path: str, values: list[dict[str, float]]) -> Row:
  power = np.maximum([value["var"] + value["mean_sq"] for value in values], 1e-300)
  return {
    "network": f"{model}: {path or 'output'}",
    "blocks": "",
    "log2 mean square, first": "",
    "last": np.log2(power),
    "log2 of the branch, first": "",
    "of the branch, last": "",
    "share of squared means, last": np.array([value["mean_sq"] for value in values]) / power,
  }


def draw(figure: Any, profiles: dict[str, np.ndarray], theirs: dict[str, list[dict[str, dict[str, float]]]]) -> None:
  """Draws six panels, of which the last one is that of a user's own network where there is one."""
  figure.set_size_inches(9.0, 5.4)
  (growth, branch, others), (stages, means, last) = figure.subplots(2, 3)
  blocks = np.arange(1, 1001)
  for style, (name, values) in enumerate((name, values) for name, values in profiles.items() if name not in OTHERS):
    label = name.removeprefix("alpha/beta, ")
    if name == label:
      drawing.line(growth, blocks, values[..., 0], "", style)
    else:
      drawing.line(stages, blocks, np.exp2(values[..., 0]), "", style)
    drawing.line(branch, blocks, values[..., 3], "", style)
    drawing.line(means, blocks, values[..., 2], name.replace("alpha/beta", "α/β"), style)
  for style, name in enumerate(OTHERS):
    drawing.line(others, blocks, profiles[name][..., 0], name, style)
    if not theirs:
      drawing.line(last, blocks, profiles[name][..., 2], "", style)
  for panel, bottom, title in ((growth, -0.5, "skip path"), (branch, -3, "residual branch"), (others, -0.5, "skip path, others")):
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=1)
    drawing.name_axes(panel, "block", "log2 of the mean square", title)
    panel.set_ylim(bottom=bottom)
  expected = np.array(DeepConfig(depth=1000, width=1, stages=STAGES, alpha=ALPHA).expected_stds() + [0.0])[1:] ** 2
  stages.plot(blocks[:-1], expected[:-1], color="0.6", lw=4, alpha=0.5, label="theory, 1 + α² l", zorder=0)
  drawing.name_axes(stages, "block", "mean square", "skip path, α/β")
  stages.set_ylim(0, 3 * expected.max())
  drawing.legend(stages)
  for panel, title in ((means, "mean shift"), (last, "mean shift, others"))[: 1 if theirs else 2]:
    drawing.name_axes(panel, "block", "share of squared means", title)
    panel.set_xscale("log")
    panel.set_ylim(0, 1.05)
  for style, (name, runs) in enumerate(theirs.items()):
    values = [[value["var"] + value["mean_sq"] for value in run.values()] for run in runs]
    drawing.line(last, np.arange(len(runs[0])), values, name.rpartition("/")[2], style)
    last.set_yscale("log")
    drawing.name_axes(last, "submodule, in order", "mean square", "your model")
    drawing.legend(last)
  for panel, side, columns in ((means, "left", 3), (others, "right", 4)):  # one for the two columns of panels, one for the third
    figure.legend(*panel.get_legend_handles_labels(), loc=f"outside lower {side}", ncols=columns, frameon=False, fontsize=8)


EXPERIMENT = Experiment(
  name="forward",
  title="Stable forward propagation",
  paper="De & Smith 2020 (2002.10444), Brock et al. 2021 (2101.08692), Lubana et al. 2021 (2106.05956)",
  section="De & Smith: section 2 and figure 2, from memory; Brock: sections 3 and 4, figures 1 and 2; Lubana: section 3, from "
  "memory",
  claim="At initialization the variance of a residual network grows linearly with batch normalization, doubles each block "
  "without normalization, and grows by alpha² a block, starting again at each transition, with alpha/beta; scaled weight "
  "standardization stops the shift of the means.",
  criteria=CRITERIA,
  minutes=1.9,
  yours=YOURS,
  run=run,
)
