"""Gradients of q, k, beta and one decay per key channel, once both recurrences are done: one warpgroup for 64 channels
of a chunk.

X = scale tril(dO U') and Y = -tril(dV U', -1), as in gradients.py but without decays, are the gradients of the pairs
that channel_prepare.py forms level by level. At a level, with f = exp of the sum to the border, and q f and k f:
    queries' gradient  X (k f)         keys' gradient  X' (q f) + Y (k f) + Y' (k f)
each times f. Where a token is read it is in a second run, where it is written in a first one, so that one product with
Y + Y' does for both. The states add scale exp(G) (dO S') to the queries' gradient, and -exp(G) (dV S') as a reader
and exp(G_end - G) (U dS') as a writer to the keys'.
The gradient of G is, by channel, token times gradient where it reads and minus that where it writes. It is summed up
from the rounded q f and k f themselves, so that what passes between two tokens cancels where it should. log_decay has
the sum of G's gradients from its token on, and of what writes to the exit state before it, and carry <S, dS>. Before a
token is in all of them, minus from it on: so one product with a triangle of ones is for all that counts from a token
on, and one with nothing but ones for the rest.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.channel_runs import RUNS, WARPS, keep_decay, load_decay, meeting, write_factors, write_totals
from jaxhybrid_kernels.gpu.launch import kernel, unmarked
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.products import (
    along_columns,
    along_rows,
    columns,
    indices,
    load,
    load_rounded,
    multiply_sum,
    shared,
)

UPPER_HALF = -0x10000  # of a float32: sign, exponent and the first seven bits, a bfloat16


def channel_gradients_kernel(plan: Plan) -> Callable[..., list[jax.Array]]:
    """(q, k, u, d_v, d_out, states, d_states, log_decay [B,T,N,K], carry [B,N,n,K]) -> d_q, d_k, d_log_decay
    [B,T,N,K], d_v U [B,n,N,64].

    As in gradients.py; log_decay is minus infinity where a segment begins. The last two results are float32.
    """
    n, K, V, N, delta, interpret = plan.n, plan.K, plan.V, plan.N, plan.delta, plan.interpret
    halves, wide = K // BLOCK, range(V // BLOCK)
    given = 3 if delta else 2  # with a value's width: d_out, u, d_v
    # Values of one block leave fewer tiles than are needed once they are done with.
    extra = max(0, 7 + given - (given + 2) * len(wide))
    tiles_needed = (given + 2) * len(wide) + extra

    def body(q, k, u, d_v, d_out, states, d_states, log_decays, carry, triangle, *refs):
        d_q, d_k, d_decays, updates, tiles, q_block, k_block, factor_block, totals, loaded, triangle_loaded = refs
        b, c, place = lax.axis_index("batch"), lax.axis_index("chunk"), lax.axis_index("part")
        head, half = lax.div(place, jnp.int32(halves)), lax.rem(place, jnp.int32(halves))
        tokens, part = pl.ds(c * CHUNK, CHUNK), pl.ds(half * BLOCK, BLOCK)
        tile = [tiles.at[pl.ds(i * BLOCK, BLOCK)] for i in range(tiles_needed)]
        state, d_state, d_outs, us, d_vs = (tile[i * len(wide) : (i + 1) * len(wide)] for i in range(5))
        # In the order in which they become free: d_state, state, then the rest.
        free = [*d_state, *tile[tiles_needed - extra :], *state, *d_outs, *us, *(d_vs if delta else [])]

        for i, source in enumerate((states, d_states)):
            plgpu.copy_gmem_to_smem(source.at[b, head, c, :, part], tiles.at[pl.ds(i * V, V)], loaded)
        of_values = [(d_out, d_outs), (u, us), *([(d_v, d_vs)] if delta else [])]
        for i in wide:
            values = pl.ds(i * BLOCK, BLOCK)
            for source, blocks in of_values:
                plgpu.copy_gmem_to_smem(source.at[b, tokens, head, values], blocks[i], loaded)
        plgpu.copy_gmem_to_smem(k.at[b, tokens, plan.key_head(head), part], k_block, loaded)
        plgpu.copy_gmem_to_smem(q.at[b, tokens, plan.query_head(head), part], q_block, loaded)
        decay = load_decay(log_decays.at[b, tokens, head, part], interpret=interpret)
        write_totals(decay, totals, interpret=interpret)
        plgpu.commit_smem()

        def factor(**what):
            write_factors(decay, totals, factor_block, **what, interpret=interpret)
            return load_rounded(factor_block)

        def product(left, right):
            return multiply_sum(*zip(left, right, strict=True), interpret=interpret)

        def turned(blocks):
            return [block.transpose((1, 0)) for block in blocks]

        plgpu.barrier_wait(loaded)
        carried = sum((load(state[i]) * load(d_state[i]) for i in wide[1:]), load(state[0]) * load(d_state[0]))
        carried = carried * along_columns(columns(carry.at[b, head, c, part]))
        d_key = product(us, d_state) * factor(leaving=True).astype(jnp.float32)
        whole_high, whole_low, *free = free
        written = load(k_block) * d_key
        split(carried + written, whole_high, whole_low)
        entry = factor().astype(jnp.float32)
        d_query = product(d_outs, state) * entry * plan.scale
        moved = load(q_block) * d_query - written
        if delta:
            predicted = product(d_vs, state) * entry
            moved = moved - load(k_block) * predicted
            d_key = d_key - predicted

        row, column = indices()
        x_block, x_turned_block, *free = free
        x = product(d_outs, turned(us)) * plan.scale
        diagonal = along_rows(jnp.sum(jnp.where(row == column, x, 0.0), axis=1), BLOCK)
        d_query, d_key = d_query + diagonal * load(k_block), d_key + diagonal * load(q_block)
        x_block[...] = x.astype(jnp.bfloat16)
        x = product(us, turned(d_outs)) * plan.scale
        x_turned_block[...] = x.astype(jnp.bfloat16)
        y_blocks = []
        if delta:
            y = product(d_vs, turned(us))
            updates[b, c, head] = jnp.sum(jnp.where(row == column, y, 0.0), axis=1)
            y = jnp.where(row > column, -y, -product(us, turned(d_vs))).astype(jnp.bfloat16)
            y_blocks, free = free[:1], free[1:]
            y_blocks[0][...] = y
        queries, keys, *free = free
        kept, onward = keep_decay(decay, (free[0], free[1]), interpret=interpret), free[2]
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(triangle, onward, triangle_loaded)

        def level(index, sums):
            d_query, d_key, moved = sums
            for i, size in enumerate(RUNS):

                @pl.when(index == i)
                def _(size=size):
                    write_factors(kept, totals, factor_block, size=size, interpret=interpret)

            rounded = load_rounded(factor_block)
            queries[...] = load_rounded(q_block) * rounded
            keys[...] = load_rounded(k_block) * rounded
            plgpu.commit_smem()
            length = lax.shift_right_logical(jnp.int32(RUNS[0]), index)
            reads = (row & length) != 0

            def of_level(block, reading=None):
                return meeting(length, load_rounded(block), reading=reading, interpret=interpret)

            change = multiply_sum((of_level(x_block, True), keys), interpret=interpret)
            d_query = d_query + rounded.astype(jnp.float32) * change
            moved = moved + load(queries) * change
            terms = [(of_level(x_turned_block, False), queries), *[(of_level(block), keys) for block in y_blocks]]
            change = multiply_sum(*terms, interpret=interpret)
            d_key = d_key + rounded.astype(jnp.float32) * change
            return d_query, d_key, moved + load(keys) * jnp.where(reads, change, -change)

        d_query, d_key, moved = lax.fori_loop(0, len(RUNS), level, (d_query, d_key, unmarked(moved)))
        q_block[...] = d_query.astype(jnp.bfloat16)
        k_block[...] = d_key.astype(jnp.bfloat16)
        split(moved, queries, keys)
        # Not in registers: there ptxas before CUDA 13.3 moves constants behind the product that reads them.
        ones = x_block
        ones[...] = jnp.where(column >= 0, 1.0, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_block, d_q.at[b, tokens, head, part])
        plgpu.copy_smem_to_gmem(k_block, d_k.at[b, tokens, head, part])
        plgpu.barrier_wait(triangle_loaded)
        terms = [(onward, queries), (onward, keys), (ones, whole_high), (ones, whole_low)]
        d_decays[b, tokens, head, part] = multiply_sum(*terms, interpret=interpret)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens = (plan.B, n * CHUNK, N, K)
    run = kernel(
        body,
        plan,
        [
            array(*tokens, dtype=jnp.bfloat16),
            array(*tokens, dtype=jnp.bfloat16),
            array(*tokens),
            array(plan.B, n, N, CHUNK),
        ],
        scratch_types=[
            shared(tiles_needed * BLOCK, BLOCK),
            *[shared(CHUNK, BLOCK)] * 3,
            plgpu.SMEM((WARPS, BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=given * len(wide) + 4),
            plgpu.Barrier(num_arrivals=1),
        ],
        grid=(plan.B, n, N * halves),
        grid_names=("batch", "chunk", "part"),
    )
    return lambda *operands: run(*operands, jnp.triu(jnp.ones((64, 64), jnp.bfloat16)))


def split(x: jax.Array, high: Any, low: Any) -> None:
    """Writes two bfloat16 parts of x [64,64] with 16 bits together: its upper half as it is, and the rest rounded."""
    upper = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & UPPER_HALF, jnp.float32)
    high[...] = upper.astype(jnp.bfloat16)
    low[...] = (x - upper).astype(jnp.bfloat16)
