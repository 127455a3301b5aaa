"""Compares our outputs on the same weights with timm's own, and with the release's, where these are installed."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnets import models
from nfnets.weights import haiku, writer
from nfnets.weights.errors import WeightsError
from nfnets.weights.network import build
from nfnets.weights.stored import Stored

SIZE = 96  # pixels of the random images that are compared


def timm_module(stored: Stored) -> Any:
  """Makes timm's own network, a torch.nn.Module in evaluation mode, with these weights.

  Raises:
    WeightsError: timm or torch is not installed, or timm has no such network.
  """
  converted = writer.convert(stored, "timm")
  try:
    import timm  # pyrefly: ignore
    import torch  # pyrefly: ignore
  except ImportError as error:
    raise WeightsError(f"{error.name} is not installed, which a comparison with timm needs; pip install timm torch") from error
  theirs = timm.create_model(converted.network, num_classes=stored.num_classes).eval()
  theirs.load_state_dict({name: torch.tensor(array) for name, array in converted.arrays.items()}, strict=True)
  return theirs


def against_timm(stored: Stored) -> list[tuple[str, float]]:
  """Returns (stage, norm of the difference / norm of timm's output), of a stage the largest of its blocks, of pool and logits.

  Raises:
    WeightsError: timm or torch is not installed, or timm has no such network.
  """
  theirs = timm_module(stored)
  import torch  # pyrefly: ignore

  images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
  outputs: list[tuple[str, str, Any]] = []  # stage, our name of the place, timm's output there
  with torch.no_grad():
    x = theirs.stem(torch.tensor(images).permute(0, 3, 1, 2))
    for number, stage in enumerate(theirs.stages, start=1):
      for block in stage:
        x = block(x)
        outputs.append((f"stage {number}", f"blocks/{len(outputs)}", x))
    x = theirs.final_act(theirs.final_conv(x))
    outputs += [("pool", "pool", x.mean((2, 3))), ("logits", "logits", theirs.forward_head(x))]
  ours = _ours(stored, images, {place for _, place, _ in outputs})
  worst: dict[str, float] = {}
  for stage, place, output in outputs:
    expected = output.numpy().transpose(0, 2, 3, 1) if output.ndim == 4 else output.numpy()
    error = float(np.linalg.norm(ours[place] - expected) / np.linalg.norm(expected))
    worst[stage] = float(np.maximum(worst.get(stage, 0.0), error))  # NaN stays NaN
  return list(worst.items())


def _ours(stored: Stored, images: np.ndarray, places: set[str]) -> dict[str, np.ndarray]:
  """The same outputs of our network, by its names of the places."""
  graph, state = nnx.split(build(stored, dtype="float32"))

  @jax.jit
  def outputs(state, images):
    seen = {}

    def tap(name, x):
      if name in places:
        seen[name] = x

    nnx.merge(graph, state).outputs(images, tap=tap)
    return seen

  return {name: np.asarray(value) for name, value in outputs(state, images).items()}


# ---- the release


def _specification(stored: Stored) -> dict[str, Any]:
  """The release's class for these weights, and its arguments. Raises WeightsError where it has none."""
  name = stored.config.model.name
  family, variant = haiku.family_of(name), haiku.variant_of(name)
  if family is None or variant is None:
    raise WeightsError(f"{stored.source} is {name}, which the release has not")
  row: Any = models.variant(name, **stored.config.model.all_overrides())
  arguments: dict[str, Any] = {"num_classes": stored.num_classes, "variant": variant, "drop_rate": 0.0}
  arguments["activation"] = row.activation
  if family.prefix == "nf_seresnet":
    arguments |= {"use_se": True, "se_ratio": row.se_ratio}
  if family.network == "ResNet":
    arguments |= {"width": 4, "norm_kwargs": {"create_scale": True, "create_offset": True, "decay_rate": 0.9, "eps": 1e-5}}
  return {"module": family.module, "class": family.network, "arguments": arguments}


def against_release(stored: Stored, directory: str) -> list[tuple[str, float]]:
  """Returns (what, relative error) for logits and pool, and the largest of every statistic of the blocks, against the release.

  Args:
    stored: the weights.
    directory: the folder that holds the release's package `nfnets` (deepmind-research).

  Raises:
    WeightsError: there is no such package, dm-haiku is missing, or the release has no such network.
  """
  spec = _specification(stored)
  if not pathlib.Path(directory, "nfnets", f"{spec['module']}.py").is_file():
    raise WeightsError(f"--official={directory}: expected the folder that holds nfnets/{spec['module']}.py of the release")
  arrays = writer.convert(stored, "haiku").arrays
  images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
  with tempfile.TemporaryDirectory() as there:
    request, answer = pathlib.Path(there, "request.npz"), pathlib.Path(there, "answer.npz")
    facts: dict[str, Any] = {"images": images, "spec": json.dumps(spec), **arrays}
    np.savez(request, **facts)
    script = pathlib.Path(__file__).with_name("official.py")
    command = [sys.executable, str(script), str(pathlib.Path(directory).absolute()), str(request), str(answer)]
    environment = {**os.environ, "JAX_TRACEBACK_FILTERING": "off"}  # so that the error is the last line
    done = subprocess.run(command, cwd=there, env=environment, capture_output=True, text=True)
    if done.returncode:
      last = (done.stderr.strip() or "no message").splitlines()[-1]
      raise WeightsError(f"--official={directory}: the release's network could not be run (dm-haiku is needed): {last[:300]}")
    theirs = dict(np.load(answer))
  return _compared(stored, images, theirs)


def _compared(stored: Stored, images: np.ndarray, theirs: dict[str, np.ndarray]) -> list[tuple[str, float]]:
  """The errors of our outputs, and of our statistics of the blocks, relative to theirs."""
  network = build(stored, dtype="float32")
  outputs, statistics = nnx.jit(lambda network, images: (network.outputs(images), models.signal_statistics(network, images)))(
    network, jax.numpy.asarray(images)
  )
  error = lambda ours, expected: float(np.linalg.norm(np.asarray(ours) - expected) / max(np.linalg.norm(expected), 1e-30))
  worst: dict[str, float] = {}
  kinds = {"avg_sq_mean": "mean_sq", "avg_var": "var", "res_avg_var": "residual_var"}
  for name, expected in theirs.items():
    kind, _, number = name.rpartition("_")
    if kind in kinds:
      index = int(number) - (kind != "res_avg_var")  # their 0 is the stem
      place = "stem" if index < 0 else f"blocks/{index}"
      found = error(statistics[place][kinds[kind]], expected)
      worst[kinds[kind]] = float(np.maximum(worst.get(kinds[kind], 0.0), found))  # NaN stays NaN
  rows = [(f"largest of the blocks' {kind}", value) for kind, value in worst.items()]
  return rows + [(name, error(outputs[name], theirs[name])) for name in ("pool", "logits") if name in theirs]
