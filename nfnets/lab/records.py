"""A result as a record that JSON can hold, which is all that the report is made of and all that a resumed run looks at."""

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

import nfnets
from nfnets.data.batches.prefetch import cores
from nfnets.lab import verdict
from nfnets.lab.experiment import Criterion, Experiment, Finding, Result, Settings
from nfnets.measure.chips import cpu_name

FORMAT = 3  # of the records; another one is not read


def identity(experiment: Experiment, settings: Settings) -> dict[str, Any]:
  """What a stored record must agree with to be taken instead of a new run: settings, criteria, code of library and model."""
  fields = {
    "format": FORMAT,
    "version": nfnets.__version__,
    "name": experiment.name,
    "settings": dataclasses.asdict(settings),
    "model_file": _digest(settings.model),
    "code": _code(),
    "criteria": [_criterion(criterion) for criterion in (*experiment.criteria, *experiment.yours)],
  }
  return json.loads(json.dumps(fields))  # as it is read again: JSON has no tuples


def record(result: Result, seconds: float, options: str = "") -> dict[str, Any]:
  """The record of a result; numbers that are not finite become None, which JSON can hold.

  Args:
    result: of `conclude`.
    seconds: that it took.
    options: what a person wrote behind the experiment's name to choose the images.
  """
  experiment, measured = result.experiment, result.measured
  return {
    **identity(experiment, result.settings),
    "title": experiment.title,
    "paper": experiment.paper,
    "section": experiment.section,
    "claim": experiment.claim,
    "verdict": result.verdict,
    "findings": [_finding(finding) for finding in result.findings],
    "yours": [_finding(finding) for finding in result.yours],
    "rows": [{column: _cell(value) for column, value in row.items()} for row in measured.rows],
    "caption": measured.caption,
    "notes": list(measured.notes),
    "options": options,
    "seconds": round(seconds, 1),
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    "machine": machine(),
  }


def read(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads a record; None where there is none, or what lies there is none of this format."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def agrees(stored: dict[str, Any] | None, experiment: Experiment, settings: Settings) -> bool:
  """Whether a stored record is of this experiment with these settings and criteria."""
  wanted = identity(experiment, settings)
  return stored is not None and {key: stored.get(key) for key in wanted} == wanted


def machine() -> str:
  """The device that computed, in words."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{jax.device_count()} × {device.device_kind}, JAX {jax.__version__}"
  return f"{cpu_name()}, {cores()} cores, JAX {jax.__version__}"


def _finding(finding: Finding) -> dict[str, Any]:
  return {
    "name": finding.criterion.name,
    "claim": finding.criterion.claim,
    "criterion": finding.criterion.text(),
    "samples": [_finite(sample) for sample in finding.samples],
    "mean": _finite(finding.interval.mean),
    "low": _finite(finding.interval.low),
    "high": _finite(finding.interval.high),
    "verdict": finding.verdict,
  }


def _criterion(criterion: Criterion) -> dict[str, Any]:
  fields = dataclasses.asdict(criterion)
  return {name: _finite(value) for name, value in fields.items()}


@functools.cache
def _code() -> str:
  """The SHA-256 of the package's source, so that what another one found is measured anew."""
  files = sorted(pathlib.Path(nfnets.__file__).parent.rglob("*.py"))
  return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _digest(model: str | None) -> str | None:
  """The SHA-256 of the file in which a person's network is written, so that an edited one is measured anew."""
  file = pathlib.Path((model or "").rpartition(":")[0])
  return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _cell(value: Any) -> Any:
  """A cell of the table: of one number a seed their mean and its interval, anything else as it is."""
  if not isinstance(value, list | tuple | np.ndarray):
    return _finite(value)
  interval = verdict.bootstrap([float(sample) for sample in value])
  return {name: _finite(getattr(interval, name)) for name in ("mean", "low", "high")}


def _finite(value: Any) -> Any:
  """The value as JSON can hold it."""
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value.item() if hasattr(value, "item") else value
