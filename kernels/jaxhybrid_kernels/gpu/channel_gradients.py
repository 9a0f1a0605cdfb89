"""Gradients of q, k, beta and one decay per key channel, once both recurrences are done: one warpgroup for 64 channels of
a chunk.

X = scale tril(dO U') and Y = -tril(dV U', -1), as in gradients.py but without decays, are the gradients of the pairs that
channel_prepare.py forms level by level. At a level, with f = exp of the sum to the border, queries q f and keys k f:
    queries' gradient  X (k f)         keys' gradient  X' (q f) + Y (k f) + Y' (k f)
each times f. Where a token is read it is in a second run, where it is written in a first one, so that Y + Y' does
for both. The states add scale exp(G) (dO S') to the queries' gradient, -exp(G) (dV S') as a reader and exp(G_end - G) (U dS')
as a writer to the keys'.
The gradient of G is, by channel, token times gradient where it reads and minus that where it writes. It is summed up from
the rounded q f and k f themselves, so that what passes between two tokens cancels where it should. log_decay has
the sum of G's gradients from its token on, and of what writes to the exit state before it, and carry <S, dS>.
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.channel_factors import RUNS, factors, indices, load, log_decay, ones_where, split, to_border
from jaxhybrid_kernels.gpu.gates import ROW_IN, ROW_OUT, SEGMENT
from jaxhybrid_kernels.gpu.launch import kernel
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.products import along_columns, along_rows, columns, multiply_sum, rows, shared


def channel_gradients_kernel(plan: Plan) -> Callable[..., list[jax.Array]]:
    """(q, k, u, d_v, d_out, states, d_states, log_decay [B,T,N,K], gates, carry [B,N,n,K]) -> d_q, d_k, d_log_decay
    [B,T,N,K], d_v U [B,N,n,64].

    As in gradients.py; gates as if there were no decay. The last two results are float32.
    """
    n, K, V, N, delta, interpret = plan.n, plan.K, plan.V, plan.N, plan.delta, plan.interpret
    halves, wide = K // BLOCK, range(V // BLOCK)
    given = 3 if delta else 2  # blocks with a value's width: d_out, u, d_v
    freed = (given + 2) * len(wide)
    tiles_needed = freed + max(0, given + 4 - freed)

    def body(q, k, u, d_v, d_out, states, d_states, decays, gates, carry, d_q, d_k, d_decays, updates, *scratch):
        tiles, q_block, k_block, high, low, first, second, entered = scratch
        b, c, place = lax.axis_index("batch"), lax.axis_index("chunk"), lax.axis_index("part")
        head, half = lax.div(place, jnp.int32(halves)), lax.rem(place, jnp.int32(halves))
        tokens, part = pl.ds(c * CHUNK, CHUNK), pl.ds(half * BLOCK, BLOCK)
        tile = iter(range(tiles_needed))
        d_outs, us, state, d_state, *d_vs = ([tiles.at[next(tile)] for _ in wide] for _ in range(given + 2))
        d_vs = d_vs[0] if delta else []
        of_values = [(d_out, d_outs), (u, us)] + ([(d_v, d_vs)] if delta else [])
        for source, blocks in of_values:
            for i in wide:
                plgpu.copy_gmem_to_smem(source.at[b, tokens, head, pl.ds(i * BLOCK, BLOCK)], blocks[i], first)
        for source, blocks in ((states, state), (d_states, d_state)):
            for i in wide:
                plgpu.copy_gmem_to_smem(source.at[b, head, c, pl.ds(i * BLOCK, BLOCK), part], blocks[i], entered)
        plgpu.copy_gmem_to_smem(k.at[b, tokens, plan.key_head(head), part], k_block, second)
        plgpu.copy_gmem_to_smem(q.at[b, tokens, plan.query_head(head), part], q_block, second)
        split(log_decay(decays.at[b, tokens, head, part]), high, low)
        plgpu.commit_smem()
        decay = high, low

        own = gates.at[b, head, c]
        row, column = indices()
        same = along_rows(rows(own.at[SEGMENT]), CHUNK) == along_columns(columns(own.at[SEGMENT]))

        def product(left, right, turned):
            right = [block.transpose((1, 0)) for block in right] if turned else right
            return multiply_sum(*zip(left, right, strict=True), interpret=interpret)

        plgpu.barrier_wait(first)
        x = product(d_outs, us, True) * plan.scale
        diagonal = jnp.sum(jnp.where(row == column, x, 0.0), axis=1)
        x = jnp.where((row > column) & same, x, 0.0).astype(jnp.bfloat16)
        x_turned = product(us, d_outs, True) * plan.scale
        x_turned = jnp.where((row < column) & same, x_turned, 0.0).astype(jnp.bfloat16)
        if delta:
            y = product(d_vs, us, True)
            updates[b, head, c] = jnp.sum(jnp.where(row == column, y, 0.0), axis=1)
            y = jnp.where(row > column, y, product(us, d_vs, True))
            y = jnp.where((row != column) & same, -y, 0.0).astype(jnp.bfloat16)

        plgpu.barrier_wait(entered)
        moved = load(state[0]) * load(d_state[0])
        for i in wide[1:]:
            moved = moved + load(state[i]) * load(d_state[i])
        moved = moved * along_columns(columns(carry.at[b, head, c, part]))
        plgpu.barrier_wait(second)
        leaving = factors(ones_where(column > row), decay, interpret=interpret)
        d_key = product(us, d_state, False) * leaving * along_rows(rows(own.at[ROW_OUT]), BLOCK)
        before = moved + load(k_block) * d_key
        entry = factors(ones_where(column <= row), decay, interpret=interpret)
        entry = entry * along_rows(rows(own.at[ROW_IN]), BLOCK)
        d_query = product(d_outs, state, False) * entry * plan.scale
        moved = moved + load(q_block) * d_query
        if delta:
            predicted = product(d_vs, state, False) * entry
            moved = moved - load(k_block) * predicted
            d_key = d_key - predicted

        # From here on the operands' tiles are free.
        queries, keys, before_high, before_low, *weights = (tiles.at[i] for i in range(given + 4))
        split(before, before_high, before_low)
        for block, weight in zip(weights, (x, x_turned, *([y] if delta else [])), strict=True):
            block[...] = weight
        for size in RUNS:
            factor = factors(to_border(row, column, size), decay, interpret=interpret)
            queries[...] = (load(q_block) * factor).astype(jnp.bfloat16)
            keys[...] = (load(k_block) * factor).astype(jnp.bfloat16)
            plgpu.commit_smem()
            apart = row ^ column
            here = (apart >= size) & (apart < 2 * size)
            x, x_turned, *y = (jnp.where(here, load(block), 0.0).astype(jnp.bfloat16) for block in weights)
            change = multiply_sum((x, keys), interpret=interpret)
            d_query = d_query + factor * change
            moved = moved + load(queries) * change
            change = multiply_sum((x_turned, queries), *[(weight, keys) for weight in y], interpret=interpret)
            d_key = d_key + factor * change
            reads = (row & size) != 0
            moved = moved + load(keys) * jnp.where(reads, change, -change)
        diagonal = along_rows(diagonal, BLOCK)
        d_query, d_key = d_query + diagonal * load(k_block), d_key + diagonal * load(q_block)
        q_block[...] = d_query.astype(jnp.bfloat16)
        k_block[...] = d_key.astype(jnp.bfloat16)
        split(moved, queries, keys)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_block, d_q.at[b, tokens, head, part])
        plgpu.copy_smem_to_gmem(k_block, d_k.at[b, tokens, head, part])
        after, earlier = ones_where(column >= row), ones_where(column < row)
        terms = [(after, queries), (after, keys), (earlier, before_high), (earlier, before_low)]
        d_decays[b, tokens, head, part] = multiply_sum(*terms, interpret=interpret)
        plgpu.wait_smem_to_gmem(0)

    def array(*shape: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens = (plan.B, n * CHUNK, N, K)
    return kernel(
        body,
        plan,
        [
            array(*tokens, dtype=jnp.bfloat16),
            array(*tokens, dtype=jnp.bfloat16),
            array(*tokens),
            array(plan.B, N, n, CHUNK),
        ],
        scratch_types=[
            shared(tiles_needed, CHUNK, BLOCK),
            *[shared(CHUNK, BLOCK)] * 4,
            plgpu.Barrier(num_arrivals=given * len(wide)),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2 * len(wide)),
        ],
        grid=(plan.B, n, N * halves),
        grid_names=("batch", "chunk", "part"),
    )
