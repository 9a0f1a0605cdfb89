"""Inverses of the 16 x 16 blocks on the diagonal of I + N, N [64,64] strictly lower: float32 forward substitution.

A product's result gives every warp 16 whole rows, so that each warp holds the block of its rows and solves it alone:
row j of the inverse is final once the rows before it are taken off, and goes to the rows below through shuffles.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, math, nvvm, vector
from jax.experimental.mosaic import gpu as mgpu

from jaxhybrid_kernels.gpu.plan import CHUNK

BLOCK = 16
FULL_WARP = 0xFFFFFFFF
WITHIN_FOUR_LANES, WITHIN_WARP = 0x1C1F, 0x1F  # segment masks of shuffles


def invert_diagonal(strict: jax.Array, *, interpret: bool) -> jax.Array:
    """N [64,64] float32, as a product's result -> the blocks' inverses, zero outside of the blocks."""
    if interpret:
        return _interpreted(strict)
    layout = plgpu.Layout.WGMMA
    shape = plgpu.ShapeDtypeStruct((CHUNK, CHUNK), jnp.float32, layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=shape)(_substitute)(strict)


def _substitute(_: Any, strict: Any) -> Any:
    """A lane holds rows lane // 4 (half 0) and that plus 8 (half 1) of its warp's block, and in each tile of eight
    columns the two from 2 (lane % 4) on."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

    def integer(value: int) -> ir.Value:
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def real(value: float) -> ir.Value:
        return arith.constant(f32, ir.FloatAttr.get(f32, value))

    def element(pair: ir.Value, e: int) -> ir.Value:
        return vector.extract(pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([e]))

    def shuffled(x: ir.Value, source: ir.Value, segment: int) -> ir.Value:
        return nvvm.shfl_sync(integer(FULL_WARP), x, source, integer(segment), nvvm.ShflKind.idx)

    thread = mgpu.utils.thread_idx()
    lane = arith.remui(thread, integer(32))
    quad, in_quad = arith.divui(lane, integer(4)), arith.remui(lane, integer(4))
    warp = arith.remui(mgpu.utils.warp_idx(), integer(4))
    own = [arith.cmpi(arith.CmpIPredicate.eq, warp, integer(w)) for w in range(4)]

    registers = strict.registers  # [1, tile of 8 columns, 1, 1, half, 1, ...] pairs of columns

    def of_block(tile: int, half: int, e: int) -> ir.Value:
        value = element(registers[0, tile, 0, 0, half, 0, 0, 0, 0], e)
        for w in range(1, 4):
            there = element(registers[0, 2 * w + tile, 0, 0, half, 0, 0, 0, 0], e)
            value = arith.select(own[w], there, value)
        return value

    n = {(t, h, e): of_block(t, h, e) for t in (0, 1) for h in (0, 1) for e in (0, 1)}
    x = {}
    for t, h, e in n:
        at = arith.cmpi(arith.CmpIPredicate.eq, quad, arith.addi(arith.muli(in_quad, integer(2)), integer(e)))
        x[t, h, e] = arith.select(at, real(1.0), real(0.0)) if t == h else real(0.0)

    for j in range(BLOCK - 1):
        tile, where = divmod(j, 8)
        holder = arith.addi(in_quad, integer(4 * where))
        pivot = {(t, e): shuffled(x[t, tile, e], holder, WITHIN_WARP) for t in range(tile + 1) for e in (0, 1)}
        for h in range(tile, 2):
            factor = arith.negf(shuffled(n[tile, h, where % 2], integer(where // 2), WITHIN_FOUR_LANES))
            for t, e in pivot:
                x[t, h, e] = math.fma(factor, pivot[t, e], x[t, h, e])

    results = np.empty_like(registers)
    pair_type = ir.VectorType.get((2,), f32)
    for tile in range(8):
        for half in (0, 1):
            pair = [arith.select(own[tile // 2], x[tile % 2, half, e], real(0.0)) for e in (0, 1)]
            results[0, tile, 0, 0, half, 0, 0, 0, 0] = vector.from_elements(pair_type, pair)
    return mgpu.FragmentedArray(_registers=results, _layout=strict.layout, _is_signed=None)


def _interpreted(strict: jax.Array) -> jax.Array:
    """The same substitution, all blocks at once, for the interpreter, which runs no code of single lanes."""
    blocks = strict.reshape(4, BLOCK, 4, BLOCK)
    blocks = jnp.stack([blocks[i, :, i] for i in range(4)])
    x = jnp.broadcast_to(jnp.eye(BLOCK, dtype=strict.dtype), blocks.shape)
    for j in range(BLOCK - 1):
        x = x - blocks[:, :, j, None] * x[:, None, j]
    rows = [jnp.pad(x[i], ((0, 0), (BLOCK * i, CHUNK - BLOCK * (i + 1)))) for i in range(4)]
    return jnp.concatenate(rows)
