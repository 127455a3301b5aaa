"""Makes a classifier of weights in a file or in a run's checkpoints."""

import os
from typing import Any

from nfnets.predict.classifier import Classifier
from nfnets.train import resolve
from nfnets.train.initial import read_weights
from nfnets.weights import network
from nfnets.weights.stored import Stored


def load(
  source: str | os.PathLike[str],
  *,
  weights: str | None = None,
  best: bool = False,
  num_classes: int | None = None,
  dtype: Any = None,
) -> Classifier:
  """Makes a classifier of stored weights.

  Args:
    source: a file of weights (ours, Haiku's or timm's), hf://OWNER/NAME, a workdir, or WORKDIR/checkpoints/STEP.
    weights: of a run, "params" or "ema"; None takes the average where it was kept.
    best: of a workdir, the best step by the run's own evaluations instead of the newest.
    num_classes: gives the network a new, untrained classifier of so many classes, to be trained.
    dtype: what convolutions compute in; None as in training.

  Raises:
    UserError: with its kinds WeightsError and CheckpointError: nothing is there, it is damaged, or it does not fit.
  """
  return classifier_of(read_weights(source, weights=weights, best=best), num_classes=num_classes, dtype=dtype)


def classifier_of(stored: Stored, *, num_classes: int | None = None, dtype: Any = None) -> Classifier:
  """Makes a classifier of weights that have been read; the arguments and errors are those of `load`."""
  return Classifier(
    network=network.build(stored, num_classes=num_classes, dtype=dtype),
    class_names=stored.class_names if num_classes is None else (),
    preprocessing=resolve.preprocessing(stored),
    loss=stored.config.loss,
    source=stored.source,
  )
