"""The recurrence over chunks, forward and backward: one thread block per batch row, value head and part of the width V.

Each consumer warpgroup holds 64 rows of the transposed state S' [V,K] in registers from the first chunk to the last and
needs nothing of the others, so all products of a chunk have their left operand in registers and none of them waits for
shared memory to be written. With the gates of gates.py as columns, one number per token:
    forward:   U' = beta (v' - row_in (S' k')) inverse'           O' = scale row_in (S' q') + U' pair'
               S' <- carry S' + (row_out U') k
    backward:  dU' = row_out (dS' k') + dO' pair                  dV' = beta (dU' inverse)
               dS' <- carry dS' + (scale row_in dO') q - (row_in dV') k
One more warpgroup brings the operands of the next chunks to shared memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.gates import BETA, CARRY, GATES, ROW_IN, ROW_OUT
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.products import (
    accumulate,
    along_columns,
    along_rows,
    columns,
    multiply,
    multiply_both,
    rows,
    shared,
)

FIRST_GATE = BETA  # the gates from here on are read
SHARED_BYTES = 227 * 1024
LOADER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # per thread; three warpgroups share 65,536


class Chunk(NamedTuple):
    """Shared memory of one chunk; x is v forwards and the gradient of the outputs backwards."""

    q: Any  # [64,K]
    k: Any
    x: Any  # [64,64]: this warpgroup's columns
    pair: Any  # [64,64]
    inverse: Any  # [64,64]; None for the additive rule
    gates: Any  # [4,64]

    def gate(self, name: int) -> jax.Array:
        return columns(self.gates.at[name - FIRST_GATE])

    def carry(self, width: int) -> jax.Array:
        return along_rows(rows(self.gates.at[CARRY - FIRST_GATE]), width)


def recurrence_kernel(plan: Plan, reverse: bool, keep: bool) -> Callable[..., list[jax.Array]]:
    """(q, k, x [B,T,N,V], matrices, gates, start [B,N,V,K]) -> y [B,T,N,V], last [B,N,V,K] and if keep states [B,N,n,V,K].

    Forwards x = v, y = out, and the states kept are those at the chunks' entries; with the delta rule the updates U
    [B,T,N,V] are kept too. In reverse x is the gradient of out, y that of v, and the states are the gradients at the
    chunks' exits. T in whole chunks.
    """
    n, K, V, blocks = plan.n, plan.K, plan.V, plan.blocks
    width = blocks * BLOCK
    keep_updates = keep and plan.delta and not reverse
    stages = _stages(plan, keep, keep_updates)
    advance = _backward if reverse else _forward

    def body(
        q, k, x, matrices, gates, start, y, last, *kept,
        q_ring, k_ring, x_ring, pair_ring, gates_ring, y_block, loaded, consumed,
        inverse_ring=None, state_block=None, update_block=None,
    ):  # fmt: skip
        b, head, part = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("part")
        group = lax.axis_index("group")

        def position(step):
            return n - 1 - step if reverse else step

        def slot_of(step):
            return lax.rem(step, jnp.array(stages, step.dtype))

        def load(step, slot):
            c = position(step)
            tokens, barrier = pl.ds(c * CHUNK, CHUNK), loaded.at[slot]
            plgpu.copy_gmem_to_smem(k.at[b, tokens, plan.key_head(head)], k_ring.at[slot], barrier)
            plgpu.copy_gmem_to_smem(gates.at[b, head, c, pl.ds(FIRST_GATE, GATES - FIRST_GATE)], gates_ring.at[slot], barrier)
            for i in range(blocks):
                columns_of = pl.ds(part * width + i * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(x.at[b, tokens, head, columns_of], x_ring.at[slot, i], barrier)
            plgpu.copy_gmem_to_smem(q.at[b, tokens, plan.query_head(head)], q_ring.at[slot], barrier)
            plgpu.copy_gmem_to_smem(matrices.at[b, head, c, 0], pair_ring.at[slot], barrier)
            if plan.delta:
                plgpu.copy_gmem_to_smem(matrices.at[b, head, c, 1], inverse_ring.at[slot], barrier)

        @pl.when(group == blocks)
        def produce():
            if blocks > 1:
                plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            for step in range(stages):
                load(step, step)

            @pl.loop(stages, n)
            def _(step):
                slot = slot_of(step)
                plgpu.barrier_wait(consumed.at[slot])
                load(step, slot)

        @pl.when(group < blocks)
        def consume():
            if blocks > 1:
                plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            own = pl.ds(part * width + group * BLOCK, BLOCK)

            def chunk_step(step, state):
                c, slot = position(step), slot_of(step)
                entry = state.astype(jnp.bfloat16)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if keep:
                    state_block.at[group][...] = entry
                plgpu.barrier_wait(loaded.at[slot])
                operands = Chunk(
                    q_ring.at[slot],
                    k_ring.at[slot],
                    x_ring.at[slot, group],
                    pair_ring.at[slot],
                    inverse_ring.at[slot] if plan.delta else None,
                    gates_ring.at[slot],
                )
                state, result, update = advance(plan, operands, state, entry)
                plgpu.barrier_arrive(consumed.at[slot])
                y_block.at[group].transpose((1, 0))[...] = result.astype(jnp.bfloat16)
                if keep_updates:
                    update_block.at[group].transpose((1, 0))[...] = update
                plgpu.commit_smem()
                tokens = pl.ds(c * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(y_block.at[group], y.at[b, tokens, head, own])
                if keep:
                    plgpu.copy_smem_to_gmem(state_block.at[group], kept[0].at[b, head, c, own])
                if keep_updates:
                    plgpu.copy_smem_to_gmem(update_block.at[group], kept[1].at[b, tokens, head, own])
                return state

            first = plgpu.load(start.at[b, head, own], layout=plgpu.Layout.WGMMA, optimized=False)
            last[b, head, own] = lax.fori_loop(0, n, chunk_step, first)
            plgpu.wait_smem_to_gmem(0)

    state = jax.ShapeDtypeStruct((plan.B, plan.N, V, K), jnp.float32)
    results = [jax.ShapeDtypeStruct((plan.B, n * CHUNK, plan.N, V), jnp.bfloat16), state]
    scratch = {
        "q_ring": shared(stages, CHUNK, K),
        "k_ring": shared(stages, CHUNK, K),
        "x_ring": shared(stages, blocks, CHUNK, BLOCK),
        "pair_ring": shared(stages, CHUNK, CHUNK),
        "gates_ring": plgpu.SMEM((stages, GATES - FIRST_GATE, CHUNK), jnp.float32),
        "y_block": shared(blocks, CHUNK, BLOCK),
        "loaded": plgpu.Barrier(num_arrivals=3 + plan.matrices + blocks, num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=blocks, num_barriers=stages),
    }
    if plan.delta:
        scratch["inverse_ring"] = shared(stages, CHUNK, CHUNK)
    if keep:
        results.append(jax.ShapeDtypeStruct((plan.B, plan.N, n, V, K), jnp.bfloat16))
        scratch["state_block"] = shared(blocks, BLOCK, K)
    if keep_updates:
        results.append(jax.ShapeDtypeStruct((plan.B, n * CHUNK, plan.N, V), jnp.bfloat16))
        scratch["update_block"] = shared(blocks, CHUNK, BLOCK)
    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=scratch,
        grid=(V // width, plan.N, plan.B),
        grid_names=("part", "head", "batch"),
        num_threads=blocks + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
    )


def _forward(plan: Plan, chunk: Chunk, state: jax.Array, entry: jax.Array) -> tuple[jax.Array, ...]:
    """(S' after the chunk, O' [64,64], U' [64,64] bfloat16)."""
    keys, queries = chunk.k.transpose((1, 0)), chunk.q.transpose((1, 0))
    values = plgpu.load(chunk.x.transpose((1, 0)), layout=plgpu.Layout.WGMMA).astype(jnp.float32)

    def solve(predicted: jax.Array) -> jax.Array:
        beta = chunk.gate(BETA)
        innovation = values * along_columns(beta) - predicted * along_columns(beta * chunk.gate(ROW_IN))
        right = chunk.inverse.transpose((1, 0))
        return multiply(innovation.astype(jnp.bfloat16), right, interpret=plan.interpret)

    if plan.delta:
        update, read = multiply_both(entry, keys, queries, solve, interpret=plan.interpret)
    else:
        update, read = values, multiply(entry, queries, interpret=plan.interpret)
    written = (update * along_columns(chunk.gate(ROW_OUT))).astype(jnp.bfloat16)
    update = update.astype(jnp.bfloat16)
    state, result = accumulate(
        (state * chunk.carry(plan.K), [(written, chunk.k)]),
        (read * along_columns(chunk.gate(ROW_IN) * plan.scale), [(update, chunk.pair.transpose((1, 0)))]),
        interpret=plan.interpret,
    )
    return state, result, update


def _backward(plan: Plan, chunk: Chunk, d_state: jax.Array, d_exit: jax.Array) -> tuple[jax.Array, ...]:
    """(dS' before the chunk, dV' [64,64], None)."""
    row_in = chunk.gate(ROW_IN)
    from_state = multiply(d_exit, chunk.k.transpose((1, 0)), interpret=plan.interpret)
    d_out = plgpu.load(chunk.x.transpose((1, 0)), layout=plgpu.Layout.WGMMA)
    (d_value,) = accumulate(
        (from_state * along_columns(chunk.gate(ROW_OUT)), [(d_out, chunk.pair)]), interpret=plan.interpret
    )
    d_read = d_out.astype(jnp.float32) * along_columns(row_in * plan.scale)
    terms = [(d_read.astype(jnp.bfloat16), chunk.q)]
    if plan.delta:
        d_value = multiply(d_value.astype(jnp.bfloat16), chunk.inverse, interpret=plan.interpret)
        d_value = d_value * along_columns(chunk.gate(BETA))
        terms.append(((-d_value * along_columns(row_in)).astype(jnp.bfloat16), chunk.k))
    (d_state,) = accumulate((d_state * chunk.carry(plan.K), terms), interpret=plan.interpret)
    return d_state, d_value, None


def _stages(plan: Plan, keep: bool, keep_updates: bool) -> int:
    """Chunks under way: as many as fit in shared memory, three at most."""
    per_stage = 2 * CHUNK * (2 * plan.K + plan.blocks * BLOCK + plan.matrices * CHUNK) + 4 * GATES * CHUNK
    outputs = CHUNK * (2 if keep_updates else 1) + (plan.K if keep else 0)
    fixed = 2 * plan.blocks * BLOCK * outputs + 4096  # reductions and barriers
    return min((SHARED_BYTES - fixed) // per_stage, 3, plan.n)
