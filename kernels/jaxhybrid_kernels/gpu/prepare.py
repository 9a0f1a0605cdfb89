"""What a chunk needs that does not depend on the state, all chunks at once, one warpgroup each.

    pair = scale tril(Q K') D        inverse = (I + tril(diag(beta) K K' D, -1))^-1
with D_ij = exp(G_i - G_j) inside a segment. The inverse starts from its diagonal blocks of 16 tokens and doubles twice:
if X inverts the blocks of one size, X - mask(X N) X inverts those of twice the size, mask keeping the new blocks below
the diagonal. Each step is exact up to rounding, powers of N never appear, and operands are split into two bfloat16
numbers each.
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.diagonal_inverse import invert_diagonal
from jaxhybrid_kernels.gpu.gates import BETA, RUNNING_SUM, SEGMENT
from jaxhybrid_kernels.gpu.plan import CHUNK, Plan
from jaxhybrid_kernels.gpu.products import (
    along_columns,
    along_rows,
    columns,
    multiply,
    multiply_split,
    rows,
    shared,
    split,
)

GATES_READ = 3  # the first three


def prepare_kernel(plan: Plan) -> Callable[..., jax.Array]:
    """(q, k, gates [B,N,n,6,64]) -> bfloat16 [B,N,n,1 or 2,64,64]: pair, and the inverse for the delta rule."""
    interpret = plan.interpret

    def body(q, k, gates, out, q_block, k_block, gate, result, high, low, strict_high, strict_low, loaded):
        c, head, b = lax.axis_index("chunk"), lax.axis_index("head"), lax.axis_index("batch")
        tokens = pl.ds(c * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(gates.at[b, head, c, pl.ds(0, GATES_READ)], gate, loaded)
        plgpu.copy_gmem_to_smem(k.at[b, tokens, plan.key_head(head)], k_block, loaded)
        plgpu.copy_gmem_to_smem(q.at[b, tokens, plan.query_head(head)], q_block, loaded)
        plgpu.barrier_wait(loaded)

        row = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0, layout=plgpu.Layout.WGMMA)
        column = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1, layout=plgpu.Layout.WGMMA)
        difference = along_rows(rows(gate.at[RUNNING_SUM]), CHUNK) - along_columns(columns(gate.at[RUNNING_SUM]))
        same = along_rows(rows(gate.at[SEGMENT]), CHUNK) == along_columns(columns(gate.at[SEGMENT]))
        decay = jnp.exp(jnp.where((row >= column) & same, difference, -jnp.inf))
        scores = multiply(q_block, k_block.transpose((1, 0)), interpret=interpret)
        result[...] = (scores * decay * plan.scale).astype(jnp.bfloat16)
        if plan.delta:
            gram = multiply(k_block, k_block.transpose((1, 0)), interpret=interpret) * decay
            strict = jnp.where(row > column, gram * along_rows(rows(gate.at[BETA]), CHUNK), 0.0)
            upper, lower = split(strict)
            strict_high[...] = upper
            strict_low[...] = lower
            solved = invert_diagonal(strict, interpret=interpret)
            for size in (16, 32):
                upper, lower = split(solved)
                high[...] = upper
                low[...] = lower
                plgpu.commit_smem()
                below = multiply_split(solved, strict_high, strict_low, interpret=interpret)
                below = jnp.where(_joins(row, column, size), below, 0.0)
                solved = solved - multiply_split(below, high, low, interpret=interpret)
            high[...] = solved.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(high, out.at[b, head, c, 1])
        else:
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, out.at[b, head, c, 0])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.B, plan.N, plan.n, plan.matrices, CHUNK, CHUNK), jnp.bfloat16),
        scratch_types=[
            shared(CHUNK, plan.K),
            shared(CHUNK, plan.K),
            plgpu.SMEM((GATES_READ, CHUNK), jnp.float32),
            *[shared(CHUNK, CHUNK)] * 5,
            plgpu.Barrier(num_arrivals=3),
        ],
        grid=(plan.B, plan.n, plan.N),  # the last axis varies fastest: heads lie side by side in memory
        grid_names=("batch", "chunk", "head"),
        # Inferring the layouts of so many elementwise steps takes minutes; they are all given here.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _joins(row: jax.Array, column: jax.Array, size: int) -> jax.Array:
    """True where two diagonal blocks of `size` tokens meet below the diagonal inside a block of twice the size."""
    apart = lax.bitwise_xor(row, column)
    return (row > column) & (apart >= size) & (apart < 2 * size)
