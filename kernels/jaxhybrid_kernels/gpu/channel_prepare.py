"""What a chunk needs that does not depend on the state, for one decay per key channel: one warpgroup a chunk.

    q_in = scale q exp(G)     k_in = k exp(G)     k_out = k exp(G_end - G)     carry = exp(G_end)
    pair_ij = scale sum_c q_ic k_jc exp(G_ic - G_jc)  for j <= i, and the inverse of I + tril(beta gram, -1) with gram
alike from two keys; all inside a segment. See channel_factors.py for the exponentials, prepare.py for the inverse.
Levels of smaller runs overwrite the blocks around the diagonal that those of larger ones filled with what does not
belong there.
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.channel_factors import (
    AFTER,
    LEVELS,
    THROUGH,
    factors,
    indices,
    load,
    log_decay,
    selection,
    selections,
    split,
)
from jaxhybrid_kernels.gpu.gates import BETA, CARRY, ROW_IN, ROW_OUT, SEGMENT
from jaxhybrid_kernels.gpu.launch import kernel
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.prepare import invert, workspace
from jaxhybrid_kernels.gpu.products import along_columns, along_rows, columns, multiply_sum, rows, shared


def channel_prepare_kernel(plan: Plan) -> Callable[..., list[jax.Array]]:
    """(q, k, log_decay [B,T,N,K], gates [B,N,n,6,64]) -> q_in, k_in, k_out [B,T,N,K], carry [B,N,n,K] and the matrices
    [B,N,n,1 or 2,64,64]: pair, and the inverse for the delta rule. Without it k_in is not written.

    T in whole chunks; log_decay and carry float32, the rest bfloat16; gates as if there were no decay.
    """
    n, K, N, delta, interpret = plan.n, plan.K, plan.N, plan.delta, plan.interpret
    halves = range(K // BLOCK)

    def body(q, k, decays, gates, constants, q_in, k_in, k_out, carry, matrices, *scratch):
        q_blocks, k_blocks, high, low, gated, work, loaded = scratch
        b, c, head = lax.axis_index("batch"), lax.axis_index("chunk"), lax.axis_index("head")
        tokens = pl.ds(c * CHUNK, CHUNK)
        parts = [pl.ds(half * BLOCK, BLOCK) for half in halves]
        for half in halves:
            plgpu.copy_gmem_to_smem(k.at[b, tokens, plan.key_head(head), parts[half]], k_blocks.at[half], loaded)
            plgpu.copy_gmem_to_smem(q.at[b, tokens, plan.query_head(head), parts[half]], q_blocks.at[half], loaded)
        for half in halves:
            split(log_decay(decays.at[b, tokens, head, parts[half]]), high.at[half], low.at[half])
        plgpu.commit_smem()
        plgpu.barrier_wait(loaded)

        row, column = indices()
        own = gates.at[b, head, c]

        def level(index, sums):
            summed = selection(constants, index)
            queries = []
            for half in halves:
                factor = factors(summed, (high.at[half], low.at[half]), interpret=interpret)
                queries.append((load(q_blocks.at[half]) * factor).astype(jnp.bfloat16))
                gated.at[half][...] = (load(k_blocks.at[half]) * factor).astype(jnp.bfloat16)
            plgpu.commit_smem()
            keys = [gated.at[half] for half in halves]
            turned = [key.transpose((1, 0)) for key in keys]
            inside = (row ^ column) < lax.shift_right_logical(jnp.int32(CHUNK), index)
            lefts = [queries, keys] if delta else [queries]
            return [
                jnp.where(inside, multiply_sum(*zip(left, turned, strict=True), interpret=interpret), sum)
                for left, sum in zip(lefts, sums, strict=True)
            ]

        zero = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), plgpu.Layout.WGMMA)
        pair, *gram = lax.fori_loop(0, LEVELS, level, [zero] * plan.matrices)
        same = along_rows(rows(own.at[SEGMENT]), CHUNK) == along_columns(columns(own.at[SEGMENT]))
        ungated = [load(q_blocks.at[half]) * load(k_blocks.at[half]) for half in halves]
        diagonal = along_rows(jnp.sum(sum(ungated[1:], ungated[0]), axis=1), CHUNK)
        pair = jnp.where(row == column, diagonal, pair)
        pair = jnp.where((row >= column) & same, pair * plan.scale, 0.0).astype(jnp.bfloat16)

        row_in, row_out = rows(own.at[ROW_IN]), rows(own.at[ROW_OUT])
        gated.at[0][...] = (row >= 0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        for half in halves:
            decay = high.at[half], low.at[half]
            turned = [part.transpose((1, 0)) for part in decay]
            total = lax.exp2(multiply_sum(*((part, gated.at[0]) for part in turned), interpret=interpret))
            # All columns are alike.
            carry[b, head, c, parts[half]] = jnp.max(total, axis=1) * rows(own.at[CARRY])
            keys = load(k_blocks.at[half])
            leaving = factors(selection(constants, AFTER), decay, interpret=interpret) * along_rows(row_out, BLOCK)
            entry = factors(selection(constants, THROUGH), decay, interpret=interpret) * along_rows(row_in, BLOCK)
            high.at[half][...] = (keys * leaving).astype(jnp.bfloat16)
            if delta:
                k_blocks.at[half][...] = (keys * entry).astype(jnp.bfloat16)
            q_blocks.at[half][...] = (load(q_blocks.at[half]) * entry * plan.scale).astype(jnp.bfloat16)
        gated.at[0][...] = pair
        plgpu.commit_smem()
        for half in halves:
            plgpu.copy_smem_to_gmem(q_blocks.at[half], q_in.at[b, tokens, head, parts[half]])
            if delta:
                plgpu.copy_smem_to_gmem(k_blocks.at[half], k_in.at[b, tokens, head, parts[half]])
            plgpu.copy_smem_to_gmem(high.at[half], k_out.at[b, tokens, head, parts[half]])
        plgpu.copy_smem_to_gmem(gated.at[0], matrices.at[b, head, c, 0])
        if delta:
            strict = jnp.where((row > column) & same, gram[0] * along_rows(rows(own.at[BETA]), CHUNK), 0.0)
            low.at[0][...] = invert(strict, row, column, work, interpret=interpret)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(low.at[0], matrices.at[b, head, c, 1])
        plgpu.wait_smem_to_gmem(0)

    def array(*shape: int, dtype: type = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    run = kernel(
        body,
        plan,
        [
            *[array(plan.B, n * CHUNK, N, K)] * 3,
            array(plan.B, N, n, K, dtype=jnp.float32),
            array(plan.B, N, n, plan.matrices, CHUNK, CHUNK),
        ],
        scratch_types=[
            *[shared(K // BLOCK, CHUNK, BLOCK)] * 5,
            workspace(),
            plgpu.Barrier(num_arrivals=2 * (K // BLOCK)),
        ],
        grid=(plan.B, n, N),
        grid_names=("batch", "chunk", "head"),
    )
    return lambda *operands: run(*operands, selections())
