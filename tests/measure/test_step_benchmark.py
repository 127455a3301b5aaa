"""The benchmark's figures agree with each other and with the description of the model. No test checks a duration."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from launch import bench as launch_bench, cli
from nfnets import models
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.measure import runs, step
from nfnets.measure.chips import peak_tflops
from nfnets.measure.step_report import Spread, StepReport
from nfnets.train.step import sharding
from nfnets.train.step.state import TrainState

ROOT = pathlib.Path(__file__).parents[2]
ONE_BLOCK = {"depth": (1,), "width": (32,), "stage_strides": (1,)}  # a program that compiles in seconds


def tiny(**changes) -> Config:
  config = Config(
    model=ModelConfig(name="nfnet_tiny", overrides=ONE_BLOCK), data=DataConfig(num_classes=10, image_size=16), batch=16
  )
  return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module", params=[1, 8])
def report(request) -> StepReport:
  mesh = sharding.make_mesh(jax.devices()[: request.param])
  report = step.benchmark_step(tiny(), steps=3, warmup=2, without_agc=request.param == 1, mesh=mesh)
  assert report.devices == request.param
  return report


def test_speeds_follow_from_the_time_of_the_run(report):
  assert report.images_per_s == pytest.approx(report.batch / (report.run_step_ms / 1e3))
  assert report.images_per_s_per_device * report.devices == pytest.approx(report.images_per_s)
  assert report.tflops_per_device == pytest.approx(report.flops_per_image * report.images_per_s_per_device / 1e12)
  assert report.run_steps == report.waited_step_ms.count == 3 and report.warmup_steps == 2
  assert min(report.init_s, report.lowering_s, report.compile_s) > 0


def test_flops_are_three_forward_passes_of_the_description(report):
  described = models.describe("nfnet_tiny", 10, resolutions={"train": 16}, **ONE_BLOCK)
  assert report.forward_macs_per_image == described.macs[16]
  assert report.flops_per_image == 6 * described.macs[16]
  assert report.parameters == described.parameters
  # XLA also counts element-wise work and leaves out the padding's zeros and the images' gradient, so the counts are only near.
  assert 0.7 < report.xla_flops_per_image / report.flops_per_image < 1.5


def test_the_whole_state_is_donated(report):
  assert report.donated_bytes == report.state_bytes
  assert report.state_bytes > 3 * 4 * report.parameters  # it holds parameters, momentum, EMA, and the count of steps
  compiled = report.memory.compiled
  assert compiled.aliased == report.state_bytes
  figures = report.memory.to_json()
  assert figures["program"] == compiled.arguments + compiled.outputs - compiled.aliased + compiled.temporaries


def test_every_step_was_an_update(report):
  blocks = 0 if report.agc is None else report.warmup_steps + runs.AGC_PAIRS * report.agc.steps_per_block
  assert report.updates == 2 + 3 + 3 + blocks
  assert math.isfinite(report.final_loss)


def test_overhead_of_agc_is_the_ratio_of_the_medians(report):
  if report.devices > 1:
    assert report.agc is None
    return
  agc = report.agc
  assert agc.ratio == pytest.approx(agc.with_agc_ms.median / agc.without_agc_ms.median)
  assert agc.with_agc_ms.count == agc.without_agc_ms.count == agc.pair_ratio.count == runs.AGC_PAIRS
  assert agc.pair_ratio.minimum <= agc.pair_ratio.median <= agc.pair_ratio.maximum


def test_a_cpu_is_an_unknown_chip_and_says_what_it_cannot_tell(report):
  assert report.peak_tflops_per_device is None and report.mfu is None
  assert "unknown chip 'cpu'" in str(report)
  if report.memory.peak is None:
    assert "not reported by this backend" in str(report)
  assert ("AGC overhead" in str(report)) == (report.agc is not None)


def test_json_holds_every_figure(report):
  read = json.loads(json.dumps(report.to_json(), allow_nan=False))
  assert read.pop("benchmark") == "step"
  assert set(read) == {field.name for field in dataclasses.fields(StepReport)}
  assert read["waited_step_ms"]["median"] == report.waited_step_ms.median
  assert {"jax", "jaxlib", "python", "backend"} <= set(read["versions"]) and read["date"].endswith("+00:00")


def test_a_known_chip_gets_its_mfu(report):
  mfu = report.tflops_per_device / 989
  on_h200 = dataclasses.replace(
    report, device_kind="NVIDIA H200", dtype="bfloat16", peak_tflops_per_device=peak_tflops("NVIDIA H200"), mfu=mfu
  )
  assert f"MFU {100 * mfu:.2f} % of 989 TFLOP/s" in str(on_h200) and "own peak is lower" not in str(on_h200)
  assert "computes in float32, whose own peak is lower" in str(dataclasses.replace(on_h200, dtype="float32"))


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835),
    ("NVIDIA GH200 480GB", 989),
    ("NVIDIA A100-SXM4-40GB", 312),
    ("NVIDIA A100 80GB PCIe", 312),
    ("Tesla V100-SXM2-16GB", 125),
    ("Tesla V100-PCIE-32GB", 112),
    ("Tesla V100S-PCIE-32GB", 130),
    ("Tesla T4", 65),
    ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362),
    ("NVIDIA GeForce RTX 4090", 165),
    ("TPU v2", 22.5),
    ("TPU v3", 61.5),
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5e", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
  ],
)
def test_peak_of_a_chip(kind, peak):
  assert peak_tflops(kind) == peak


@pytest.mark.parametrize(
  "kind",
  [
    "cpu",
    "",
    "NVIDIA L40",
    "NVIDIA A10",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA T400",
    "TPU v4 lite",
    "TPU7x",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
  ],
)
def test_a_chip_that_no_row_describes_has_no_peak(kind):
  assert peak_tflops(kind) is None


def test_spread_is_numpys_quartiles():
  spread = Spread.of([4.0, 1.0, 3.0, 2.0, 10.0])
  assert (spread.minimum, spread.quartile1, spread.median, spread.quartile3, spread.maximum) == (1, 2, 3, 4, 10)
  assert spread.count == 5


def test_the_batch_is_noise_and_split_over_the_devices():
  mesh = sharding.make_mesh()
  batch = runs.noise_batch(tiny(), mesh, 16, 10)
  assert batch["image"].shape == (16, 16, 16, 3) and batch["image"].dtype == np.uint8
  assert len({image.tobytes() for image in np.asarray(batch["image"])}) == 16
  assert set(np.asarray(batch["label"])) <= set(range(10)) and len(set(np.asarray(batch["label"]))) > 1
  assert {shard.data.shape[0] for shard in batch["image"].addressable_shards} == {16 // mesh.size}


@pytest.mark.parametrize(
  "halted, loss_sum, counted, error, message",
  [
    (True, 9.2, 2, FloatingPointError, "not finite at step 3 of the benchmark"),
    (False, math.nan, 2, FloatingPointError, "loss nan"),
    (False, 9.2, 1, RuntimeError, "counts 1 updates, but 2 steps were timed"),
  ],
)
def test_times_of_a_run_that_did_not_train_are_an_error(halted, loss_sum, counted, error, message):
  state = TrainState(
    step=jnp.int32(counted),
    params={},
    stats={},
    opt_state=(),
    ema=None,
    halted=jnp.array(halted),
    loss_mean=jnp.zeros(()),
    bad_steps=jnp.int32(0),
    passed_over=jnp.int32(0),
  )
  metrics = {"loss_sum": jnp.float32(loss_sum), "count": jnp.float32(4)}
  run = runs.Run(step=lambda state, batch: (state, metrics), state=state, batch={})
  assert run.seconds_per_step(2) > 0
  with pytest.raises(error, match=message):
    run.check()


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"steps": 0}, "steps = 0: expected a whole number >= 1"),
    ({"warmup": 0}, "warmup = 0: expected a whole number >= 1"),
    ({"config": tiny(optim=OptimConfig(clipping=None)), "without_agc": True}, "config.optim.clipping=None"),
    ({"config": tiny(optim=OptimConfig(clipping=math.inf)), "without_agc": True}, "config.optim.clipping=inf"),
    ({"config": tiny(batch=12)}, "config.batch=12 is not divisible by the 8 devices; use 8 or 16"),
    ({"config": tiny(model=ModelConfig(name="nfnet_tny"))}, "nfnet_tiny"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    step.benchmark_step(**{"config": tiny(), **arguments})


def test_out_of_memory_says_what_to_lower():
  with pytest.raises(runs.OutOfMemoryError, match="4096 images of 192×192 a step on 1 × cpu; lower the batch"):
    with runs.explained_out_of_memory(4096, 192, "1 × cpu"):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), runs.explained_out_of_memory(1, 1, ""):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")


# ---- the program


def test_program_prints_json_last_and_writes_it(tmp_path):
  recipe, file = tmp_path / "one_block.py", tmp_path / "step.json"
  recipe.write_text(
    "from configs import digits\n\n\ndef get_config():\n  config = digits.get_config()\n"
    f"  config.model.overrides = {ONE_BLOCK}\n  return config\n"
  )
  command = ["step", f"--config={recipe}", "--steps=2", "--warmup=1", "--batch=8", "--image_size=16", f"--json={file}"]
  environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  done = subprocess.run(
    [sys.executable, "-m", "launch.bench", *command], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  last = done.stdout.splitlines()[-1]
  assert json.loads(last) == json.loads(file.read_text())
  read = json.loads(last)
  assert (read["batch"], read["image_size"], read["num_classes"], read["run_steps"]) == (8, 16, 10, 2)
  assert "10 classes, as the dataset digits has" in done.stdout
  assert read["glibc_tunables"] == ("glibc.malloc.hugetlb=1:glibc.malloc.mxfast=0" if sys.platform == "linux" else "")
  assert read["clipping"] == digits.get_config().optim.clipping and read["agc_track"] is True and read["agc"] is None


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "subcommand: got nothing, expected step or sweep or agc or data"),
    (("stp", "--config=configs/digits.py"), "got stp, expected step"),
    (("step", "more", "--config=configs/digits.py"), "unexpected argument 'more'"),
    (("step",), "--config is missing"),
    (("step", "--config=configs/synthetic.py:nfnet_f9"), "nfnet_f"),
    (("step", "--config=configs/digits.py", "--steps=0"), "steps"),
    (("step", "--config=configs/digits.py", "--classes=0"), "classes"),
    (
      ("step", "--config=configs/digits.py", "--config.data.name=pets"),
      "config.data.name='pets' has is not known without reading",
    ),
    (("step", "--config=configs/digits.py", "--image_size=0"), "image_size"),
    (("step", "--config=configs/digits.py", "--batch=12"), "config.batch=12 is not divisible by the 8 devices"),
    (("step", "--config=configs/digits.py", "--config.optim.clipping=inf", "--without-agc"), "config.optim.clipping=inf"),
    (("step", "--config=configs/digits.py", "--json=no/such/dir/a.json"), "--json=no/such/dir/a.json: No such file"),
    (("step", "--config=configs/digits.py", "--config.epochs=1"), "warm-up of 3 epochs"),
  ],
)
def test_program_answers_a_mistake_in_one_line(arguments, message, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", ["launch/bench.py", *arguments])
  with pytest.raises(SystemExit) as stopped:
    cli.main(launch_bench.run, launch_bench.define, "", arguments=True)
  printed = capsys.readouterr()
  assert stopped.value.code == 2
  assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
  assert "{" not in printed.out


def test_benchmark_imports_nothing_heavy():
  heavy = ("tensorflow_datasets", "sklearn", "orbax", "matplotlib", "tensorflow", "grain")
  program = f"import sys, nfnets.measure.step; print([name for name in {heavy} if name in sys.modules])"
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
