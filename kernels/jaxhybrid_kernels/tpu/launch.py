"""Starts a kernel over (batch, head groups, chunks): blocks, platform, and manual mesh axes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxhybrid_kernels.tpu.layout import CHUNK, Layout

VMEM_BYTES = 64 * 2**20


class Block(NamedTuple):
    """The part of an array that a grid step sees, and its block indices from (batch, head group, chunk)."""

    shape: tuple[int, ...]
    place: Callable[[Any, Any, Any], tuple[Any, ...]]


def token_block(layout: Layout, heads: int, width: int) -> Block:
    """Of [B,n*C,heads*width]; head groups may share a head."""
    count = layout.block_heads(heads)
    return Block((1, CHUNK, count * width), lambda b, g, t: (b, t, g * layout.heads * heads // layout.sizes.N // count))


def state_block(layout: Layout) -> Block:
    """Of [B,N,K,V]."""
    return Block((1, layout.heads, layout.K, layout.V), lambda b, g, t: (b, g, 0, 0))


def chunk_block(heads: int, rows: int, columns: int) -> Block:
    """Of [B,steps*heads,n,rows,columns]."""
    return Block((1, heads, 1, rows, columns), lambda b, g, t: (b, g, t, 0, 0))


def whole_block(shape: tuple[int, ...]) -> Block:
    """All of an array, at every grid step."""
    return Block(shape, lambda b, g, t: (0,) * len(shape))


def launch(
    kernel: Callable[..., None],
    name: str,
    layout: Layout,
    inputs: Any,
    input_blocks: Any,
    outputs: Any,
    output_blocks: Any,
    scratch: tuple[Any, ...],
    reverse: bool = False,
) -> Any:
    """Runs kernel(*inputs, outputs, *scratch), all of them references, on every block, chunks in order or reversed.

    outputs: ShapeDtypeStructs; scratch: trees of them, arrays that live as long as a (batch, head group).
    On a CPU the kernel is interpreted.
    """
    varying = jax.typeof(jax.tree.leaves(inputs)[0]).manual_axis_type
    outputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying), outputs)

    def specification(block: Block) -> pl.BlockSpec:
        def place(b, g, t):
            return block.place(b, g, layout.chunks - 1 - t if reverse else t)

        return pl.BlockSpec(block.shape, place)

    def specifications(blocks: Any) -> Any:
        return jax.tree.map(specification, blocks, is_leaf=lambda x: isinstance(x, Block))

    call = partial(
        pl.pallas_call,
        kernel,
        out_shape=(outputs,),
        grid=(layout.sizes.B, layout.steps, layout.chunks),
        in_specs=specifications(input_blocks),
        out_specs=(specifications(output_blocks),),
        scratch_shapes=jax.tree.map(lambda x: pltpu.VMEM(x.shape, x.dtype), scratch),
        name=name,
    )
    on_chip = call(
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        )
    )
    return lax.platform_dependent(*inputs, tpu=on_chip, cpu=call(interpret=True))[0]
