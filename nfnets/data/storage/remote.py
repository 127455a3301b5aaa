"""Calls over a network to gs://, s3:// and any other protocol of fsspec: listings, streams, TFDS metadata, clear errors.

Credentials are the libraries' own (gcloud, ~/.aws, environment variables); AWS_ENDPOINT_URL names another S3 server. What
can pass by itself (a timeout, a lost connection, 5xx) is tried again for RETRY_SECONDS; what a person must mend (no
credentials, refused, missing) raises DataError at once. fsspec keeps one idle daemon thread of its own ("fsspecIO") for
the life of the process.
"""

import asyncio
import concurrent.futures
import errno
import json
import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

from nfnets.data.errors import DataError

BLOCK = 8 << 20  # bytes; the most that one request asks for, unless a single record is larger
THREADS = 16
RETRY_SECONDS = 30.0  # since the first try of a request; no try starts later
TRY_SECONDS = 60.0  # for a single try

_LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
_CREDENTIALS = {
  "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; FSSPEC_S3_ANON=true for a public bucket",
  "gs": "run `gcloud auth application-default login`; FSSPEC_GS_TOKEN=anon for a public bucket",
}
_NO_CREDENTIALS = {
  "NoCredentialsError",
  "PartialCredentialsError",
  "CredentialRetrievalError",
  "TokenRetrievalError",
  "ProfileNotFound",
  "DefaultCredentialsError",
  "UnauthorizedSSOTokenError",
  "SSOTokenLoadError",
}
# The libraries whose own errors are those of a network unless they say otherwise.
_NETWORK = {"aiohttp", "aiobotocore", "asyncio", "botocore", "fsspec", "gcsfs", "google", "http", "requests", "s3fs", "urllib3"}
_PERMANENT = {errno.EINVAL, errno.ENAMETOOLONG, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EISDIR, errno.ENOTDIR}

_log = logging.getLogger(__name__)


class Closed(Exception):
  """The reader was closed while a request was under way."""


def _protocol(url: str) -> str:
  return url.partition("://")[0]


def open_filesystem(url: str):
  """(fsspec filesystem, path in it). Raises DataError when the library that speaks the protocol is missing."""
  protocol = _protocol(url)
  library = _LIBRARIES.get(protocol, "")
  try:
    from fsspec.core import url_to_fs

    # botocore keeps 10 connections by default, fewer than our threads. It would also compute a checksum of every response,
    # which is left out: the reader of the records compares their own checksums.
    s3 = {"max_pool_connections": 2 * THREADS, "response_checksum_validation": "when_required"}
    options = {"config_kwargs": s3} if library == "s3fs" else {}
    if library == "gcsfs" and not logging.getLogger("gcsfs").level:
      logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of what we report in one line
    return url_to_fs(url, **options)
  except ImportError as error:
    raise DataError(
      f"{url}: reading {protocol}:// needs a library that is not installed: pip install {library or 'fsspec'} ({error})"
    ) from error
  except Exception as error:
    known = _mend(error, url)
    if known is None and not isinstance(error, ValueError):
      raise
    raise known or DataError(f"{url}: {_brief(error)}") from error


def _brief(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def _mend(error: BaseException, url: str) -> DataError | None:
  """What `error` means when trying again is of no use; None when it may pass, or is a mistake of the program's."""
  if isinstance(error, DataError):
    return error
  code = str(getattr(error, "code", "") or getattr(error, "status", ""))
  code = code if re.fullmatch(r"[1-5]\d\d", code) else ""
  if isinstance(error, FileNotFoundError) or code == "404":
    return DataError(f"{url}: no such file, directory or bucket ({_brief(error)})")
  refused = isinstance(error, PermissionError) or code in ("401", "403") or str(error).startswith("Forbidden")
  if refused or type(error).__name__ in _NO_CREDENTIALS:
    hint = _CREDENTIALS.get({"s3a": "s3", "gcs": "gs"}.get(_protocol(url), _protocol(url)), "check its permissions")
    what = "refused" if refused else "no credentials"
    return DataError(f"{url}: {what} ({_brief(error)}); {hint}")
  if (code.startswith("4") and code not in ("408", "429")) or (isinstance(error, OSError) and error.errno in _PERMANENT):
    return DataError(f"{url}: {_brief(error)}")
  return None


def _may_pass(error: BaseException) -> bool:
  return isinstance(error, (OSError, EOFError)) or type(error).__module__.partition(".")[0] in _NETWORK


class Calls:
  """Calls of one filesystem that are tried again, given up after a while, and cancelled together."""

  def __init__(self):
    self.closed = threading.Event()
    self._futures: set[concurrent.futures.Future] = set()
    self._lock = threading.Lock()

  def __call__(self, filesystem, url: str, method: str, *args, **kwargs):
    start, delay, tries = time.monotonic(), 0.1, 0
    while True:
      try:
        return self._once(filesystem, method, *args, **kwargs)
      except Exception as error:
        tries += 1
        if self.closed.is_set():
          raise Closed from error
        known = _mend(error, url)
        if known is not None:
          raise known from error
        if not _may_pass(error):
          raise
        elapsed = time.monotonic() - start
        if elapsed + delay > RETRY_SECONDS:
          raise DataError(f"{url}: given up after {tries} tries in {elapsed:.0f} s ({_brief(error)})") from error
        if tries == 3:
          _log.warning("%s: %s; trying again for up to %.0f s", url, _brief(error), RETRY_SECONDS - elapsed)
      # Jitter, so that 16 requests that failed together do not come back together.
      if self.closed.wait(delay * random.uniform(0.5, 1.0)):
        raise Closed
      delay = min(2 * delay, 5.0)

  def _once(self, filesystem, method, *args, **kwargs):
    if not filesystem.async_impl:
      return getattr(filesystem, method)(*args, **kwargs)
    # Not fsspec's own blocking call: that can neither be given up nor cancelled.
    with self._lock:
      if self.closed.is_set():
        raise Closed
      coroutine = getattr(filesystem, f"_{method}")(*args, **kwargs)
      future = asyncio.run_coroutine_threadsafe(coroutine, filesystem.loop)
      self._futures.add(future)
    try:
      return future.result(TRY_SECONDS)
    except concurrent.futures.CancelledError as error:
      if self.closed.is_set():
        raise Closed from None
      raise ConnectionError("cancelled by the library") from error
    finally:
      future.cancel()
      with self._lock:
        self._futures.discard(future)

  def close(self) -> None:
    with self._lock:
      self.closed.set()
      futures = list(self._futures)
    for future in futures:
      future.cancel()


_calls = Calls()


def _list(url: str) -> tuple[list[dict], str]:
  filesystem, path = open_filesystem(url)
  filesystem.invalidate_cache(path)  # what lies there may have changed since it was last listed
  entries = _calls(filesystem, url, "ls", path, detail=True)
  return [entry for entry in entries if entry["name"].rstrip("/") != path.rstrip("/")], path


def _names(url: str, kind: str) -> list[str]:
  return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in _list(url)[0] if entry["type"] == kind)


def list_files(url: str) -> list[str]:
  """The URLs of the files right in a directory, sorted."""
  return [f"{url.rstrip('/')}/{name}" for name in _names(url, "file")]


def list_directories(url: str) -> list[str]:
  """The names of the directories right in a directory, sorted."""
  return _names(url, "directory")


def stat_files(urls: Sequence[str]) -> list[tuple[int, str]]:
  """(size in bytes, a string that changes when the file does: ETag, checksum or time) of each; one listing a directory."""
  found = {}
  for parent in dict.fromkeys(url.rpartition("/")[0] for url in urls):
    found |= {f"{parent}/{entry['name'].rpartition('/')[2]}": entry for entry in _list(parent)[0] if entry["type"] == "file"}
  missing = [url for url in urls if url not in found]
  if missing:
    raise DataError(f"{missing[0]}: no such file" + (f" (nor {len(missing) - 1} more)" if missing[1:] else ""))
  return [(int(found[url]["size"]), _version(found[url])) for url in urls]


def _version(entry: dict) -> str:
  keys = ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "updated", "last_modified", "modified", "created")
  return next((str(entry[key]).strip('"') for key in keys if entry.get(key)), "")


def stream(url: str, *, block: int = BLOCK) -> Iterator[bytes]:
  """A file from its start to its end in blocks of at most `block` bytes, one request each."""
  ((size, _),) = stat_files([url])
  filesystem, path = open_filesystem(url)
  for start in range(0, size, block):
    end = min(start + block, size)
    data = _calls(filesystem, url, "cat_file", path, start=start, end=end)
    if len(data) != end - start:
      raise DataError(f"{url}: got {len(data)} of {end - start} bytes at byte {start}: replaced while it was read")
    yield data


def read_file(url: str) -> bytes:
  """A whole, small file."""
  filesystem, path = open_filesystem(url)
  return _calls(filesystem, url, "cat_file", path)


def write_file(url: str, data: bytes) -> None:
  """Makes or replaces a whole, small file; object stores do so at once or not at all."""
  filesystem, path = open_filesystem(url)
  _calls(filesystem, url, "pipe_file", path, data)


def copy_metadata(url: str) -> str:
  """A new local directory with the small files (*.json, *.txt) of a TFDS version directory; the caller removes it.

  `tfds.builder_from_directory` of it tells splits, shards and features. Raises DataError when `url` is not such a directory.
  """
  files = [file for file in list_files(url) if file.endswith((".json", ".txt"))]
  if not any(file.endswith("/dataset_info.json") for file in files):
    raise DataError(f"{url}: not a prepared TFDS dataset (no dataset_info.json)")
  contents = [(file.rpartition("/")[2], read_file(file)) for file in files]
  target = tempfile.mkdtemp(prefix="nfnets-")
  for name, data in contents:
    with open(os.path.join(target, name), "wb") as file:
      file.write(data)
  return target


def find_version(dir_url: str, name: str) -> str:
  """URL of a prepared dataset's version directory. name: "NAME[/CONFIG][:VERSION]"; the newest version when none is named.

  Without CONFIG, a dataset that has configurations gives its default one, or the only one.
  """
  name, _, version = name.partition(":")
  url = f"{dir_url.rstrip('/')}/{name}"
  try:
    directories = list_directories(url)
  except DataError as error:
    if not isinstance(error.__cause__, FileNotFoundError):
      raise
    there = ", ".join(list_directories(dir_url)[:10])
    raise DataError(f"{url}: no such dataset (in {dir_url}: {there or 'nothing'})") from error
  versions = sorted((d for d in directories if re.fullmatch(r"\d+\.\d+\.\d+", d)), key=lambda d: [int(n) for n in d.split(".")])
  configs = [d for d in directories if d not in versions and not d.startswith(".")]
  if not versions and configs and "/" not in name:
    return find_version(dir_url, f"{name}/{_default_config(url, configs)}" + (f":{version}" if version else ""))
  if version:
    pattern = re.escape(version).replace(r"\*", r"\d+")
    versions = [d for d in versions if re.fullmatch(pattern, d)]
  if not versions:
    raise DataError(f"{url}: no version {version or 'directory such as 1.0.0'} (found: {', '.join(directories) or 'nothing'})")
  return f"{url}/{versions[-1]}"


def _default_config(url: str, configs: list[str]) -> str:
  if len(configs) == 1:
    return configs[0]
  try:
    default = json.loads(read_file(f"{url}/.config/metadata.json")).get("default_config_name")
  except (DataError, ValueError):
    default = None
  if default not in configs:
    raise DataError(f"{url}: several configurations; name one of them: {', '.join(configs)} (config.data.name=NAME/CONFIG)")
  return default


def is_url(path: str) -> bool:
  return "://" in path
