"""What a program moves and computes, operation by operation, against figures that are known without a compiler."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nfnets import models
from nfnets.measure import traffic

TEXT = """HloModule jit_f, entry_computation_layout={()->f32[]}

%fused (param_0: f32[8,16,16,4], param_1: f32[3,3,4,32]) -> f32[8,16,16,32] {
  %param_0 = f32[8,16,16,4]{3,2,1,0} parameter(0)
  %param_1 = f32[3,3,4,32]{3,2,1,0} parameter(1)
  ROOT %convolution.1 = f32[8,16,16,32]{3,2,1,0} convolution(%param_0, %param_1), dim_labels=b01f_01io->b01f
}

%body (state: (s32[], f32[64])) -> (s32[], f32[64]) {
  %state = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[64]{0} get-tuple-element(%state), index=1
  %double = f32[64]{0} add(%x, %x), metadata={op_name="jit(f)/fc/add"}
  ROOT %next = (s32[], f32[64]{0}) tuple(%i, %double)
}

%condition (state: (s32[], f32[64])) -> pred[] {
  %state.1 = (s32[], f32[64]{0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[8,16,16,4], b: f32[3,3,4,32], c: (s32[], f32[64])) -> f32[8,16,16,32] {
  %a = f32[8,16,16,4]{3,2,1,0} parameter(0)
  %b = f32[3,3,4,32]{3,2,1,0} parameter(1)
  %c = (s32[], f32[64]{0}) parameter(2)
  %loop = (s32[], f32[64]{0}) while(%c), condition=%condition, body=%body
  ROOT %fusion.7 = f32[8,16,16,32]{3,2,1,0} fusion(%a, %b), calls=%fused, metadata={op_name="transpose(jvp(blocks/3))/conv"}
}
"""


def test_a_fusion_is_charged_its_operands_its_result_and_the_products_inside():
  found = {operation.name: operation for operation in traffic.operations(TEXT)}
  fusion = found["fusion.7"]
  assert fusion.bytes == 4 * (8 * 16 * 16 * 4 + 3 * 3 * 4 * 32 + 8 * 16 * 16 * 32)
  assert fusion.flops == 2 * 8 * 16 * 16 * 32 * (3 * 3 * 4) and fusion.layer == "blocks/3 (backward)"
  assert "convolution.1" not in found and "a" not in found


def test_what_a_loop_does_counts_as_often_as_it_runs():
  double = next(operation for operation in traffic.operations(TEXT) if operation.name == "double")
  assert (double.times, double.bytes, double.layer) == (5, 5 * 4 * 192, "fc")


def test_of_a_stack_in_a_loop_the_layer_that_is_read_or_written_counts_alone():
  lines = """
%inner (param_0: f32[5,100], param_1: s32[]) -> f32[1,100] {
  %param_0 = f32[5,100]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,100}
}

%outer (param_2: f32[5,100], param_3: f32[5,100], param_4: s32[], param_5: f32[7]) -> (f32[5,100], f32[1,100]) {
  %param_2 = f32[5,100]{1,0} parameter(0)
  %param_3 = f32[5,100]{1,0} parameter(1)
  %param_4 = s32[] parameter(2)
  %param_5 = f32[7]{0} parameter(3)
  %layer = f32[1,100]{1,0} fusion(%param_3, %param_4), kind=kLoop, calls=%inner
  %none = s32[] constant(0)
  %stack = f32[5,100]{1,0} dynamic-update-slice(%param_2, %layer, %param_4, %none)
  ROOT %both = (f32[5,100]{1,0}, f32[1,100]{1,0}) tuple(%stack, %layer)
}

%copied (param_6: f32[5,100], param_7: f32[1,100], param_8: s32[]) -> f32[5,100] {
  %param_6 = f32[5,100]{1,0} parameter(0)
  %param_7 = f32[1,100]{1,0} parameter(1)
  %param_8 = s32[] parameter(2)
  %changed = f32[5,100]{1,0} dynamic-update-slice(%param_6, %param_7, %param_8, %param_8)
  ROOT %twice = f32[5,100]{1,0} add(%changed, %changed)
}

%cast (param_9: f32[5,100], param_10: f32[1,100], param_11: s32[]) -> f32[500] {
  %param_9 = f32[5,100]{1,0} parameter(0)
  %param_10 = f32[1,100]{1,0} parameter(1)
  %param_11 = s32[] parameter(2)
  %placed = f32[5,100]{1,0} dynamic-update-slice(%param_9, %param_10, %param_11, %param_11)
  ROOT %flat = f32[500]{0} bitcast(%placed)
}

ENTRY %main (a: f32[5,100], b: f32[5,100], i: s32[], c: f32[7]) -> f32[5,100] {
  %a = f32[5,100]{1,0} parameter(0)
  %b = f32[5,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = f32[7]{0} parameter(3)
  %both.1 = (f32[5,100]{1,0}, f32[1,100]{1,0}) fusion(%a, %b, %i, %c), kind=kLoop, calls=%outer
  %one = f32[1,100]{1,0} fusion(%b, %i), kind=kLoop, calls=%inner
  %whole = f32[5,100]{1,0} add(%a, %b)
  %copy.1 = f32[5,100]{1,0} fusion(%a, %one, %i), kind=kLoop, calls=%copied
  %cast.1 = f32[500]{0} fusion(%b, %one, %i), kind=kLoop, calls=%cast
  ROOT %in_place = f32[5,100]{1,0} dynamic-update-slice(%whole, %one, %i, %i)
}
"""
  index, layer, unused = 4, 400, 0
  assert {operation.name: operation.bytes for operation in traffic.operations(lines)} == {
    "both.1": layer + index + unused + 2 * layer,  # a layer is read, and two are written, one of them into a stack
    "one": layer + index + layer,
    "whole": 3 * 5 * layer,
    "copy.1": 5 * layer + layer + index + 5 * layer,  # what is added up is not changed in place
    "cast.1": layer + index + layer,
    "in_place": layer + 2 * index + layer,
  }


def test_what_lies_in_fast_memory_costs_nothing_and_a_copy_ahead_counts_once():
  lines = """
ENTRY %main (a: f32[1000], b: f32[8,100]) -> f32[1000] {
  %a = f32[1000]{0:T(1024)} parameter(0)
  %b = f32[8,100]{1,0:T(8,128)} parameter(1)
  %copy-start = (f32[1000]{0:T(1024)S(1)}, f32[1000]{0:T(1024)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[1000]{0:T(1024)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[8,100]{1,0:T(8,128)}), f32[2,100]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%b), slice={[0:2], [0:100]}
  %slice-done = f32[2,100]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  ROOT %double = f32[1000]{0:T(1024)} add(%copy-done, %copy-done), metadata={op_name="jit(f)/stem/add"}
}
"""
  assert {operation.name: operation.bytes for operation in traffic.operations(lines)} == {
    "copy-start": 4000,
    "slice-start": 800,
    "double": 4000,
  }


def test_the_products_of_a_real_network_are_those_of_its_description():
  network = models.create("nf_resnet_tiny", 10)
  graph, state = nnx.split(network)
  compiled = jax.jit(lambda state, images: nnx.merge(graph, state)(images)).lower(state, jnp.zeros((4, 32, 32, 3))).compile()
  found = traffic.operations(compiled.as_text())
  macs = models.describe("nf_resnet_tiny", 10, resolutions={"train": 32}).macs[32]
  assert sum(operation.flops for operation in found) == pytest.approx(2 * 4 * macs, rel=0.02)
  assert {"stem", "blocks/0", "blocks/5", "fc"} <= {operation.layer for operation in found}
