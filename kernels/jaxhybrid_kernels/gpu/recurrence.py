"""The recurrence over chunks, forward and backward: one thread block per batch row, value head and part of the width V.

Each consumer warpgroup holds 64 rows of the transposed state S' [V,K] in registers from the first chunk to the last and
needs nothing of the others, so all products of a chunk have their left operand in registers and none of them waits for
shared memory to be written. With the gates of gates.py as columns, one number per token:
    forward:   U' = beta (v' - row_in (S' k')) inverse'           O' = scale row_in (S' q') + U' pair'
               S' <- carry S' + (row_out U') k
    backward:  dU' = row_out (dS' k') + dO' pair                  dV' = beta (dU' inverse)
               dS' <- carry dS' + (scale row_in dO') q - (row_in dV') k
With decays per channel the gates are in the operands, the scale too, and k_out takes the place of row_out k:
    forward:   U' = beta (v' - S' k_in') inverse'                 O' = S' q_in' + U' pair'     S' <- S' carry + U' k_out
    backward:  dU' = dS' k_out' + dO' pair                        dS' <- dS' carry + dO' q_in - dV' k_in
One more warpgroup brings the operands of the next chunks to shared memory. With thread blocks enough to fill the GPU
yet another one makes the next chunk's pair matrix and inverse (see prepare.py) meanwhile, in both directions: making
them twice costs less than keeping them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.gates import BETA, GATES
from jaxhybrid_kernels.gpu.launch import kernel, unmarked
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.prepare import chunk_matrices, workspace
from jaxhybrid_kernels.gpu.products import shared
from jaxhybrid_kernels.gpu.steps import Chunk, backward, forward

SHARED_BYTES = 227 * 1024


class Registers(NamedTuple):
    """Per thread; the warpgroups of a multiprocessor share 512 of them."""

    loader: int
    preparer: int
    consumer: int


def recurrence_kernel(
    plan: Plan, keep: bool, reverse: bool = False, started: bool = False
) -> Callable[..., list[jax.Array]]:
    """(q, k, x [B,T,N,V], gates, start [B,N,V,K], matrices) -> y [B,T,N,V], last [B,N,V,K] and more if keep.

    There is a start only if started, and there are no matrices if the plan is fused. With decays per channel q and k
    are q_in and k_in, and k_out [B,T,N,K] and carry [B,N,n,K] come last; k is not read without the delta rule.

    Forwards x = v, y = out, and kept are the states at the chunks' entries [B,N,n,V,K] and with the delta rule the
    updates U [B,T,N,V]. In reverse x is the gradient of out, y that of v, and kept are the gradients of the states at
    the chunks' exits. T in whole chunks.
    """
    n, K, V, blocks, fused = plan.n, plan.K, plan.V, plan.blocks, plan.fused
    width = blocks * BLOCK
    keep_updates = keep and plan.delta and not reverse
    stages = _stages(plan, keep, keep_updates, fused)
    registers = _registers(blocks, fused)
    advance = backward if reverse else forward
    channels = plan.per_channel
    beta_gate = pl.ds(BETA, 1)

    def body(q, k, x, gates, *refs, s):
        start, *others = refs if started else (None, *refs)
        given, *others = (None, *others) if fused else others
        k_out, carries, y, last, *more = others if channels else (None, None, *others)
        kept: dict[str, Any] = dict(zip(outputs, more, strict=True))
        b, head, part = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("part")
        group = lax.axis_index("group")
        query_head, key_head = (head, head) if channels else (plan.query_head(head), plan.key_head(head))

        def position(step):
            return n - 1 - step if reverse else step

        def slot_of(step):
            return lax.rem(step, jnp.array(stages, step.dtype))

        def load(step, slot):
            c = position(step)
            tokens, barrier = pl.ds(c * CHUNK, CHUNK), s["loaded"].at[slot]
            gate = gates.at[b, c, head]
            if "k" in s:
                plgpu.copy_gmem_to_smem(k.at[b, tokens, key_head], s["k"].at[slot], barrier)
            plgpu.copy_gmem_to_smem(gate.at[beta_gate] if channels else gate, s["gates"].at[slot], barrier)
            plgpu.copy_gmem_to_smem(q.at[b, tokens, query_head], s["q"].at[slot], barrier)
            if k_out is not None and carries is not None:
                plgpu.copy_gmem_to_smem(k_out.at[b, tokens, head], s["k_out"].at[slot], barrier)
                plgpu.copy_gmem_to_smem(carries.at[b, head, c], s["carry"].at[slot], barrier)
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
                    operands = (s["q"].at[slot], s["k"].at[slot], s["gates"].at[slot], s["pair"].at[slot])
                    inverse = chunk_matrices(plan, *operands, s["work"])
                    plgpu.barrier_arrive(s["consumed"].at[slot])
                    if plan.delta:
                        s["inverse"].at[slot][...] = inverse
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(s["prepared"].at[slot])

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
                    s["k"].at[slot] if "k" in s else None,
                    s["x"].at[slot, group],
                    s["pair"].at[slot],
                    s["inverse"].at[slot] if plan.delta else None,
                    s["gates"].at[slot],
                    *([s["k_out"].at[slot], s["carry"].at[slot]] if channels else []),
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

            if start is None:
                first = plgpu.layout_cast(jnp.zeros((BLOCK, K), jnp.float32), plgpu.Layout.WGMMA)
            else:
                first = unmarked(plgpu.load(start.at[b, head, own], layout=plgpu.Layout.WGMMA, optimized=False))
            last[b, head, own] = lax.fori_loop(0, n, chunk_step, first)
            plgpu.wait_smem_to_gmem(0)

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    outputs = {}
    arrivals = 3 + blocks + (0 if fused else plan.matrices)
    if channels:
        arrivals += 2 if plan.delta else 1
    scratch = {
        "q": shared(stages, CHUNK, K),
        "x": shared(stages, blocks, CHUNK, BLOCK),
        "pair": shared(stages, CHUNK, CHUNK),
        "gates": plgpu.SMEM((stages, 1 if channels else GATES, CHUNK), jnp.float32),
        "y": shared(blocks, CHUNK, BLOCK),
        "loaded": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=blocks + fused, num_barriers=stages),
    }
    if plan.delta:
        scratch["inverse"] = shared(stages, CHUNK, CHUNK)
    if plan.delta or not channels:
        scratch["k"] = shared(stages, CHUNK, K)
    if channels:
        scratch |= {"k_out": shared(stages, CHUNK, K), "carry": plgpu.SMEM((stages, K), jnp.float32)}
    if keep:
        outputs["states"] = array(plan.B, plan.N, n, V, K)
    if keep or fused:
        scratch["state"] = shared(blocks, BLOCK, K)
    if fused:
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


def _registers(blocks: int, fused: bool) -> Registers | None:
    """None where nobody needs more than an even share."""
    if fused:
        return Registers(24, 136, 176) if blocks == 2 else Registers(40, 232, 232)
    return Registers(40, 0, 232) if blocks == 2 else None


def _stages(plan: Plan, keep: bool, keep_updates: bool, fused: bool) -> int:
    """Chunks under way: as many as fit in shared memory, three at most."""
    matrix = 2 * CHUNK * CHUNK
    keys, gates = (3 if plan.delta else 2, CHUNK + plan.K) if plan.per_channel else (2, GATES * CHUNK)
    per_stage = 2 * CHUNK * (keys * plan.K + plan.blocks * BLOCK) + plan.matrices * matrix + 4 * gates
    outputs = CHUNK * (2 if keep_updates else 1) + (plan.K if keep or fused else 0)
    fixed = 2 * plan.blocks * BLOCK * outputs + (2 * matrix if fused else 0) + 1024  # barriers, alignment
    return min((SHARED_BYTES - fixed) // per_stage, 3, plan.n)
