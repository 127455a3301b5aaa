"""What several processes must find alike: a number that process 0 knows, and the files of storage that they share."""
import pathlib
import random

import jax
import numpy as np
from jax.experimental import multihost_utils

from nfnets.train.manifest import CheckpointError


def agree(value: int) -> int:
  """Process 0's value, in all processes."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check(directory: pathlib.Path) -> None:
  """Raises CheckpointError, in all processes, where one of them does not see what process 0 writes into `directory`."""
  if jax.process_count() == 1:
    return
  path = directory / f".seen-{agree(random.SystemRandom().randrange(1 << 31))}"
  if jax.process_index() == 0:
    path.touch()
  try:
    check_seen(path)
  finally:
    if jax.process_index() == 0:
      path.unlink(missing_ok=True)


def check_seen(path: pathlib.Path) -> None:
  """The same for a `path` that process 0 has written."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("written")
    seen = np.ravel(multihost_utils.process_allgather(np.int32(path.exists())))
    if not seen.all():
      blind = ", ".join(map(str, np.flatnonzero(seen == 0)))
      raise CheckpointError(f"process {blind} does not see {path}: the workdir must be on storage that all processes share")
