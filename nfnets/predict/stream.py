"""Predictions for any number of photographs: decoded by threads ahead of the devices, in batches, in order."""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from nfnets import models
from nfnets.data.batches.prefetch import cores
from nfnets.data.errors import printable
from nfnets.errors import UserError
from nfnets.predict.classifier import Classifier, Photo
from nfnets.predict.forward import over_devices
from nfnets.train.step import sharding


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
  """What became of a photograph.

  Attributes:
    place: its number among the photographs.
    values: a row of what was read of the network, such as {"probabilities": float32 [classes]}; None where it cannot be read.
    pixels: what the network saw, uint8 [size, size, 3]; None where it cannot be read.
    error: why it cannot be read, in one line; empty where it can.
  """

  place: int
  values: dict[str, np.ndarray] | None = None
  pixels: np.ndarray | None = None
  error: str = ""


def probabilities(classifier: Classifier) -> Callable[[models.Network, jax.Array], dict[str, jax.Array]]:
  """What to read of a network for the probabilities of its classes."""
  share = jax.nn.softmax if classifier.loss == "softmax" else jax.nn.sigmoid
  return lambda network, images: {"probabilities": share(network(images))}


def run_photos(
  classifier: Classifier,
  photos: Sequence[Photo],
  read: Callable[[models.Network, jax.Array], dict[str, jax.Array]] | None = None,
  *,
  batch: int = 64,
  threads: int | None = None,
) -> Iterator[Result]:
  """Yields the result of each photograph, in order.

  Args:
    classifier: the network and its preprocessing.
    photos: files, bytes or arrays; at most four batches of them are in memory at once.
    read: what to read of the network, see `over_devices`; by default the probabilities.
    batch: photographs at once, over all devices; rounded up to a multiple of them.
    threads: that read and decode; None is one for each core.

  Raises:
    UserError: the network gives what is not finite.
  """
  mesh = sharding.make_mesh()
  rows = sharding.whole_batch(max(1, min(batch, len(photos))), mesh)
  forward = over_devices(classifier.network, classifier.preprocessing, mesh, read or probabilities(classifier))
  computing: tuple[list[Result], Any] | None = None  # while it is, the next batch is decoded
  for results in _batches(_decoded(classifier, photos, 2 * rows, threads), rows):
    images = [result.pixels for result in results if result.pixels is not None]
    padded = np.stack([*images, *[np.zeros_like(images[0])] * (rows - len(images))]) if images else None
    started = results, None if padded is None else forward(padded)
    if computing is not None:
      yield from _with_values(*computing)
    computing = started
  if computing is not None:
    yield from _with_values(*computing)


def _decoded(classifier: Classifier, photos: Sequence[Photo], ahead: int, threads: int | None) -> Iterator[Result]:
  """Yields the photographs' pixels, in order; those of another size than the first are refused, since they fit in no batch."""
  shape: tuple[int, ...] | None = None
  pool = concurrent.futures.ThreadPoolExecutor(threads or cores(), thread_name_prefix="decode")
  try:
    begun: collections.deque[concurrent.futures.Future] = collections.deque()
    for place in range(len(photos)):
      while len(begun) < min(ahead, len(photos) - place):
        begun.append(pool.submit(classifier.square, photos[place + len(begun)]))
      try:
        pixels = begun.popleft().result()
      except UserError as error:
        yield Result(place, error=str(error))
        continue
      shape = shape or pixels.shape
      if pixels.shape == shape:
        yield Result(place, pixels=pixels)
      else:
        name = printable(str(photos[place])) if isinstance(photos[place], str | os.PathLike) else f"photograph {place + 1}"
        yield Result(
          place,
          error=f"{name} is {pixels.shape[0]}×{pixels.shape[1]}, the first {shape[0]}×{shape[1]}; expected one size, because "
          "this network takes images as they are (test_crop='none')",
        )
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _batches(results: Iterator[Result], rows: int) -> Iterator[list[Result]]:
  """Yields groups with at most `rows` photographs that can be read, and not many more in all."""
  group: list[Result] = []
  for result in results:
    group.append(result)
    if sum(member.pixels is not None for member in group) == rows or len(group) == 2 * rows:
      yield group
      group = []
  if group:
    yield group


def _with_values(results: list[Result], computed: Any) -> Iterator[Result]:
  """Waits for what was computed of a group's photographs, and hands each its row."""
  values, row = jax.device_get(computed), 0
  for result in results:
    if result.pixels is None:
      yield result
      continue
    mine = {name: value[row] for name, value in values.items()}
    row += 1
    if not all(np.isfinite(value).all() for value in mine.values()):
      raise UserError("the network gives what is not finite: its weights are damaged, or training diverged")
    yield dataclasses.replace(result, values=mine)
