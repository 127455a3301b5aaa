"""Every device of every process in one mesh: the batch is split over it, the state is copied to each device or split as well."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfnets.errors import UserError

AXIS = "data"
SMALLEST = 4096  # elements; smaller arrays are copied: sending them costs more than they take


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """Makes a mesh with one axis, "data", over `devices` (all of all processes by default), process by process.

  Not jax.make_mesh: that may reorder a TPU's devices, and a process's rows of the global batch would no longer lie together. The
  collectives here span all devices, for which XLA finds its own way through the network.
  """
  devices = sorted(jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id))
  return Mesh(np.asarray(devices), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what lies whole on each device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its rows split over the devices."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def state_sharding(mesh: Mesh, shape: tuple[int, ...], shard: bool) -> NamedSharding:
  """How one array of the state lies: split along its last axis that the devices divide, if it is to be split and can be.

  The last axis of a kernel is its output's: what is computed for each output channel (standardization, AGC's norms) stays on
  one device.
  """
  if shard and np.prod(shape) >= SMALLEST:
    for axis in reversed(range(len(shape))):
      if shape[axis] % mesh.size == 0:
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))
  return replicated(mesh)


def place(mesh: Mesh, like: Any, *, shard: bool = False) -> Any:
  """Says where a state lies: `like`, of arrays or shapes, as jax.ShapeDtypeStruct with shardings over the mesh."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=state_sharding(mesh, x.shape, shard)), like)


def put(tree: Any, like: Any) -> Any:
  """Places arrays that every process has whole as `like` says; each process sends its own devices' parts alone."""

  def send(x: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, wanted.sharding, lambda part: host[part])

  return jax.tree.map(send, tree, like)


def gather(mesh: Mesh, tree: Any) -> Any:
  """The same arrays, whole on each device; those that are already cost nothing."""
  if all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree)):
    return tree
  return jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))(tree)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Sends this process's rows of a batch to its devices, split along the first axis; returns at once."""
  sharding = batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def whole_batch(batch: int, mesh: Mesh) -> int:
  """The least multiple of the devices that is not below `batch`."""
  return -(-batch // mesh.size) * mesh.size


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
  """Raises UserError where the devices cannot share `batch` images evenly, in `accumulate` equal parts each."""
  parts = mesh.size * accumulate
  if batch % parts:
    lower, upper = batch // parts * parts, -(-batch // parts) * parts
    near = f"{lower} or {upper}" if lower else str(upper)
    times = f" times config.accumulate={accumulate}" if accumulate > 1 else ""
    raise UserError(f"config.batch={batch} is not divisible by the {mesh.size} devices{times}; use {near}")
