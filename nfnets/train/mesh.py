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
  """Sends a batch to the devices, split along its first axis; returns at once."""
  return jax.device_put(batch, batch_sharding(mesh))


def check_batch(batch: int, mesh: Mesh) -> None:
  """Raises ValueError where the devices cannot share `batch` images evenly."""
  if batch % mesh.size:
    lower, upper = batch // mesh.size * mesh.size, -(-batch // mesh.size) * mesh.size
    near = f"{lower} or {upper}" if lower else str(upper)
    raise ValueError(f"config.batch={batch} is not divisible by the {mesh.size} devices; use {near}")
