"""Tests the files of launch/pods/ as far as stand-ins for the programs of engines that are not installed allow."""

import os
import pathlib
import shlex
import subprocess
import sys
import sysconfig

import yaml

from nfnets.distributed import should_restart

ROOT = pathlib.Path(__file__).resolve().parents[2]
PODS = ROOT / "launch" / "pods"


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
  """Checks a few rules, since JobSet's whole definition is too large to be kept here; docs/pods.md says what checked that."""
  jobset = yaml.safe_load((PODS / "jobset.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet") and jobset["metadata"]["name"]
  [job] = jobset["spec"]["replicatedJobs"]
  assert job["name"] and job["replicas"] >= 1
  spec = job["template"]["spec"]
  assert spec["completions"] == spec["parallelism"] and spec["backoffLimit"] == 0
  pod = spec["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
  [container] = pod["containers"]
  assert {"name", "image", "command", "resources"} <= set(container)
  [rule] = spec["podFailurePolicy"]["rules"]
  assert rule == {"action": "FailJob", "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [1, 2]}}
  assert not any(map(should_restart, rule["onExitCodes"]["values"])) and all(map(should_restart, set(STATUSES) - {0, 1, 2, 130}))
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


TPU = {"NAME": "n", "ZONE": "z", "TYPE": "v4-32", "REPO": "https://x/y", "BUCKET": "b"}
STATUSES = (0, 1, 2, 75, 76, 130, 134, 137)


def fake(path: pathlib.Path, text: str) -> None:
  """Writes a program that stands in for one that is not installed."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(0o755)


def fake_python(path: pathlib.Path) -> None:
  """Writes a Python that runs only launch.pods.local; else it adds its arguments to the file COUNT and ends with STATUS."""
  fake(path, f'case "$*" in "-m launch.pods.local "*) exec {sys.executable} "$@" ;; esac; echo "$*" >> "$COUNT"; exit "$STATUS"')


def runs_by_status(command: list[str], tmp_path: pathlib.Path, **variables: str) -> dict[int, int]:
  """Returns how often, of at most 3 times, `command` runs a program that ends with a status, by this status."""
  counts = {}
  for status in (2, 75):  # tests/distributed tests the rule with all other statuses
    count = tmp_path / f"count{status}"
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "STATUS": str(status), "COUNT": str(count)}
    subprocess.run(command, env=environment, cwd=tmp_path, timeout=60, capture_output=True)
    counts[status] = len(count.read_text().splitlines())
    assert "-m launch.train --config=c" in count.read_text()
  return counts


def test_skypilot_starts_again_by_the_rule(tmp_path):
  task = yaml.safe_load((PODS / "skypilot.yaml").read_text())
  assert task["num_nodes"] == 2 and task["resources"]["accelerators"]
  assert set(task["envs"]) == {"CONFIG", "BUCKET", "WORKDIR", "MOST_RESTARTS"}
  fake_python(tmp_path / ".venv/bin/python")
  variables = {"MOST_RESTARTS": "2", "CONFIG": "c", "WORKDIR": "w"}
  assert runs_by_status(["bash", "-c", task["run"]], tmp_path, **variables) == {2: 1, 75: 3}


def test_a_tpu_worker_starts_again_by_the_rule(tmp_path):
  """The stand-in for gcloud runs on this machine what a worker would run."""
  fake_python(tmp_path / "nfnets-run/.venv/bin/python")
  fake(
    tmp_path / "bin/gcloud",
    """case "$*" in
    *describe*) echo ACTIVE ;;
    *" ssh "*) for word; do case $word in --command=*git\\ clone*) ;; --command=*) bash -c "${word#--command=}" ;; esac; done ;;
  esac""",
  )
  variables = TPU | {"MOST_RESTARTS": "2", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
  assert runs_by_status(["bash", str(PODS / "tpu_vm.sh"), "--config=c"], tmp_path, **variables) == {2: 1, 75: 3}


def test_a_tpu_is_not_thrown_away_for_a_hiccup(tmp_path):
  """gcloud fails once while the TPU is awaited, and installing fails once; after that everything works."""
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
  environment = os.environ | TPU | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  command = ["bash", str(PODS / "tpu_vm.sh")]
  done = subprocess.run(
    [*command, "--dry-run", "--config=a", "--workdir=/mnt/b/a b"], env=environment, text=True, capture_output=True
  )
  assert done.returncode == 0 and "called" not in done.stdout, done.stderr
  lines = done.stdout.splitlines()
  assert lines[0].startswith("gcloud compute tpus queued-resources create n --node-id=n --accelerator-type=v4-32")
  assert "--spot" in lines[0] and "--rename-dir-limit" in done.stdout
  assert all("--worker=all" in line for line in lines[1:3]) and "https://x/y" in lines[1]
  worker = next(word for word in shlex.split(lines[2]) if word.startswith("--command="))
  assert "launch.train --config=a --workdir=/mnt/b/a\\ b" in worker and "queued-resources delete n" in lines[3]
  del environment["ZONE"]
  assert "e.g. us-central2-b" in subprocess.run(command, env=environment, capture_output=True, text=True).stderr


def test_slurm_requeues_by_the_rule(tmp_path):
  """srun and scontrol are stand-ins."""
  fake(tmp_path / "bin/srun", 'exit "$STATUS"')
  fake(tmp_path / "bin/scontrol", 'echo "$*" > requeued')
  path = f"{tmp_path}/bin:{os.environ['PATH']}"
  requeued = {}
  for status in STATUSES:
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
  assert requeued == {status: should_restart(status) for status in STATUSES}
  assert (tmp_path / "requeued").read_text() == "requeue incomplete 7\n"  # "incomplete" leaves out a job that scancel has ended


def test_scripts_pass_shellcheck():
  shellcheck = pathlib.Path(sysconfig.get_path("scripts"), "shellcheck")
  done = subprocess.run([shellcheck, str(PODS / "tpu_vm.sh"), str(PODS / "slurm.sbatch")], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
