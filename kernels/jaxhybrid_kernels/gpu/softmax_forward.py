"""Softmax attention forward: a warpgroup has 64 queries of one head and meets the blocks of keys that they see.

The largest score m, the sum l and the output O of what was met so far are in registers (arXiv 2205.14135); S are the
scores of the next block, exponents of base 2:
    m' = max(m, rowmax(S))   P = 2^(S - m')   l' = 2^(m - m') l + rowsum(P)   O' = 2^(m - m') O + P V
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.attention_plan import ROWS, AttentionPlan
from jaxhybrid_kernels.gpu.block_stream import barriers, run_stream
from jaxhybrid_kernels.gpu.launch import kernel
from jaxhybrid_kernels.gpu.products import accumulate, accumulate_meanwhile, along_rows, multiply, shared
from jaxhybrid_kernels.gpu.query_block import LOG2_E, key_slots, key_stream, launch_grid, query_block

LOWEST = -1e20  # the first m: above NOTHING, so that what is not seen weighs nothing before anything is seen


def forward_kernel(plan: AttentionPlan) -> Callable[..., list[jax.Array]]:
    """(q [B,Q,Hq,D], k, v [B,M,Hk,D], starts [B,Q], ranges) -> out [B,Q,Hq,D], logsumexp [B,Hq,Q] float32, base 2.

    ranges: `block_ranges.key_blocks_seen`. Every query sees itself.
    """
    blocks, D, interpret = plan.forward, plan.D, plan.interpret
    factor = D**-0.5 * LOG2_E

    def body(q, k, v, starts, ranges, out, logsumexp, s):
        own = query_block(plan, blocks, ranges)
        stream = key_stream(blocks, own, k, v, s)

        def turn():
            """At each of these places one warpgroup waits for the other to be at its next."""
            if blocks.alternate:
                plgpu.barrier_arrive(s["turn"])
                plgpu.barrier_wait(s["turn"])

        def consume():
            query, arrived = s["q"].at[own.group], s["arrived"].at[own.group]
            plgpu.copy_gmem_to_smem(q.at[own.b, own.tokens, own.head], query, arrived)
            first_keys = own.starts(starts)
            plgpu.barrier_wait(arrived)

            def weigh(i, scores, m, l):
                """(Weights of the step's keys, what remains of earlier ones, new m and l.)"""
                scores = own.masked(i, scores, first_keys)
                new_m = jnp.maximum(m, jnp.max(scores, axis=1) * factor)
                weights = jnp.exp2(scores * factor - along_rows(new_m, blocks.columns))
                kept = jnp.exp2(m - new_m)
                return weights.astype(plan.dtype), kept, new_m, l * kept + jnp.sum(weights, axis=1)

            def block(i):
                """Keys, turned, and values of a step."""
                slot = stream.slot(i)
                return s["k"].at[slot].transpose((1, 0)), s["v"].at[slot]

            def step(i, carry):
                o, m, l = carry
                keys, values = block(i)
                stream.await_block(i)
                scores = multiply(query, keys, interpret=interpret, issued=turn)
                weights, kept, m, l = weigh(i, scores, m, l)
                o = o * along_rows(kept, D)
                if blocks.alternate:
                    o, l, m, weights = lax.optimization_barrier((o, l, m, weights))
                turn()
                (o,) = accumulate((o, [(weights, values)]), interpret=interpret)
                stream.release(i)
                return o, m, l

            def step_ahead(i, carry):
                """Sums the step's values, and weighs the next keys."""
                o, weights, m, l = carry
                stream.await_block(i + 1)
                o, weights, kept, m, l = accumulate_meanwhile(
                    o,
                    (weights, block(i)[1]),
                    (query, block(i + 1)[0]),
                    lambda scores: weigh(i + 1, scores, m, l),
                    (weights, m, m, l),
                    interpret=interpret,
                )
                stream.release(i)
                return o * along_rows(kept, D), weights, m, l

            def full(value, *shape):
                layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

            pl.when(own.group == 1)(turn)
            begin = full(0.0, ROWS, D), full(LOWEST, ROWS), full(0.0, ROWS)
            if blocks.ahead:
                o, m, l = begin
                first, last = jnp.int32(0), stream.steps - 1
                stream.await_block(first)
                scores = multiply(query, block(first)[0], interpret=interpret)
                weights, _, m, l = weigh(first, scores, m, l)
                o, weights, m, l = lax.fori_loop(0, last, step_ahead, (o, weights, m, l))
                (o,) = accumulate((o, [(weights, block(last)[1])]), interpret=interpret)
            else:
                o, m, l = lax.fori_loop(0, stream.steps, step, begin)
            pl.when(own.group == 0)(turn)
            logsumexp[own.b, own.head, own.tokens] = m + jnp.log(l) * LOG2_E
            query[...] = (o * along_rows(1 / l, D)).astype(plan.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, out.at[own.b, own.tokens, own.head])
            plgpu.wait_smem_to_gmem(0)

        run_stream(blocks, stream, consume)

    return kernel(
        body,
        plan,
        [
            jax.ShapeDtypeStruct((plan.B, plan.Q, plan.Hq, D), plan.dtype),
            jax.ShapeDtypeStruct((plan.B, plan.Hq, plan.Q), jnp.float32),
        ],
        scratch_types={
            "s": {
                "q": shared(blocks.warpgroups, ROWS, D, dtype=plan.dtype),
                "arrived": plgpu.Barrier(num_barriers=blocks.warpgroups),
                **key_slots(plan, blocks),
                **barriers(blocks, copies=2),
            }
        },
        **launch_grid(plan, blocks),
    )
