"""Plans: bytes that are known beforehand are found in compiled programs; arithmetic and advice on made-up figures."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from launch import cli, plan as launch_plan
from nfnets.config import Config, DataConfig, ModelConfig, OptimConfig
from nfnets.measure import hlo, plan, plan_report, program
from nfnets.measure.chips import CHIPS, Chip, chip
from nfnets.train.step import sharding

ROOT = pathlib.Path(__file__).parents[2]
# A program that compiles in seconds, and without LLVM's pains: memory and communication are settled before.
ONE_BLOCK = {"depth": (1,), "width": (512,), "stage_strides": (1,), "stem_kernel": 3, "stem_pool": False}
GAINS = 128 + 128 + 128 + 512 + 512  # of the stem, the block's three convolutions and its shortcut
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def tiny(**changes) -> Config:
  config = Config(
    model=ModelConfig(name="nf_resnet50", overrides=ONE_BLOCK), data=DataConfig(num_classes=8, image_size=8), batch=8, epochs=10
  )
  return dataclasses.replace(config, **changes)


# ---------------------------------------------------------------- the parser
HLO = """HloModule step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b), metadata={op_name="all-reduce(nothing)"}
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %whole = f32[64]{0:T(128)} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %part = f32[8]{0} dynamic-slice(%whole, %at), dynamic_slice_sizes={8}
}

%body (t: (s32[], f32[16])) -> (s32[], f32[16]) {
  %pair = (f32[16]{0:T(128)S(1)}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}
  ROOT %next = (s32[], f32[16]) tuple(%i, %z)
}

%condition (t: (s32[], f32[16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%gathering (q: bf16[4]) -> bf16[32] {
  ROOT %all = bf16[32]{0} all-gather(%q), replica_groups=mesh['data'=8] {'data'}, dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %reduce-start = f32[100]{0} all-reduce-start(%x), replica_groups={}, to_apply=%add
  %reduce-done = f32[100]{0} all-reduce-done(%reduce-start)
  %gather-start = (f32[3]{0}, f32[24]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %gather-done = f32[24]{0} all-gather-done(%gather-start)
  %async-start = ((bf16[4]{0}), bf16[32]{0}, u32[]) async-start(%x), calls=%gathering
  %async-done = bf16[32]{0} async-done(%async-start), calls=%gathering
  %permute-start = (s8[7]{0}, s8[7]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %permute-done = s8[7]{0} collective-permute-done(%permute-start)
  %scattered = f32[5]{0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
  %exchanged = (pred[9]{0}, pred[9]{0}) all-to-all(%x, %y), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %alone = f32[1000]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %fused = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %known = (s32[], f32[16]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %guessed = (s32[], f32[16]) while(%t), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%guessed), index=1
}
"""


def test_parser_counts_each_collective_as_often_as_it_runs():
  found = {(each.kind, each.bytes, each.devices, each.times) for each in hlo.parse(HLO, 8)}
  assert found == {
    ("all-reduce", 4 * 100, 8, 1),
    ("all-reduce", 4 * 16 + 2 * 6, 2, 3 + 5),
    ("all-gather", 4 * 24, 8, 1),
    ("all-gather", 2 * 32, 8, 1),
    ("collective-permute", 7, 8, 1),
    ("reduce-scatter", 4 * 5 * 4, 4, 1),
    ("all-to-all", 18, 2, 1),
    ("reduce-scatter", 4 * 64, 8, 1),
  }
  assert len(found) == len(hlo.parse(HLO, 8))


@pytest.mark.parametrize(
  "kind, sent",
  [
    ("all-reduce", 2 * 7 / 8 * 800 * 3),
    ("all-gather", 7 / 8 * 800 * 3),
    ("reduce-scatter", 7 / 8 * 800 * 3),
    ("all-to-all", 7 / 8 * 800 * 3),
    ("collective-permute", 800 * 3),
  ],
)
def test_what_a_ring_sends(kind, sent):
  assert hlo.Collective(kind=kind, bytes=800, devices=8, times=3).sent == sent


def test_parser_finds_the_known_bytes_of_a_real_program():
  mesh = sharding.make_mesh(jax.devices()[:8])

  def program(x, y):  # each device: x [2, 640] float32, y [8, 16] int16
    def body(carry, row):
      return carry + jax.lax.psum(row, "data"), None

    looped, _ = jax.lax.scan(body, jnp.zeros(640), x)
    return (
      looped,
      jax.lax.all_gather(x, "data"),
      jax.lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True),
      jax.lax.all_to_all(y, "data", 0, 0),
      jax.lax.ppermute(y, "data", [(i, (i + 1) % 8) for i in range(8)]),
    )

  rows = P("data")
  split = jax.shard_map(program, mesh=mesh, in_specs=(rows, rows), out_specs=(P(), P(), P("data"), rows, rows), check_vma=False)
  args = jax.ShapeDtypeStruct((16, 640), jnp.float32), jax.ShapeDtypeStruct((64, 16), jnp.int16)
  found = hlo.parse(jax.jit(split).lower(*args).compile().as_text(), 8)
  sums = {kind: sum(each.bytes * each.times for each in found if each.kind == kind) for kind in hlo.KINDS}
  assert sums == {
    "all-reduce": 2 * 640 * 4,
    "all-gather": 8 * 2 * 640 * 4,
    "reduce-scatter": 2 * 640 * 4,
    "all-to-all": 8 * 16 * 2,
    "collective-permute": 8 * 16 * 2,
  }
  assert all(each.devices == 8 for each in found)


# ---------------------------------------------------------------- the step
def test_memory_of_a_sharded_state_falls_as_devices_rise():
  """Of the compiled program, by its own memory analysis: what is split falls as 1/devices, the little that is not stays."""
  memory, copied = {}, 0
  for n in (1, 2, 4, 8):
    mesh = sharding.make_mesh(jax.devices()[:n])
    lowered = plan.lower(tiny(shard=True), mesh, 8, 8)
    memory[n] = program.memory(lowered.compile(FAST))
    state, _ = lowered.in_avals[0]
    whole = [x for x in jax.tree.leaves(state) if sharding.state_sharding(mesh, x.shape, True).spec == P()]
    copied = sum(x.size * x.dtype.itemsize for x in whole)
  assert copied < 0.1 * memory[1].aliased
  for n in (2, 4, 8):
    assert memory[n].aliased - copied == pytest.approx((memory[1].aliased - copied) / n, rel=0.01)
  assert memory[8].total < memory[4].total < memory[2].total < memory[1].total


def test_program_end_to_end_on_this_machine(tmp_path, monkeypatch, capsys):
  recipe, file = tmp_path / "one_block.py", tmp_path / "plan.json"
  recipe.write_text("from tests.measure import test_plan\n\n\ndef get_config():\n  return test_plan.tiny()\n")
  status, out, err = run_program(monkeypatch, capsys, f"--config={recipe}", f"--json={file}", f"--out={tmp_path / 'plan.png'}")
  assert status == 0, err
  read = json.loads(out.splitlines()[-1])
  assert read == json.loads(file.read_text()) and not (tmp_path / "plan.png").exists()
  (step,) = read["steps"]
  assert (read["devices"], read["device_kind"], read["topology"], read["batch"]) == (8, "cpu", None, 8)
  assert step["fits"] is None and step["roofline"] is None and read["chip"] is None and "unknown" in out
  memory = step["memory"]
  assert memory["aliased"] > 3 * 4 * read["parameters"]  # parameters, momentum, EMA
  assert memory["total"] == sum(memory[k] for k in ("arguments", "outputs", "temporaries", "code")) - memory["aliased"]
  # each gradient, float32, is summed over the devices once, but that of the gains, which are in the standardized kernels by then;
  # the loss and the counts beside them are a few bytes
  gradients = 4 * (read["parameters"] - GAINS)
  assert gradients < step["collectives"]["all-reduce"]["bytes"] <= gradients + 32
  assert 0.7 < step["flops"] / step["counted_flops"] < 2 and step["memory_bytes"] > memory["aliased"]
  assert "all-reduce 1" in out and "advice: whether it fits is unknown" in out


def test_counted_flops():
  config = tiny(batch=32)
  assert plan.counted_flops(config, 1000, 8) == 6 * 1000 * 4
  remat = dataclasses.replace(config, model=ModelConfig(name="nf_resnet50", remat=True))
  assert plan.counted_flops(remat, 1000, 8) == 8 * 1000 * 4
  assert plan.counted_flops(dataclasses.replace(config, optim=OptimConfig(sam_rho=0.05)), 1000, 8) == pytest.approx(
    1.2 * 6 * 1000 * 4
  )


# ---------------------------------------------------------------- the roofline, with made-up figures
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
def test_what_is_unknown_has_no_roofline(row, values):
  assert plan_report.roofline(row, **{"flops": 1e12, "memory_bytes": 1e9, "sent": 1.0, **values}) is None


def test_links_do_not_matter_where_nothing_is_sent():
  assert plan_report.roofline(Chip("no links", 100.0, 16, 1000.0), flops=1e12, memory_bytes=1e9, sent=0.0).links == 0


def test_known_chips():
  assert chip("TPU v5 lite").memory == 16 and chip("TPU v5").memory_gb_s == 2765 and chip("TPU v4").link_gb_s == 300
  assert chip("NVIDIA A100-SXM4-40GB").memory == 40 and chip("NVIDIA H100 80GB HBM3").link_gb_s == 450
  assert chip("cpu") is None and chip("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
  assert len({row.kind for row in CHIPS}) == len(CHIPS)


# ---------------------------------------------------------------- advice, with made-up compilations
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
  """A plan whose compilations are made up: `needs(config)` GiB each; (plan, lines said)."""
  monkeypatch.setattr(plan, "_capacity", lambda device, sold: capacity)
  monkeypatch.setattr(plan, "_compile", lambda name, config, *rest: made_up(name, needs(config), rest[-2], config.accumulate))
  said = []
  return plan.make_plan(config or tiny(batch=64), say=said.append, **arguments), said


def test_nothing_else_is_compiled_if_it_fits(monkeypatch):
  made, said = plan_with(monkeypatch, lambda config: 15)
  assert [step.name for step in made.steps] == ["as configured"] and made.advice == "it fits as configured"
  assert len(said) == 1 and "fits" in said[0]


def test_variants_are_tried_in_order_until_one_fits(monkeypatch):
  made, _ = plan_with(monkeypatch, lambda config: 40 / config.accumulate)
  assert [step.name for step in made.steps] == ["as configured", "remat", "shard", "accumulate=2", "accumulate=4"]
  assert made.advice == "it does not fit as configured; it does with accumulate=4"


def test_advise_tries_all_and_leaves_out_what_is_set_or_cannot_be(monkeypatch):
  config = tiny(batch=32, shard=True)
  made, _ = plan_with(monkeypatch, lambda config: 15, config=config, advise=True)
  assert [step.name for step in made.steps] == ["as configured", "remat", "accumulate=2", "accumulate=4"]
  assert made.advice == "it fits as configured"


def test_all_together_comes_last(monkeypatch):
  tried = []
  made, _ = plan_with(monkeypatch, lambda config: tried.append(config) or 20)
  assert made.steps[-1].name == "remat, shard, accumulate=8" and len(made.steps) == 7
  assert (tried[-1].model.remat, tried[-1].shard, tried[-1].accumulate) == (True, True, 8)
  assert "it does not fit, nor with remat; shard; " in made.advice and "lower config.batch" in made.advice


def test_unknown_memory_stays_unknown(monkeypatch):
  made, _ = plan_with(monkeypatch, lambda config: 20, capacity=None)
  assert [step.fits for step in made.steps] == [None] and made.advice.startswith("whether it fits is unknown")


def test_a_report_has_every_figure_and_a_picture(monkeypatch, tmp_path):
  made, _ = plan_with(monkeypatch, lambda config: 40 / config.accumulate)
  made = dataclasses.replace(made, chip=MADE_UP, device_kind="made up")
  read = json.loads(json.dumps(made.to_json(), allow_nan=False))
  assert set(read) == {"plan"} | {field.name for field in dataclasses.fields(plan_report.Plan)}
  assert read["steps"][0]["roofline"]["bound"] == "compute" and read["steps"][0]["collectives"]["all-reduce"]["count"] == 1
  assert made.variants().row_count == len(made.steps) and any("loop" in note for note in made.assumptions())
  plan_report.picture(made, str(tmp_path / "plan.png"))
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
    ("nothing said", None, None),
  ],
)
def test_what_a_refusal_says(refusal, needed, available):
  said = lambda gib: None if gib is None else round(gib * plan_report.GIB)
  assert plan._refused(refusal) == (said(needed), said(available))


# ---------------------------------------------------------------- mistakes
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
  ],
)
def test_program_answers_a_mistake_in_one_line(arguments, message, monkeypatch, capsys):
  status, out, err = run_program(monkeypatch, capsys, *arguments)
  assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1 and "{" not in out


@pytest.mark.parametrize(
  "found, raised, message",
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
def test_program_answers_a_wrong_topology_in_one_line(found, raised, message, monkeypatch, capsys):
  from jax.experimental import topologies

  real = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: (object() if found else None) if name == "libtpu" else real(name))
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
def test_devices_of_a_slice(topology, devices, kind):
  found = plan.tpu_devices(topology)
  assert len(found) == devices and {each.device_kind for each in found} == {kind} and chip(kind).memory is not None
