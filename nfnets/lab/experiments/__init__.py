"""The experiments, one a file, and the one table of them."""

import importlib

from nfnets.lab.experiment import Experiment

# In the order of the report. A file is imported when its experiment is asked for.
_TABLE: tuple[str, ...] = (
  "forward",
  "backward",
  "informative",
  "covariate_shift",
  "landscape",
  "stability_edge",
  "batch_size",
  "train_test",
  "agc_inside",
  "agc_optimizers",
  "nfify",
  "without_norm",
  "scaling",
)


def names() -> list[str]:
  """The names of all experiments, in the order of the report."""
  return list(_TABLE)


def get(name: str) -> Experiment:
  """The experiment of that name; raises KeyError."""
  if name not in _TABLE:
    raise KeyError(name)
  return importlib.import_module(f"nfnets.lab.experiments.{name}").EXPERIMENT
