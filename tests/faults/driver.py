"""Runs launch.train and makes faults in it; NFNETS_FAULTS holds them as JSON, e.g. {"SIGKILL": {"process": 1, "step": 9}}.

SIGKILL, SIGTERM, SIGINT, SIGSTOP: the signal, from itself, while `step` is computed, once in the workdir's life.
nan: {"step"}, the batch whose loss is NaN. lr: {"first", "last", "factor"}, steps with another learning rate.
raise: {"step"}, an error in a decoding thread. slow: {"seconds"}, more for every batch.
pid: the process writes its number to WORKDIR/pid-PROCESS. full: {"first", "last"}, while the workdir's disk is full.
Every batch is written down by its hash, in WORKDIR/batches-PROCESS.jsonl.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp

from launch import cli, train as program
from nfnets.data.batches.training import TrainBatches
from nfnets.optim import optimizer
from nfnets.train import run as training_run
from nfnets.train.step import gradients

POISON = 255  # the driver gives an image of nothing but this value a loss that is not a number


def fill(ballast: pathlib.Path, full: bool) -> None:
  if not full:
    ballast.unlink()
    return
  with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
    while file.write(bytes(4096)):
      pass


def install(faults: dict[str, dict], workdir: pathlib.Path) -> None:
  start, normalise, make_schedule = TrainBatches.start, gradients.normalise, optimizer.make_schedule
  train_step_over = training_run.train_step_over
  mine = lambda fault: fault.get("process", 0) == jax.process_index()

  def faulty_start(self, at):
    time.sleep(faults.get("slow", {}).get("seconds", 0))
    if "pid" in faults:
      (workdir / f"pid-{jax.process_index()}").write_text(str(os.getpid()))
    if at == faults.get("raise", {}).get("step"):
      self._decoder.pixels = lambda index: 1 / 0
    pending = start(self, at)
    result = pending.result

    def noted():
      batch = result()
      line = {"step": at, "batch": hashlib.sha256(b"".join(batch[key].tobytes() for key in sorted(batch))).hexdigest()[:16]}
      with contextlib.suppress(OSError), open(workdir / f"batches-{jax.process_index()}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
      if at == faults.get("nan", {}).get("step"):
        batch["image"][:] = POISON
      return batch

    pending.result = noted
    return pending

  def faulty_step_over(*args):
    step, at = train_step_over(*args), None

    def faulty(state, batch):
      nonlocal at
      at = int(jax.device_get(state.step)) if at is None else at + 1
      result = step(state, batch)  # the step is under way from here on
      if "full" in faults and at in (faults["full"]["first"], faults["full"]["last"]):
        fill(workdir / "ballast", at == faults["full"]["first"])
      for name, fault in faults.items():
        once = workdir / f"done-{name}-{jax.process_index()}"
        if name.startswith("SIG") and mine(fault) and at >= fault["step"] and not once.exists():
          once.touch()
          os.kill(os.getpid(), getattr(signal, name))
      return result

    return faulty

  def faulty_normalise(images, config):
    poisoned = (images == POISON).all()
    return normalise(images, config) * jnp.where(poisoned, jnp.nan, 1.0)

  def faulty_schedule(*args, **kwargs):
    usual, fault = make_schedule(*args, **kwargs), faults["lr"]
    return lambda step: usual(step) * jnp.where((step >= fault["first"]) & (step <= fault["last"]), fault["factor"], 1.0)

  TrainBatches.start, training_run.train_step_over = faulty_start, faulty_step_over
  if "nan" in faults:
    gradients.normalise = faulty_normalise
  if "lr" in faults:
    optimizer.make_schedule = faulty_schedule


if __name__ == "__main__":
  where = pathlib.Path(next(part.partition("=")[2] for part in sys.argv if part.startswith("--workdir=")))
  where.mkdir(parents=True, exist_ok=True)
  install(json.loads(os.environ.get("NFNETS_FAULTS", "{}")), where)
  cli.main(program.run, program.define, program.__doc__)
