"""How long programs take to classify a batch, measured in turns, so that what else the machine does meets all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def latency(programs: Mapping[str, Callable[[Any], Any]], images: Any, *, rounds: int = 15) -> dict[str, float]:
  """Measures programs on the same images; each has run once before, so that compiling does not count.

  Returns:
    Milliseconds a batch of each program, the median of the rounds.
  """
  for program in programs.values():
    jax.block_until_ready(program(images))
  times: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(rounds):
    for name, program in programs.items():
      began = time.perf_counter()
      jax.block_until_ready(program(images))
      times[name].append(1000 * (time.perf_counter() - began))
  return {name: statistics.median(values) for name, values in times.items()}
