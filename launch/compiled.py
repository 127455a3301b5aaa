"""Keeps compiled programs between starts, so that the second start of a run takes seconds instead of minutes.

Programs lie in $XDG_CACHE_HOME/nfnets/compiled or ~/.cache/nfnets/compiled, in a directory for each kind of processor, because
XLA compiles for its instructions and home directories are shared by machines of several kinds. JAX's own variable,
JAX_COMPILATION_CACHE_DIR, goes before. Whoever may write there can run code as the user who reads it.
"""

import hashlib
import os
import pathlib
import platform

from absl import flags

MOST_BYTES = 8 << 30  # of all programs; those that were not used for the longest time go first
LEAST_SECONDS = 0.2  # of compiling; quicker programs are not kept


def define(values: flags.FlagValues) -> None:
  """Adds the flag that sets the directory, or turns the cache off."""
  flags.DEFINE_string(
    "compiled", "", "Where compiled programs are kept; empty: in the user's cache; off: nowhere.", flag_values=values
  )


def keep(values: flags.FlagValues) -> None:
  """Lets JAX keep compiled programs; to be called before anything is compiled."""
  if values.compiled == "off" or not values.compiled and "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  directory = pathlib.Path(values.compiled or default_directory())
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    print(f"--compiled={directory}: {error.strerror}; programs will be compiled again at the next start")
    return
  import jax

  jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def default_directory() -> pathlib.Path:
  """Returns the directory for this machine's kind of processor."""
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return pathlib.Path(cache, "nfnets", "compiled", _processor())


def _processor() -> str:
  """Returns what tells kinds of processors apart: the architecture and a digest of its instructions."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    instructions = next(line for line in lines if line.startswith(("flags", "Features")))
  except (OSError, StopIteration):
    instructions = platform.processor()
  return f"{platform.machine()}-{hashlib.sha256(instructions.encode()).hexdigest()[:8]}"
