"""The engine is read from the environment; processes meet, part and notice a lost one. Threads stand in for the processes."""

import concurrent.futures
import io
import json
import pathlib
import re
import socket
import threading
import time

import pytest

from nfnets import distributed
from nfnets.distributed import agree, detect, lifeline, meeting, processes
from nfnets.distributed.detect import Membership, Placement
from nfnets.distributed.errors import LostPeer, ProcessError

MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
TPU = {"TPU_ML_PLATFORM": "JAX"}
KUBEFLOW = {"JAX_COORDINATOR_ADDRESS": "c:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
SKY = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}


def detected(environ, *, workers=1, kubernetes=True, **given) -> Membership:
  return detect.detect(environ, tpu_workers=lambda: workers, has_kubernetes=lambda: kubernetes, **given)


def alone(engine: str) -> Membership:
  return Membership(engine=engine, count=1, index=0)


@pytest.mark.parametrize(
  "environ, given, expected",
  [
    ({}, {}, alone("by default")),
    (
      MPI | SLURM | KUBEFLOW | SKY,
      dict(coordinator="h:9", count=2, index=1),
      Membership(engine="flags", coordinator="h:9", count=2, index=1),
    ),
    (SLURM | SKY, dict(count=1), alone("flags")),
    # engines come in JAX's order and before the JAX_ variables; mpirun within an sbatch sees the variables of both
    (MPI | SLURM | SKY, {}, Membership(engine="Open MPI", count=4, index=2, ask="ompi")),
    (SLURM | SKY, {}, Membership(engine="SLURM", count=4, index=1, ask="slurm")),
    (SLURM, dict(coordinator="h:9"), Membership(engine="SLURM", coordinator="h:9", count=4, index=1, ask="slurm")),
    (SLURM | KUBEFLOW, {}, Membership(engine="SLURM", coordinator="c:1", count=4, index=1, ask="slurm")),
    (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, alone("SLURM")),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {}, alone("SLURM")),  # in the shell that salloc starts
    (
      {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"},
      {},
      alone("by default"),
    ),  # started without srun
    (TPU | {"TPU_WORKER_HOSTNAMES": "a,b"} | SKY, {}, Membership(engine="TPU pod", ask="gketpu")),
    (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, {}, alone("TPU, one host")),
    (TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}, Membership(engine="TPU pod", ask="gketpu")),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, alone("by default")),  # no TPU in this machine
    (POD, {}, Membership(engine="Kubernetes", ask="k8s")),
    (
      POD | KUBEFLOW,
      {},
      Membership(engine="JAX_ variables", coordinator="c:1", count=4, index=3),
    ),  # a pod that may not ask the API server
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}, alone("by default")),  # a pod that belongs to no indexed job, e.g. a notebook
    (KUBEFLOW | SKY, {}, Membership(engine="JAX_ variables", coordinator="c:1", count=4, index=3)),
    ({"JAX_NUM_PROCESSES": "1"}, {}, alone("JAX_ variables")),
    (SKY, {}, Membership(engine="SkyPilot", coordinator="10.0.0.1:8476", count=2, index=1)),
    (
      SKY | {"SKYPILOT_NODE_IPS": "fd00::1\nfd00::2"},
      {},
      Membership(engine="SkyPilot", coordinator="[fd00::1]:8476", count=2, index=1),
    ),
    (
      {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"},
      {"coordinator": None},
      Membership(engine="SkyPilot", coordinator="10.0.0.1:8476", count=1, index=0),
    ),
  ],
)
def test_who_is_believed(environ, given, expected):
  assert detected(environ, **given) == expected


def test_a_tpu_vm_is_asked_for_its_hosts_only_where_it_is_one():
  assert detected(TPU, workers=4) == Membership(engine="TPU pod", ask="gcetpu")
  assert detected(TPU, workers=1) == alone("TPU, one host")
  never = lambda: pytest.fail("asked the metadata server")
  for environ in ({}, TPU | {"TPU_SKIP_MDS_QUERY": "1"}, TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, SLURM):
    detect.detect(environ, tpu_workers=never, has_kubernetes=lambda: False)


@pytest.mark.parametrize(
  "environ, given, expected",
  [
    ({}, dict(count=2), "--processes=2: --coordinator and --process must be given too"),
    ({}, dict(coordinator="h:1", index=0), "--coordinator=h:1, --process=0: --processes must be given too"),
    ({}, dict(coordinator="h:1", count=2, index=2), "--process=2 with --processes=2: expected 0 to 1"),
    ({}, dict(coordinator="h", count=2, index=0), "--coordinator=h: expected HOST:PORT"),
    ({}, dict(coordinator="h:1", count=0, index=0), "--processes=0: expected at least 1"),
    ({}, dict(coordinator="h:1", count=2, index=-1), "--process=-1: expected 0 or more"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, {}, "JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=0: JAX_COORDINATOR_ADDRESS"),
    ({"JAX_COORDINATOR_ADDRESS": "h:1"}, {}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be given too"),
    (KUBEFLOW | {"JAX_NUM_PROCESSES": "two"}, {}, "JAX_NUM_PROCESSES='two': expected a number"),
    (KUBEFLOW | {"JAX_PROCESS_ID": "4"}, {}, "JAX_PROCESS_ID=4 with JAX_NUM_PROCESSES=4: expected 0 to 3"),
    (SKY | {"SKYPILOT_NUM_NODES": "3"}, {}, "SKYPILOT_NUM_NODES=3, but SKYPILOT_NODE_IPS holds 2 addresses"),
    (SKY | {"SKYPILOT_NODE_RANK": "2"}, {}, "SKYPILOT_NODE_RANK=2 with SKYPILOT_NUM_NODES=2"),
    (SLURM | {"SLURM_PROCID": "4"}, {}, "SLURM_PROCID=4 with SLURM_NTASKS=4"),
    (SLURM | {"SLURM_NTASKS": ""}, {}, "SLURM_NTASKS='': expected a number"),
    ({name: MPI[name] for name in list(MPI)[:2]}, {}, "--coordinator=HOST:PORT (Open MPI 5 does not say where) must"),
  ],
)
def test_contradictions_are_refused_by_name(environ, given, expected):
  with pytest.raises(ProcessError, match=re.escape(expected)):
    detected(environ, **given)


def test_jax_is_asked_where_the_coordinator_is(monkeypatch):
  """JAX is asked by a name that is not public, so this fails when it moves. The port is the job's, the host the list's first."""
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  placement, local = detect.complete(detected(SLURM), 5)
  assert placement == Placement(engine="SLURM", coordinator="n1:61447", count=4, index=1) and local == [1]
  assert detect.complete(alone("SLURM"), 5) == (Placement(engine="SLURM", coordinator="", count=1, index=0), None)


def test_a_coordinator_without_an_address_is_waited_for(monkeypatch):
  """Where another pod has not started, JAX gives up by itself, on Kubernetes before the time that it was given."""
  from jax._src import clusters

  answers = []

  def ask(*_):
    answer = answers.pop(0)
    if isinstance(answer, Exception):
      raise answer
    return answer

  monkeypatch.setattr(clusters.ClusterEnv, "auto_detect_unset_distributed_params", ask)
  tired = RuntimeError("Retry failed with all attempts exhausted")
  tired.__cause__ = socket.gaierror(-2, "Name or service not known")
  unknown = RuntimeError("Failed to recognize coordinator address a")
  answers[:] = [tired, unknown, ("a:1", 2, 1, None)]
  placement, _ = detect.complete(Membership(engine="Kubernetes", ask="k8s"), 60)
  assert placement == Placement(engine="Kubernetes", coordinator="a:1", count=2, index=1)
  answers[:] = [unknown]
  with pytest.raises(LostPeer, match="TPU pod: process 0's host has no address after 0 s"):
    detect.complete(Membership(engine="TPU pod", ask="gketpu"), 0)
  answers[:] = [RuntimeError("something else")]
  with pytest.raises(ProcessError, match="JAX's detection failed: RuntimeError: something else"):
    detect.complete(Membership(engine="TPU pod", ask="gketpu"), 60)


def test_hosts_of_all_slices_are_counted_and_a_hiccup_is_none(monkeypatch):
  metadata = {"worker-network-endpoints": "a,b", "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '3'\n"}
  answers = [OSError("timed out")]

  def urlopen(request, timeout):
    if answers:
      raise answers.pop()
    return io.BytesIO(metadata[request.full_url.rpartition("/")[2]].encode())

  monkeypatch.setattr(detect.urllib.request, "urlopen", urlopen)
  assert detect.tpu_workers() == 6
  metadata["tpu-env"] = "ZONE: 'z'"
  assert detect.tpu_workers() == 2
  answers[:] = [detect.urllib.error.URLError(socket.gaierror(-2, "unknown"))] * 2
  assert detect.tpu_workers() == 1


def test_a_silent_coordinator_is_a_lost_one():
  """A process 0 of an earlier run may hang, while the kernel still takes connections for it."""
  with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(LostPeer, match="and then said nothing"):
    meeting.meet(f"127.0.0.1:{silent.getsockname()[1]}", 2, 1, bind=None, timeout_s=0.5)


def test_a_task_gets_one_gpu_only_where_several_share_a_node():
  two_here = {"SLURM_STEP_TASKS_PER_NODE": "1(x2),2", "SLURM_NODEID": "2"}
  assert detect.local_devices(two_here, [1]) == [1]
  assert detect.local_devices(two_here | {"SLURM_NODEID": "0"}, [0]) is None
  assert detect.local_devices(two_here | {"CUDA_VISIBLE_DEVICES": "3"}, [1]) is None
  assert detect.local_devices(two_here | {"CUDA_VISIBLE_DEVICES": "0,1"}, [1]) == [1]
  assert detect.local_devices(two_here | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, [1]) is None
  assert (
    detect.local_devices(two_here | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "CUDA_VISIBLE_DEVICES": "0,1"}, [3])
    is None
  )
  assert detect.local_devices({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, [0]) is None
  assert detect.local_devices(two_here | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, [1]) is None


def test_one_process_starts_nothing(monkeypatch):
  said = []
  monkeypatch.setattr(processes, "_started", False)
  monkeypatch.setattr(processes, "_me", None)
  monkeypatch.setattr(meeting, "meet", lambda *_, **__: pytest.fail("met somebody"))
  me = distributed.start(count=1, say=said.append)
  assert me == distributed.Processes(0, 1, "flags") and said == ["processes: one (flags)"]
  assert distributed.start(count=1, say=said.append) is me and len(said) == 1
  assert distributed.label() == ""
  distributed.require_equal({"config": "{}"}, say=said.append)
  assert len(said) == 1
  distributed.shutdown()


def free_port() -> int:
  with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    return sock.getsockname()[1]


def meet_all(*counts_and_indices: tuple[int, int], port: int, timeout_s: float = 1.0) -> list:
  """Returns what meet() returned or raised for each (count, index)."""
  address = f"127.0.0.1:{port}"
  with concurrent.futures.ThreadPoolExecutor(len(counts_and_indices)) as pool:
    waiting = [pool.submit(meeting.meet, address, *place, bind=address, timeout_s=timeout_s) for place in counts_and_indices]
    return [future.exception() or future.result() for future in waiting]


def close(*everyone: dict) -> None:
  for wires in everyone:
    for wire in wires.values():
      wire.close()


def test_all_meet_even_where_strangers_knock():
  port = free_port()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(meeting.meet, f"127.0.0.1:{port}", 3, 0, bind=None, timeout_s=10)
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
      stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    others = meet_all((3, 2), (3, 1), port=port, timeout_s=10)
    assert sorted(first.result()) == [1, 2] and [list(wires) for wires in others] == [[0], [0]]
  close(first.result(), *others)


@pytest.mark.parametrize(
  "who, error, expected",
  [
    ([(3, 0), (3, 2)], LostPeer, "2 of 3 processes came within 1 s, missing: 1;"),
    ([(2, 0), (3, 1)], ProcessError, "was told of 3 processes, process 0 of 2"),
    ([(3, 0), (3, 1), (3, 1)], ProcessError, "two processes are number 1 of 3: "),
    ([(2, 1)], LostPeer, "was not reached within 1 s (Connection refused)"),
  ],
)
def test_a_wrong_number_of_processes_is_refused_by_all_of_them(who, error, expected):
  raised = meet_all(*who, port=free_port())
  assert all(type(reason) is error and expected in str(reason) for reason in raised), raised


def test_a_busy_port_and_a_process_too_many(monkeypatch):
  monkeypatch.setattr(meeting, "BUSY_S", 0.3)
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    [error] = meet_all((2, 0), port=port)
    assert type(error) is ProcessError and f"cannot listen on port {port} (Address already in use)" in str(error)
    hang_up = threading.Thread(target=lambda: [other.accept()[0].close() for _ in range(2)], daemon=True)
    hang_up.start()
    [error] = meet_all((2, 1), port=port)
  assert type(error) is ProcessError and "the run there is complete (one process too many?)" in str(error)


@pytest.fixture
def watched():
  """Gives three processes that have met: (their connections, what their watches said, the watches, not started)."""
  wires = meet_all((3, 0), (3, 1), (3, 2), port=free_port(), timeout_s=10)
  said = [[], [], []]
  watches = [lifeline.Watch(connections, lambda *end, i=i: said[i].append(end)) for i, connections in enumerate(wires)]
  yield wires, said, watches
  for watch in watches:
    watch.close()
    if watch.ident:
      watch.join(5)
  close(*wires)


def wait_for(condition, seconds: float = 5.0) -> None:
  until = time.monotonic() + seconds
  while not condition() and time.monotonic() < until:
    time.sleep(0.02)
  assert condition()


def test_a_closed_connection_is_a_lost_process_and_all_hear_of_it(watched):
  wires, said, watches = watched
  watches[0].start()
  watches[1].start()
  wires[2][0].close()
  wait_for(lambda: said[0] and said[1])
  for text, status in said[0] + said[1]:
    assert text.startswith("process 2 (") and text.endswith("was lost: its connection was closed") and status is None


def test_silence_is_a_lost_process_and_signs_of_life_are_none(watched, monkeypatch):
  monkeypatch.setattr(lifeline, "BEAT_S", 0.2)
  monkeypatch.setattr(lifeline, "SILENCE_S", 1.0)
  _, said, watches = watched
  for watch in watches:
    watch.start()
  time.sleep(1.5)
  assert said == [[], [], []]
  watches[1]._tell = lambda **_: None  # it falls silent, but its connection stays
  wait_for(lambda: said[0] and said[2])
  assert all("process 1 (" in text and "no sign of life for 1 s" in text for (text, _), *_ in (said[0], said[2]))


def test_a_failure_is_passed_on_with_its_status_and_an_end_is_none(watched):
  _, said, watches = watched
  for watch in watches:
    watch.start()
  watches[1].close()
  time.sleep(0.3)
  assert said == [[], [], []]
  watches[2].fail("process 2 failed (status 2): no such file", 2)
  wait_for(lambda: said[0])
  assert said[0] == [("process 2 failed (status 2): no such file", 2)] and said[1] == []


def test_differences_name_the_field_and_who_has_what():
  config = lambda **change: json.dumps({"batch": 64, "optim": {"base_lr": 0.1, "name": "sgd"}} | change)
  facts = lambda **change: {"code": "0.1.0 abc", "config": config(), "data": "digits, 1437 images"} | change
  assert distributed.differences([facts()] * 3) == []
  assert distributed.differences([facts(), facts(config=config(batch=32)), facts()]) == [
    "config.batch: 64 in process 0 and 2, 32 in process 1"
  ]
  assert distributed.differences([facts(), facts(code="0.1.0 def", config=config(optim={"name": "sgd"}))]) == [
    "code: 0.1.0 abc in process 0, 0.1.0 def in process 1",
    "config.optim.base_lr: 0.1 in process 0, nothing in process 1",
  ]
  [text] = distributed.differences([facts(data="a" * 500), facts(data="a" * 499 + "b")])
  short = re.fullmatch(r"data: a{24}… \((\w{12})\) in process 0, a{24}… \((\w{12})\) in process 1", text)
  assert short and short[1] != short[2]


def test_the_code_version_follows_the_source(tmp_path, monkeypatch):
  package = tmp_path / "nfnets"
  package.mkdir()
  (package / "__init__.py").write_text("")
  monkeypatch.setattr(agree.nfnets, "__file__", str(package / "__init__.py"))
  before = agree.code_version()
  assert before == agree.code_version() and before.startswith(agree.nfnets.__version__)
  pathlib.Path(package, "agc.py").write_text("x = 1\n")
  assert agree.code_version() != before
