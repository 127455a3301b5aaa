"""Eight fake CPU devices for the whole suite; must be set before jax starts its backend.

Most of the suite's time is compiling. LLVM is told not to optimize, which halves it and leaves XLA's own passes as they are; what
was compiled once is kept for the other tests and processes of this run; and the many objects that stay are seldom searched for
garbage.
"""

import gc
import os
import tempfile

_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()  # a flag that is set later wins
gc.set_threshold(50_000, 20, 100)
if "NFNETS_TEST_CACHE" not in os.environ:  # set by the first process of the run, read by those that it starts
  _cache = tempfile.TemporaryDirectory(prefix="nfnets-compiled-", ignore_cleanup_errors=True)
  os.environ["NFNETS_TEST_CACHE"] = _cache.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["NFNETS_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
