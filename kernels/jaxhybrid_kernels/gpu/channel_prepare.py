"""What a chunk needs that does not depend on the state, for one decay per key channel: one warpgroup a chunk.

    q_in = scale q exp(G)     k_in = k exp(G)     k_out = k exp(G_end - G)     carry = exp(G_end)
    pair_ij = scale sum_c q_ic k_jc exp(G_ic - G_jc)  for j <= i, and the inverse of I + tril(beta gram, -1) with gram
alike from two keys. log_decay is minus infinity where a segment begins, so that all these are zero across segments. See
channel_runs.py for the decays and the levels by which the matrices are filled, prepare.py for the inverse.

Shared memory and registers suffice for three thread blocks a multiprocessor, each of which hides the others' waits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.channel_runs import (
    READ,
    READERS,
    RUNS,
    WARPS,
    load_decay,
    write_diagonal,
    write_gated,
    write_level,
    write_level_matrices,
    write_totals,
)
from jaxhybrid_kernels.gpu.gates import BETA
from jaxhybrid_kernels.gpu.launch import kernel
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.prepare import Workspace, invert
from jaxhybrid_kernels.gpu.products import indices, load, multiply_sum, shared


def channel_prepare_kernel(plan: Plan) -> Callable[..., list[jax.Array]]:
    """(q, k, log_decay [B,T,N,K], gates [B,n,N,6,64]) -> q_in, k_in, k_out [B,T,N,K], carry [B,N,n,K] and the matrices
    [B,N,n,1 or 2,64,64]: pair, and the inverse for the delta rule. Without it there is no k_in.

    T in whole chunks; log_decay, gates (beta alone is read) and carry float32, the rest bfloat16.
    """
    n, K, N, delta, interpret = plan.n, plan.K, plan.N, plan.delta, plan.interpret
    halves = range(K // BLOCK)

    def body(q, k, log_decays, gates, q_in, *refs):
        *k_in, k_out, carry, matrices = refs[: 4 if delta else 3]
        q_blocks, k_blocks, union, totals, pair, strict, loaded = refs[4 if delta else 3 :]
        tile, (k_out_blocks, work) = union
        b, c, head = lax.axis_index("batch"), lax.axis_index("chunk"), lax.axis_index("head")
        tokens = pl.ds(c * CHUNK, CHUNK)
        parts = [pl.ds(half * BLOCK, BLOCK) for half in halves]
        for half in halves:
            plgpu.copy_gmem_to_smem(k.at[b, tokens, plan.key_head(head), parts[half]], k_blocks.at[half], loaded)
            plgpu.copy_gmem_to_smem(q.at[b, tokens, plan.query_head(head), parts[half]], q_blocks.at[half], loaded)
        decay = load_decay(log_decays.at[b, tokens, head], interpret=interpret)
        write_totals(decay, totals, interpret=interpret)
        nothing = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), plgpu.Layout.WGMMA)
        pair[...] = nothing.astype(jnp.bfloat16)
        if delta:
            strict[...] = nothing.astype(jnp.float16)
        plgpu.commit_smem()
        plgpu.barrier_wait(loaded)

        def products(left: Any, right: Any) -> jax.Array:
            terms = [(left.at[half], right.at[half].transpose((1, 0))) for half in halves]
            return multiply_sum(*terms, interpret=interpret)

        for size in RUNS:
            write_level(size, decay, q_blocks, k_blocks, totals, tile, delta=delta, interpret=interpret)
            plgpu.commit_smem()
            meeting = products(tile.at[:, pl.ds(0, READERS)], tile.at[:, pl.ds(READERS, READ)])
            beta = gates.at[b, c, head, BETA]
            write_level_matrices(size, meeting, plan.scale, beta, pair, strict if delta else None, interpret=interpret)
        write_diagonal(products(q_blocks, k_blocks), plan.scale, pair, interpret=interpret)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(pair, matrices.at[b, head, c, 0])
        gated = (totals, q_blocks, k_blocks, k_out_blocks, carry.at[b, head, c])
        write_gated(decay, plan.scale, *gated, delta=delta, interpret=interpret)
        plgpu.commit_smem()
        written = [(q_blocks, q_in), *([(k_blocks, k_in[0])] if delta else []), (k_out_blocks, k_out)]
        for blocks, result in written:
            for half in halves:
                plgpu.copy_smem_to_gmem(blocks.at[half], result.at[b, tokens, head, parts[half]])
        if delta:
            row, column = indices()
            solved = invert(load(strict), row, column, Workspace(strict, work), interpret=interpret)
            plgpu.wait_smem_to_gmem(len(written) * len(halves), wait_read_only=True)  # pair's place is free
            pair[...] = solved
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(pair, matrices.at[b, head, c, 1])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    blocks = shared(K // BLOCK, CHUNK, BLOCK)
    return kernel(
        body,
        plan,
        [
            *[array(plan.B, n * CHUNK, N, K)] * (3 if delta else 2),
            array(plan.B, N, n, K, dtype=jnp.float32),
            array(plan.B, N, n, plan.matrices, CHUNK, CHUNK),
        ],
        scratch_types=[
            *[blocks] * 2,
            plgpu.RefUnion(
                shared(K // BLOCK, READERS + READ, BLOCK),
                [blocks, shared(CHUNK, CHUNK, dtype=jnp.float16)],
            ),
            plgpu.SMEM((WARPS, K), jnp.float32),
            shared(CHUNK, CHUNK),
            shared(CHUNK, CHUNK, dtype=jnp.float16),
            plgpu.Barrier(num_arrivals=2 * (K // BLOCK)),
        ],
        grid=(plan.B, n, N),
        grid_names=("batch", "chunk", "head"),
    )
