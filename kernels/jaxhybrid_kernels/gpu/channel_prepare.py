"""What a chunk needs that does not depend on the state, for one decay per key channel: one warpgroup a chunk.

    q_in = scale q exp(G)     k_in = k exp(G)     k_out = k exp(G_end - G)     carry = exp(G_end)
    pair_ij = scale sum_c q_ic k_jc exp(G_ic - G_jc)  for j <= i, and the inverse of I + tril(beta gram, -1) with gram
alike from two keys; all inside a segment. See channel_factors.py for the exponentials, prepare.py for the inverse.
Levels of smaller runs overwrite the blocks around the diagonal that those of larger ones filled with what does not
belong there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.channel_factors import (
    AFTER,
    BELOW,
    DIAGONAL,
    LEVELS,
    THROUGH,
    factors,
    load_rounded,
    log_decay,
    masks,
    same_segment,
    selection,
    windows,
)
from jaxhybrid_kernels.gpu.gates import BETA, CARRY, ROW_IN, ROW_OUT, SEGMENT
from jaxhybrid_kernels.gpu.launch import kernel
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.prepare import invert, workspace
from jaxhybrid_kernels.gpu.products import along_rows, equal_pairs, indices, load, multiply, multiply_sums, rows, shared


def channel_prepare_kernel(plan: Plan) -> Callable[..., list[jax.Array]]:
    """(q, k, log_decay [B,T,N,K], gates [B,n,N,6,64]) -> q_in, k_in, k_out [B,T,N,K], carry [B,N,n,K] and the matrices
    [B,N,n,1 or 2,64,64]: pair, and the inverse for the delta rule. Without it there is no k_in.

    T in whole chunks; log_decay and carry float32, the rest bfloat16; gates as if there were no decay.
    """
    n, K, N, delta, interpret = plan.n, plan.K, plan.N, plan.delta, plan.interpret
    halves = range(K // BLOCK)

    def body(q, k, log_decays, gates, window, mask, q_in, *refs):
        *k_in, k_out, carry, matrices = refs[: 4 if delta else 3]
        q_blocks, k_blocks, k_out_blocks, decay, work, loaded, pair_block, *inverse = refs[4 if delta else 3 :]
        b, c, head = lax.axis_index("batch"), lax.axis_index("chunk"), lax.axis_index("head")
        tokens = pl.ds(c * CHUNK, CHUNK)
        parts = [pl.ds(half * BLOCK, BLOCK) for half in halves]
        for half in halves:
            plgpu.copy_gmem_to_smem(k.at[b, tokens, plan.key_head(head), parts[half]], k_blocks.at[half], loaded)
            plgpu.copy_gmem_to_smem(q.at[b, tokens, plan.query_head(head), parts[half]], q_blocks.at[half], loaded)
        for half in halves:
            decay.at[half][...] = log_decay(log_decays.at[b, tokens, head, parts[half]])
        plgpu.commit_smem()
        plgpu.barrier_wait(loaded)

        row, column = indices()
        own = gates.at[b, c, head]

        gated, decays = k_out_blocks, [decay.at[half] for half in halves]

        def level(index, sums):
            until = selection(window, index)
            queries = []
            for half, factor in enumerate(factors(*((until, decay) for decay in decays), interpret=interpret)):
                factor = factor.astype(jnp.bfloat16)
                queries.append(load_rounded(q_blocks.at[half]) * factor)
                gated.at[half][...] = load_rounded(k_blocks.at[half]) * factor
            plgpu.commit_smem()
            keys = [gated.at[half] for half in halves]
            turned = [key.transpose((1, 0)) for key in keys]
            inside = (row ^ column) < lax.shift_right_logical(jnp.int32(CHUNK), index)
            lefts = [queries, keys] if delta else [queries]
            new = multiply_sums(*(list(zip(left, turned, strict=True)) for left in lefts), interpret=interpret)
            return [jnp.where(inside, x, before) for x, before in zip(new, sums, strict=True)]

        zero = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), plgpu.Layout.WGMMA)
        pair, *gram = lax.fori_loop(0, LEVELS, level, [zero] * plan.matrices)
        ungated = [load(q_blocks.at[half]) * load(k_blocks.at[half]) for half in halves]
        diagonal = along_rows(jnp.sum(sum(ungated[1:], ungated[0]), axis=1) * plan.scale, CHUNK).astype(jnp.bfloat16)
        below = selection(mask, BELOW) * same_segment(own.at[SEGMENT])
        pair = (pair * plan.scale).astype(jnp.bfloat16) * below + diagonal * selection(mask, DIAGONAL)

        row_in, row_out = rows(own.at[ROW_IN]), rows(own.at[ROW_OUT])
        work.strict[...] = (row >= 0).astype(jnp.float16)
        plgpu.commit_smem()
        for half in halves:
            total = multiply(decays[half].transpose((1, 0)), work.strict, interpret=interpret)  # all columns alike
            carry[b, head, c, parts[half]] = lax.exp2(jnp.max(total, axis=1)) * rows(own.at[CARRY])
            keys = load(k_blocks.at[half])
            sums = [(selection(window, i), decays[half]) for i in (AFTER, THROUGH)]
            leaving, entry = factors(*sums, interpret=interpret)
            leaving, entry = leaving * along_rows(row_out, BLOCK), entry * along_rows(row_in, BLOCK)
            k_out_blocks.at[half][...] = (keys * leaving).astype(jnp.bfloat16)
            if delta:
                k_blocks.at[half][...] = (keys * entry).astype(jnp.bfloat16)
            q_blocks.at[half][...] = (load(q_blocks.at[half]) * entry * plan.scale).astype(jnp.bfloat16)
        pair_block[...] = pair
        plgpu.commit_smem()
        for half in halves:
            plgpu.copy_smem_to_gmem(q_blocks.at[half], q_in.at[b, tokens, head, parts[half]])
            if delta:
                plgpu.copy_smem_to_gmem(k_blocks.at[half], k_in[0].at[b, tokens, head, parts[half]])
            plgpu.copy_smem_to_gmem(k_out_blocks.at[half], k_out.at[b, tokens, head, parts[half]])
        plgpu.copy_smem_to_gmem(pair_block, matrices.at[b, head, c, 0])
        if delta:
            same = equal_pairs(own.at[SEGMENT])
            strict = jnp.where((row > column) & same, gram[0] * along_rows(rows(own.at[BETA]), CHUNK), 0.0)
            inverse[0][...] = invert(strict, row, column, work, interpret=interpret)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(inverse[0], matrices.at[b, head, c, 1])
        plgpu.wait_smem_to_gmem(0)

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    run = kernel(
        body,
        plan,
        [
            *[array(plan.B, n * CHUNK, N, K)] * (3 if delta else 2),
            array(plan.B, N, n, K, dtype=jnp.float32),
            array(plan.B, N, n, plan.matrices, CHUNK, CHUNK),
        ],
        scratch_types=[
            *[shared(K // BLOCK, CHUNK, BLOCK)] * 3,
            shared(K // BLOCK, CHUNK, BLOCK, dtype=jnp.float16),
            workspace(),
            plgpu.Barrier(num_arrivals=2 * (K // BLOCK)),
            *[shared(CHUNK, CHUNK)] * plan.matrices,
        ],
        grid=(plan.B, n, N),
        grid_names=("batch", "chunk", "head"),
    )
    return lambda *operands: run(*operands, windows(), masks())
