"""Eight fake CPU devices for the whole suite; must be set before jax starts its backend.

Most of the suite's time is compiling, see xla.py. What was compiled once is kept for the other tests and processes of this run;
the many objects that stay are seldom searched for garbage; programs do not say which of our lines they come from; and a process
of several ends without taking apart what it compiled.
"""

import atexit
import gc
import os
import tempfile

import pytest

from tests.xla import FAST

_FLAGS = f"--xla_force_host_platform_device_count=8 {FAST}"
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()  # a flag that is set later wins
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
gc.set_threshold(200_000, 50, 100)
if "PYTEST_XDIST_WORKER" in os.environ:
  atexit.register(os._exit, 0)  # the first to be registered is the last to be called
if "NFNETS_TEST_CACHE" not in os.environ:  # set by the first process of the run, read by those that it starts
  _cache = tempfile.TemporaryDirectory(prefix="nfnets-compiled-", ignore_cleanup_errors=True)
  os.environ["NFNETS_TEST_CACHE"] = _cache.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["NFNETS_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


@pytest.fixture(scope="module")
def two_devices():
  """Gives what asks for all devices two of them: as good as eight where they are not what is tested, and less work."""
  import jax

  from nfnets.train.step import sharding

  make_mesh = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", lambda devices=None: make_mesh(jax.devices()[:2] if devices is None else devices))
    yield


@pytest.fixture(scope="session", autouse=True)
def quick_initial_values():
  """Lets LLVM optimize the one program that draws initial values, which takes ten times longer otherwise, a while per network."""
  import jax

  from nfnets.models import layers

  traced = layers._draw_block
  optimized = jax.jit(traced.__wrapped__, static_argnums=2, compiler_options={"xla_backend_optimization_level": 1})
  draw = lambda key, index, truncated: (traced if isinstance(key, jax.core.Tracer) else optimized)(key, index, truncated)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers, "_draw_block", draw)
    yield
