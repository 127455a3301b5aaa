"""What all processes of a run must find alike: configuration, data, code, process 0's decisions, the storage they share."""

import hashlib
import json
import pathlib
import random

import jax
import numpy as np
from jax.experimental import multihost_utils

import nfnets
from nfnets.distributed.errors import ProcessError
from nfnets.distributed.processes import Say, print_line

_SHOWN = 48  # characters of a value that an error shows; of longer ones it shows a hash, or the fields that differ


def code_version() -> str:
  """nfnets' version and a hash of its source files, e.g. "0.1.0 3f2a…"; what runs, not what is installed."""
  root, digest = pathlib.Path(nfnets.__file__).parent, hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
  return f"{nfnets.__version__} {digest.hexdigest()[:12]}"


def require_equal(facts: dict[str, str], say: Say = print_line) -> None:
  """Compares `facts` (e.g. config: JSON, data: what it is), the code and JAX's version over all processes.

  Every process must call it, at the same place. Where something differs, every process raises ProcessError that names it and says
  who has what: short values in full, JSON objects by the fields that differ, others by a hash. With one process nothing happens.
  """
  if jax.process_count() == 1:
    return
  devices = [sum(device.process_index == i for device in jax.devices()) for i in range(jax.process_count())]
  if len(set(devices)) > 1:
    raise ProcessError(f"processes differ in the number of devices: {_who_has_what([str(many) for many in devices])}")
  mine = json.dumps({"code": code_version(), "jax": jax.__version__, **facts}).encode()
  lengths = multihost_utils.process_allgather(np.int32(len(mine)))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(mine)] = np.frombuffer(mine, np.uint8)
  everyone = multihost_utils.process_allgather(padded)
  found = [json.loads(bytes(row[:length])) for row, length in zip(everyone, lengths, strict=True)]
  if differing := differences(found):
    raise ProcessError(f"processes differ in {'; '.join(differing)}")
  if jax.process_index() == 0:
    say(f"processes: all {len(found)} agree on {', '.join(found[0])}")


def differences(everyone: list[dict[str, str]]) -> list[str]:
  """What differs between the processes' facts, one text each; empty where all are equal. everyone[i]: those of process i."""
  names = dict.fromkeys(name for facts in everyone for name in facts)
  return [text for name in names for text in _difference(name, [facts.get(name, "nothing") for facts in everyone])]


def _difference(name: str, values: list[str]) -> list[str]:
  if len(set(values)) == 1:
    return []
  try:
    fields = [_flat(json.loads(value), name) for value in values]
  except ValueError:
    fields = []
  if fields and all(len(each) > 1 for each in fields):
    return [
      text
      for field in dict.fromkeys(field for each in fields for field in each)
      for text in _difference(field, [each.get(field, "nothing") for each in fields])
    ]
  return [f"{name}: {_who_has_what(values)}"]


def _flat(value: object, name: str) -> dict[str, str]:
  if not isinstance(value, dict):
    return {name: value if isinstance(value, str) else json.dumps(value)}
  return {path: text for key, inner in value.items() for path, text in _flat(inner, f"{name}.{key}").items()}


def _who_has_what(values: list[str]) -> str:
  """ "64 in process 0 and 2, 32 in process 1" """
  groups: dict[str, list[str]] = {}
  for index, value in enumerate(values):
    groups.setdefault(value, []).append(str(index))
  return ", ".join(
    f"{_short(value)} in process {' and '.join(who[:4])}{f' and {len(who) - 4} more' if len(who) > 4 else ''}"
    for value, who in groups.items()
  )


def _short(value: str) -> str:
  return value if len(value) <= _SHOWN else f"{value[: _SHOWN // 2]}… ({hashlib.sha256(value.encode()).hexdigest()[:12]})"


def broadcast_from_first(value: int) -> int:
  """Process 0's value, in all processes."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def require_shared_storage(directory: pathlib.Path) -> None:
  """Raises ProcessError, in all processes, where one of them does not see what process 0 writes into `directory`."""
  if jax.process_count() == 1:
    return
  path = directory / f".seen-{broadcast_from_first(random.SystemRandom().randrange(1 << 31))}"
  if jax.process_index() == 0:
    path.touch()
  try:
    require_seen(path)
  finally:
    if jax.process_index() == 0:
      path.unlink(missing_ok=True)


def require_seen(path: pathlib.Path) -> None:
  """The same for a `path` that process 0 has written."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("written")
    seen = np.ravel(multihost_utils.process_allgather(np.int32(path.exists())))
    if not seen.all():
      blind = ", ".join(map(str, np.flatnonzero(seen == 0)))
      raise ProcessError(f"process {blind} does not see {path}: the workdir must be on storage that all processes share")


def any_process(flag: bool) -> bool:
  """Whether `flag` is True in one process at least; to be called by all of them."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))
