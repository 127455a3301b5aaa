"""The collectives of hand-written and of really compiled HLO are counted with their bytes, groups and repetitions."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from nfnets.measure import hlo
from nfnets.train.step import sharding

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
  collectives = hlo.parse(HLO, 8)
  assert {(collective.kind, collective.bytes, collective.devices, collective.times) for collective in collectives} == {
    ("all-reduce", 4 * 100, 8, 1),
    ("all-reduce", 4 * 16 + 2 * 6, 2, 3 + 5),
    ("all-gather", 4 * 24, 8, 1),
    ("all-gather", 2 * 32, 8, 1),
    ("collective-permute", 7, 8, 1),
    ("reduce-scatter", 4 * 5 * 4, 4, 1),
    ("all-to-all", 18, 2, 1),
    ("reduce-scatter", 4 * 64, 8, 1),
  }
  assert len(collectives) == 8


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
def test_a_ring_sends_an_all_reduce_twice_and_everything_else_once(kind, sent):
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
  shapes = jax.ShapeDtypeStruct((16, 640), jnp.float32), jax.ShapeDtypeStruct((64, 16), jnp.int16)
  collectives = hlo.parse(jax.jit(split).lower(*shapes).compile().as_text(), 8)
  sums = dict.fromkeys(hlo.KINDS, 0)
  for collective in collectives:
    sums[collective.kind] += collective.bytes * collective.times
  assert sums == {
    "all-reduce": 2 * 640 * 4,
    "all-gather": 8 * 2 * 640 * 4,
    "reduce-scatter": 2 * 640 * 4,
    "all-to-all": 8 * 16 * 2,
    "collective-permute": 8 * 16 * 2,
  }
  assert {collective.devices for collective in collectives} == {8}
