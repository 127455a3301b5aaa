"""Reads files of arrays: safetensors, npz, pickles of arrays, and PyTorch's. What a file is, its first bytes say, not its name.

Files may come from anyone: nothing in them runs, and arrays take no more memory than the file's size warrants.
"""

import dataclasses
import hashlib
import io
import math
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

from nfnets.weights import pickles
from nfnets.weights.errors import WeightsError

EXPANSION, SPARE = 4, 1 << 24  # compressed members may grow to EXPANSION times the file and SPARE bytes; weights hardly compress
DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class File:
  """What one file holds.

  Attributes:
    format: "safetensors", "npz", "pickle" or "pytorch".
    arrays: by name, not to be written to.
    metadata: of safetensors.
    md5: of a pickle, which is how the published files are known; else empty.
  """

  format: str
  arrays: dict[str, np.ndarray]
  metadata: dict[str, str] = dataclasses.field(default_factory=dict)
  md5: str = ""


def read(path: str | os.PathLike[str]) -> File:
  """Reads a file of arrays.

  Raises:
    WeightsError: it is not there, cannot be read, is damaged, or holds something else.
  """
  path = pathlib.Path(path)
  try:
    if not path.is_file():
      raise WeightsError(f"{path} is {'no regular file' if path.exists() else 'not there'}; expected a file of weights")
    with open(path, "rb") as file:
      head = file.read(64)
    return _reader(path, head)(path)
  except (OSError, MemoryError, RecursionError) as error:
    raise WeightsError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error or type(error).__name__}") from error


def _reader(path: pathlib.Path, head: bytes) -> Any:
  """The function that reads a file which begins so."""
  if not head:
    raise WeightsError(f"{path} is empty; expected a file of weights")
  if head[8:9] == b"{":
    return _safetensors
  if head.startswith(b"PK\x03\x04"):
    return _zip
  if head[0] == 0x80:
    return (
      _pytorch if b"\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in head else _pickle
    )  # the number that old files begin with
  if head.lstrip()[:1] == b"<":
    raise WeightsError(f"{path} is a web page (HTML), not weights; download the file itself")
  if head.startswith(b"version https://git-lfs"):
    raise WeightsError(f"{path} is a pointer of Git LFS, not the weights; run git lfs pull")
  raise WeightsError(f"{path} is no file of weights; expected safetensors, npz, a pickle of arrays, or PyTorch's .pth")


def _safetensors(path: pathlib.Path) -> File:
  import safetensors

  try:
    with safetensors.safe_open(path, framework="np") as file:
      metadata, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
  except (OSError, TypeError, safetensors.SafetensorError) as error:
    raise WeightsError(f"{path} is no safetensors file: {error}") from error
  return File(format="safetensors", arrays=_checked(path, arrays), metadata=metadata)


def _pickle(path: pathlib.Path) -> File:
  data = path.read_bytes()
  arrays = flat(pickles.read(data, str(path)))
  return File(format="pickle", arrays=_checked(path, arrays), md5=hashlib.md5(data, usedforsecurity=False).hexdigest())


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """The leaves of nested dictionaries by their keys, joined by "/"."""
  leaves: dict[str, Any] = {}
  for key, value in tree.items():
    leaves |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return leaves


def _zip(path: pathlib.Path) -> File:
  """An npz, or PyTorch's newer files; members are measured before any is unpacked."""
  try:
    with zipfile.ZipFile(path) as archive:
      members, limit = archive.infolist(), EXPANSION * path.stat().st_size + SPARE
      names, size = [member.filename for member in members], sum(member.file_size for member in members)
      if size > limit:
        raise WeightsError(f"{path} would unpack to {size:,} bytes; expected at most {limit:,} for a file of its size")
      if len(set(names)) < len(names):
        raise WeightsError(f"{path} has two members of the same name; expected one of each")
      if any(name.endswith("data.pkl") for name in names):
        return _pytorch(path)
      arrays = {member.filename.removesuffix(".npy"): _npy(path, archive, member) for member in members}
  except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
    if isinstance(error, WeightsError):
      raise
    raise WeightsError(f"{path} is a damaged zip file (npz or PyTorch's): {error}") from error
  return File(format="npz", arrays=_checked(path, arrays))


def _npy(path: pathlib.Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
  """One array of an npz; its header is compared with the member's size before anything of the header's size is made."""
  if not member.filename.endswith(".npy"):
    raise WeightsError(f"{path} has the member {member.filename[:80]!r}; expected arrays (.npy) alone")
  data = archive.read(member)
  stream = io.BytesIO(data)
  version = np.lib.format.read_magic(stream)
  if version not in ((1, 0), (2, 0)):
    raise WeightsError(f"{path}: {member.filename[:80]} is npy {version[0]}.{version[1]}, expected 1.0 or 2.0")
  read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  shape, fortran, dtype = read_header(stream)
  if dtype.hasobject or dtype.names or dtype.kind not in "fiub":
    raise WeightsError(f"{path}: {member.filename[:80]} holds {str(dtype)[:80]}, expected numbers")
  if math.prod(shape) * dtype.itemsize != len(data) - stream.tell() or any(side < 1 for side in shape):
    raise WeightsError(
      f"{path}: {member.filename[:80]} says that it is {shape} {dtype}, but has {len(data) - stream.tell():,} bytes"
    )
  array = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
  return array.astype(dtype.newbyteorder("="), copy=False)


def _pytorch(path: pathlib.Path) -> File:
  """PyTorch's file of tensors, through its own reader of weights alone, where torch is installed."""
  try:
    import torch  # pyrefly: ignore
  except ImportError as error:
    raise WeightsError(f"{path} is a PyTorch file, and torch is not installed; pip install torch, or use safetensors") from error
  try:
    tree = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises what its parts raise: pickle's, zip's and its own
    raise WeightsError(
      f"{path} is refused by torch.load(weights_only=True), so that nothing was run: it is damaged or holds other than tensors"
    ) from error
  for key in ("state_dict", "model"):  # of training's checkpoints
    if isinstance(tree, dict) and isinstance(tree.get(key), dict):
      tree = tree[key]
  if not isinstance(tree, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tree.values()):
    raise WeightsError(f"{path} holds {type(tree).__name__}, expected a dictionary of tensors by name (a state_dict)")
  if any(tensor.layout != torch.strided or tensor.is_quantized for tensor in tree.values()):
    raise WeightsError(f"{path} holds sparse or quantized tensors, expected plain ones")
  if sum(tensor.numel() * tensor.element_size() for tensor in tree.values()) > 2 * path.stat().st_size:
    raise WeightsError(f"{path} uses the same bytes again and again: its tensors are larger than the file")
  as_numpy = lambda tensor: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
  arrays = {str(name).removeprefix("module."): as_numpy(tensor.detach()) for name, tensor in tree.items()}
  return File(format="pytorch", arrays=_checked(path, arrays))


def _checked(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays; raises WeightsError where there is none, or where one is not made of numbers."""
  if not arrays:
    raise WeightsError(f"{path} holds no arrays")
  for name, array in arrays.items():
    if array.dtype.name not in DTYPES:
      raise WeightsError(f"{path}: {name[:80]} is {array.dtype}, expected one of {', '.join(DTYPES)}")
  return arrays
