"""What a network gives for every image of a split, in the order of the split, on any number of devices and processes."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nfnets import models
from nfnets.config import DataConfig
from nfnets.data.batches.evaluation import EvalBatches
from nfnets.data.sources.base import Source
from nfnets.errors import UserError
from nfnets.predict.forward import over_devices
from nfnets.train.step import sharding


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
  """What was read of a network for the images of a split.

  Attributes:
    values: by name, arrays with a row for each image that could be read, in the order of the split.
    index: int64 [rows], the images' numbers in the split.
    labels: int32 [rows].
    left_out: how many images of the split could not be read, in all processes.
    corrupt: what is wrong with the images that could not be read, by their number; in this process's share of them.
    images_per_s: from reading to result, compiling left out; of all processes. None where all was one batch.
  """

  values: dict[str, np.ndarray]
  index: np.ndarray
  labels: np.ndarray
  left_out: int
  corrupt: dict[int, str]
  images_per_s: float | None

  def of(self, kept: np.ndarray) -> "Outputs":
    """Those of the images that a mask, bool [rows], keeps."""
    values = {name: rows[kept] for name, rows in self.values.items()}
    return dataclasses.replace(self, values=values, index=self.index[kept], labels=self.labels[kept])


def run_split(
  network: models.Network,
  source: Source,
  data: DataConfig,
  read: Callable[[models.Network, jax.Array], dict[str, jax.Array]],
  *,
  batch: int,
  progress: Callable[[int], None] = lambda images: None,
  say: Callable[[str], None] = print,
) -> Outputs:
  """Runs a network over all images of a split; every process of a run calls it and gets all rows.

  Args:
    network: as it is to be used.
    source: the images.
    data: how they are cropped and normalised, with the sizes filled in.
    read: see `over_devices`; returns arrays by name.
    batch: images at once, over all devices; rounded up to a multiple of them.
    progress: gets the number of images that are done.
    say: gets a line about every corrupt record.

  Raises:
    DataError: too many records are corrupt, or images that are taken as they are stored differ in size.
    UserError: no image can be read, or the network gives what is not finite.
  """
  mesh = sharding.make_mesh()
  forward = over_devices(network, data, mesh, read)
  process = jax.process_index(), jax.process_count()
  parts: list[dict[str, np.ndarray]] = []
  began, began_at = time.monotonic(), 0
  rows = sharding.whole_batch(min(batch, len(source)), mesh)
  with contextlib.closing(EvalBatches(source, data, batch=rows, process=process, say=say)) as batches:
    for part in _computed(forward, batches, mesh):
      parts.append(part)
      progress(min(len(source), len(parts) * batches.batch))
      if len(parts) == 1:
        began, began_at = time.monotonic(), min(len(source), batches.batch)
    corrupt = dict(batches.corrupt)
  timed = len(source) - began_at
  speed = timed / (time.monotonic() - began) if timed else None
  return _gathered(parts, source, corrupt, speed)


def _gathered(parts: list[dict[str, np.ndarray]], source: Source, corrupt: dict[int, str], images_per_s: float | None) -> Outputs:
  """Puts the global batches together, without the rows that only fill them up or could not be read."""
  everything = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  # Rows of the global batch lie process by process, which is the order of the split.
  index = np.flatnonzero(everything.pop("mask"))
  labels = everything.pop("label")[index]
  if not len(index):
    raise UserError(f"no image of {source.name} {source.split} can be read")
  values = {name: _finite(name, rows[index]) for name, rows in everything.items()}
  return Outputs(
    values=values, index=index, labels=labels, left_out=len(source) - len(index), corrupt=corrupt, images_per_s=images_per_s
  )


def _computed(forward: Callable[[np.ndarray], Any], batches: EvalBatches, mesh: Mesh) -> Iterator[dict[str, np.ndarray]]:
  """Yields what is read of each global batch with its "label" and "mask"; one is computed while the one before is handed out."""
  whole = jax.jit(lambda rows: rows, out_shardings=sharding.replicated(mesh))
  computing: Any = None
  with contextlib.closing(batches.__iter__()) as stream:
    for part in stream:
      facts = sharding.put_batch(mesh, {name: part[name] for name in ("label", "mask")})
      started = forward(part["image"]), whole(facts)
      if computing is not None:
        yield _to_host(*computing)
      computing = started
  yield _to_host(*computing)


def _to_host(values: dict[str, jax.Array], facts: dict[str, jax.Array]) -> dict[str, np.ndarray]:
  return jax.device_get({**values, **facts})


def _finite(name: str, values: np.ndarray) -> np.ndarray:
  """Raises UserError where rows are not finite: nothing can be said of such a network."""
  bad = int((~np.isfinite(values.reshape(len(values), -1)).all(axis=1)).sum())
  if bad:
    raise UserError(
      f"the network's {name} are not finite for {bad:,} of {len(values):,} images: its weights are damaged, or training diverged"
    )
  return values
