"""The recurrence over chunks, forward and backward: one thread block per batch row, value head, span of chunks and part
of the width V.

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

With few heads a sequence is divided into spans that run side by side, each from its own entry state, see spans.py.
These states come from a summary: the same recurrence without outputs, forwards on K more rows that have no values.
"""

import math
from collections.abc import Callable, Mapping
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
from jaxhybrid_kernels.gpu.steps import Chunk, backward, forward, summarize

SHARED_BYTES = 227 * 1024


class Registers(NamedTuple):
    """Per thread; the warpgroups of a multiprocessor share 512 of them."""

    loader: int
    preparer: int
    consumer: int


def recurrence_kernel(
    plan: Plan, keep: bool, reverse: bool = False, started: bool = False, summary: bool = False
) -> Callable[..., list[jax.Array]]:
    """(q, k, x [B,T,N,V], gates, matrices, start [B,N,spans,V,K]) -> last [B,N,spans,V,K], y [B,T,N,V], more if keep.

    There is a start only if started, and there are no matrices if the plan is fused. With decays per channel q and k
    are q_in and k_in, and k_out [B,T,N,K] and carry [B,N,n,K] come before start; k is not read without the delta rule.
    A summary of all spans but the last one in the run's direction gives last alone, forwards [B,N,spans-1,V+K,K] from
    such a start.

    Forwards x = v, y = out, and kept are the states at the chunks' entries [B,N,n,V,K] and with the delta rule the
    updates U [B,T,N,V]. In reverse x is the gradient of out, y that of v, and kept are the gradients of the states at
    the chunks' exits. T in whole chunks.
    """
    K, V, blocks, fused, channels = plan.K, plan.V, plan.blocks, plan.fused, plan.per_channel
    width = blocks * BLOCK
    transition = summary and not reverse
    spans = plan.spans - summary
    rows_of_state = V + K if transition else V
    slots = _slots(plan, reads=not transition)
    made = [name for name in ("pair", "inverse") if fused and name in slots]
    outputs = {} if summary else _outputs(plan, keep, reverse)
    buffers = dict.fromkeys(outputs, (CHUNK, BLOCK)) | ({"states": (BLOCK, K)} if keep or fused else {})
    stages = _stages(plan, slots, buffers)
    registers = _registers(blocks, fused)
    advance = backward if reverse else summarize if summary else forward
    beta_gate = pl.ds(BETA, 1)

    def body(q, k, x, gates, *refs, s):
        matrices, *others = (None, *refs) if fused else refs
        k_out, carries, *others = others if channels else (None, None, *others)
        start, last, *others = others if started else (None, *others)
        results: dict[str, Any] = dict(zip(outputs, others, strict=True))
        b, head, part = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("part")
        span, group = lax.axis_index("span"), lax.axis_index("group")
        query_head, key_head = (head, head) if channels else (plan.query_head(head), plan.key_head(head))
        begin, end = plan.chunks_of(span + 1 if summary and reverse else span)
        count = end - begin

        def position(step):
            return end - 1 - step if reverse else begin + step

        def slot_of(step):
            return lax.rem(step, jnp.array(stages, step.dtype))

        def load(step, slot):
            c = position(step)
            tokens, gate = pl.ds(c * CHUNK, CHUNK), gates.at[b, c, head]
            given = {
                "k": lambda: k.at[b, tokens, key_head],
                "gates": lambda: gate.at[beta_gate] if channels else gate,
                "q": lambda: q.at[b, tokens, query_head],
                "k_out": lambda: k_out.at[b, tokens, head],
                "carries": lambda: carries.at[b, head, c],
                "pair": lambda: matrices.at[b, head, c, 0],
                "inverse": lambda: matrices.at[b, head, c, 1],
            }
            for name, source in given.items():
                if name in slots and name not in made:
                    plgpu.copy_gmem_to_smem(source(), s[name].at[slot], s["loaded"].at[slot])
            for i in range(blocks):
                row = part * width + i * BLOCK
                columns_of = pl.ds(lax.rem(row, jnp.int32(V)) if transition else row, BLOCK)
                plgpu.copy_gmem_to_smem(x.at[b, tokens, head, columns_of], s["x"].at[slot, i], s["loaded"].at[slot])

        @pl.when(group == blocks)
        def produce():
            if registers is not None:
                plgpu.set_max_registers(registers.loader, action="decrease")
            for step in range(stages):
                load(step, step)

            @pl.loop(stages, count)
            def _(step):
                slot = slot_of(step)
                plgpu.barrier_wait(s["consumed"].at[slot])
                load(step, slot)

        if fused and registers is not None:

            @pl.when(group == blocks + 1)
            def prepare():
                plgpu.set_max_registers(registers.preparer, action="increase")

                @pl.loop(0, count)
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
            first_row = part * width + group * BLOCK
            own = pl.ds(first_row, BLOCK)
            valued = first_row < V if transition else None

            def chunk_step(step, state):
                c, slot = position(step), slot_of(step)
                entry = state.astype(jnp.bfloat16)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if "states" in buffers:
                    s["states"].at[group][...] = entry
                plgpu.barrier_wait(s["loaded"].at[slot])
                operands = {name: s[name].at[slot] for name in slots} | {"x": s["x"].at[slot, group]}
                if fused:  # with so many warpgroups the registers do not suffice
                    plgpu.commit_smem()
                    entry = s["states"].at[group]
                    plgpu.barrier_wait(s["prepared"].at[slot])
                state, *computed = advance(plan, Chunk(**operands, valued=valued), state, entry)
                plgpu.barrier_arrive(s["consumed"].at[slot])
                for name, result in zip(("y", "updates"), computed, strict=False):
                    if name in outputs:
                        s[name].at[group].transpose((1, 0))[...] = result.astype(jnp.bfloat16)
                plgpu.commit_smem()
                tokens = pl.ds(c * CHUNK, CHUNK)
                for name, result in results.items():
                    place = (head, c) if name == "states" else (tokens, head)
                    plgpu.copy_smem_to_gmem(s[name].at[group], result.at[b, *place, own])
                return state

            if start is None:
                first = plgpu.layout_cast(jnp.zeros((BLOCK, K), jnp.float32), plgpu.Layout.WGMMA)
            else:
                first = unmarked(plgpu.load(start.at[b, head, span, own], layout=plgpu.Layout.WGMMA, optimized=False))
            last[b, head, span, own] = lax.fori_loop(0, count, chunk_step, first)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = {
        **{name: _operand(stages, slot) for name, slot in slots.items()},
        **{name: shared(blocks, *shape) for name, shape in buffers.items()},
        "loaded": plgpu.Barrier(num_arrivals=len(slots) - 1 + blocks - len(made), num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=blocks + fused, num_barriers=stages),
    }
    if fused:
        scratch |= {"work": workspace(), "prepared": plgpu.Barrier(num_barriers=stages)}
    return kernel(
        body,
        plan,
        [jax.ShapeDtypeStruct((plan.B, plan.N, spans, rows_of_state, K), jnp.float32), *outputs.values()],
        scratch_types={"s": scratch},
        grid=(rows_of_state // width, plan.N, spans, plan.B),
        grid_names=("part", "head", "span", "batch"),
        num_threads=blocks + 1 + fused,
        thread_name="group",
    )


def _outputs(plan: Plan, keep: bool, reverse: bool) -> dict[str, jax.ShapeDtypeStruct]:
    by_token = jax.ShapeDtypeStruct((plan.B, plan.n * CHUNK, plan.N, plan.V), jnp.bfloat16)
    outputs = {"y": by_token}
    if keep:
        outputs["states"] = jax.ShapeDtypeStruct((plan.B, plan.N, plan.n, plan.V, plan.K), jnp.bfloat16)
    if keep and plan.delta and not reverse:
        outputs["updates"] = by_token
    return outputs


def _slots(plan: Plan, reads: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """A chunk's operands in shared memory; those of products in bfloat16. Queries and pair matrix are for reads."""

    def operand(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    gates = 1 if plan.per_channel else GATES
    slots = {"gates": jax.ShapeDtypeStruct((gates, CHUNK), jnp.float32), "x": operand(plan.blocks, CHUNK, BLOCK)}
    if reads:
        slots |= {"q": operand(CHUNK, plan.K), "pair": operand(CHUNK, CHUNK)}
    if plan.delta:
        slots["inverse"] = operand(CHUNK, CHUNK)
    if plan.delta or not plan.per_channel:
        slots["k"] = operand(CHUNK, plan.K)
    if plan.per_channel:
        slots |= {"k_out": operand(CHUNK, plan.K), "carries": jax.ShapeDtypeStruct((plan.K,), jnp.float32)}
    return slots


def _operand(stages: int, slot: jax.ShapeDtypeStruct) -> Any:
    shape = (stages, *slot.shape)
    return plgpu.SMEM(shape, jnp.float32) if slot.dtype == jnp.float32 else shared(*shape)


def _stages(plan: Plan, slots: dict[str, jax.ShapeDtypeStruct], buffers: Mapping[str, tuple[int, ...]]) -> int:
    """Chunks under way: as many as fit in shared memory, three at most."""
    per_stage = sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in slots.values())
    fixed = 2 * plan.blocks * sum(math.prod(shape) for shape in buffers.values())
    fixed += (4 * CHUNK * CHUNK if plan.fused else 0) + 1024  # workspace; barriers, alignment
    return min((SHARED_BYTES - fixed) // per_stage, 3, plan.n // plan.spans)


def _registers(blocks: int, fused: bool) -> Registers | None:
    """None where nobody needs more than an even share."""
    if fused:
        return Registers(24, 136, 176) if blocks == 2 else Registers(40, 232, 232)
    return Registers(40, 0, 232) if blocks == 2 else None
