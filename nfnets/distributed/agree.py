"""Makes sure that all processes of a run have the same configuration, data, code and storage; spreads process 0's values."""

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

_SHOWN = 48  # characters of a value that an error shows in full; a longer value is cut, and its hash added


def code_version() -> str:
  """Returns nfnets' version and a hash of the source files that run, e.g. "0.1.0 3f2a…"."""
  root, digest = pathlib.Path(nfnets.__file__).parent, hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
  return f"{nfnets.__version__} {digest.hexdigest()[:12]}"


def require_equal(facts: dict[str, str], say: Say = print_line) -> None:
  """Compares `facts`, the code and JAX's version over all processes; all of them must call it, at the same place.

  Args:
    facts: texts by name, e.g. config: its JSON, data: its description.
    say: prints a line, in process 0, when all agree.

  Raises:
    ProcessError: something differs. Every process raises it, with the values of all: short ones in full, of JSON objects the
      fields that differ, others by a hash.
  """
  if jax.process_count() == 1:
    return
  devices = [sum(device.process_index == i for device in jax.devices()) for i in range(jax.process_count())]
  if len(set(devices)) > 1:
    raise ProcessError(f"processes differ in the number of devices: {_owners([str(number) for number in devices])}")
  mine = json.dumps({"code": code_version(), "jax": jax.__version__, **facts}).encode()
  lengths = multihost_utils.process_allgather(np.int32(len(mine)))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(mine)] = np.frombuffer(mine, np.uint8)
  rows = multihost_utils.process_allgather(padded)
  by_process = [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]
  if differing := differences(by_process):
    raise ProcessError(f"processes differ in {'; '.join(differing)}")
  if jax.process_index() == 0:
    say(f"processes: all {len(by_process)} agree on {', '.join(by_process[0])}")


def differences(everyone: list[dict[str, str]]) -> list[str]:
  """Describes each difference between the processes' facts in a text; empty where all are equal.

  Args:
    everyone: the facts of each process, by its number.
  """
  names = dict.fromkeys(name for facts in everyone for name in facts)
  return [text for name in names for text in _difference(name, [facts.get(name, "nothing") for facts in everyone])]


def _difference(name: str, values: list[str]) -> list[str]:
  """Describes how the processes' `values` of a fact differ, JSON objects field by field."""
  if len(set(values)) == 1:
    return []
  try:
    objects = [_flat(json.loads(value), name) for value in values]
  except ValueError:
    objects = []
  if objects and all(len(fields) > 1 for fields in objects):
    return [
      text
      for field in dict.fromkeys(field for fields in objects for field in fields)
      for text in _difference(field, [fields.get(field, "nothing") for fields in objects])
    ]
  return [f"{name}: {_owners(values)}"]


def _flat(value: object, name: str) -> dict[str, str]:
  """Lists the leaves of nested JSON objects, {"config.optim.name": "sgd"}."""
  if not isinstance(value, dict):
    return {name: value if isinstance(value, str) else json.dumps(value)}
  return {path: text for key, inner in value.items() for path, text in _flat(inner, f"{name}.{key}").items()}


def _owners(values: list[str]) -> str:
  """Says which process has which value, e.g. "64 in process 0 and 2, 32 in process 1"."""
  groups: dict[str, list[str]] = {}
  for index, value in enumerate(values):
    groups.setdefault(value, []).append(str(index))
  return ", ".join(
    f"{_short(value)} in process {' and '.join(indices[:4])}{f' and {len(indices) - 4} more' if len(indices) > 4 else ''}"
    for value, indices in groups.items()
  )


def _short(value: str) -> str:
  """Cuts a long value and adds its hash."""
  return value if len(value) <= _SHOWN else f"{value[: _SHOWN // 2]}… ({hashlib.sha256(value.encode()).hexdigest()[:12]})"


def broadcast_from_first(value: int) -> int:
  """Returns process 0's `value` in all processes."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def require_shared_storage(directory: pathlib.Path) -> None:
  """Raises ProcessError, in all processes, where one of them does not see a file that process 0 writes into `directory`."""
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
  """Raises ProcessError, in all processes, where one of them does not see `path`, which process 0 has written."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("written")
    seen = np.ravel(multihost_utils.process_allgather(np.int32(path.exists())))
    if not seen.all():
      blind = ", ".join(map(str, np.flatnonzero(seen == 0)))
      raise ProcessError(f"process {blind} does not see {path}: the workdir must be on storage that all processes share")


def any_process(flag: bool) -> bool:
  """Returns whether `flag` is True in at least one process; all of them must call it."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))
