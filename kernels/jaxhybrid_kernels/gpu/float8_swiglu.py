"""SwiGLU of what two float8 products gave, rounded to float8 for the next one (Triton): a program for each token.

A token's scale follows from its largest number, so all of them are at hand before the first is written: they stay in
registers, and gate and up are read once.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxhybrid_kernels.gpu.launch import unmarked
from jaxhybrid_kernels.numerics import FLOAT8, LARGEST_FLOAT8, LOG2_E, SMALLEST_SCALED

BLOCK = 1024
WARPS = 8


def float8_swiglu_kernel(
    gate_NF: jax.Array,
    up_NF: jax.Array,
    row_scale_N: jax.Array,
    gate_scale_F: jax.Array,
    up_scale_F: jax.Array,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
    interpret: bool = False,
) -> list[jax.Array]:
    """`float8_swiglu` of sums [N,F] and float32 scales: (values [N,F], scale [N])."""
    N, F = gate_NF.shape

    def body(gate_ref: Any, up_ref: Any, row_ref: Any, gate_scale_ref: Any, up_scale_ref: Any, *outs: Any) -> None:
        values_ref, scale_ref = outs
        row, lane = pl.program_id(0), jnp.arange(block)
        own_scale, begins = unmarked(row_ref[row]), range(0, F, block)

        def columns(begin: int) -> Any:
            return pl.ds(begin, block) if begin + block <= F else begin + lane

        def read(ref: Any, begin: int, *row: Any) -> jax.Array:
            part = plt.load(ref.at[*row, columns(begin)], mask=begin + lane < F, other=0.0)
            return unmarked(part).astype(jnp.float32)

        sums = [(read(gate_ref, begin, row), read(up_ref, begin, row)) for begin in begins]
        # The row's scale is left out of the hidden numbers: it is in both of their factors, and in their own scale.
        exponent, hidden = -LOG2_E * own_scale, []
        for begin, (gate, up) in zip(begins, sums):
            gate, up = gate * read(gate_scale_ref, begin), up * read(up_scale_ref, begin)
            hidden.append(gate * up * _share(gate * exponent, interpret))
        largest = jnp.max(reduce(jnp.maximum, map(jnp.abs, hidden)))
        scale = jnp.maximum(own_scale * (own_scale * largest), SMALLEST_SCALED) / LARGEST_FLOAT8
        scale_ref[row] = scale
        inverse = own_scale * (own_scale / scale)
        for begin, part in zip(begins, hidden):
            plt.store(values_ref.at[row, columns(begin)], (part * inverse).astype(FLOAT8), mask=begin + lane < F)

    varying = jax.typeof(gate_NF).manual_axis_type
    return pl.pallas_call(
        body,
        grid=(N,),
        out_shape=[
            jax.ShapeDtypeStruct((N, F), FLOAT8, manual_axis_type=varying),
            jax.ShapeDtypeStruct((N,), jnp.float32, manual_axis_type=varying),
        ],
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="float8_swiglu",
    )(gate_NF, up_NF, row_scale_N, gate_scale_F, up_scale_F)


def _share(x: jax.Array, interpret: bool) -> jax.Array:
    """1 / (1 + 2^x) of float32, without the care for numbers below 2^-126 that takes as long as the rest."""
    if interpret:
        return 1 / (1 + jnp.exp2(x))
    (share,) = plt.elementwise_inline_asm(
        "{ .reg .f32 a; ex2.approx.ftz.f32 a, $1; add.f32 a, a, 0f3F800000; rcp.approx.ftz.f32 $0, a; }",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return share
