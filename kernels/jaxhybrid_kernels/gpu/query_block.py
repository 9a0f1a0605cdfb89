"""The 64 queries of one head that a warpgroup holds, in the kernels that go over the keys they see."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.attention_plan import ROWS, WARPGROUPS, AttentionPlan, Blocks
from jaxhybrid_kernels.gpu.block_ranges import BEGIN, END, FULL_BEGIN, FULL_END, PLACE
from jaxhybrid_kernels.gpu.block_stream import Stream
from jaxhybrid_kernels.gpu.launch import unmarked
from jaxhybrid_kernels.gpu.products import along_rows, rows, shared
from jaxhybrid_kernels.numerics import NOTHING

LOADING, COMPUTING = 24, 240  # registers of a thread


class QueryBlock(NamedTuple):
    """Where the queries are, and the blocks of keys that their thread block meets."""

    b: Any
    head: Any
    key_head: Any
    group: Any
    tokens: Any  # of q
    first: Any  # query's place among the keys
    begin: Any
    full_begin: Any
    full_end: Any
    end: Any
    columns: int

    def masked(self, step: jax.Array, scores: jax.Array, starts: jax.Array) -> jax.Array:
        """The step's scores [64,columns] with NOTHING at keys that are not seen; starts [64]."""
        block = self.begin + step
        key = block * self.columns

        def mask(scores):
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
            )
            seen = (column >= along_rows(starts - key, self.columns)) & (column - row <= self.first - key)
            return jnp.where(seen, scores, NOTHING)

        return lax.cond((block < self.full_begin) | (block >= self.full_end), mask, lambda scores: scores, scores)

    def starts(self, starts: Any) -> jax.Array:
        return unmarked(rows(starts.at[self.b, self.tokens]))


def query_block(plan: AttentionPlan, blocks: Blocks, ranges: Any) -> QueryBlock:
    b, head, group = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("group")
    # Where documents are long the last queries see most keys: they begin, so that the ends fill the chip.
    index = plan.Q // plan.rows - 1 - lax.axis_index("block")
    shift = 0 if plan.by_head else group * ROWS
    key_head = lax.div(head * plan.heads, jnp.int32(plan.group))
    begin, full_begin, full_end, end, place = (
        unmarked(ranges[b, index, entry]) for entry in (BEGIN, FULL_BEGIN, FULL_END, END, PLACE)
    )
    if plan.by_head:
        head = head * WARPGROUPS + group
    tokens = pl.ds(index * plan.rows + shift, ROWS)
    return QueryBlock(b, head, key_head, group, tokens, place + shift, begin, full_begin, full_end, end, blocks.columns)


def key_stream(blocks: Blocks, own: QueryBlock, k: Any, v: Any, s: dict[str, Any]) -> Stream:
    """The keys and values that the queries see, in s["k"] and s["v"]."""

    def load(step, slot):
        keys = pl.ds((own.begin + step) * blocks.columns, blocks.columns)
        for source, name in ((k, "k"), (v, "v")):
            plgpu.copy_gmem_to_smem(source.at[own.b, keys, own.key_head], s[name].at[slot], s["loaded"].at[slot])

    return Stream(load, own.end - own.begin, blocks.stages, s["loaded"], s["consumed"])


def key_slots(plan: AttentionPlan, blocks: Blocks) -> dict[str, Any]:
    """Scratch memory of a stream of keys and values."""
    slots = shared(blocks.stages, blocks.columns, plan.D, dtype=plan.dtype)
    return {
        "k": slots,
        "v": slots,
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
        "consumed": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=blocks.stages),
    }


def run_beside_loader(stream: Stream, consume: Callable[[], None]) -> None:
    """`consume` in the warpgroups that compute, the stream's loads in the last one."""
    group = lax.axis_index("group")

    @pl.when(group == WARPGROUPS)
    def _():
        plgpu.set_max_registers(LOADING, action="decrease")
        stream.produce()

    @pl.when(group < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTING, action="increase")
        consume()


def launch_grid(plan: AttentionPlan) -> dict[str, Any]:
    return {
        "grid": (plan.Hq // plan.heads, plan.Q // plan.rows, plan.B),
        "grid_names": ("head", "block", "batch"),
        "num_threads": WARPGROUPS + 1,
        "thread_name": "group",
    }
