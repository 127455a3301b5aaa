"""A trace of real steps is read back: which operations took how long; and when a training loop's tracer begins and ends."""

import types

import jax
import jax.numpy as jnp
import pytest

from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.train import loop
from nfnets.train.logs import profile


@pytest.fixture(scope="module")
def step():
  """A compiled program with several operations, one of which is far more expensive than the others."""
  compiled, x = jax.jit(lambda x: jnp.sort(jnp.tanh(x @ x), axis=0) + 1), jnp.ones((300, 300))
  compiled(x).block_until_ready()
  return lambda: compiled(x)


def test_own_time_is_without_what_runs_inside():
  spans = [("outer", 0, 100), ("inner", 10, 40), ("innermost", 20, 25), ("second", 50, 60), ("after", 100, 103)]
  assert dict(profile.own_times(spans)) == {"outer": 60, "inner": 25, "innermost": 5, "second": 10, "after": 3}


def test_operations_of_a_trace_are_those_of_the_program(tmp_path, step):
  with profile.trace(str(tmp_path)):
    for _ in range(3):
      step().block_until_ready()
  file = profile.newest(str(tmp_path))
  found = profile.operations(file)
  times = [operation.milliseconds for operation in found]
  assert times == sorted(times, reverse=True) and times[-1] >= 0
  assert "sort" in found[0].name and any("tanh" in operation.name for operation in found)
  lines = profile.table(file, 3).splitlines()
  assert lines[0] == f"trace of 3 steps: {file}" and lines[1].split() == ["operation", "ms", "a", "step", "share"]
  name, milliseconds, share, percent = lines[2].rsplit(maxsplit=3)
  assert name == found[0].name and percent == "%"
  assert float(milliseconds) == pytest.approx(times[0] / 3, abs=1e-3)
  assert float(share) == pytest.approx(100 * times[0] / sum(times), abs=0.06)
  assert len(lines) == 3 + min(len(found), profile.SHOWN) and lines[-1].startswith(f"of {len(found)} operations, ")


def test_what_a_gpu_runs_in_a_graph_is_named_by_kernel():
  def event(name, op):
    return types.SimpleNamespace(name=name, stats={"hlo_module": "step", "hlo_op": op}.items(), start_ns=0, duration_ns=5)

  spans = profile._spans([event("fusion_3", "command_buffer_7"), event("sm90_gemm", "dot.1"), types.SimpleNamespace(stats=())])
  assert [key for key, _, _ in spans] == [("step", "fusion_3"), ("step", "dot.1")]


@pytest.mark.parametrize("steps, traced", [(12, 2), (20, 10), (25, 10)])
def test_the_loops_tracer_takes_ten_steps_or_those_that_are_left(tmp_path, step, steps, traced):
  said = []
  with profile.StepTracer(str(tmp_path), said.append) as tracer:
    state = jnp.zeros(())
    for _ in range(steps):
      tracer.before_step(state)
      state = step()
  assert len(said) == 1 and said[0].startswith(f"trace of {traced} steps: {tmp_path}")
  assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_a_run_that_is_too_short_says_so_and_no_directory_is_no_trace(tmp_path):
  said = []
  for directory, steps in ((str(tmp_path), 10), (None, 30)):
    with profile.StepTracer(directory, said.append) as tracer:
      for _ in range(steps):
        tracer.before_step(())
  assert said == ["nothing was traced: the run ended before its step 11 since the start of this process"]
  assert not list(tmp_path.iterdir())


def test_a_training_run_says_which_operations_took_most(tmp_path, capsys):
  """Sixteen steps: those from the eleventh on are traced."""
  config = Config(
    model=ModelConfig(name="nf_resnet_tiny", overrides={"width": (16,), "depth": (1,), "stage_strides": (1,)}),
    data=DataConfig(name="digits"),
    optim=OptimConfig(base_lr=0.4, warmup_epochs=0.5),
    batch=128,
    epochs=16 / 11.2,
  )
  result = loop.train(config, str(tmp_path / "run"), profile=str(tmp_path / "trace"))
  assert result.finished and result.step == 16
  printed = capsys.readouterr().out
  assert "trace of 6 steps: " in printed and "operation" in printed and " operations, " in printed
  assert profile.operations(profile.newest(str(tmp_path / "trace")))
