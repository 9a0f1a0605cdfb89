"""All gradients of softmax attention in one kernel: a thread block has the keys of one key head, and meets the queries
that see them in all heads of its group, so that the heads' gradients of keys and values are summed in registers.

Everything is transposed, so that left operands come from registers:
    P' = 2^(S' - logsumexp)   dP' = V dO'   dS' = P' (dP' - rowsum(dO O)')   dV = P' dO   dK = dS' Q / sqrt(D)
The queries' gradient dS K is added up over the thread blocks in memory, in float32; each warpgroup makes a part of its
channels from the dS of all warpgroups. So its last bits depend on which thread block comes first.
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.attention_plan import ROWS, AttentionPlan
from jaxhybrid_kernels.gpu.block_ranges import BEGIN, END, FULL_BEGIN, FULL_END, PLACE
from jaxhybrid_kernels.gpu.block_stream import Stream, barriers, run_stream
from jaxhybrid_kernels.gpu.launch import kernel, unmarked
from jaxhybrid_kernels.gpu.products import accumulate, along_columns, columns, multiply_both, multiply_sum, shared
from jaxhybrid_kernels.gpu.query_block import LOG2_E, NOTHING

FLOAT32_TILES = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


def gradients_kernel(plan: AttentionPlan) -> Callable[..., list[jax.Array]]:
    """(q [B,Q,Hq,D], k, v [B,M,Hk,D], d_out as q, logsumexp, dots [B,Hq,Q], starts [B,Q], ranges, d_q) -> d_k, d_v.

    dots = rowsum(dO O); ranges: `block_ranges.query_blocks_seeing`. d_q is a reference to zeros [B,Q,Hq,D] float32, to
    which the gradient of q is added, but for a factor of 1 / sqrt(D).
    """
    blocks, D, interpret = plan.key, plan.D, plan.interpret
    factor = D**-0.5 * LOG2_E
    width, parts = blocks.columns, blocks.warpgroups
    part = D // parts

    def body(q, k, v, d_out, logsumexp, dots, starts, ranges, d_q, d_k, d_v, s):
        b, index, key_head = lax.axis_index("batch"), lax.axis_index("block"), lax.axis_index("head")
        group = lax.axis_index("group")
        first_key = index * blocks.rows + group * ROWS
        own = b, pl.ds(first_key, ROWS), key_head
        begin, full_begin, full_end, end, place = (
            unmarked(ranges[b, index, entry]) for entry in (BEGIN, FULL_BEGIN, FULL_END, END, PLACE)
        )

        def queries_of(step):
            head = key_head * plan.group + lax.rem(step, jnp.int32(plan.group))
            return head, begin + lax.div(step, jnp.int32(plan.group))

        def load(step, slot):
            head, block = queries_of(step)
            queries = pl.ds(block * width, width)
            sources = {
                "q": q.at[b, queries, head],
                "d_out": d_out.at[b, queries, head],
                "logsumexp": logsumexp.at[b, head, queries],
                "dots": dots.at[b, head, queries],
                "starts": starts.at[b, queries],
            }
            for name, source in sources.items():
                plgpu.copy_gmem_to_smem(source, s[name].at[slot], s["loaded"].at[slot])

        stream = Stream(load, (end - begin) * plan.group, blocks.stages, s["loaded"], s.get("consumed"))

        def consume():
            keys, values, arrived = s["k"].at[group], s["v"].at[group], s["arrived"].at[group]
            plgpu.copy_gmem_to_smem(k.at[own], keys, arrived)
            plgpu.copy_gmem_to_smem(v.at[own], values, arrived)
            plgpu.barrier_wait(arrived)
            if parts > 1:  # the keys of all
                plgpu.barrier_arrive(s["made"])
                plgpu.barrier_wait(s["made"])

            def step(i, totals):
                (head, block), slot = queries_of(i), stream.slot(i)
                queries, d_output, d_scores_of = (
                    s["q"].at[slot],
                    s["d_out"].at[slot],
                    s["d_scores"].at[lax.rem(i, jnp.int32(2))],
                )
                stream.await_block(i)

                def mask(scores):
                    row, column = (
                        plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA)
                        for axis in (0, 1)
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
                d_scores = (weights * (d_weights - along_columns(columns(s["dots"].at[slot])))).astype(plan.dtype)
                weights = weights.astype(plan.dtype)
                d_scores_of.at[group][...] = d_scores
                plgpu.commit_smem()
                if parts > 1:
                    plgpu.barrier_arrive(s["made"])
                d_key, d_value = totals
                totals = accumulate(
                    (d_key, [(d_scores, queries)]), (d_value, [(weights, d_output)]), interpret=interpret
                )
                stream.release(i)
                if parts > 1:
                    plgpu.barrier_wait(s["made"])
                channels = pl.ds(group * part, part)
                d_query = multiply_sum(
                    *((d_scores_of.at[j].transpose((1, 0)), s["k"].at[j, :, channels]) for j in range(parts)),
                    interpret=interpret,
                )
                target = d_q.at[b, pl.ds(block * width, width), head, channels]
                if interpret:
                    target[...] = target[...] + d_query
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    s["d_q"].at[group][...] = d_query
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(s["d_q"].at[group], target, reduction_op="add")
                return totals

            zeros = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
            d_key, d_value = lax.fori_loop(0, stream.steps, step, (zeros, zeros))
            if parts > 1:  # all are done with the keys
                plgpu.barrier_arrive(s["made"])
                plgpu.barrier_wait(s["made"])
            keys[...] = (d_key * D**-0.5).astype(plan.dtype)
            values[...] = d_value.astype(plan.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(keys, d_k.at[own])
            plgpu.copy_smem_to_gmem(values, d_v.at[own])
            plgpu.wait_smem_to_gmem(0)

        run_stream(blocks, stream, consume)

    gradient = jax.ShapeDtypeStruct((plan.B, plan.M, plan.Hk, D), plan.dtype)
    held = shared(parts, ROWS, D, dtype=plan.dtype)
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
                "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=parts),
                "q": met,
                "d_out": met,
                "logsumexp": by_query,
                "dots": by_query,
                "starts": plgpu.SMEM((blocks.stages, width), jnp.int32),
                "d_scores": shared(2, parts, ROWS, width, dtype=plan.dtype),
                "d_q": plgpu.SMEM((parts, width, part), jnp.float32, transforms=FLOAT32_TILES),
                "made": plgpu.Barrier(num_arrivals=parts),
                **barriers(blocks, copies=5),
            }
        },
        grid=(plan.Hk, plan.M // blocks.rows, plan.B),
        grid_names=("head", "block", "batch"),
        num_threads=blocks.warpgroups + blocks.loader,
        thread_name="group",
    )
