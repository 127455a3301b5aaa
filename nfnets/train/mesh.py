"""Every device in one mesh: the batch is split over it, the state is replicated."""
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh with one axis, "data", over `devices` (all of them by default)."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Sends this process's rows of a batch to its devices, split along the first axis; returns at once."""
  sharding = batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def whole_batch(batch: int, mesh: Mesh) -> int:
  """The least multiple of the devices that is not below `batch`."""
  return -(-batch // mesh.size) * mesh.size


def check_batch(batch: int, mesh: Mesh) -> None:
  """Raises ValueError where the devices cannot share `batch` images evenly."""
  if batch % mesh.size:
    lower, upper = batch // mesh.size * mesh.size, -(-batch // mesh.size) * mesh.size
    near = f"{lower} or {upper}" if lower else str(upper)
    raise ValueError(f"config.batch={batch} is not divisible by the {mesh.size} devices; use {near}")
