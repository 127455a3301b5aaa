"""Runs of several processes for real, on this machine, by launch.pods.local and by engines where they are installed.

The tests of SLURM and Open MPI need sbatch (with a running slurmctld) and mpirun; docs/pods.md says what they were seen to do.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PODS = ROOT / "launch" / "pods"
PROGRAM = """
import os, signal, sys, time
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from launch import cli
from nfnets import distributed
from nfnets.train.step import sharding

def run(values):
  me = cli.start_processes(values)
  mode = os.environ.get("MODE", "")
  print("joined", me.index, "of", me.count, "by", me.engine, os.getpid())
  if me.count > 1:
    distributed.require_equal({"config": '{"batch": %d, "seed": 0}' % (64 - 32 * me.index if mode == "differ" else 64)})
  mesh = sharding.make_mesh()
  x = sharding.put_batch(mesh, {"x": np.full(jax.local_device_count(), me.index + 1.0, np.float32)})["x"]
  total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))
  print("psum", float(total(x)[0]), "over", mesh.size)
  if mode == "bug in 0" and me.index == 0:
    {}["nothing here"]
  if mode == "bug" and me.index == 1:
    {}["nothing here"]
  if mode == "apart":
    from nfnets.train.checkpoints.writer import CheckpointWriter
    from tests.faults.checkpoint_faults import FACTS
    CheckpointWriter(f"{os.environ['MARK']}-{me.index}", FACTS, keep=1)
  if mode == "usage" and me.index == 1:
    cli.run_subcommand({"list": None}, values, ("lst",), "NAME DIR")
  if mode.startswith("stop once") and not os.path.exists(os.environ["MARK"]):
    distributed.shutdown()  # so that both processes have looked for the mark
    if me.index == 0:
      open(os.environ["MARK"], "w").close()
    return distributed.STOPPED
  while mode == "on and on":
    total(x).block_until_ready()
    time.sleep(0.05)
  if mode.endswith("wait for TERM"):
    signals = []
    signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
    print("listening")
    while not signals:
      time.sleep(0.05)
    return distributed.STOPPED

cli.main(run, cli.define_processes, "A run of several processes")
"""


def environ(**variables: str) -> dict[str, str]:
  others = ("JAX_NUM", "JAX_PROCESS", "JAX_COORD", "SLURM")
  kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
  return {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1", **variables}


@pytest.fixture
def program(tmp_path) -> list[str]:
  path = tmp_path / "program.py"
  path.write_text(PROGRAM)
  return [sys.executable, str(path)]


def local(program: list[str], *options: str, **variables: str) -> subprocess.Popen:
  command = [sys.executable, "-m", "launch.pods.local", "--processes=2", "--grace=20", *options, "--", *program]
  return subprocess.Popen(
    command, cwd=ROOT, env=environ(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def finish(running: subprocess.Popen) -> tuple[int, str]:
  """Waits for the end; returns (status, the output that was not read yet)."""
  try:
    out, _ = running.communicate(timeout=60)
    return running.returncode, out
  finally:
    running.kill()


def read_until(running: subprocess.Popen, pattern: str, times: int) -> str:
  """Returns the output until `pattern` has come `times` times."""
  out = ""
  for line in running.stdout:
    out += line
    if len(re.findall(pattern, out)) == times:
      return out
  pytest.fail(f"the run ended before {pattern!r} came {times} times:\n{out}")


def test_two_processes_of_two_devices_add_up_start_again_and_are_told_to_stop(program, tmp_path):
  """Processes that end with 75 by themselves start again; after a signal that went to all, 75 is the end."""
  running = local(program, "--devices=2", "--restarts=3", MODE="stop once, then wait for TERM", MARK=str(tmp_path / "mark"))
  until = read_until(running, "listening", 2)
  running.send_signal(signal.SIGTERM)
  status, out = finish(running)
  out = until + out
  assert status == 75, out
  assert out.count("psum 6.0 over 4") == 4 and "[0] psum" in out and "[1] psum" in out
  assert out.count("status 75: starting again, 1 of 3") == 1 and "starting again, 2" not in out
  assert re.search(r"^\[0\] processes: 0 of 2 \(JAX_ variables\), coordinator 127\.0\.0\.1:\d+$", out, re.MULTILINE)
  assert out.count("processes: all 2 agree on code, jax, config") == 2  # process 0 says it in both runs


@pytest.mark.parametrize(
  "mode, status, expected",
  [
    ("differ", 2, ["processes differ in config.batch: 64 in process 0, 32 in process 1"]),
    (
      "usage",
      2,
      [
        "[1] process 1 of 2: error: subcommand: got lst, expected list",
        "[0] process 0 of 2: error: process 1 failed (status 2): ",
      ],
    ),
    ("apart", 2, ["[0] process 0 of 2: error: process 1 does not see ", "must be on storage that all processes share"]),
    (
      "bug",
      1,
      [
        "[1] process 1 of 2: Traceback",
        "[1] process 1 of 2: KeyError: 'nothing here'",
        "[0] process 0 of 2: error: process 1 failed (status 1): ",
      ],
    ),
    ("bug in 0", 1, ["[0] process 0 of 2: KeyError: 'nothing here'", "[1] process 1 of 2: error: process 0 failed (status 1): "]),
  ],
)
def test_a_failing_process_takes_the_others_along_with_its_status(program, tmp_path, mode, status, expected):
  ended_with, out = finish(local(program, "--restarts=2", MODE=mode, MARK=str(tmp_path / "disk")))
  assert ended_with == status, out
  assert all(text in out for text in expected) and "starting again" not in out and "status 134" not in out, out


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_at_once(program, victim):
  running = local(program, MODE="on and on")
  out = read_until(running, "psum 3.0 over 2", 2)
  pids = {int(index): int(pid) for index, pid in re.findall(r"joined (\d) of 2 by .* (\d+)\n", out)}
  since = time.monotonic()
  os.kill(pids[victim], signal.SIGKILL)
  status, out = finish(running)
  assert time.monotonic() - since < 10
  assert status == 137, out  # the status of the process that failed first
  lost = f"[{1 - victim}] process {1 - victim} of 2: error: process {victim} ("
  # where process 0 died, JAX may abort (134) before our line is written; the launchers start again after both
  assert (lost in out and "was lost: its connection was closed; run the same command again" in out) or victim == 0, out


def test_who_is_not_there_is_waited_for_and_named(program):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  command = [*program, f"--coordinator={address}", "--processes=3", "--process=0", "--start_timeout=1"]
  done = subprocess.run(command, cwd=ROOT, env=environ(), capture_output=True, text=True, timeout=60)
  assert done.returncode == 76
  assert done.stderr.startswith("process 0 of 3: error: 1 of 3 processes came within 1 s, missing: 1, 2;")
  assert len(done.stderr.splitlines()) == 1


# ---- engines that may be installed

_SLURM_RUNS = shutil.which("sbatch") and subprocess.run(["sinfo"], capture_output=True).returncode == 0


@pytest.mark.skipif(not _SLURM_RUNS, reason="no SLURM: sbatch is not installed or slurmctld does not answer")
def test_slurm_for_real(program, tmp_path):
  """The sbatch file starts two tasks, or one, which is a process by itself."""
  options = ["--wait", "--ntasks-per-node=2", "--cpus-per-task=1", "--gres=none", f"--output={tmp_path}/log"]
  command = ["sbatch", *options, str(PODS / "slurm.sbatch"), *program]
  done = subprocess.run(command, cwd=ROOT, env=environ(), capture_output=True, text=True, timeout=120)
  log = (tmp_path / "log").read_text()
  assert done.returncode == 0, done.stderr + log
  assert "processes: 0 of 2 (SLURM), coordinator " in log and "all 2 agree" in log and log.count("psum 3.0 over 2") == 2
  done = subprocess.run(["srun", "-n1", *program], cwd=ROOT, env=environ(), capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and "processes: one (SLURM)" in done.stdout and "psum 1.0 over 1" in done.stdout


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no Open MPI: mpirun is not installed")
def test_open_mpi_for_real(program):
  """JAX cannot tell from Open MPI 5 where process 0 listens, so it is given."""
  allowed = {f"{engine}_ALLOW_RUN_AS_ROOT{end}": "1" for engine in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
  version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
  if int(re.search(r"(\d+)\.\d", version)[1]) >= 5:
    with socket.create_server(("127.0.0.1", 0)) as free:
      allowed["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free.getsockname()[1]}"
  done = subprocess.run(
    ["mpirun", "--oversubscribe", "-n", "2", *program],
    cwd=ROOT,
    env=environ(**allowed),
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert "processes: 0 of 2 (Open MPI), coordinator " in done.stdout and done.stdout.count("psum 3.0 over 2") == 2
