"""The recurrence over chunks, forward and backward: one thread block per batch row, value head and part of the width V.

Each consumer warpgroup holds 64 rows of the transposed state S' [V,K] in registers from the first chunk to the last and
needs nothing of the others, so all products of a chunk have their left operand in registers and none of them waits for
shared memory to be written. With the gates of gates.py as columns, one number per token:
    forward:   U' = beta (v' - row_in (S' k')) inverse'           O' = scale row_in (S' q') + U' pair'
               S' <- carry S' + (row_out U') k
    backward:  dU' = row_out (dS' k') + dO' pair                  dV' = beta (dU' inverse)
               dS' <- carry dS' + (scale row_in dO') q - (row_in dV') k
One more warpgroup brings the operands of the next chunks to shared memory. Forwards, with thread blocks enough to fill
the GPU, yet another one makes the next chunk's pair matrix and inverse (see prepare.py) meanwhile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.gates import BETA, CARRY, GATES, ROW_IN, ROW_OUT
from jaxhybrid_kernels.gpu.launch import kernel, unmarked
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.prepare import chunk_matrices, workspace
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

SHARED_BYTES = 227 * 1024


class Registers(NamedTuple):
    """Per thread; the warpgroups of a multiprocessor share 512 of them."""

    loader: int
    preparer: int
    consumer: int


class Chunk(NamedTuple):
    """Shared memory of one chunk; x is v forwards and the gradient of the outputs backwards."""

    q: Any  # [64,K]
    k: Any
    x: Any  # [64,64]: this warpgroup's columns
    pair: Any  # [64,64]
    inverse: Any  # [64,64]; None for the additive rule
    gates: Any  # [6,64]

    def gate(self, name: int) -> jax.Array:
        return columns(self.gates.at[name])

    def carry(self, width: int) -> jax.Array:
        return along_rows(rows(self.gates.at[CARRY]), width)


def recurrence_kernel(
    plan: Plan, keep: bool, reverse: bool = False, fused: bool = False
) -> Callable[..., list[jax.Array]]:
    """(q, k, x [B,T,N,V], gates, start [B,N,V,K], matrices) -> y [B,T,N,V], last [B,N,V,K] and more if keep.

    Forwards x = v, y = out, and kept are the states at the chunks' entries [B,N,n,V,K], the matrices if they are made
    here (fused: they are no argument then), and with the delta rule the updates U [B,T,N,V]. In reverse x is the
    gradient of out, y that of v, and kept are the gradients of the states at the chunks' exits. T in whole chunks.
    """
    n, K, V, blocks = plan.n, plan.K, plan.V, plan.blocks
    width = blocks * BLOCK
    keep_updates = keep and plan.delta and not reverse
    stages = _stages(plan, keep, keep_updates, fused)
    registers = _registers(blocks, fused)
    advance: Callable[..., tuple[jax.Array, jax.Array, Any]] = _backward if reverse else _forward

    def body(q, k, x, gates, start, *refs, s):
        given, *results = (None, *refs) if fused else refs
        y, last, *more = results
        kept: dict[str, Any] = dict(zip(outputs, more, strict=True))
        b, head, part = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("part")
        group = lax.axis_index("group")

        def position(step):
            return n - 1 - step if reverse else step

        def slot_of(step):
            return lax.rem(step, jnp.array(stages, step.dtype))

        def load(step, slot):
            c = position(step)
            tokens, barrier = pl.ds(c * CHUNK, CHUNK), s["loaded"].at[slot]
            plgpu.copy_gmem_to_smem(k.at[b, tokens, plan.key_head(head)], s["k"].at[slot], barrier)
            plgpu.copy_gmem_to_smem(gates.at[b, head, c], s["gates"].at[slot], barrier)
            plgpu.copy_gmem_to_smem(q.at[b, tokens, plan.query_head(head)], s["q"].at[slot], barrier)
            for i in range(blocks):
                columns_of = pl.ds(part * width + i * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(x.at[b, tokens, head, columns_of], s["x"].at[slot, i], barrier)
            if given is not None:
                plgpu.copy_gmem_to_smem(given.at[b, head, c, 0], s["pair"].at[slot], barrier)
                if plan.delta:
                    plgpu.copy_gmem_to_smem(given.at[b, head, c, 1], s["inverse"].at[slot], barrier)

        @pl.when(group == blocks)
        def produce():
            if registers is not None:
                plgpu.set_max_registers(registers.loader, action="decrease")
            for step in range(stages):
                load(step, step)

            @pl.loop(stages, n)
            def _(step):
                slot = slot_of(step)
                plgpu.barrier_wait(s["consumed"].at[slot])
                load(step, slot)

        if fused and registers is not None:

            @pl.when(group == blocks + 1)
            def prepare():
                plgpu.set_max_registers(registers.preparer, action="increase")

                @pl.loop(0, n)
                def _(step):
                    slot = slot_of(step)
                    plgpu.barrier_wait(s["loaded"].at[slot])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    operands = (s["q"].at[slot], s["k"].at[slot], s["gates"].at[slot], s["pair"].at[slot])
                    inverse = chunk_matrices(plan, *operands, s["work"])
                    plgpu.barrier_arrive(s["consumed"].at[slot])
                    if plan.delta:
                        s["inverse"].at[slot][...] = inverse
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(s["prepared"].at[slot])
                    if keep:
                        plgpu.copy_smem_to_gmem(s["pair"].at[slot], kept["matrices"].at[b, head, step, 0])
                        if plan.delta:
                            plgpu.copy_smem_to_gmem(s["inverse"].at[slot], kept["matrices"].at[b, head, step, 1])

                plgpu.wait_smem_to_gmem(0)

        @pl.when(group < blocks)
        def consume():
            if registers is not None:
                plgpu.set_max_registers(registers.consumer, action="increase")
            own = pl.ds(part * width + group * BLOCK, BLOCK)

            def chunk_step(step, state):
                c, slot = position(step), slot_of(step)
                entry = state.astype(jnp.bfloat16)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if "state" in s:
                    s["state"].at[group][...] = entry
                plgpu.barrier_wait(s["loaded"].at[slot])
                operands = Chunk(
                    s["q"].at[slot],
                    s["k"].at[slot],
                    s["x"].at[slot, group],
                    s["pair"].at[slot],
                    s["inverse"].at[slot] if plan.delta else None,
                    s["gates"].at[slot],
                )
                if fused:  # with so many warpgroups the registers do not suffice
                    plgpu.commit_smem()
                    entry = s["state"].at[group]
                    plgpu.barrier_wait(s["prepared"].at[slot])
                state, result, update = advance(plan, operands, state, entry)
                plgpu.barrier_arrive(s["consumed"].at[slot])
                s["y"].at[group].transpose((1, 0))[...] = result.astype(jnp.bfloat16)
                if keep_updates:
                    s["updates"].at[group].transpose((1, 0))[...] = update
                plgpu.commit_smem()
                tokens = pl.ds(c * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(s["y"].at[group], y.at[b, tokens, head, own])
                if keep:
                    plgpu.copy_smem_to_gmem(s["state"].at[group], kept["states"].at[b, head, c, own])
                if keep_updates:
                    plgpu.copy_smem_to_gmem(s["updates"].at[group], kept["updates"].at[b, tokens, head, own])
                return state

            first = unmarked(plgpu.load(start.at[b, head, own], layout=plgpu.Layout.WGMMA, optimized=False))
            last[b, head, own] = lax.fori_loop(0, n, chunk_step, first)
            plgpu.wait_smem_to_gmem(0)

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    outputs = {}
    scratch = {
        "q": shared(stages, CHUNK, K),
        "k": shared(stages, CHUNK, K),
        "x": shared(stages, blocks, CHUNK, BLOCK),
        "pair": shared(stages, CHUNK, CHUNK),
        "gates": plgpu.SMEM((stages, GATES, CHUNK), jnp.float32),
        "y": shared(blocks, CHUNK, BLOCK),
        "loaded": plgpu.Barrier(num_arrivals=3 + blocks + (0 if fused else plan.matrices), num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=blocks + fused, num_barriers=stages),
    }
    if plan.delta:
        scratch["inverse"] = shared(stages, CHUNK, CHUNK)
    if keep:
        outputs["states"] = array(plan.B, plan.N, n, V, K)
    if keep or fused:
        scratch["state"] = shared(blocks, BLOCK, K)
    if fused:
        if keep:
            outputs["matrices"] = array(plan.B, plan.N, n, plan.matrices, CHUNK, CHUNK)
        scratch |= {"work": workspace(), "prepared": plgpu.Barrier(num_barriers=stages)}
    if keep_updates:
        outputs["updates"] = array(plan.B, n * CHUNK, plan.N, V)
        scratch["updates"] = shared(blocks, CHUNK, BLOCK)
    return kernel(
        body,
        plan,
        [
            array(plan.B, n * CHUNK, plan.N, V),
            array(plan.B, plan.N, V, K, dtype=jnp.float32),
            *outputs.values(),
        ],
        scratch_types={"s": scratch},
        grid=(V // width, plan.N, plan.B),
        grid_names=("part", "head", "batch"),
        num_threads=blocks + 1 + fused,
        thread_name="group",
    )


def _forward(plan: Plan, chunk: Chunk, state: jax.Array, entry: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(S' after the chunk, O' [64,64], U' [64,64] bfloat16)."""
    keys, queries = chunk.k.transpose((1, 0)), chunk.q.transpose((1, 0))

    def values() -> jax.Array:
        return plgpu.load(chunk.x.transpose((1, 0)), layout=plgpu.Layout.WGMMA).astype(jnp.float32)

    def written(update: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (update * along_columns(chunk.gate(ROW_OUT))).astype(jnp.bfloat16), update.astype(jnp.bfloat16)

    def innovation(predicted: jax.Array) -> jax.Array:
        beta = chunk.gate(BETA)
        new = values() * along_columns(beta) - predicted * along_columns(beta * chunk.gate(ROW_IN))
        return new.astype(jnp.bfloat16)

    if not plan.delta:
        (left, update), read = written(values()), multiply(entry, queries, interpret=plan.interpret)
    elif plan.fused:
        # One result less at a time than below.
        new = innovation(multiply(entry, keys, interpret=plan.interpret))
        solve = (new, chunk.inverse.transpose((1, 0)))
        (left, update), read = multiply_both(solve, (entry, queries), written, interpret=plan.interpret)
    else:
        new, read = multiply_both((entry, keys), (entry, queries), innovation, interpret=plan.interpret)
        left, update = written(multiply(new, chunk.inverse.transpose((1, 0)), interpret=plan.interpret))
    state, result = accumulate(
        (state * chunk.carry(plan.K), [(left, chunk.k)]),
        (read * along_columns(chunk.gate(ROW_IN) * plan.scale), [(update, chunk.pair.transpose((1, 0)))]),
        interpret=plan.interpret,
    )
    return state, result, update


def _backward(plan: Plan, chunk: Chunk, d_state: jax.Array, d_exit: jax.Array) -> tuple[jax.Array, jax.Array, None]:
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


def _registers(blocks: int, fused: bool) -> Registers | None:
    """None where nobody needs more than an even share."""
    if fused:
        return Registers(24, 136, 176) if blocks == 2 else Registers(40, 232, 232)
    return Registers(40, 0, 232) if blocks == 2 else None


def _stages(plan: Plan, keep: bool, keep_updates: bool, fused: bool) -> int:
    """Chunks under way: as many as fit in shared memory, three at most."""
    matrix = 2 * CHUNK * CHUNK
    per_stage = 2 * CHUNK * (2 * plan.K + plan.blocks * BLOCK) + plan.matrices * matrix + 4 * GATES * CHUNK
    outputs = CHUNK * (2 if keep_updates else 1) + (plan.K if keep or fused else 0)
    fixed = 2 * plan.blocks * BLOCK * outputs + (2 * matrix if fused else 0) + 1024  # barriers, alignment
    return min((SHARED_BYTES - fixed) // per_stage, 3, plan.n)
