"""Compiled programs are kept between starts, also of several processes at once, and nothing ends where they cannot be."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
from absl import flags

from launch import compiled

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
import jax, jax.numpy as jnp
from absl import flags
from launch import compiled
values = flags.FlagValues()
compiled.define(values)
values(["program"])
compiled.keep(values)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
value = jax.jit(lambda x: jnp.linalg.qr(jnp.sin(x @ x.T))[0].sum())(jnp.ones((64, 64)))
print(float(value), len(hits))
"""


def start(cache: pathlib.Path) -> subprocess.Popen:
  environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
  environment |= {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_what_one_start_compiled_the_next_one_reads(tmp_path):
  first = [start(tmp_path), start(tmp_path)]  # at the same time, into the same directory
  values = {running.communicate(timeout=120)[0].split()[0] for running in first}
  value, hits = start(tmp_path).communicate(timeout=120)[0].split()
  assert int(hits) > 0 and values == {value}
  (kind,) = (tmp_path / "nfnets" / "compiled").iterdir()
  assert any(path.name.endswith("-cache") for path in kind.iterdir())


@pytest.fixture
def unset(monkeypatch):
  """JAX's settings as they were before."""
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  yield before["jax_compilation_cache_dir"]
  for name, value in before.items():
    jax.config.update(name, value)


def keep(*arguments: str) -> str | None:
  values = flags.FlagValues()
  compiled.define(values)
  values(["program", *arguments])
  compiled.keep(values)
  return jax.config.jax_compilation_cache_dir


def test_a_flag_turns_it_off_or_names_the_directory_and_the_variable_goes_before(unset, tmp_path, monkeypatch, capsys):
  assert keep("--compiled=off") == unset
  assert keep(f"--compiled={tmp_path}/here") == f"{tmp_path}/here" and (tmp_path / "here").is_dir()
  (tmp_path / "file").touch()
  assert keep(f"--compiled={tmp_path}/file/x") == f"{tmp_path}/here"
  assert "Not a directory; programs will be compiled again at the next start" in capsys.readouterr().out
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  assert keep() == f"{tmp_path}/here"
