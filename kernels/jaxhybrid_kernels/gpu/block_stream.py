"""Blocks that pass through shared memory one after the other, a few of them under way at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.attention_plan import Blocks


class Stream(NamedTuple):
    """`load(step, slot)` has the copies of a step's block on their way to a slot, which say so at `loaded[slot]`.

    Where a warpgroup of its own loads, `consumed[slot]` tells it that all others are done with the slot.
    """

    load: Callable[[Any, Any], None]
    steps: jax.Array
    stages: int
    loaded: Any
    consumed: Any

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.stages))

    def await_block(self, step: jax.Array) -> None:
        plgpu.barrier_wait(self.loaded.at[self.slot(step)])

    def release(self, step: jax.Array) -> None:
        """This warpgroup is done with the step's block: its slot can have the next one."""

        @pl.when(step + self.stages < self.steps)
        def _():
            if self.consumed is not None:
                plgpu.barrier_arrive(self.consumed.at[self.slot(step)])
            else:  # issuing a copy waits for all of the warpgroup to be here
                self.load(step + self.stages, self.slot(step))

    def begin(self) -> None:
        for step in range(self.stages):

            @pl.when(step < self.steps)
            def _(step=step):
                self.load(jnp.int32(step), step)

    def produce(self) -> None:
        """All that the loading warpgroup does."""
        self.begin()

        @pl.loop(self.stages, self.steps)
        def _(step):
            plgpu.barrier_wait(self.consumed.at[self.slot(step)])
            self.load(step, self.slot(step))


def run_stream(blocks: Blocks, stream: Stream, consume: Callable[[], None]) -> None:
    """`consume` in every computing warpgroup, with the stream under way."""
    if not blocks.loader:
        stream.begin()
        consume()
        return
    group = lax.axis_index("group")

    @pl.when(group == blocks.warpgroups)
    def _():
        plgpu.set_max_registers(blocks.registers[0], action="decrease")
        stream.produce()

    @pl.when(group < blocks.warpgroups)
    def _():
        plgpu.set_max_registers(blocks.registers[1], action="increase")
        consume()


def barriers(blocks: Blocks, copies: int) -> dict[str, Any]:
    """Scratch memory of a stream each block of which takes so many copies."""
    scratch = {"loaded": plgpu.Barrier(num_arrivals=copies, num_barriers=blocks.stages)}
    if blocks.loader:
        scratch["consumed"] = plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages)
    if blocks.alternate:
        scratch["turn"] = plgpu.Barrier(num_arrivals=2)
    return scratch
