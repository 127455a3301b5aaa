"""Calls over a network to gs://, s3:// and any other protocol of fsspec: listings, streams, TFDS metadata, clear errors.

Credentials come from where the libraries look for them (gcloud, ~/.aws, environment variables); AWS_ENDPOINT_URL names
another S3 server. A call that fails for a reason that can pass (a timeout, a lost connection, 5xx) is tried again for
RETRY_SECONDS; a failure that a person must mend (no credentials, refused, missing) raises DataError at once. fsspec keeps
one idle daemon thread ("fsspecIO") for the life of the process.
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
from typing import Any

from nfnets.data.errors import DataError

BLOCK = 8 << 20  # bytes; the most that a request asks for, unless a single record is larger
THREADS = 16  # of a reader, each with a request
RETRY_SECONDS = 30.0  # after the first try of a request; no try starts later
TRY_SECONDS = 60.0  # that a single try may take

_LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
_CREDENTIALS = {
  "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; FSSPEC_S3_ANON=true for a public bucket",
  "gs": "run `gcloud auth application-default login`; FSSPEC_GS_TOKEN=anon for a public bucket",
}
# Names of the libraries' exceptions for missing or expired credentials.
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
# Libraries whose exceptions mean a failure of the network that may pass, unless `_permanent_error` knows better.
_NETWORK = {"aiohttp", "aiobotocore", "asyncio", "botocore", "fsspec", "gcsfs", "google", "http", "requests", "s3fs", "urllib3"}
_PERMANENT = {errno.EINVAL, errno.ENAMETOOLONG, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EISDIR, errno.ENOTDIR}

_log = logging.getLogger(__name__)


class Closed(Exception):
  """The reader was closed while a request was under way."""


def _protocol(url: str) -> str:
  return url.partition("://")[0]


def open_filesystem(url: str) -> tuple[Any, str]:
  """Returns (fsspec's filesystem, the path in it). Raises DataError when the library for the protocol is missing."""
  protocol = _protocol(url)
  library = _LIBRARIES.get(protocol, "")
  try:
    from fsspec.core import url_to_fs

    # botocore keeps 10 connections by default, fewer than our threads. It would also check a checksum of every response,
    # which we turn off: records have checksums of their own, which are compared when they are read.
    s3 = {"max_pool_connections": 2 * THREADS, "response_checksum_validation": "when_required"}
    options = {"config_kwargs": s3} if library == "s3fs" else {}
    if library == "gcsfs" and not logging.getLogger("gcsfs").level:
      logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of errors that we report in one line
    return url_to_fs(url, **options)
  except ImportError as error:
    raise DataError(
      f"{url}: reading {protocol}:// needs a library that is not installed: pip install {library or 'fsspec'} ({error})"
    ) from error
  except Exception as error:
    permanent = _permanent_error(error, url)
    if permanent is None and not isinstance(error, ValueError):
      raise
    raise permanent or DataError(f"{url}: {_brief(error)}") from error


def _brief(error: BaseException) -> str:
  """Returns the type and the message of an error in one line of at most 300 characters."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def _permanent_error(error: BaseException, url: str) -> DataError | None:
  """Returns what a person must mend; None when `error` may pass by itself, or is a mistake in the program."""
  if isinstance(error, DataError):
    return error
  code = str(getattr(error, "code", "") or getattr(error, "status", ""))
  code = code if re.fullmatch(r"[1-5]\d\d", code) else ""
  if isinstance(error, FileNotFoundError) or code == "404":
    return DataError(f"{url}: no such file, directory or bucket ({_brief(error)})")
  refused = isinstance(error, PermissionError) or code in ("401", "403") or str(error).startswith("Forbidden")
  if refused or type(error).__name__ in _NO_CREDENTIALS:
    hint = _CREDENTIALS.get({"s3a": "s3", "gcs": "gs"}.get(_protocol(url), _protocol(url)), "check its permissions")
    problem = "refused" if refused else "no credentials"
    return DataError(f"{url}: {problem} ({_brief(error)}); {hint}")
  if (code.startswith("4") and code not in ("408", "429")) or (isinstance(error, OSError) and error.errno in _PERMANENT):
    return DataError(f"{url}: {_brief(error)}")
  return None


def _may_pass(error: BaseException) -> bool:
  """Whether `error`, which is not permanent, comes from the network rather than from a mistake in the program."""
  return isinstance(error, (OSError, EOFError)) or type(error).__module__.partition(".")[0] in _NETWORK


class Calls:
  """Calls of filesystems that are tried again, given up after a while, and cancelled together by `close`."""

  def __init__(self) -> None:
    self.closed = threading.Event()
    self._futures: set[concurrent.futures.Future] = set()
    self._lock = threading.Lock()

  def __call__(self, filesystem: Any, url: str, method: str, *args: Any, **kwargs: Any) -> Any:
    """Returns `filesystem.method(*args, **kwargs)`; the caller names the method and its arguments as fsspec has them.

    Raises:
      DataError: the call fails for a reason that a person must mend, or for longer than RETRY_SECONDS; names `url`.
      Closed: the calls were closed meanwhile.
    """
    start, delay, tries = time.monotonic(), 0.1, 0
    while True:
      try:
        return self._try_call(filesystem, method, *args, **kwargs)
      except Exception as error:
        tries += 1
        if self.closed.is_set():
          raise Closed from error
        permanent = _permanent_error(error, url)
        if permanent is not None:
          raise permanent from error
        if not _may_pass(error):
          raise
        elapsed = time.monotonic() - start
        if elapsed + delay > RETRY_SECONDS:
          raise DataError(f"{url}: given up after {tries} tries in {elapsed:.0f} s ({_brief(error)})") from error
        if tries == 3:
          _log.warning("%s: %s; trying again for up to %.0f s", url, _brief(error), RETRY_SECONDS - elapsed)
      # Random waits, so that 16 requests that failed together are not sent again together.
      if self.closed.wait(delay * random.uniform(0.5, 1.0)):
        raise Closed
      delay = min(2 * delay, 5.0)

  def _try_call(self, filesystem: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    if not filesystem.async_impl:
      return getattr(filesystem, method)(*args, **kwargs)
    # fsspec's own blocking call could neither be given up nor cancelled.
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
    """Cancels the calls under way; they and all later ones raise Closed."""
    with self._lock:
      self.closed.set()
      futures = list(self._futures)
    for future in futures:
      future.cancel()


_calls = Calls()


def _list(url: str) -> list[dict[str, Any]]:
  """Returns fsspec's entries of a directory, without the directory itself."""
  filesystem, path = open_filesystem(url)
  filesystem.invalidate_cache(path)  # the directory may have changed since it was last listed
  entries = _calls(filesystem, url, "ls", path, detail=True)
  return [entry for entry in entries if entry["name"].rstrip("/") != path.rstrip("/")]


def _names(url: str, kind: str) -> list[str]:
  """Returns the names in a directory, sorted. kind: "file" or "directory"."""
  return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in _list(url) if entry["type"] == kind)


def list_files(url: str) -> list[str]:
  """Returns the URLs of the files directly in a directory, sorted."""
  return [f"{url.rstrip('/')}/{name}" for name in _names(url, "file")]


def list_directories(url: str) -> list[str]:
  """Returns the names of the directories directly in a directory, sorted."""
  return _names(url, "directory")


def stat_files(urls: Sequence[str]) -> list[tuple[int, str]]:
  """Returns for each file (its bytes, a string that changes when the file does: ETag, checksum or time).

  Every directory is listed only once. Raises DataError when a file is missing.
  """
  entries: dict[str, dict[str, Any]] = {}
  for parent in dict.fromkeys(url.rpartition("/")[0] for url in urls):
    entries |= {f"{parent}/{entry['name'].rpartition('/')[2]}": entry for entry in _list(parent) if entry["type"] == "file"}
  missing = [url for url in urls if url not in entries]
  if missing:
    raise DataError(f"{missing[0]}: no such file" + (f" (nor {len(missing) - 1} more)" if missing[1:] else ""))
  return [(int(entries[url]["size"]), _change_tag(entries[url])) for url in urls]


def _change_tag(entry: dict[str, Any]) -> str:
  """Returns the first of fsspec's fields that changes with the file; empty where the filesystem has none of them."""
  keys = ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "updated", "last_modified", "modified", "created")
  return next((str(entry[key]).strip('"') for key in keys if entry.get(key)), "")


def stream(url: str, *, block: int = BLOCK) -> Iterator[bytes]:
  """Yields a file from its start to its end in blocks of at most `block` bytes, each with a request."""
  ((size, _),) = stat_files([url])
  filesystem, path = open_filesystem(url)
  for start in range(0, size, block):
    end = min(start + block, size)
    data = _calls(filesystem, url, "cat_file", path, start=start, end=end)
    if len(data) != end - start:
      raise DataError(f"{url}: got {len(data)} of {end - start} bytes at byte {start}: replaced while it was read")
    yield data


def read_file(url: str) -> bytes:
  """Returns a small file as a whole."""
  filesystem, path = open_filesystem(url)
  return _calls(filesystem, url, "cat_file", path)


def write_file(url: str, data: bytes) -> None:
  """Makes or replaces a small file; object stores do so as a whole or not at all."""
  filesystem, path = open_filesystem(url)
  _calls(filesystem, url, "pipe_file", path, data)


def copy_metadata(url: str, largest: int) -> str:
  """Copies the small files (*.json, *.txt) of a TFDS version directory to a new local one, which the caller removes.

  `nfnets.data.sources.metadata` reads splits, shards and features from it. Raises DataError when `url` is not such a
  directory, or one of the files has more than `largest` bytes.
  """
  files = [file for file in list_files(url) if file.endswith((".json", ".txt"))]
  if not any(file.endswith("/dataset_info.json") for file in files):
    raise DataError(f"{url}: not a prepared TFDS dataset (no dataset_info.json)")
  for file, (size, _) in zip(files, stat_files(files), strict=True):
    if size > largest:
      raise DataError(f"{file} has {size:,} bytes; expected metadata of at most {largest:,}")
  contents = [(file.rpartition("/")[2], read_file(file)) for file in files]
  target = tempfile.mkdtemp(prefix="nfnets-")
  for name, data in contents:
    with open(os.path.join(target, name), "wb") as file:
      file.write(data)
  return target


def find_version(dir_url: str, name: str) -> str:
  """Returns the URL of a prepared dataset's version directory.

  Args:
    dir_url: the directory of the datasets.
    name: "NAME[/CONFIG][:VERSION]"; without VERSION the newest version is meant, and without CONFIG the default
      configuration of a dataset that has several.

  Raises:
    DataError: there is no such dataset or version, or it has several configurations and no default.
  """
  name, _, version = name.partition(":")
  url = f"{dir_url.rstrip('/')}/{name}"
  try:
    directories = list_directories(url)
  except DataError as error:
    if not isinstance(error.__cause__, FileNotFoundError):
      raise
    datasets = ", ".join(list_directories(dir_url)[:10])
    raise DataError(f"{url}: no such dataset (in {dir_url}: {datasets or 'nothing'})") from error
  versions = [directory for directory in directories if re.fullmatch(r"\d+\.\d+\.\d+", directory)]
  versions.sort(key=lambda numbers: [int(number) for number in numbers.split(".")])
  configs = [directory for directory in directories if directory not in versions and not directory.startswith(".")]
  if not versions and configs and "/" not in name:
    return find_version(dir_url, f"{name}/{_default_config(url, configs)}" + (f":{version}" if version else ""))
  if version:
    pattern = re.escape(version).replace(r"\*", r"\d+")
    versions = [directory for directory in versions if re.fullmatch(pattern, directory)]
  if not versions:
    raise DataError(f"{url}: no version {version or 'directory such as 1.0.0'} (found: {', '.join(directories) or 'nothing'})")
  return f"{url}/{versions[-1]}"


def _default_config(url: str, configs: list[str]) -> str:
  """Returns the only configuration of a dataset, or the default that its metadata name; raises DataError without one."""
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
  """Whether a path names a protocol, such as gs://."""
  return "://" in path
