"""Gradients of q, k, beta and the decays of all chunks at once, once both recurrences are done: one warpgroup a chunk.

With S the state at the chunk's entry, dS the gradient of the state at its exit, U what the chunk's tokens wrote, and
dO, dV (= beta dZ) known, X = tril(dO U') D scale and Y = -tril(dV U', -1) D are the gradients of Q K' and of K K':
    dQ = scale row_in (dO S') + X K        dK = reads + writes
    reads  = Y K - row_in (dV S')          as queries of what was written before
    writes = Y' K + X' Q + row_out (U dS') as keys of what is read later
A decay before token t weighs on all that is read at or after t of what was written before, hence the gradient of the
running sum G is q dQ + k reads - k writes at each token, and at the chunk's end row_out (U dS') k and carry <S, dS>
besides. Both triangles of X and Y are multiplied out and rounded alike, so that what passes between two tokens cancels
where it should. beta has dV U / beta^2, since U is beta times what the inverse leaves of v.

Products go over K in halves of 64 channels, the state's halves one after the other: two thread blocks then fit on a
multiprocessor, and each hides the other's waits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.gates import (
    CARRIED,
    CARRY,
    LEAVING,
    ROW_IN,
    ROW_OUT,
    RUNNING_SUM,
    SEGMENT,
    TOTAL,
)
from jaxhybrid_kernels.gpu.launch import kernel
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.products import (
    accumulate,
    along_columns,
    along_rows,
    columns,
    equal_pairs,
    indices,
    load,
    multiply_all,
    rows,
    shared,
)


def gradients_kernel(plan: Plan) -> Callable[..., list[jax.Array]]:
    """(q, k, u, d_v, d_out, states, d_states, gates) -> d_q, d_k [B,T,N,K],
    sums [B,n,N,2 + V/64,64], and with the delta rule dV U by token [B,n,N,64].

    q, k, u, d_v, d_out [B,T,heads,width] in whole chunks and states, d_states [B,N,n,V,K], all bfloat16; gates
    as in gates.py. Without the delta rule u is v, and d_v is not read. d_q and d_k are bfloat16 and one per value head;
    the others float32. sums has G's gradient but for the chunk's end and row_out (U dS') k by token, and carry <S, dS>
    by row of V, 64 to a row.
    """
    n, K, V, delta, interpret = plan.n, plan.K, plan.V, plan.delta, plan.interpret
    halves = K // BLOCK

    def body(q, k, u, d_v, d_out, states, d_states, gates, d_q, d_k, sums, *refs):
        *updates, scratch = (refs[0], refs[1:]) if delta else (refs,)
        q_block, k_block, u_block, d_v_block, d_out_block, state, d_state, first, second, entered = scratch
        b, c, head = lax.axis_index("batch"), lax.axis_index("chunk"), lax.axis_index("head")
        tokens = pl.ds(c * CHUNK, CHUNK)

        def load_states(half):
            part = pl.ds(half * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(states.at[b, head, c, :, part], state, entered)
            plgpu.copy_gmem_to_smem(d_states.at[b, head, c, :, part], d_state, entered)

        plgpu.copy_gmem_to_smem(d_out.at[b, tokens, head], d_out_block, first)
        plgpu.copy_gmem_to_smem(u.at[b, tokens, head], u_block, first)
        if delta:
            plgpu.copy_gmem_to_smem(d_v.at[b, tokens, head], d_v_block, first)
        load_states(0)
        for half in range(halves):
            part = pl.ds(half * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(k.at[b, tokens, plan.key_head(head), part], k_block.at[half], second)
            plgpu.copy_gmem_to_smem(q.at[b, tokens, plan.query_head(head), part], q_block.at[half], second)

        own = gates.at[b, c, head]
        row, column = indices()
        difference = along_rows(rows(own.at[RUNNING_SUM]), CHUNK) - along_columns(columns(own.at[RUNNING_SUM]))
        same = equal_pairs(own.at[SEGMENT])
        # Below the diagonal the decay from column to row, above it from row to column.
        decay = jnp.exp(jnp.where(same, jnp.where(row >= column, difference, -difference), -jnp.inf))
        row_in, row_out = rows(own.at[ROW_IN]), rows(own.at[ROW_OUT])

        def below(x, diagonal):
            return jnp.where(row >= column if diagonal else row > column, x, 0.0).astype(jnp.bfloat16)

        def above(x, diagonal):
            return jnp.where(row <= column if diagonal else row < column, x, 0.0).astype(jnp.bfloat16)

        plgpu.barrier_wait(first)
        x, x_turned = multiply_all(
            (d_out_block, _turned(u_block)), (u_block, _turned(d_out_block)), interpret=interpret
        )
        weight = decay * plan.scale
        x, x_turned = below(x * weight, True), above(x_turned * weight, True)
        if delta:
            y, y_turned = multiply_all(
                (d_v_block, _turned(u_block)), (u_block, _turned(d_v_block)), interpret=interpret
            )
            updates[0][b, c, head] = jnp.sum(jnp.where(row == column, y, 0.0), axis=1)
            y, y_turned = below(-y * decay, False), above(-y_turned * decay, False)

        totals: list[jax.Array] = []
        leaving: list[jax.Array] = []
        dots_by_row: list[list[jax.Array]] = []
        for half in range(halves):
            part = pl.ds(half * BLOCK, BLOCK)
            keys, queries = k_block.at[half], q_block.at[half]
            plgpu.barrier_wait(entered)
            dots_by_row.append([_row_sums(_rows(state, i), load(_rows(d_state, i))) for i in range(V // BLOCK)])
            products = [(d_out_block, state), (u_block, d_state)] + ([(d_v_block, state)] if delta else [])
            read, written, *predicted = multiply_all(*products, interpret=interpret)
            if half + 1 < halves:
                load_states(half + 1)
            if half == 0:
                plgpu.barrier_wait(second)
            written = written * along_rows(row_out, BLOCK)
            leaving.append(_row_sums(keys, written))
            starts = [
                (read * along_rows(row_in * plan.scale, BLOCK), [(x, keys)]),
                (written, [(x_turned, queries)] + ([(y_turned, keys)] if delta else [])),
            ]
            if delta:
                starts.append((predicted[0] * along_rows(-row_in, BLOCK), [(y, keys)]))
            d_query, as_key, *as_query = accumulate(*starts, interpret=interpret)
            moved = _row_sums(queries, d_query)
            if delta:
                moved = moved + _row_sums(keys, as_query[0] - as_key)
                as_key = as_key + as_query[0]
            else:
                moved = moved - _row_sums(keys, as_key)
            totals.append(moved)
            queries[...] = d_query.astype(jnp.bfloat16)
            keys[...] = as_key.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(queries, d_q.at[b, tokens, head, part])
            plgpu.copy_smem_to_gmem(keys, d_k.at[b, tokens, head, part])
        sums[b, c, head, TOTAL] = _total(totals)
        sums[b, c, head, LEAVING] = _total(leaving)
        for i in range(V // BLOCK):
            sums[b, c, head, CARRIED + i] = _total([dots[i] for dots in dots_by_row]) * rows(own.at[CARRY])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    gradient = jax.ShapeDtypeStruct((plan.B, n * CHUNK, plan.N, K), jnp.bfloat16)
    return kernel(
        body,
        plan,
        [
            gradient,
            gradient,
            jax.ShapeDtypeStruct((plan.B, n, plan.N, CARRIED + V // BLOCK, CHUNK), jnp.float32),
            *[jax.ShapeDtypeStruct((plan.B, n, plan.N, CHUNK), jnp.float32)] * delta,
        ],
        scratch_types=[
            *[shared(halves, CHUNK, BLOCK)] * 2,
            *[shared(CHUNK, V)] * 3,
            *[shared(V, BLOCK)] * 2,
            plgpu.Barrier(num_arrivals=3 if delta else 2),
            plgpu.Barrier(num_arrivals=2 * halves),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(plan.B, n, plan.N),
        grid_names=("batch", "chunk", "head"),
    )


def _turned(block: Any) -> Any:
    return block.transpose((1, 0))


def _rows(block: Any, i: int) -> Any:
    return block.at[pl.ds(i * BLOCK, BLOCK)]


def _row_sums(block: Any, x: jax.Array) -> jax.Array:
    """Row sums of block * x: [64]; block in shared memory, x as a product's result."""
    return jnp.sum(load(block) * x, axis=1)


def _total(terms: list[jax.Array]) -> jax.Array:
    first, *rest = terms
    return sum(rest, first)
