"""Plans hold the bytes that can be computed beforehand; arithmetic and advice are tested on made-up figures."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import pytest
from jax.sharding import PartitionSpec as P

from launch import cli, plan as launch_plan
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.data.sources.open import open_source
from nfnets.measure import hlo, plan, plan_report, program
from nfnets.measure.chips import CHIPS, Chip, chip
from nfnets.train.step import sharding

ROOT = pathlib.Path(__file__).parents[2]
# A network and options that compile in seconds; LLVM's expensive passes, which are skipped, come after memory and communication.
ONE_BLOCK = {"depth": (1,), "width": (512,), "stage_strides": (1,), "stem_kernel": 3, "stem_pool": False}
GAINS = 128 + 128 + 128 + 512 + 512  # those of the stem, of the block's three convolutions and of its shortcut
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def tiny(**changes) -> Config:
  config = Config(
    model=ModelConfig(name="nf_resnet50", overrides=ONE_BLOCK), data=DataConfig(num_classes=8, image_size=8), batch=8, epochs=10
  )
  return dataclasses.replace(config, **changes)


# ---- the step


def test_memory_of_a_sharded_state_falls_as_devices_rise():
  """By the program's own memory analysis, what is split falls as 1/devices, and the little that is not split stays."""
  memory, copied = {}, 0
  for n in (1, 2, 4, 8):
    mesh = sharding.make_mesh(jax.devices()[:n])
    lowered = plan.lower(tiny(shard=True), mesh, 8, 8)
    memory[n] = program.memory(lowered.compile(FAST))
    state, _ = lowered.in_avals[0]
    whole = [leaf for leaf in jax.tree.leaves(state) if sharding.state_sharding(mesh, leaf.shape, True).spec == P()]
    copied = sum(leaf.size * leaf.dtype.itemsize for leaf in whole)
  assert copied < 0.1 * memory[1].aliased
  for n in (2, 4, 8):
    assert memory[n].aliased - copied == pytest.approx((memory[1].aliased - copied) / n, rel=0.01)
  assert memory[8].total < memory[4].total < memory[2].total < memory[1].total


def test_program_end_to_end_on_this_machine(tmp_path, monkeypatch, capsys):
  recipe, file = tmp_path / "one_block.py", tmp_path / "plan.json"
  recipe.write_text("from tests.measure import test_plan\n\n\ndef get_config():\n  return test_plan.tiny()\n")
  status, out, err = run_program(
    monkeypatch, capsys, f"--config={recipe}", f"--json={file}", f"--out={tmp_path / 'plan.png'}", "--classes=6"
  )
  assert status == 0, err
  assert "6 classes, as config.data.num_classes or --classes says" in out
  read = json.loads(out.splitlines()[-1])
  assert read == json.loads(file.read_text()) and not (tmp_path / "plan.png").exists()
  (step,) = read["steps"]
  assert (read["devices"], read["device_kind"], read["topology"], read["batch"]) == (8, "cpu", None, 8)
  assert step["fits"] is None and step["roofline"] is None and read["chip"] is None and "unknown" in out
  memory = step["memory"]
  assert memory["aliased"] > 3 * 4 * read["parameters"]  # it holds parameters, momentum and EMA
  assert memory["total"] == sum(memory[part] for part in ("arguments", "outputs", "temporaries", "code")) - memory["aliased"]
  # Each gradient is summed over the devices once, in float32, except the gains', which are part of the standardized kernels.
  # The loss and the counts add a few bytes.
  gradients = 4 * (read["parameters"] - GAINS)
  assert gradients < step["collectives"]["all-reduce"]["bytes"] <= gradients + 32
  assert 0.7 < step["flops"] / step["counted_flops"] < 2 and step["memory_bytes"] > memory["aliased"]
  assert "all-reduce 1" in out and "advice: whether it fits is unknown" in out


def test_counted_flops_follow_remat_and_sam():
  config = tiny(batch=32)
  assert plan.counted_flops(config, 1000, 8) == 6 * 1000 * 4
  remat = dataclasses.replace(config, model=ModelConfig(name="nf_resnet50", remat=True))
  assert plan.counted_flops(remat, 1000, 8) == 8 * 1000 * 4
  assert plan.counted_flops(dataclasses.replace(config, optim=OptimConfig(sam_rho=0.05)), 1000, 8) == pytest.approx(
    1.2 * 6 * 1000 * 4
  )


# ---- the roofline, with made-up figures


MADE_UP = Chip("made up", 100.0, 16, 1000.0, 50.0)


def test_roofline_is_the_slowest_of_three_and_their_sum():
  line = plan_report.roofline(MADE_UP, flops=2e12, memory_bytes=5e9, sent=1e9)
  assert (line.compute, line.memory, line.links) == pytest.approx((0.02, 0.005, 0.02))
  assert (line.low, line.high) == pytest.approx((0.02, 0.045)) and line.bound == "compute"
  looped = plan_report.roofline(MADE_UP, flops=1e12, memory_bytes=15e9, sent=0, loops=4)
  assert (looped.low, looped.high, looped.links, looped.bound) == pytest.approx((0.015, 0.07, 0, "memory"))


@pytest.mark.parametrize(
  "row, values",
  [
    (None, {}),
    (Chip("no bandwidth", 100.0), {}),
    (Chip("no links", 100.0, 16, 1000.0), {}),
    (MADE_UP, {"memory_bytes": None}),
    (MADE_UP, {"flops": None}),
  ],
)
def test_an_unknown_chip_bandwidth_or_count_has_no_roofline(row, values):
  assert plan_report.roofline(row, **{"flops": 1e12, "memory_bytes": 1e9, "sent": 1.0, **values}) is None


def test_links_do_not_matter_where_nothing_is_sent():
  assert plan_report.roofline(Chip("no links", 100.0, 16, 1000.0), flops=1e12, memory_bytes=1e9, sent=0.0).links == 0


def test_chips_have_their_makers_figures():
  assert chip("TPU v5 lite").memory == 16 and chip("TPU v5").memory_gb_s == 2765 and chip("TPU v4").link_gb_s == 300
  assert chip("NVIDIA A100-SXM4-40GB").memory == 40 and chip("NVIDIA H100 80GB HBM3").link_gb_s == 450
  assert chip("cpu") is None and chip("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
  assert len({row.kind for row in CHIPS}) == len(CHIPS)


# ---- advice, with made-up compilations


def made_up(name: str, gib: float, capacity: int | None, accumulate: int = 1) -> plan_report.CompiledStep:
  memory = program.ProgramMemory(
    arguments=plan_report.GIB,
    outputs=plan_report.GIB,
    aliased=plan_report.GIB,
    temporaries=round((gib - 1) * plan_report.GIB),
    code=0,
  )
  reduce = hlo.Collective(kind="all-reduce", bytes=1000, devices=8, times=1)
  return plan_report.CompiledStep(
    name=name,
    accumulate=accumulate,
    memory=memory,
    refusal="",
    needed=None,
    fits=capacity and memory.total <= capacity,
    lowering_s=1.0,
    compile_s=2.0,
    flops=1e12,
    counted_flops=1e12,
    memory_bytes=1e9,
    collectives=[reduce],
    roofline=plan_report.roofline(MADE_UP, flops=1e12, memory_bytes=1e9, sent=reduce.sent, loops=accumulate),
  )


def plan_with(monkeypatch, needs, *, config=None, capacity=16 * plan_report.GIB, **arguments):
  """Makes a plan from made-up compilations of `needs(config)` GiB each; returns (plan, printed lines)."""
  monkeypatch.setattr(plan, "_capacity", lambda device, sold: capacity)
  monkeypatch.setattr(
    plan, "_compile", lambda name, config, setup, say: made_up(name, needs(config), setup.capacity, config.accumulate)
  )
  lines = []
  return plan.make_plan(config or tiny(batch=64), say=lines.append, **arguments), lines


def test_nothing_else_is_compiled_if_it_fits(monkeypatch):
  planned, lines = plan_with(monkeypatch, lambda config: 15)
  assert [step.name for step in planned.steps] == ["as configured"] and planned.advice == "it fits as configured"
  assert len(lines) == 2 and "8 classes, as config.data.num_classes" in lines[0] and "fits" in lines[1]


@pytest.mark.parametrize("name, classes", [("digits", 10), ("synthetic", 1000), ("imagenet2012", 1000), ("cifar10", 10)])
def test_the_classes_are_those_of_the_dataset(name, classes, monkeypatch):
  planned, lines = plan_with(monkeypatch, lambda config: 15, config=tiny(batch=64, data=DataConfig(name=name, image_size=8)))
  assert planned.num_classes == classes and lines[0] == f"{classes} classes, as the dataset {name} has"


def test_the_table_of_classes_agrees_with_the_data_that_needs_no_download():
  for name in ("digits", "synthetic"):
    assert open_source(DataConfig(name=name), "train").num_classes == program.CLASSES[name]


def test_variants_are_tried_in_order_until_one_fits(monkeypatch):
  planned, _ = plan_with(monkeypatch, lambda config: 40 / config.accumulate)
  assert [step.name for step in planned.steps] == ["as configured", "remat", "shard", "accumulate=2", "accumulate=4"]
  assert planned.advice == "it does not fit as configured; it does with accumulate=4"


def test_advise_tries_all_and_leaves_out_what_is_set_or_cannot_be(monkeypatch):
  config = tiny(batch=32, shard=True)
  planned, _ = plan_with(monkeypatch, lambda config: 15, config=config, advise=True)
  assert [step.name for step in planned.steps] == ["as configured", "remat", "accumulate=2", "accumulate=4"]
  assert planned.advice == "it fits as configured"


def test_all_together_comes_last(monkeypatch):
  tried = []
  planned, _ = plan_with(monkeypatch, lambda config: tried.append(config) or 20)
  assert planned.steps[-1].name == "remat, shard, accumulate=8" and len(planned.steps) == 7
  assert (tried[-1].model.remat, tried[-1].shard, tried[-1].accumulate) == (True, True, 8)
  assert "it does not fit, nor with remat; shard; " in planned.advice and "lower config.batch" in planned.advice


def test_unknown_memory_stays_unknown(monkeypatch):
  planned, _ = plan_with(monkeypatch, lambda config: 20, capacity=None)
  assert [step.fits for step in planned.steps] == [None] and planned.advice.startswith("whether it fits is unknown")


def test_a_report_has_every_figure_and_a_picture(monkeypatch, tmp_path):
  planned, _ = plan_with(monkeypatch, lambda config: 40 / config.accumulate)
  planned = dataclasses.replace(planned, chip=MADE_UP, device_kind="made up")
  read = json.loads(json.dumps(planned.to_json(), allow_nan=False))
  assert set(read) == {"plan"} | {field.name for field in dataclasses.fields(plan_report.Plan)}
  assert read["steps"][0]["roofline"]["bound"] == "compute" and read["steps"][0]["collectives"]["all-reduce"]["count"] == 1
  assert planned.variants().row_count == len(planned.steps) and any("loop" in note for note in planned.assumptions())
  plan_report.picture(planned, str(tmp_path / "plan.png"))
  assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  "refusal, needed, available",
  [
    (
      "CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (19.26G) exceeds available HBM "
      "(15.75G).",
      19.26,
      15.75,
    ),
    ("Used 1.50T of 15.48G hbm. Exceeded hbm capacity by 9.02G.", 1536, 15.48),
    ("no figures", None, None),
  ],
)
def test_the_figures_of_a_refusal_are_read(refusal, needed, available):
  bytes_of = lambda gib: None if gib is None else round(gib * plan_report.GIB)
  assert plan._refused(refusal) == (bytes_of(needed), bytes_of(available))


# ---- mistakes


def run_program(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", ["launch/plan.py", *arguments])
  with pytest.raises(SystemExit) as stopped:
    cli.main(launch_plan.run, launch_plan.define, "")
  printed = capsys.readouterr()
  return stopped.value.code, printed.out, printed.err


DIGITS = "--config=configs/digits.py"


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "--config is missing"),
    ((DIGITS, "--config.batch=12"), "config.batch=12 is not divisible by the 8 devices"),
    ((DIGITS, "--json=no/such/dir/a.json"), "--json=no/such/dir/a.json: No such file"),
    ((DIGITS, "--out=no/such/dir/a.png"), "--out=no/such/dir/a.png: No such file"),
    (("--config=configs/synthetic.py:nfnet_f9",), "nfnet_f"),
    ((DIGITS, "--config.data.name=pets"), "config.data.name='pets' has is not known without reading it; give --classes=N"),
  ],
)
def test_program_answers_a_mistake_in_one_line(arguments, message, monkeypatch, capsys):
  status, out, err = run_program(monkeypatch, capsys, *arguments)
  assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1 and "{" not in out


@pytest.mark.parametrize(
  "installed, raised, message",
  [
    (False, None, "needs libtpu, the compiler for TPUs (no TPU needed): pip install 'jax[tpu]=="),
    (
      True,
      jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Invalid TPU external name: TPU v5\nmore"),
      "unknown topology 'v5e-16x16'",
    ),
    (True, jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such layout"), "v5e:16x16"),
    (
      True,
      RuntimeError("Mismatched PJRT plugin version"),
      f"jax {jax.__version__} cannot use the libtpu that is installed (Mism",
    ),
  ],
)
def test_program_answers_a_wrong_topology_in_one_line(installed, raised, message, monkeypatch, capsys):
  from jax.experimental import topologies

  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: (object() if installed else None) if name == "libtpu" else real(name)
  )
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  for name in plan._LIBTPU:
    monkeypatch.setenv(name, "")

  def refuse(**arguments):
    raise raised

  monkeypatch.setattr(topologies, "get_topology_desc", refuse)
  status, out, err = run_program(monkeypatch, capsys, DIGITS, "--topology=v5e-16x16")
  assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1 and "{" not in out


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
  "topology, devices, kind",
  [
    ("v5e:2x4", 8, "TPU v5 lite"),
    ("v5e:16x16", 256, "TPU v5 lite"),
    ("v4:2x2x2", 8, "TPU v4"),
    ("v5p:2x2x2", 8, "TPU v5"),
    ("v6e:4x4", 16, "TPU v6 lite"),
  ],
)
def test_a_slice_has_its_devices(topology, devices, kind):
  slice_devices = plan.tpu_devices(topology)
  assert (
    len(slice_devices) == devices and {device.device_kind for device in slice_devices} == {kind} and chip(kind).memory is not None
  )
