"""Several processes write one checkpoint together, and agree on which one they go on from."""

import os
import pathlib
import socket
import subprocess
import sys

from tests.faults.checkpoint_faults import leftovers, like, read, same, small_state

ROOT = pathlib.Path(__file__).resolve().parents[3]

PROGRAM = """
import sys
import jax
port, index, workdir = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
from jax.experimental import multihost_utils
from nfnets.train.checkpoints.reader import CheckpointReader
from nfnets.train.checkpoints.writer import CheckpointWriter
from nfnets.train.step import sharding
from tests.faults.checkpoint_faults import FACTS, flip, small_state
like = sharding.place(sharding.make_mesh(), jax.eval_shape(lambda: small_state(0)), shard=True)
say = lambda line: print(f"said by {index}: {line}", flush=True)
checkpoints = CheckpointWriter(workdir, FACTS, keep=3, say=say)
assert CheckpointReader(workdir, say=say).choose() is None
for step in (1, 2, 3):
  checkpoints.save(sharding.put(small_state(step), like))
checkpoints.close()
multihost_utils.sync_global_devices("all written")
if index == "0":
  flip(checkpoints.path(3) / "meta" / "metadata")
checkpoints = CheckpointWriter(workdir, FACTS, keep=2, say=say)
reader = CheckpointReader(workdir, say=say)
state = reader.restore(reader.choose(), like)
checkpoints.go_on_from(int(state.step))
print(f"process {index} goes on from {int(state.step)}", flush=True)
checkpoints.save(sharding.put(small_state(4), like))
checkpoints.close()
"""


def test_two_processes_write_one_checkpoint_and_agree_on_what_to_restore(tmp_path):
  """The state is split over 2 × 2 devices and the newest checkpoint damaged; at last one process of 8 devices reads the rest."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  both = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, str(port), str(index), str(tmp_path)],
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for index in range(2)
  ]
  try:
    out = "\n".join(process.communicate(timeout=120)[0] for process in both)
  finally:
    for process in both:
      process.kill()
  assert [process.returncode for process in both] == [0, 0], out
  assert "process 0 goes on from 2" in out and "process 1 goes on from 2" in out
  assert out.count("is damaged: its SHA-256 is another") == 1 and "said by 0: checkpoint" in out
  reader = read(tmp_path)
  assert reader.steps() == [2, 4] and leftovers(tmp_path) == ["3.aside"] and reader.meta(4)["processes"] == 2
  assert reader.choose() == 4 and same(reader.restore(4, like(8, shard=True)), small_state(4))
