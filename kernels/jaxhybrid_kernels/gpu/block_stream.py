"""Blocks that pass through shared memory one after the other, a few of them under way at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax


class Stream(NamedTuple):
    """`load(step, slot)` has the copies of a step's block on their way to a slot, which say so at `loaded[slot]`.

    Where a warpgroup of its own loads (`produce`), `consumed[slot]` tells it that all others are done with the slot.
    There may be no steps at all.
    """

    load: Callable[[Any, Any], None]
    steps: jax.Array
    stages: int
    loaded: Any
    consumed: Any = None

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.stages))

    def await_block(self, step: jax.Array) -> None:
        plgpu.barrier_wait(self.loaded.at[self.slot(step)])

    def release(self, step: jax.Array) -> None:
        """This warpgroup is done with the step's block: its slot can have the next one, if there is one."""

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
