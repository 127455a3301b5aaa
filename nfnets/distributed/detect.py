"""Which engine started this process, and what it says: one of how many, and where process 0 listens.

`detect` looks at the environment alone; what must be asked for over a network (a TPU's metadata, Kubernetes) is asked by
`complete`, through JAX's own detection, and only where the environment says that somebody will answer.
"""

import dataclasses
import importlib.util
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from nfnets.distributed.errors import LostPeer, ProcessError

SKYPILOT_PORT = 8476


_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX wants to see


_VARIABLES = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
  """What is known about this process. coordinator: HOST:PORT. Of what is None, JAX's detection `ask` is to be asked.

  ask: JAX's name of a cluster ("slurm", "ompi", "gketpu", "gcetpu"), "k8s", or None.
  """

  engine: str
  coordinator: str | None = None
  count: int | None = None
  index: int | None = None
  ask: str | None = None


def tpu_workers() -> int:
  """Hosts of this TPU VM's job, those of all slices, by its metadata server; 1 where none answers, three times, within 2 s."""
  hosts, environment = _metadata("worker-network-endpoints"), _metadata("tpu-env")
  slices = re.search(r"MEGASCALE_NUM_SLICES\W+(\d+)", environment)
  return len(hosts.split(",")) * (int(slices[1]) if slices else 1)


def _metadata(name: str) -> str:
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
      if isinstance(getattr(error, "reason", None), socket.gaierror):  # no such name: this is no machine of Google's
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
  """Explicit arguments, then what JAX detects, then the JAX_ variables, then SkyPilot's, then one process.

  What is explicit goes before what the engine says, value by value. Raises ProcessError, naming the variable, for values that
  are no numbers or contradict each other.
  """
  if None not in (coordinator, count, index):
    plan = Membership(engine="flags", coordinator=coordinator, count=count, index=index)
  elif count == 1:
    plan = Membership(engine="flags", count=1, index=index)
  else:
    found = _by_jax(environ, tpu_workers, has_kubernetes) or _by_variables(environ) or _by_skypilot(environ)
    if found is None:
      found = (
        Membership(engine="by default", count=1) if (coordinator, count, index) == (None,) * 3 else Membership(engine="flags")
      )
    values = {"coordinator": coordinator, "count": count, "index": index}
    plan = dataclasses.replace(found, **{name: value for name, value in values.items() if value is not None})
  return _checked(plan)


def complete(plan: Membership, timeout_s: float) -> tuple[Membership, list[int] | None]:
  """Asks JAX for what `plan` lacks: (the plan with everything known, local device ids that JAX would give this process).

  Raises ProcessError with what JAX's detection said; LostPeer where process 0's host has no address within `timeout_s`.
  """
  if plan.ask is None or (plan.count == 1 and plan.ask in ("slurm", "ompi")):
    return plan, None
  from jax._src import clusters  # the public initialize() kills the process where a peer is missing, so it comes after we met

  deadline = time.monotonic() + timeout_s
  try:
    coordinator, count, index, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      plan.coordinator, plan.count, plan.index, None, None if plan.ask == "k8s" else plan.ask, int(timeout_s)
    )
  except (RuntimeError, ValueError, KeyError, OSError) as error:
    said = " ".join(str(error).split())
    if "Failed to recognize coordinator" in said or isinstance(error.__cause__, socket.gaierror):  # its pod has not started yet
      if time.monotonic() < deadline:
        return complete(plan, deadline - time.monotonic())
      raise LostPeer(f"{plan.engine}: process 0's host has no address after {timeout_s:g} s ({said})") from error
    raise ProcessError(
      f"{plan.engine}: JAX's detection failed: {type(error).__name__}: {said}; give --coordinator, --processes and --process"
    ) from error
  return _checked(dataclasses.replace(plan, coordinator=coordinator, count=count, index=index, ask=None)), local


def local_devices(environ: Mapping[str, str], suggested: list[int] | None) -> list[int] | None:
  """The ids of the GPUs that this process may use; None: all it can see.

  JAX suggests one GPU a task wherever SLURM or Open MPI starts it, the task's number on its node. That leaves GPUs unused where
  a node runs one task, and asks for one that is not there where the engine already shows each task its own.
  """
  if "JAX_LOCAL_DEVICE_IDS" in environ:
    return None  # JAX reads it
  tasks, visible = _tasks_on_node(environ), environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES"))
  shown = None if visible is None else len(visible.split(","))
  each_its_own = shown == 1 or "SLURM_GPUS_PER_TASK" in environ or None not in (shown, tasks) and shown < tasks
  return None if each_its_own or tasks == 1 else suggested


def _by_jax(environ: Mapping[str, str], tpu_workers: Callable[[], int], has_kubernetes: Callable[[], bool]) -> Membership | None:
  """In the order in which JAX looks."""
  where = environ.get("JAX_COORDINATOR_ADDRESS")
  if "OMPI_COMM_WORLD_SIZE" in environ:
    known = {"count": _number(environ, "OMPI_COMM_WORLD_SIZE"), "index": _number(environ, "OMPI_COMM_WORLD_RANK")}
    # Open MPI 5 no longer says where mpirun listens, from which JAX learns the coordinator's host
    ask = "ompi" if "OMPI_MCA_orte_hnp_uri" in environ else None
    return Membership(engine="Open MPI", coordinator=where, ask=ask, **known)
  if all(name in environ for name in _SLURM):
    # an interactive shell is a step of one task in an allocation of many
    many = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    known = {"count": _number(environ, many), "index": _number(environ, "SLURM_PROCID")}
    return Membership(engine="SLURM", coordinator=where, ask="slurm", **known)
  if environ.get("TPU_ML_PLATFORM") == "JAX":  # `import jax` sets it where it finds TPU chips and libtpu
    names = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    slices = _number(environ, "MEGASCALE_NUM_SLICES") if environ.get("MEGASCALE_NUM_SLICES") else 1
    if names is None and "TPU_SKIP_MDS_QUERY" in environ:
      return None
    if max(slices, len(names.split(",")) if names is not None else tpu_workers()) == 1:
      return Membership(engine="TPU, one host", count=1)
    return Membership(engine="TPU pod", coordinator=where, ask="gketpu" if names is not None else "gcetpu")
  indexed = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
  # JAX asks the API server, for which a pod needs rights; Kubeflow's variables need none, and say the same
  if indexed and not all(name in environ for name in _VARIABLES) and has_kubernetes():
    return Membership(engine="Kubernetes", coordinator=where, ask="k8s")
  return None


def _by_variables(environ: Mapping[str, str]) -> Membership | None:
  if not any(environ.get(name) for name in _VARIABLES):
    return None
  count, index = (_number(environ, name) if environ.get(name) else None for name in _VARIABLES[:2])
  return Membership(engine="JAX_ variables", coordinator=environ.get("JAX_COORDINATOR_ADDRESS") or None, count=count, index=index)


def _by_skypilot(environ: Mapping[str, str]) -> Membership | None:
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


_NAMES = {  # what a person sets: coordinator, count, index
  "flags": ("--coordinator", "--processes", "--process"),
  "JAX_ variables": ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
  "SkyPilot": ("SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"),
  "SLURM": ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "SLURM_PROCID"),
  "Open MPI": ("--coordinator=HOST:PORT (Open MPI 5 does not say where)", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


def _checked(plan: Membership) -> Membership:
  """`plan` if its values can be; ProcessError if not."""
  where, many, which = _NAMES.get(plan.engine, _NAMES["flags"])
  count, index = plan.count, plan.index
  if count is not None and count < 1:
    raise ProcessError(f"{many}={count}: expected at least 1 process")
  if index is not None and index < 0:
    raise ProcessError(f"{which}={index}: expected 0 or more")
  if count is not None and index is not None and index >= count:
    raise ProcessError(f"{which}={index} with {many}={count}: expected 0 to {count - 1}; one process too many, or a wrong count")
  if count == 1 and plan.coordinator is None:
    return dataclasses.replace(plan, index=0, ask=None)
  if plan.ask is None:
    given = {where: plan.coordinator, many: count, which: index}
    missing = [name for name, value in given.items() if value is None]
    if missing:
      known = ", ".join(f"{name.split('=')[0]}={value}" for name, value in given.items() if value is not None)
      raise ProcessError(f"{known or plan.engine}: {' and '.join(missing)} must be given too")
  if plan.coordinator is not None and not re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\s\[\]/]+):\d{1,5}", plan.coordinator):
    raise ProcessError(f"{where}={plan.coordinator}: expected HOST:PORT, e.g. 10.0.0.1:8476")
  return plan


def _number(environ: Mapping[str, str], name: str) -> int:
  text = environ.get(name, "")
  if not re.fullmatch(r"\s*-?\d+\s*", text):
    raise ProcessError(f"{name}={text!r}: expected a number")
  return int(text)


def _tasks_on_node(environ: Mapping[str, str]) -> int | None:
  """Tasks of this job step on this node; None where nobody says. SLURM writes "2(x3),1": three nodes of 2, then one of 1."""
  if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "").isdigit():
    return int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
  tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
  nodes = [int(many) for many, times in tasks for _ in range(int(times or 1))]
  node = environ.get("SLURM_NODEID", "")
  return nodes[int(node)] if node.isdigit() and int(node) < len(nodes) else None
