"""Runs of several processes for real, on this machine, and the files of launch/pods/ as far as no cluster is needed.

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
import sysconfig
import time

import pytest
import yaml

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
  what = os.environ.get("WHAT", "")
  print("joined", me.index, "of", me.count, "by", me.engine, os.getpid())
  if me.count > 1:
    distributed.require_equal({"config": '{"batch": %d, "seed": 0}' % (64 - 32 * me.index if what == "differ" else 64)})
  mesh = sharding.make_mesh()
  x = sharding.put_batch(mesh, {"x": np.full(jax.local_device_count(), me.index + 1.0, np.float32)})["x"]
  total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))
  print("psum", float(total(x)[0]), "over", mesh.size)
  if what == "bug in 0" and me.index == 0:
    {}["nothing here"]
  if what == "bug" and me.index == 1:
    {}["nothing here"]
  if what == "apart":
    from nfnets.train.checkpoints.writer import CheckpointWriter
    from tests.faults.checkpoint_faults import FACTS
    CheckpointWriter(f"{os.environ['MARK']}-{me.index}", FACTS, keep=1)
  if what == "usage" and me.index == 1:
    cli.run_subcommand({"list": None}, values, ("lst",), "NAME DIR")
  if what.startswith("stop once") and not os.path.exists(os.environ["MARK"]):
    distributed.shutdown()  # so that both have looked
    if me.index == 0:
      open(os.environ["MARK"], "w").close()
    return distributed.STOPPED
  while what == "on and on":
    total(x).block_until_ready()
    time.sleep(0.05)
  if what.endswith("wait for TERM"):
    got = []
    signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    print("listening")
    while not got:
      time.sleep(0.05)
    return distributed.STOPPED

cli.main(run, cli.define_processes, "A run of several processes")
"""


def environ(**more: str) -> dict[str, str]:
  others = ("JAX_NUM", "JAX_PROCESS", "JAX_COORD", "SLURM")
  kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
  return {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1", **more}


@pytest.fixture
def program(tmp_path) -> list[str]:
  path = tmp_path / "program.py"
  path.write_text(PROGRAM)
  return [sys.executable, str(path)]


def local(program: list[str], *options: str, **more: str) -> subprocess.Popen:
  command = [sys.executable, "-m", "launch.pods.local", "--processes=2", "--grace=20", *options, "--", *program]
  return subprocess.Popen(command, cwd=ROOT, env=environ(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(running: subprocess.Popen) -> tuple[int, str]:
  """(status, what it printed that was not read yet)."""
  try:
    out, _ = running.communicate(timeout=60)
    return running.returncode, out
  finally:
    running.kill()


def read_until(running: subprocess.Popen, pattern: str, times: int) -> str:
  """What it printed until `pattern` had come `times` times."""
  out = ""
  for line in running.stdout:
    out += line
    if len(re.findall(pattern, out)) == times:
      return out
  pytest.fail(f"the run ended before {pattern!r} came {times} times:\n{out}")


def test_two_processes_of_two_devices_add_up_start_again_and_are_told_to_stop(program, tmp_path):
  """Status 75 of their own starts them again; 75 after a signal that went to all is the end."""
  running = local(program, "--devices=2", "--restarts=3", WHAT="stop once, then wait for TERM", MARK=str(tmp_path / "mark"))
  until = read_until(running, "listening", 2)
  running.send_signal(signal.SIGTERM)
  status, out = finish(running)
  out = until + out
  assert status == 75, out
  assert out.count("psum 6.0 over 4") == 4 and "[0] psum" in out and "[1] psum" in out
  assert out.count("status 75: starting again, 1 of 3") == 1 and "starting again, 2" not in out
  assert re.search(r"^\[0\] processes: 0 of 2 \(JAX_ variables\), coordinator 127\.0\.0\.1:\d+$", out, re.MULTILINE)
  assert out.count("processes: all 2 agree on code, jax, config") == 2  # process 0, twice


@pytest.mark.parametrize(
  "what, status, expected",
  [
    ("differ", 2, ["processes differ in config.batch: 64 in process 0, 32 in process 1"]),
    (
      "usage",
      2,
      [
        "[1] process 1 of 2: error: what to do: got lst, expected: list",
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
def test_a_failing_process_takes_the_others_along_with_its_status(program, tmp_path, what, status, expected):
  found, out = finish(local(program, "--restarts=2", WHAT=what, MARK=str(tmp_path / "disk")))
  assert found == status, out
  assert all(text in out for text in expected) and "starting again" not in out and "status 134" not in out, out


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_at_once(program, victim):
  running = local(program, WHAT="on and on")
  out = read_until(running, "psum 3.0 over 2", 2)
  pids = {int(index): int(pid) for index, pid in re.findall(r"joined (\d) of 2 by .* (\d+)\n", out)}
  since = time.monotonic()
  os.kill(pids[victim], signal.SIGKILL)
  status, out = finish(running)
  assert time.monotonic() - since < 10
  assert status == 137, out  # the first that failed
  lost = f"[{1 - victim}] process {1 - victim} of 2: error: process {victim} ("
  # JAX's own abort (134) may come before ours where process 0 died; the launchers start again after both
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


# ---- files for engines that are not here


def test_every_file_says_how_it_is_used():
  for name, words in (
    ("tpu_vm.sh", "launch/pods/tpu_vm.sh"),
    ("slurm.sbatch", "sbatch "),
    ("jobset.yaml", "kubectl apply -f "),
    ("skypilot.yaml", "sky jobs launch "),
    ("local.py", "python -m launch.pods.local "),
  ):
    lines = (PODS / name).read_text().splitlines()
    assert 20 <= len(lines) <= 80 and words in " ".join(lines[:2]), name


def test_jobset_has_what_its_definition_asks_for():
  """The definition itself (jobset.x-k8s.io_jobsets.yaml) is too large to keep here; docs/pods.md says what checked it."""
  jobset = yaml.safe_load((PODS / "jobset.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet") and jobset["metadata"]["name"]
  [job] = jobset["spec"]["replicatedJobs"]
  assert job["name"] and job["replicas"] >= 1
  spec = job["template"]["spec"]
  assert spec["completions"] == spec["parallelism"] and spec["backoffLimit"] == 0
  pod = spec["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for
  [container] = pod["containers"]
  assert {"name", "image", "command", "resources"} <= set(container)
  [rule] = spec["podFailurePolicy"]["rules"]
  assert rule == {"action": "FailJob", "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [1, 2]}}
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
  [ends] = jobset["spec"]["failurePolicy"]["rules"]
  assert ends["action"] == "FailJobSet" and ends["onJobFailureReasons"] == ["PodFailurePolicy"] and ends["name"]
  [mount], [volume] = container["volumeMounts"], pod["volumes"]
  assert mount["name"] == volume["name"] and f"--workdir={mount['mountPath']}/" in " ".join(container["args"])
  assert spec["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  hosts = 1
  for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
    hosts *= int(side)
  assert hosts // container["resources"]["limits"]["google.com/tpu"] == spec["completions"]


def statuses_that_run_again(command: list[str], tmp_path: pathlib.Path, **more: str) -> dict[int, int]:
  """How often `command` runs a program that ends with each status, of at most 3 times."""
  found = {}
  for status in (0, 1, 2, 75, 76, 130, 134, 137):
    count = tmp_path / f"count{status}"
    subprocess.run(
      command,
      env={**os.environ, **more, "STATUS": str(status), "COUNT": str(count)},
      cwd=tmp_path,
      timeout=60,
      capture_output=True,
    )
    found[status] = len(count.read_text())
  return found


TPU = {"NAME": "n", "ZONE": "z", "TYPE": "v4-32", "REPO": "https://x/y", "BUCKET": "b"}
AGAIN = {0: 1, 1: 1, 2: 1, 75: 3, 76: 3, 130: 1, 134: 3, 137: 3}


def fake(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(0o755)


def test_skypilot_runs_again_what_says_so(tmp_path):
  task = yaml.safe_load((PODS / "skypilot.yaml").read_text())
  assert task["num_nodes"] == 2 and task["resources"]["accelerators"]
  assert set(task["envs"]) == {"CONFIG", "BUCKET", "WORKDIR", "MOST_RESTARTS"}
  fake(tmp_path / ".venv/bin/python", 'printf x >> "$COUNT"; exit "$STATUS"')
  assert statuses_that_run_again(["bash", "-c", task["run"]], tmp_path, MOST_RESTARTS="3", CONFIG="c", WORKDIR="w") == AGAIN


def test_a_tpu_worker_runs_again_what_says_so(tmp_path):
  """With a gcloud that runs here what a worker would run."""
  fake(tmp_path / "nfnets-run/.venv/bin/python", 'printf x >> "$COUNT"; exit "$STATUS"')
  fake(
    tmp_path / "bin/gcloud",
    """case "$*" in
    *describe*) echo ACTIVE ;;
    *" ssh "*) for word; do case $word in --command=*git\\ clone*) ;; --command=*) bash -c "${word#--command=}" ;; esac; done ;;
  esac""",
  )
  told = TPU | {"MOST_RESTARTS": "3", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
  assert statuses_that_run_again(["bash", str(PODS / "tpu_vm.sh"), "--config=c"], tmp_path, **told) == AGAIN


def test_a_tpu_is_not_thrown_away_for_a_hiccup(tmp_path):
  """gcloud fails once while the TPU is waited for, installing fails once; then all is well."""
  fake(tmp_path / "bin/sleep", "echo sleep >> calls")
  fake(
    tmp_path / "bin/gcloud",
    r"""case "$*" in
    *describe*) echo x >> described; case $(wc -l < described) in
      1) echo "ERROR: (gcloud) NOT_FOUND: n" >&2; exit 1 ;; 2) echo "ERROR: (gcloud) 503" >&2; exit 1 ;; *) echo ACTIVE ;; esac ;;
    *git\ clone*) echo install >> calls; [ "$(grep -c install calls)" = 2 ] ;;
    *launch.train*) echo train >> calls ;;
    *create*) echo create >> calls ;;
    *delete*) echo delete >> calls ;;
    *) exit 1 ;;
  esac""",
  )
  done = subprocess.run(
    ["bash", str(PODS / "tpu_vm.sh"), "--config=c"],
    cwd=tmp_path,
    timeout=60,
    capture_output=True,
    text=True,
    env=os.environ | TPU | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "calls").read_text().split() == ["create", "sleep", "install", "sleep", "install", "train", "delete"]


def test_what_a_tpu_is_asked_for(tmp_path):
  fake(tmp_path / "gcloud", "echo called; exit 1")
  told = os.environ | TPU | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  command = ["bash", str(PODS / "tpu_vm.sh")]
  done = subprocess.run([*command, "--dry-run", "--config=a", "--workdir=/mnt/b/a b"], env=told, text=True, capture_output=True)
  assert done.returncode == 0 and "called" not in done.stdout, done.stderr
  lines = done.stdout.splitlines()
  assert lines[0].startswith("gcloud compute tpus queued-resources create n --node-id=n --accelerator-type=v4-32")
  assert "--spot" in lines[0] and "--rename-dir-limit" in done.stdout
  assert all("--worker=all" in line for line in lines[1:3]) and "https://x/y" in lines[1]
  assert "launch.train --config=a --workdir=/mnt/b/a\\\\ b" in lines[2] and "queued-resources delete n" in lines[3]
  del told["ZONE"]
  assert "e.g. us-central2-b" in subprocess.run(command, env=told, capture_output=True, text=True).stderr


def test_slurm_puts_back_what_says_so(tmp_path):
  """With an srun and an scontrol that are none."""
  fake(tmp_path / "bin/srun", 'exit "$STATUS"')
  fake(tmp_path / "bin/scontrol", 'echo "$*" > requeued')
  path = f"{tmp_path}/bin:{os.environ['PATH']}"
  requeued = {}
  for status in AGAIN:
    (tmp_path / "requeued").unlink(missing_ok=True)
    done = subprocess.run(
      ["bash", str(PODS / "slurm.sbatch"), "python"],
      capture_output=True,
      text=True,
      cwd=tmp_path,
      env={**os.environ, "PATH": path, "STATUS": str(status), "SLURM_JOB_ID": "7"},
    )
    assert done.returncode == status and f"srun ended with status {status}" in done.stdout
    requeued[status] = (tmp_path / "requeued").exists()
  assert requeued == {status: times == 3 for status, times in AGAIN.items()}
  assert (tmp_path / "requeued").read_text() == "requeue incomplete 7\n"  # not what scancel has ended


def test_scripts_pass_shellcheck():
  shellcheck = pathlib.Path(sysconfig.get_path("scripts"), "shellcheck")
  done = subprocess.run([shellcheck, str(PODS / "tpu_vm.sh"), str(PODS / "slurm.sbatch")], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


# ---- engines that may be here

_SLURM_RUNS = shutil.which("sbatch") and subprocess.run(["sinfo"], capture_output=True).returncode == 0


@pytest.mark.skipif(not _SLURM_RUNS, reason="no SLURM: sbatch is not installed or slurmctld does not answer")
def test_slurm_for_real(program, tmp_path):
  """Two tasks by the sbatch file; and one task, which stays one process."""
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
  """Open MPI 5 must be told where process 0 listens."""
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
