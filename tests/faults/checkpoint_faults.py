"""Damages checkpoints as the world can: by kills, flipped bits, files cut short or deleted, and full disks.

Each function needs an empty directory and returns what it counted; "wrong" and "silent" must be 0.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from nfnets.config import Config
from nfnets.train.checkpoints import manifest, retention
from nfnets.train.checkpoints.compatibility import RunFacts
from nfnets.train.checkpoints.errors import SaveError
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.checkpoints.writer import CheckpointWriter
from nfnets.train.step import sharding
from nfnets.train.step.state import TrainState

FACTS = RunFacts(config=Config(), class_names=tuple("0123456789"), records=1000)


@dataclasses.dataclass(frozen=True)
class Kills:
  """What came of kills during saves.

  Attributes:
    attempts: how many kills there were.
    restorable: how many of them left a checkpoint to restore that is no older than the last finished one.
    wrong: how many of the restored checkpoints held other arrays than their step's.
    litter: how much was left in the directory after the next run had opened it.
    during_write: how many of the kills left something unfinished.
  """

  attempts: int
  restorable: int
  wrong: int
  litter: int
  during_write: int


@dataclasses.dataclass(frozen=True)
class Damage:
  """What came of damaged files.

  Attributes:
    attempts: how often a file was damaged, one at a time.
    files: how many files there are.
    silent: how often the damaged checkpoint was taken.
    fallbacks: how often the checkpoint before it was taken and a line named the damaged file.
  """

  attempts: int
  files: int
  silent: int
  fallbacks: int


@dataclasses.dataclass(frozen=True)
class DiskFull:
  """What came of a full disk.

  Attributes:
    how: "tmpfs", or "RLIMIT_FSIZE" where this process may not mount one.
    said: the lines that were printed.
    raised: whether waiting for the save raised its error.
    old_intact: whether the checkpoint before could still be restored.
    later_saved: whether a save worked once there was space again.
    litter: how much was left in the directory.
  """

  how: str
  said: str
  raised: bool
  old_intact: bool
  later_saved: bool
  litter: int


def small_state(step: int) -> TrainState:
  """Makes a state from its step alone, with float32, bfloat16, int32 and bool leaves, an empty array, None and empty trees."""
  rng = np.random.default_rng(step)
  params = {
    "blocks": {"0": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 16, 64)), jnp.float32)}},
    "fc": {"bias": jnp.asarray(rng.normal(size=8), jnp.bfloat16)},
  }
  opt_state = {
    "trace": jax.tree.map(lambda x: x * 2, params),
    "count": jnp.int32(step),
    "on": jnp.array(step % 2 == 0),
    "nothing": jnp.zeros((0, 4)),
    "hole": None,
    "empty": {},
  }
  fields = {
    "step": jnp.int32(step),
    "params": params,
    "stats": {},
    "opt_state": opt_state,
    "ema": (jax.tree.map(lambda x: x + 1, params), {}),
    "halted": jnp.array(False),
  }
  others = {field.name for field in dataclasses.fields(TrainState)} - set(fields)
  return TrainState(**fields, **{name: jnp.asarray(step + number, jnp.int32) for number, name in enumerate(sorted(others))})


def same(a: TrainState, b: TrainState) -> bool:
  """Says whether two states have the same structure, dtypes and bits; chex would hold NaNs and zeros of any sign for equal."""
  pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
  )


def save(workdir: pathlib.Path, *steps: int, keep: int = 9, say: Callable[[str], None] = print) -> None:
  """Saves the states of these steps, one after the other."""
  checkpoints = CheckpointWriter(str(workdir), FACTS, keep=keep, say=say)
  for step in steps:
    checkpoints.save(small_state(step))
    checkpoints.wait()
  checkpoints.close()


def like(devices: int = 1, *, shard: bool = False) -> TrainState:
  """Returns the shapes of a state, placed on the first `devices` devices, split among them or copied."""
  return sharding.place(sharding.make_mesh(jax.devices()[:devices]), jax.eval_shape(lambda: small_state(0)), shard=shard)


def read(workdir: pathlib.Path) -> CheckpointReader:
  return CheckpointReader(str(workdir))


def flip(path: pathlib.Path) -> None:
  """Flips a bit in the middle of a file."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def leftovers(workdir: pathlib.Path) -> list[str]:
  """Returns what lies in the directory and is no checkpoint."""
  directory = workdir / "checkpoints"
  good = {str(step) for step in CheckpointReader(str(workdir)).steps()}
  return sorted(path.name for path in directory.iterdir() if path.name not in good)


def kill_during_saves(workdir: pathlib.Path, kills: int, seed: int = 0) -> Kills:
  """Kills a process at a random moment of a save, `kills` times in one workdir; the next goes on from what is left."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tests.faults.checkpoint_faults"])
  rng, restorable, wrong, unfinished = random.Random(seed), 0, 0, 0
  for _ in range(kills):
    ours, theirs = context.Pipe()
    child = context.Process(target=_save_for_ever, args=(str(workdir), theirs))
    child.start()
    theirs.close()
    took = ours.recv()  # the seconds of a whole save; the next save begins now
    time.sleep(rng.uniform(0, 1.1 * took))
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    finished = _last(ours)
    before = _listing(workdir)
    unfinished += bool(leftovers(workdir))
    reader = CheckpointReader(str(workdir), say=lambda line: None)
    step = reader.choose()
    restored = reader.restore(step, jax.eval_shape(lambda: small_state(0)))
    restorable += step >= finished and before == _listing(workdir)
    wrong += not same(restored, small_state(step))
  opened = CheckpointWriter(str(workdir), FACTS, keep=2, say=lambda line: None)
  opened.close()
  return Kills(kills, restorable, wrong, len(leftovers(workdir)), unfinished)


def _save_for_ever(workdir: str, pipe) -> None:
  os.environ["XLA_FLAGS"] = ""  # one device starts sooner than eight
  checkpoints = CheckpointWriter(workdir, FACTS, keep=2, say=lambda line: None)
  step = CheckpointReader(workdir).choose() or 0
  if step:
    checkpoints.go_on_from(step)
  while True:
    step += 1
    state = small_state(step)
    jax.block_until_ready(state)
    began = time.perf_counter()
    checkpoints.save(state)
    checkpoints.wait()
    pipe.send(time.perf_counter() - began)
    pipe.send(step)


def _last(pipe) -> int:
  """Returns the newest step that the child said it had finished."""
  newest = 0
  try:
    while True:
      message = pipe.recv()
      newest = message if isinstance(message, int) else newest
  except (EOFError, OSError):
    return newest


def _listing(workdir: pathlib.Path) -> list[str]:
  return sorted(str(path) for path in workdir.rglob("*"))


def flip_bits(workdir: pathlib.Path, count: int, seed: int = 0) -> Damage:
  """Flips one bit at a time, at `count` offsets spread over all files of the newer of two checkpoints."""
  rng = random.Random(seed)

  def damages(files: list[pathlib.Path]) -> Iterator[tuple[pathlib.Path, bytes]]:
    for number in range(count):
      path = files[number % len(files)]
      data = bytearray(path.read_bytes())
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
      yield path, bytes(data)

  return _damage(workdir, damages)


def truncate_files(workdir: pathlib.Path) -> Damage:
  """Cuts each file by one byte, to its half, and to nothing."""
  return _damage(
    workdir,
    lambda files: (
      (path, path.read_bytes()[:size])
      for path in files
      for size in sorted({path.stat().st_size - 1, path.stat().st_size // 2, 0})
    ),
  )


def delete_files(workdir: pathlib.Path) -> Damage:
  """Deletes each file, one at a time."""
  return _damage(workdir, lambda files: ((path, None) for path in files))


def _damage(
  workdir: pathlib.Path, damages: Callable[[list[pathlib.Path]], Iterator[tuple[pathlib.Path, bytes | None]]]
) -> Damage:
  save(workdir, 10, 20)
  newest = workdir / "checkpoints" / "20"
  files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
  attempts = silent = fallbacks = 0
  for path, content in damages(files):
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    said: list[str] = []
    reader = CheckpointReader(str(workdir), say=said.append)
    step = reader.choose()
    attempts, silent = attempts + 1, silent + (step == 20)
    named = len(said) == 1 and path.relative_to(newest).as_posix() in said[0]
    fallbacks += (
      step == 10
      and named
      and (attempts % 20 != 1 or same(reader.restore(10, jax.eval_shape(lambda: small_state(0))), small_state(10)))
    )
    path.write_bytes(whole)
  assert CheckpointReader(str(workdir)).choose() == 20, "the damage was not undone"
  return Damage(attempts, len(files), silent, fallbacks)


def fill_disk(workdir: pathlib.Path) -> DiskFull:
  """Fills the disk while a checkpoint is written in the background, and then makes space again."""
  workdir.mkdir(parents=True, exist_ok=True)
  mounted = (
    os.geteuid() == 0
    and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(workdir)], capture_output=True).returncode == 0
  )
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  said: list[str] = []
  checkpoints = CheckpointWriter(str(workdir), FACTS, keep=9, say=said.append)
  try:
    checkpoints.save(small_state(1))
    checkpoints.wait()
    if mounted:
      with open(workdir / "ballast", "wb", buffering=0) as file:
        try:
          while file.write(bytes(4096)):
            pass
        except OSError:
          file.truncate(file.tell() - 100_000)
    else:
      resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limits[1]))
    checkpoints.save(small_state(2))
    try:
      checkpoints.wait()
      raised = False
    except SaveError:
      raised = True
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (workdir / "ballast").unlink(missing_ok=True)
    shapes = jax.eval_shape(lambda: small_state(0))
    reader = CheckpointReader(str(workdir))
    intact = reader.choose() == 1 and same(reader.restore(1, shapes), small_state(1))
    checkpoints.save(small_state(3))
    checkpoints.wait()
    later = CheckpointReader(str(workdir))
    saved = later.choose() == 3 and same(later.restore(3, shapes), small_state(3))
    return DiskFull("tmpfs" if mounted else "RLIMIT_FSIZE", "\n".join(said), raised, intact, saved, len(leftovers(workdir)))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.close()
    if mounted:
      subprocess.run(["umount", str(workdir)], check=True)


def lost_manifests(workdir: pathlib.Path) -> list[int]:
  """Takes the manifests of two checkpoints away; returns the steps that a run which opens the directory leaves."""
  save(workdir, 10, 20)
  for step in (10, 20):
    (workdir / "checkpoints" / str(step) / manifest.NAME).unlink()
  CheckpointWriter(str(workdir), FACTS, keep=2, say=lambda line: None).close()
  return retention.steps(workdir / "checkpoints")
