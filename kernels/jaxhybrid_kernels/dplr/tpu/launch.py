"""Starts a kernel over (batch, groups of heads, chunks): blocks, platform, and manual mesh axes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxhybrid_kernels.dplr.tpu.layout import Layout

VMEM_BYTES = 64 * 2**20


class Block:
    """The part of an array that a grid step sees, by the axes of the array that follow the grid.

    axes: for each axis of the array "batch", "head" or "chunk", or None for an axis that is seen whole.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...]):
        self.shape, self.axes = shape, axes

    def specification(self, chunks: int, reverse: bool) -> pl.BlockSpec:
        def place(batch, head, chunk):
            at = {"batch": batch, "head": head, "chunk": chunks - 1 - chunk if reverse else chunk, None: 0}
            return tuple(at[axis] for axis in self.axes)

        return pl.BlockSpec(self.shape, place)


def launch(
    kernel: Callable[..., None],
    name: str,
    layout: Layout,
    inputs: Any,
    input_blocks: Any,
    outputs: Any,
    output_blocks: Any,
    reverse: bool = False,
) -> Any:
    """Runs kernel(*inputs, outputs, states), all of them references, on every block, chunks in order or reversed.

    outputs: ShapeDtypeStructs. states [groups,group*V,group*K] float32 lives as long as a (batch, group of heads). On a
    CPU the kernel is interpreted.
    """
    varying = jax.typeof(jax.tree.leaves(inputs)[0]).manual_axis_type
    outputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying), outputs)

    def specifications(blocks: Any) -> Any:
        return jax.tree.map(
            lambda block: block.specification(layout.chunks, reverse), blocks, is_leaf=lambda x: isinstance(x, Block)
        )

    states = (layout.heads // layout.group, layout.group * layout.V, layout.group * layout.K)
    call = partial(
        pl.pallas_call,
        kernel,
        out_shape=(outputs,),
        grid=(layout.B, layout.steps, layout.chunks),
        in_specs=specifications(input_blocks),
        out_specs=(specifications(output_blocks),),
        scratch_shapes=[pltpu.VMEM(states, jnp.float32)],
        name=name,
    )
    on_chip = call(
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        )
    )
    return lax.platform_dependent(*inputs, tpu=on_chip, cpu=call(interpret=True))[0]
