"""What a chunk needs that does not depend on the state: by one warpgroup a chunk, all chunks at once.

    pair = scale tril(Q K') D        inverse = (I + tril(diag(beta) K K' D, -1))^-1
with D_ij = exp(G_i - G_j) inside a segment. The inverse starts from its diagonal blocks of 16 tokens, exact to
rounding, and doubles twice: if X inverts the blocks of one size, X - mask(X N) X inverts those of twice the size, mask
keeping the new blocks below the diagonal. Powers of N never appear. The operands of these two steps are float16: with
eleven bits they add less than the rounding of the result to bfloat16 for beta up to 1, and about as much for beta up
to 2; beta k k' has to stay below 65,504, which keys of any use do by far.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.diagonal_inverse import invert_diagonal
from jaxhybrid_kernels.gpu.gates import BETA, RUNNING_SUM, SEGMENT
from jaxhybrid_kernels.gpu.launch import kernel
from jaxhybrid_kernels.gpu.plan import CHUNK, Plan
from jaxhybrid_kernels.gpu.products import (
    accumulate,
    along_columns,
    along_rows,
    columns,
    equal_pairs,
    indices,
    multiply,
    rows,
    shared,
)

GATES_READ = 3  # the first three


class Workspace(NamedTuple):
    """Shared memory for the right operands of the inverse's products, [64,64] float16."""

    strict: Any
    inverse: Any


def workspace() -> Workspace:
    return Workspace(*[shared(CHUNK, CHUNK, dtype=jnp.float16)] * 2)


def chunk_matrices(plan: Plan, q: Any, k: Any, gates: Any, pair: Any, work: Workspace) -> jax.Array | None:
    """Writes pair [64,64] and returns the inverse (None for the additive rule), bfloat16 in registers.

    All arguments lie in shared memory; what is written there is not committed.
    """
    interpret = plan.interpret
    row, column = indices()
    difference = along_rows(rows(gates.at[RUNNING_SUM]), CHUNK) - along_columns(columns(gates.at[RUNNING_SUM]))
    same = equal_pairs(gates.at[SEGMENT])
    decay = jnp.exp(jnp.where((row >= column) & same, difference, -jnp.inf))
    scores = multiply(q, k.transpose((1, 0)), interpret=interpret)
    pair[...] = (scores * decay * plan.scale).astype(jnp.bfloat16)
    if not plan.delta:
        return None
    gram = multiply(k, k.transpose((1, 0)), interpret=interpret) * decay
    strict = jnp.where(row > column, gram * along_rows(rows(gates.at[BETA]), CHUNK), 0.0)
    return invert(strict, row, column, work, interpret=interpret)


def invert(strict: jax.Array, row: jax.Array, column: jax.Array, work: Workspace, *, interpret: bool) -> jax.Array:
    """(I + strict)^-1 in bfloat16; strict [64,64] float32, a product's result; row and column its indices."""
    work.strict[...] = strict.astype(jnp.float16)
    inverse = invert_diagonal(strict, interpret=interpret)
    for size in (16, 32):
        rounded = inverse.astype(jnp.float16)
        work.inverse[...] = rounded
        plgpu.commit_smem()
        below = multiply(rounded, work.strict, interpret=interpret)
        below = jnp.where(_joins(row, column, size), -below, 0.0).astype(jnp.float16)
        (inverse,) = accumulate((inverse, [(below, work.inverse)]), interpret=interpret)
    return inverse.astype(jnp.bfloat16)


def prepare_kernel(plan: Plan) -> Callable[..., jax.Array]:
    """(q, k, gates [B,n,N,6,64]) -> bfloat16 [B,N,n,1 or 2,64,64]: pair, and the inverse for the delta rule."""

    def body(q, k, gates, out, q_block, k_block, gate, work, loaded, pair, inverse=None):
        b, c, head = lax.axis_index("batch"), lax.axis_index("chunk"), lax.axis_index("head")
        tokens = pl.ds(c * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(gates.at[b, c, head, pl.ds(0, GATES_READ)], gate, loaded)
        plgpu.copy_gmem_to_smem(k.at[b, tokens, plan.key_head(head)], k_block, loaded)
        plgpu.copy_gmem_to_smem(q.at[b, tokens, plan.query_head(head)], q_block, loaded)
        plgpu.barrier_wait(loaded)
        solved = chunk_matrices(plan, q_block, k_block, gate, pair, work)
        if inverse is not None:
            inverse[...] = solved
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(pair, out.at[b, head, c, 0])
        if inverse is not None:
            plgpu.copy_smem_to_gmem(inverse, out.at[b, head, c, 1])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    run = kernel(
        body,
        plan,
        [jax.ShapeDtypeStruct((plan.B, plan.N, plan.n, plan.matrices, CHUNK, CHUNK), jnp.bfloat16)],
        scratch_types=[
            shared(CHUNK, plan.K),
            shared(CHUNK, plan.K),
            plgpu.SMEM((GATES_READ, CHUNK), jnp.float32),
            workspace(),
            plgpu.Barrier(num_arrivals=3),
            *[shared(CHUNK, CHUNK)] * plan.matrices,
        ],
        grid=(plan.B, plan.n, plan.N),  # the last axis varies fastest: heads lie side by side in memory
        grid_names=("batch", "chunk", "head"),
    )
    return lambda *operands: run(*operands)[0]


def _joins(row: jax.Array, column: jax.Array, size: int) -> jax.Array:
    """True where two diagonal blocks of `size` tokens meet below the diagonal inside a block of twice the size."""
    apart = lax.bitwise_xor(row, column)
    return (row > column) & (apart >= size) & (apart < 2 * size)
