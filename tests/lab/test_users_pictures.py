"""A person's network in pictures and tables: every seed is measured, and the legend names it. Purpose-made ones are made up."""

import json
import re
import textwrap

import numpy as np
import pytest
from matplotlib.figure import Figure

from nfnets.lab.experiment import Settings
from nfnets.lab.experiments import agc_inside, agc_optimizers, backward, forward, informative
from nfnets.lab.progress import Progress

SEEDS, STEPS, KERNELS = 2, 9, 3
NETWORK = """
  from flax import nnx

  class Net(nnx.Module):
    image_size = 8

    def __init__(self, seed):
      rngs = nnx.Rngs(seed)
      self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
      self.fc = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
      return self.fc(nnx.relu(self.conv(images)).reshape(len(images), -1))

  make = Net
"""


class Brief(Settings):
  """A few steps."""

  def of_scale(self, small, full):
    return STEPS if isinstance(small, int) else small


class MadeUp(Progress):
  """Computes the parts of a person's network, as JSON gives them back; those of all others are values that are made up."""

  def __init__(self, made_up, own):
    super().__init__(lambda share: None)
    self.made_up, self.own = made_up, own

  def parts(self, jobs):
    made = {name: job() if self.own and name.startswith(self.own) else self.made_up(name) for name, job in jobs.items()}
    return json.loads(json.dumps(made))


def linear_or_grouped(part):
  """Of `informative`: measures [seeds, layers], or [seeds], or a loss."""
  if part.startswith("groups"):
    return 1.0
  keys = (*informative.MEASURES, "effective_rank")
  return {key: np.ones((SEEDS, STEPS) if part.startswith("linear") else SEEDS).tolist() for key in keys}


def training(part):
  """Of `agc_inside`."""
  kept = {name: np.ones((KERNELS, len(agc_inside.BINS) - 1)).tolist() for name in agc_inside.PARTS}
  return {"accuracy": 0.5, "gain": 0.1, "clipped": np.ones((STEPS, KERNELS)).tolist(), **kept}


MADE_UP = {
  forward: lambda part: np.ones((SEEDS, int(re.findall(r"(\d+) blocks", part)[0]), 4)).tolist(),
  backward: lambda part: np.ones((SEEDS, int(re.findall(r"(\d+) blocks", part)[0]))).tolist(),
  informative: linear_or_grouped,
  agc_inside: training,
  agc_optimizers: lambda part: [0.5, 0.1, *np.ones(STEPS).tolist()],
}


def pictured(experiment, model):
  """The table, how many panels the picture has, and all words in its legends."""
  measured = experiment.run(Brief(seeds=SEEDS, model=model), MadeUp(MADE_UP[experiment], model))
  measured.draw(figure := Figure())
  legends = filter(None, [axis.get_legend() for axis in figure.axes])
  words = [text.get_text() for legend in legends for text in (legend.get_title(), *legend.get_texts())]
  return measured.rows, len(figure.axes), words


@pytest.mark.parametrize("experiment", MADE_UP)
def test_it_has_a_number_a_seed_and_a_place_in_the_legend(experiment, tmp_path, monkeypatch):
  if experiment is agc_optimizers:
    monkeypatch.setattr(experiment, "RATES", {"SGD": (0.1, 0.4), "Lion": (0.002, 0.012)})
    monkeypatch.setattr(experiment, "figures", lambda *found: {})
  monkeypatch.setattr(agc_inside, "_layer_rows", every_layer(agc_inside._layer_rows))
  (tmp_path / "mine.py").write_text(textwrap.dedent(NETWORK))
  model = f"{tmp_path / 'mine.py'}:make"
  rows, panels, words = pictured(experiment, model)
  assert "mine.py:make" in words
  theirs = [row for row in rows if any(isinstance(cell, str) and model in cell for cell in row.values())]
  numbers = [np.asarray(cell) for row in theirs for cell in row.values() if not isinstance(cell, str | int | float)]
  assert theirs and numbers and all(cell.shape == (SEEDS,) for cell in numbers)
  assert any(np.ptp(cell) > 0 for cell in numbers)  # other weights
  without, fewer, words = pictured(experiment, None)
  assert len(without) == len(rows) - len(theirs) and fewer <= panels and not any("mine.py" in word for word in words)


def every_layer(rows):
  """`_layer_rows` for as many layers as are made up."""
  return lambda name, layers, logs: rows(name, layers[: len(logs[0]["first"])], logs)


def test_histograms_of_eight_parts_cover_all_steps():
  """The ratio grows tenfold at each of eight steps, in a layer of two units; another layer has no gradient."""
  ratios = np.stack([10.0 ** np.arange(-5, 2)] * 2, axis=1).repeat(2, axis=0) * 1.5  # [14, 2]
  log = {"ratios": np.concatenate([ratios, np.zeros((14, 1))], axis=1), "clipped": np.zeros((14, 2))}
  kept = agc_inside.summary(log, [2, 1])
  found = np.array([agc_inside.medians(np.array(kept[part])) for part in agc_inside.PARTS])  # [parts, layers]
  assert found[0, 0] == -4.875 and found[-1, 0] == 1.125 and (np.diff(found[:, 0]) >= 0).all() and np.isnan(found[:, 1]).all()


def test_cosine_of_consecutive_updates():
  """Updates to and fro have the cosine -1; a step with numbers that are not finite counts for nothing."""
  move = np.array([1.0, -2.0, 0.5])
  assert agc_optimizers.consecutive([move, -2 * move, move, [np.nan] * 3, [np.inf] * 3]) == pytest.approx(-1)
  assert agc_optimizers.consecutive([move, [2.0, 1.0, 0.0], move]) == pytest.approx(0)
  assert np.isnan(agc_optimizers.consecutive([move])) and np.isnan(agc_optimizers.consecutive(np.zeros((3, 2))))
