"""Our own training step on one device, in a process of its own (see turns.py), so that a peer's step can be timed beside it."""

from typing import Any

import jax

from nfnets.config.text import from_json
from nfnets.measure import program, runs
from nfnets.train.step import sharding


def start(job: dict[str, Any]) -> "OurStep":
  """Builds the network, its state and the batch, and compiles the step.

  Args:
    job: "config" is the run as JSON has it, "size" are pixels a side, "classes" is the number of logits.
  """
  return OurStep(job)


class OurStep:
  """The training loop's own compiled step, which takes steps on one batch."""

  def __init__(self, job: dict[str, Any]):
    config, size = from_json(job["config"]), job["size"]
    device = jax.devices()[0]
    with runs.explained_out_of_memory(config.batch, size, device.device_kind):
      ready = runs.prepare(config, sharding.make_mesh([device]), size, job["classes"])
    self.run = ready.run
    self.facts = {
      "network": f"nfnets' {config.model.name}, jax.jit",
      "device": device.device_kind,
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.run.state.params)),
      "build_s": ready.init_s,
      "compile_s": ready.lowering_s + ready.compile_s,
      "versions": program.versions(),
    }

  def seconds(self, steps: int) -> float:
    """Runs `steps` steps in a row, waits for the last one, and returns the seconds of a step."""
    return self.run.seconds_per_step(steps)

  def loss(self) -> float:
    """Returns the loss of the last step; FloatingPointError where the run has halted."""
    return self.run.check()
