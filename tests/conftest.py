"""Eight fake CPU devices for the whole suite; must be set before jax starts its backend.

Most of the suite's time is compiling: what was compiled once is kept for the other tests and processes of this run.
"""

import os
import tempfile

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
if "NFNETS_TEST_CACHE" not in os.environ:  # set by the first process of the run, read by those that it starts
  _cache = tempfile.TemporaryDirectory(prefix="nfnets-compiled-", ignore_cleanup_errors=True)
  os.environ["NFNETS_TEST_CACHE"] = _cache.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["NFNETS_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
