"""Finds out which engine started this process, how many processes there are, which one this is and where process 0 listens.

`detect` reads the environment, and the metadata server of a TPU VM. What only a network can answer (the hosts of a TPU pod,
Kubernetes) is left to `complete`, which asks JAX's own detection, and only where the environment shows such an engine.
"""

import dataclasses
import importlib.util
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence

from nfnets.distributed.errors import LostPeer, ProcessError

SKYPILOT_PORT = 8476
_SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)  # all that JAX's detection needs
_VARIABLES = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
  """What the flags and the environment say about this process; values that are None are still unknown.

  Attributes:
    engine: who gave the values, for messages.
    coordinator: HOST:PORT at which process 0 listens.
    count: number of processes.
    index: number of this process, from 0.
    ask: JAX's name of the cluster whose detection knows the rest ("slurm", "ompi", "gketpu", "gcetpu", "k8s"), or None.
  """

  engine: str
  coordinator: str | None = None
  count: int | None = None
  index: int | None = None
  ask: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
  """Everything that this process must know to join its run. coordinator: HOST:PORT; may be empty for a run of one process."""

  engine: str
  coordinator: str
  count: int
  index: int


def tpu_workers() -> int:
  """Asks the metadata server for the number of hosts of this TPU VM's job, over all slices; 1 where none answers."""
  hosts, environment = _metadata("worker-network-endpoints"), _metadata("tpu-env")
  slices = re.search(r"MEGASCALE_NUM_SLICES\W+(\d+)", environment)
  return len(hosts.split(",")) * (int(slices[1]) if slices else 1)


def _metadata(name: str) -> str:
  """Reads an attribute of this virtual machine from Google's metadata server; empty where there is none."""
  request = urllib.request.Request(
    f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}", headers={"Metadata-Flavor": "Google"}
  )
  for _ in range(3):
    try:
      with urllib.request.urlopen(request, timeout=2) as answer:
        return answer.read().decode()
    except urllib.error.HTTPError as error:
      if error.code == 404:
        break
    except OSError as error:
      if isinstance(getattr(error, "reason", None), socket.gaierror):  # the name is unknown: this is not Google's cloud
        break
  return ""


def detect(
  environ: Mapping[str, str],
  *,
  coordinator: str | None = None,
  count: int | None = None,
  index: int | None = None,
  tpu_workers: Callable[[], int] = tpu_workers,
  has_kubernetes: Callable[[], bool] = lambda: importlib.util.find_spec("kubernetes") is not None,
) -> Membership:
  """Finds this process's membership: from the arguments, what JAX detects, the JAX_ variables, SkyPilot's, or else one process.

  Args:
    environ: the environment variables.
    coordinator: HOST:PORT of process 0. This and the next two override what the engine says, value by value.
    count: number of processes.
    index: number of this process, from 0.
    tpu_workers: counts the hosts of a TPU VM's job.
    has_kubernetes: whether the package through which JAX asks Kubernetes is installed.

  Raises:
    ProcessError: a value is not a number, or values contradict each other; the message names the variable or flag.
  """
  if None not in (coordinator, count, index):
    return _checked(Membership(engine="flags", coordinator=coordinator, count=count, index=index))
  if count == 1:
    return _checked(Membership(engine="flags", count=1, index=index))
  membership = _by_jax(environ, tpu_workers, has_kubernetes) or _by_variables(environ) or _by_skypilot(environ)
  if membership is None and (coordinator, count, index) == (None, None, None):
    membership = Membership(engine="by default", count=1)
  elif membership is None:
    membership = Membership(engine="flags")
  return _checked(
    dataclasses.replace(
      membership,
      coordinator=membership.coordinator if coordinator is None else coordinator,
      count=membership.count if count is None else count,
      index=membership.index if index is None else index,
    )
  )


def complete(membership: Membership, timeout_s: float) -> tuple[Placement, Sequence[int] | None]:
  """Asks JAX's detection for what `membership` lacks.

  Returns:
    The complete placement, and the ids of the local devices that JAX would give this process (None: all).

  Raises:
    ProcessError: JAX's detection failed; the message holds its error.
    LostPeer: process 0's host still has no address after `timeout_s`.
  """
  if membership.ask is None or (membership.count == 1 and membership.ask in ("slurm", "ompi")):
    return _placement(membership), None
  # jax.distributed.initialize would detect and join at once, and kill the process where a peer is missing; we must meet between
  from jax._src import clusters

  deadline = time.monotonic() + timeout_s
  try:
    coordinator, count, index, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      membership.coordinator,
      membership.count,
      membership.index,
      None,
      None if membership.ask == "k8s" else membership.ask,
      int(timeout_s),
    )
  except (RuntimeError, ValueError, KeyError, OSError) as error:
    reason = " ".join(str(error).split())
    no_address = "Failed to recognize coordinator" in reason or isinstance(error.__cause__, socket.gaierror)
    if no_address and time.monotonic() < deadline:  # process 0's pod has not started yet
      return complete(membership, deadline - time.monotonic())
    if no_address:
      raise LostPeer(f"{membership.engine}: process 0's host has no address after {timeout_s:g} s ({reason})") from error
    raise ProcessError(
      f"{membership.engine}: JAX's detection failed: {type(error).__name__}: {reason}; "
      "give --coordinator, --processes and --process"
    ) from error
  complete_membership = dataclasses.replace(membership, coordinator=coordinator, count=count, index=index, ask=None)
  return _placement(_checked(complete_membership)), local


def local_devices(environ: Mapping[str, str], suggested: Sequence[int] | None) -> Sequence[int] | None:
  """Chooses the ids of the GPUs that this process may use; None means all that it can see.

  JAX suggests one GPU a task wherever SLURM or Open MPI starts it, the task's number on its node. That leaves GPUs unused where
  a node runs one task, and asks for a GPU that does not exist where the engine already shows each task its own.
  """
  if "JAX_LOCAL_DEVICE_IDS" in environ:
    return None  # JAX reads it
  tasks, visible = _tasks_on_node(environ), environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES"))
  gpus = None if visible is None else len(visible.split(","))
  fewer_than_tasks = gpus is not None and tasks is not None and gpus < tasks
  each_its_own = gpus == 1 or "SLURM_GPUS_PER_TASK" in environ or fewer_than_tasks
  return None if each_its_own or tasks == 1 else suggested


# ---- engines


def _by_jax(environ: Mapping[str, str], tpu_workers: Callable[[], int], has_kubernetes: Callable[[], bool]) -> Membership | None:
  """Recognizes the engines that JAX detects, in JAX's order."""
  coordinator = environ.get("JAX_COORDINATOR_ADDRESS")
  if "OMPI_COMM_WORLD_SIZE" in environ:
    return Membership(
      engine="Open MPI",
      coordinator=coordinator,
      count=_number(environ, "OMPI_COMM_WORLD_SIZE"),
      index=_number(environ, "OMPI_COMM_WORLD_RANK"),
      # JAX learns the coordinator's host from mpirun's address, which Open MPI 5 no longer publishes
      ask="ompi" if "OMPI_MCA_orte_hnp_uri" in environ else None,
    )
  if all(name in environ for name in _SLURM):
    # in an interactive shell, SLURM_NTASKS counts the allocation's tasks, while the shell is a step of one task
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return Membership(
      engine="SLURM", coordinator=coordinator, count=_number(environ, tasks), index=_number(environ, "SLURM_PROCID"), ask="slurm"
    )
  if environ.get("TPU_ML_PLATFORM") == "JAX":  # `import jax` sets it where it finds TPU chips and libtpu
    return _by_tpu(environ, coordinator, tpu_workers)
  indexed = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
  # JAX asks the API server, for which a pod needs rights; Kubeflow's variables hold the same values and need none
  if indexed and not all(name in environ for name in _VARIABLES) and has_kubernetes():
    return Membership(engine="Kubernetes", coordinator=coordinator, ask="k8s")
  return None


def _by_tpu(environ: Mapping[str, str], coordinator: str | None, tpu_workers: Callable[[], int]) -> Membership | None:
  """Tells a TPU pod from a single TPU host."""
  names = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
  slices = _number(environ, "MEGASCALE_NUM_SLICES") if environ.get("MEGASCALE_NUM_SLICES") else 1
  if names is None and "TPU_SKIP_MDS_QUERY" in environ:
    return None
  hosts = tpu_workers() if names is None else len(names.split(","))
  if max(slices, hosts) == 1:
    return Membership(engine="TPU, one host", count=1)
  return Membership(engine="TPU pod", coordinator=coordinator, ask="gcetpu" if names is None else "gketpu")


def _by_variables(environ: Mapping[str, str]) -> Membership | None:
  """Reads the JAX_ variables, which Kubeflow and local launchers set."""
  if not any(environ.get(name) for name in _VARIABLES):
    return None
  count, index = (_number(environ, name) if environ.get(name) else None for name in _VARIABLES[:2])
  return Membership(engine="JAX_ variables", coordinator=environ.get("JAX_COORDINATOR_ADDRESS") or None, count=count, index=index)


def _by_skypilot(environ: Mapping[str, str]) -> Membership | None:
  """Reads SkyPilot's variables; process 0 is on the first address."""
  if not environ.get("SKYPILOT_NODE_IPS"):
    return None
  addresses = environ["SKYPILOT_NODE_IPS"].split()
  count = _number(environ, "SKYPILOT_NUM_NODES") if "SKYPILOT_NUM_NODES" in environ else len(addresses)
  if count != len(addresses):
    raise ProcessError(f"SKYPILOT_NUM_NODES={count}, but SKYPILOT_NODE_IPS holds {len(addresses)} addresses")
  host = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
  return Membership(
    engine="SkyPilot", coordinator=f"{host}:{SKYPILOT_PORT}", count=count, index=_number(environ, "SKYPILOT_NODE_RANK")
  )


# ---- checks


_NAMES = {  # engine: the flags or variables in which a person sets the coordinator, the count and the index
  "flags": ("--coordinator", "--processes", "--process"),
  "JAX_ variables": ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
  "SkyPilot": ("SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"),
  "SLURM": ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "SLURM_PROCID"),
  "Open MPI": ("--coordinator=HOST:PORT (Open MPI 5 does not say where)", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


def _checked(membership: Membership) -> Membership:
  """Returns `membership` if its values are possible together, with index 0 where there is one process; else ProcessError."""
  coordinator_name, count_name, index_name = _NAMES.get(membership.engine, _NAMES["flags"])
  coordinator, count, index = membership.coordinator, membership.count, membership.index
  if count is not None and count < 1:
    raise ProcessError(f"{count_name}={count}: expected at least 1 process")
  if index is not None and index < 0:
    raise ProcessError(f"{index_name}={index}: expected 0 or more")
  if count is not None and index is not None and index >= count:
    raise ProcessError(
      f"{index_name}={index} with {count_name}={count}: expected 0 to {count - 1}; one process too many, or a wrong count"
    )
  if count == 1 and coordinator is None:
    return dataclasses.replace(membership, index=0, ask=None)
  if membership.ask is None:
    values = {coordinator_name: coordinator, count_name: count, index_name: index}
    missing = [name for name, value in values.items() if value is None]
    if missing:
      given = ", ".join(f"{name.split('=')[0]}={value}" for name, value in values.items() if value is not None)
      raise ProcessError(f"{given or membership.engine}: {' and '.join(missing)} must be given too")
  if coordinator is not None and not re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\s\[\]/]+):\d{1,5}", coordinator):
    raise ProcessError(f"{coordinator_name}={coordinator}: expected HOST:PORT, e.g. 10.0.0.1:8476")
  return membership


def _placement(membership: Membership) -> Placement:
  """Returns the values of a membership that lacks nothing, as `_checked` makes sure."""
  count, index = membership.count, membership.index
  if count is None or index is None or (membership.coordinator is None and count > 1):
    raise ValueError(f"{membership}: expected a coordinator, a count and an index")
  return Placement(engine=membership.engine, coordinator=membership.coordinator or "", count=count, index=index)


def _number(environ: Mapping[str, str], name: str) -> int:
  """Reads a whole number from the variable `name`; ProcessError for anything else."""
  text = environ.get(name, "")
  if not re.fullmatch(r"\s*-?\d+\s*", text):
    raise ProcessError(f"{name}={text!r}: expected a number")
  return int(text)


def _tasks_on_node(environ: Mapping[str, str]) -> int | None:
  """Counts this job step's tasks on this node; None where the engine does not say.

  SLURM writes "2(x3),1" for three nodes of 2 tasks and one of 1.
  """
  if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "").isdecimal():
    return int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
  groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
  tasks_by_node = [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]
  node = environ.get("SLURM_NODEID", "")
  return tasks_by_node[int(node)] if node.isdecimal() and int(node) < len(tasks_by_node) else None
