"""Gradients of the keys and values of softmax attention: a warpgroup has 64 keys of one key head, and meets the queries
that see them in all heads of its group, so that the heads' gradients are summed in registers.

A thread block is one warpgroup, which loads for itself: two of them share a multiprocessor. Keys that nobody sees get
zeros.

Everything is transposed, so that left operands come from registers:
    P' = 2^(S' - logsumexp)   dP' = V dO'   dS' = P' (dP' - rowsum(dO O)')   dV = P' dO   dK = dS' Q / sqrt(D)
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.attention_plan import ROWS, AttentionPlan
from jaxhybrid_kernels.gpu.block_ranges import BEGIN, END, FULL_BEGIN, FULL_END, PLACE
from jaxhybrid_kernels.gpu.block_stream import Stream
from jaxhybrid_kernels.gpu.launch import kernel, unmarked
from jaxhybrid_kernels.gpu.products import accumulate, along_columns, columns, multiply_both, shared
from jaxhybrid_kernels.numerics import LOG2_E, NOTHING


def key_gradients_kernel(plan: AttentionPlan) -> Callable[..., list[jax.Array]]:
    """(q [B,Q,Hq,D], k, v [B,M,Hk,D], d_out as q, logsumexp, dots [B,Hq,Q], starts [B,Q], ranges) -> d_k, d_v.

    dots = rowsum(dO O); ranges: `block_ranges.query_blocks_seeing`.
    """
    blocks, D, interpret = plan.key, plan.D, plan.interpret
    factor = D**-0.5 * LOG2_E
    width = blocks.columns

    def body(q, k, v, d_out, logsumexp, dots, starts, ranges, d_k, d_v, s):
        b, index, key_head = lax.axis_index("batch"), lax.axis_index("block"), lax.axis_index("head")
        first_key = index * ROWS
        own = b, pl.ds(first_key, ROWS), key_head
        begin, full_begin, full_end, end, place = (
            unmarked(ranges[b, index, entry]) for entry in (BEGIN, FULL_BEGIN, FULL_END, END, PLACE)
        )

        def load(step, slot):
            head = key_head * plan.group + lax.rem(step, jnp.int32(plan.group))
            queries = pl.ds((begin + lax.div(step, jnp.int32(plan.group))) * width, width)
            sources = {
                "q": q.at[b, queries, head],
                "d_out": d_out.at[b, queries, head],
                "logsumexp": logsumexp.at[b, head, queries],
                "dots": dots.at[b, head, queries],
                "starts": starts.at[b, queries],
            }
            for name, source in sources.items():
                plgpu.copy_gmem_to_smem(source, s[name].at[slot], s["loaded"].at[slot])

        stream = Stream(load, (end - begin) * plan.group, blocks.stages, s["loaded"])
        keys, values = s["k"], s["v"]
        plgpu.copy_gmem_to_smem(k.at[own], keys, s["arrived"])
        plgpu.copy_gmem_to_smem(v.at[own], values, s["arrived"])
        stream.begin()
        plgpu.barrier_wait(s["arrived"])

        def step(i, totals):
            block, slot = begin + lax.div(i, jnp.int32(plan.group)), stream.slot(i)
            queries, d_output = s["q"].at[slot], s["d_out"].at[slot]
            stream.await_block(i)

            def mask(scores):
                row, column = (
                    plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
                )
                started = row >= along_columns(unmarked(columns(s["starts"].at[slot])) - first_key)
                seen = started & (row - column <= place + block * width - first_key)
                return jnp.where(seen, scores, NOTHING)

            def weigh(scores):
                masked = (block < full_begin) | (block >= full_end)
                scores = lax.cond(masked, mask, lambda scores: scores, scores)
                return jnp.exp2(scores * factor - along_columns(columns(s["logsumexp"].at[slot])))

            weights, d_weights = multiply_both(
                (keys, queries.transpose((1, 0))), (values, d_output.transpose((1, 0))), weigh, interpret=interpret
            )
            d_scores = weights * (d_weights - along_columns(columns(s["dots"].at[slot])))
            d_key, d_value = totals
            totals = accumulate(
                (d_key, [(d_scores.astype(plan.dtype), queries)]),
                (d_value, [(weights.astype(plan.dtype), d_output)]),
                interpret=interpret,
            )
            stream.release(i)
            return totals

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
        d_key, d_value = lax.fori_loop(0, stream.steps, step, (zeros, zeros))
        keys[...] = (d_key * D**-0.5).astype(plan.dtype)
        values[...] = d_value.astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(keys, d_k.at[own])
        plgpu.copy_smem_to_gmem(values, d_v.at[own])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    gradient = jax.ShapeDtypeStruct((plan.B, plan.M, plan.Hk, D), plan.dtype)
    held = shared(ROWS, D, dtype=plan.dtype)
    met = shared(blocks.stages, width, D, dtype=plan.dtype)
    by_query = plgpu.SMEM((blocks.stages, width), jnp.float32)
    return kernel(
        body,
        plan,
        [gradient, gradient],
        scratch_types={
            "s": {
                "k": held,
                "v": held,
                "arrived": plgpu.Barrier(num_arrivals=2),
                "q": met,
                "d_out": met,
                "logsumexp": by_query,
                "dots": by_query,
                "starts": plgpu.SMEM((blocks.stages, width), jnp.int32),
                "loaded": plgpu.Barrier(num_arrivals=5, num_barriers=blocks.stages),
            }
        },
        grid=(plan.Hk, plan.M // ROWS, plan.B),
        grid_names=("head", "block", "batch"),
    )
