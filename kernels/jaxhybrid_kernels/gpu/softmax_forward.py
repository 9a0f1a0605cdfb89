"""Softmax attention forward: a warpgroup has 64 queries of one head and meets the blocks of keys that they see.

The largest score m, the sum l and the output O of what was met so far are in registers (arXiv 2205.14135); S are the
scores of the next block, exponents of base 2:
    m' = max(m, rowmax(S))   P = 2^(S - m')   l' = 2^(m - m') l + rowsum(P)   O' = 2^(m - m') O + P V
Two warpgroups take turns: one is at the tensor cores while the other makes weights of scores (arXiv 2407.08608).
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.attention_plan import ROWS, WARPGROUPS, AttentionPlan
from jaxhybrid_kernels.gpu.launch import kernel
from jaxhybrid_kernels.gpu.products import accumulate, along_rows, multiply, shared
from jaxhybrid_kernels.gpu.query_block import key_slots, key_stream, launch_grid, query_block, run_beside_loader
from jaxhybrid_kernels.numerics import LOG2_E

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
            """At each of these places one warpgroup waits for the other to be at its next. As both have the same number
            of steps, both come to as many places."""
            plgpu.barrier_arrive(s["turn"])
            plgpu.barrier_wait(s["turn"])

        def consume():
            query, arrived = s["q"].at[own.group], s["arrived"].at[own.group]
            plgpu.copy_gmem_to_smem(q.at[own.b, own.tokens, own.head], query, arrived)
            first_keys = own.starts(starts)
            plgpu.barrier_wait(arrived)

            def step(i, carry):
                o, m, l = carry
                slot = stream.slot(i)
                stream.await_block(i)
                keys = s["k"].at[slot].transpose((1, 0))
                scores = own.masked(i, multiply(query, keys, interpret=interpret, issued=turn), first_keys)
                new_m = jnp.maximum(m, jnp.max(scores, axis=1) * factor)
                weights = jnp.exp2(scores * factor - along_rows(new_m, blocks.columns))
                kept = jnp.exp2(m - new_m)
                l = l * kept + jnp.sum(weights, axis=1)
                # All of this before the turn: it is the other warpgroup's time at the tensor cores.
                o, l, m, weights = lax.optimization_barrier(
                    (o * along_rows(kept, D), l, new_m, weights.astype(plan.dtype))
                )
                turn()
                (o,) = accumulate((o, [(weights, s["v"].at[slot])]), interpret=interpret)
                stream.release(i)
                return o, m, l

            def full(value, *shape):
                layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

            pl.when(own.group == 1)(turn)
            begin = full(0.0, ROWS, D), full(LOWEST, ROWS), full(0.0, ROWS)
            o, m, l = lax.fori_loop(0, stream.steps, step, begin)
            pl.when(own.group == 0)(turn)
            logsumexp[own.b, own.head, own.tokens] = m + jnp.log(l) * LOG2_E
            query[...] = (o * along_rows(1 / l, D)).astype(plan.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, out.at[own.b, own.tokens, own.head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        run_beside_loader(stream, consume)

    return kernel(
        body,
        plan,
        [
            jax.ShapeDtypeStruct((plan.B, plan.Q, plan.Hq, D), plan.dtype),
            jax.ShapeDtypeStruct((plan.B, plan.Hq, plan.Q), jnp.float32),
        ],
        scratch_types={
            "s": {
                "q": shared(WARPGROUPS, ROWS, D, dtype=plan.dtype),
                "arrived": plgpu.Barrier(num_barriers=WARPGROUPS),
                **key_slots(plan, blocks),
                "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
            }
        },
        **launch_grid(plan),
    )
