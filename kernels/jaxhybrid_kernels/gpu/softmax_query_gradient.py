"""Gradient of the queries of softmax attention: a warpgroup has 64 queries of one head and meets the keys they see.

P = 2^(S - logsumexp)   dP = dO V'   dS = P (dP - rowsum(dO O))   dQ = dS K / sqrt(D)
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.attention_plan import ROWS, WARPGROUPS, AttentionPlan
from jaxhybrid_kernels.gpu.launch import kernel, unmarked
from jaxhybrid_kernels.gpu.products import accumulate, along_rows, multiply_both, rows, shared
from jaxhybrid_kernels.gpu.query_block import key_slots, key_stream, launch_grid, query_block, run_beside_loader
from jaxhybrid_kernels.numerics import LOG2_E


def query_gradient_kernel(plan: AttentionPlan) -> Callable[..., list[jax.Array]]:
    """(q [B,Q,Hq,D], k, v [B,M,Hk,D], d_out as q, logsumexp, dots [B,Hq,Q], starts [B,Q], ranges) -> d_q.

    dots = rowsum(dO O); ranges: `block_ranges.key_blocks_seen`.
    """
    blocks, D, interpret = plan.query, plan.D, plan.interpret
    factor = D**-0.5 * LOG2_E

    def body(q, k, v, d_out, logsumexp, dots, starts, ranges, d_q, s):
        own = query_block(plan, blocks, ranges)
        stream = key_stream(blocks, own, k, v, s)

        def consume():
            query, d_output, arrived = s["q"].at[own.group], s["d_out"].at[own.group], s["arrived"].at[own.group]
            plgpu.copy_gmem_to_smem(q.at[own.b, own.tokens, own.head], query, arrived)
            plgpu.copy_gmem_to_smem(d_out.at[own.b, own.tokens, own.head], d_output, arrived)
            first_keys = own.starts(starts)
            offset, dot = (unmarked(rows(x.at[own.b, own.head, own.tokens])) for x in (logsumexp, dots))
            plgpu.barrier_wait(arrived)

            def step(i, total):
                keys, values = (s[name].at[stream.slot(i)] for name in "kv")
                stream.await_block(i)
                weights, d_weights = multiply_both(
                    (query, keys.transpose((1, 0))),
                    (d_output, values.transpose((1, 0))),
                    lambda scores: jnp.exp2(
                        own.masked(i, scores, first_keys) * factor - along_rows(offset, blocks.columns)
                    ),
                    interpret=interpret,
                )
                d_scores = (weights * (d_weights - along_rows(dot, blocks.columns))).astype(plan.dtype)
                (total,) = accumulate((total, [(d_scores, keys)]), interpret=interpret)
                stream.release(i)
                return total

            begin = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
            total = lax.fori_loop(0, stream.steps, step, begin)
            query[...] = (total * D**-0.5).astype(plan.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, d_q.at[own.b, own.tokens, own.head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        run_beside_loader(stream, consume)

    operand = shared(WARPGROUPS, ROWS, D, dtype=plan.dtype)
    return kernel(
        body,
        plan,
        [jax.ShapeDtypeStruct((plan.B, plan.Q, plan.Hq, D), plan.dtype)],
        scratch_types={
            "s": {
                "q": operand,
                "d_out": operand,
                "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
                **key_slots(plan, blocks),
            }
        },
        **launch_grid(plan),
    )
