"""What `benchmarks/compiled.py` reads in a compiled program's text, against numbers that were worked out by hand."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "compiled.py"
SPEC = importlib.util.spec_from_file_location("compiled", PATH)
compiled = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compiled)

# As XLA writes programs for GPUs, cut to what is read.
TEXT = """
%take (stack: f32[28,64,32], at: s32[]) -> bf16[64,32] {
  %stack = f32[28,64,32]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,64,32]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,64,32}
  %flat = f32[64,32]{1,0} bitcast(%row)
  ROOT %cast = bf16[64,32]{1,0} convert(%flat)
}

%put (into: bf16[28,8,32], row: bf16[8,32], place: s32[]) -> bf16[28,8,32] {
  %into = bf16[28,8,32]{2,1,0} parameter(0)
  %row.1 = bf16[8,32]{1,0} parameter(1)
  %place = s32[] parameter(2)
  %one = bf16[1,8,32]{2,1,0} bitcast(%row.1)
  %none = s32[] constant(0)
  ROOT %update = bf16[28,8,32]{2,1,0} dynamic-update-slice(%into, %one, %place, %none, %none)
}

ENTRY %main (w: f32[28,64,32], i: s32[], x: bf16[8,64], out: bf16[28,8,32]) -> bf16[28,8,32] {
  %w = f32[28,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[8,64]{1,0} parameter(2)
  %out = bf16[28,8,32]{2,1,0} parameter(3)
  %fusion.1 = bf16[64,32]{1,0} fusion(%w, %i), kind=kLoop, calls=%take, metadata={op_name="jit(step)/transpose(jvp())/while/body/jvp(gather)/convert_element_type"}
  %gemm = (bf16[8,32]{1,0}, s8[64]{0}) custom-call(%x, %fusion.1), custom_call_target="__cublas$gemm", metadata={op_name="jit(step)/transpose(jvp())/while/body/transpose(jvp(mlp))/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %product = bf16[8,32]{1,0} get-tuple-element(%gemm), index=0
  ROOT %fusion.2 = bf16[28,8,32]{2,1,0} fusion(%out, %product, %i), kind=kLoop, calls=%put, metadata={op_name="jit(step)/mlp/norm/mul"}
}
"""  # noqa: E501


def test_bytes_and_operations():
    program = compiled.Program(TEXT)
    assert program.bytes_of("fusion.1") == 64 * 32 * (4 + 2) + 4
    assert program.bytes_of("fusion.2") == 8 * 32 * (2 + 2) + 4
    assert program.bytes_of("gemm") == 2 * (8 * 64 + 64 * 32 + 8 * 32) + 64
    assert [program.operations_of(name) for name in ("gemm", "fusion.1")] == [2 * 8 * 64 * 32, 0]


@pytest.mark.parametrize(
    ("name", "turn", "scope"),
    [("fusion.1", "again", "no scope"), ("gemm", "backward", "mlp"), ("fusion.2", "forward", "norm")],
)
def test_where_an_instruction_was_traced(name, turn, scope):
    one, _ = compiled.Program(TEXT).instructions[name]
    assert (one.turn, one.scope(("mlp", "norm"))) == (turn, scope)


def test_a_program_of_this_machine():
    product = jax.jit(lambda x, w: jnp.tanh(x @ w)).lower(jnp.ones((8, 64)), jnp.ones((64, 32))).compile()
    program = compiled.Program(product.as_text())
    entry = [one for inside in program.computations.values() for one in inside.values() if one.operation == "dot"]
    assert sum(program.operations_of(one.name) for one in entry) == 2 * 8 * 64 * 32
