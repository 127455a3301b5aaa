"""Weights that lie elsewhere: on the Hugging Face hub, and DeepMind's published files; both end up in a cache on this machine."""

import contextlib
import hashlib
import http.client
import os
import pathlib
import urllib.error
import urllib.request

from nfnets.files import whole_file
from nfnets.weights.errors import WeightsError
from nfnets.weights.haiku import PUBLISHED

HUB = "hf://"
BUCKET = "https://storage.googleapis.com/dm-nfnets/"
TIMEOUT_S = 30.0
LARGEST = 4 << 30  # bytes; the largest published file has 1.8e9


def local(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
  """Returns the place on this machine of hf://OWNER/NAME, timm/NAME or a published file's https:// address; others as they are.

  The hub's files are kept in huggingface_hub's cache, which serves where there is no network; DeepMind's in
  ~/.cache/nfnets/weights (or $XDG_CACHE_HOME), and a file of another MD5 sum is refused.

  Raises:
    WeightsError: there is no such file, no network, or no huggingface_hub.
  """
  if isinstance(source, str) and source.startswith("timm/") and not os.path.exists(source):
    source = HUB + source
  if not isinstance(source, str) or "://" not in source:
    return source
  if source.startswith(HUB):
    return _of_hub(source)
  names = {f"{BUCKET}F{name[-1]}_haiku.npz": md5 for md5, name in PUBLISHED.items()}
  if source not in names:
    raise WeightsError(f"{source}: expected hf://OWNER/NAME, a path, or one of {BUCKET}F0_haiku.npz … F6_haiku.npz")
  return _of_bucket(source, names[source])


def _of_hub(source: str) -> pathlib.Path:
  repository = source.removeprefix(HUB)
  parts = repository.split("/")
  if len(parts) != 2 or not all(parts):
    raise WeightsError(f"{source}: expected hf://OWNER/NAME, such as hf://timm/dm_nfnet_f0.dm_in1k")
  try:
    import huggingface_hub  # pyrefly: ignore
  except ImportError as error:
    raise WeightsError(f"{source} needs huggingface_hub, which is not installed; pip install huggingface_hub") from error
  try:
    file = pathlib.Path(huggingface_hub.hf_hub_download(repository, "model.safetensors"))
    with contextlib.suppress(Exception):  # a repository may do without it
      huggingface_hub.hf_hub_download(repository, "config.json")  # lies beside it then, where `card.read_config` looks
    return file
  except Exception as error:  # of its own, of its HTTP library, of the disk; none of them is a mistake of ours
    missing = type(error).__name__ == "LocalEntryNotFoundError"
    reason = "no network" if missing else str(error).strip().split("\n")[0][:200] or type(error).__name__
    raise WeightsError(f"{source} is not in huggingface_hub's cache and could not be fetched: {reason}") from error


def _of_bucket(source: str, md5: str) -> pathlib.Path:
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "nfnets" / "weights"
  file = cache / source.removeprefix(BUCKET)
  try:
    if file.is_file():
      return file
    cache.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with urllib.request.urlopen(source, timeout=TIMEOUT_S) as answer, whole_file(file) as copy:
      while part := answer.read(1 << 20):
        digest.update(part)
        copy.write(part)
        size += len(part)
        if size > LARGEST:
          raise WeightsError(f"{source} is larger than {LARGEST:,} bytes, which no published file is")
      if digest.hexdigest() != md5:  # before the copy takes its name
        raise WeightsError(f"{source} has the MD5 sum {digest.hexdigest()}, expected {md5}; it was not kept")
  except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
    raise WeightsError(f"{source} could not be fetched: {getattr(error, 'reason', None) or error}") from error
  return file
