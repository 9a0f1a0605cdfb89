"""The forward kernel: a grid step takes a chunk of several heads, whose states stay in VMEM from chunk to chunk."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxhybrid_kernels.dplr.inputs import Inputs
from jaxhybrid_kernels.dplr.tpu.chunk import Arrays, Chunk, Constants, constants, read_pair
from jaxhybrid_kernels.dplr.tpu.lanes import Lanes
from jaxhybrid_kernels.dplr.tpu.launch import Block, launch
from jaxhybrid_kernels.dplr.tpu.layout import (
    CHUNK,
    Layout,
    lay_out,
    lay_out_segments,
    lay_out_state,
    take_back,
    take_back_state,
)
from jaxhybrid_kernels.tpu.inverse import invert_blocks
from jaxhybrid_kernels.tpu.products import product, product_transposed, transposed_product
from jaxhybrid_kernels.tpu.turns import Chain, take_turns


class Residuals(NamedTuple):
    """What the backward keeps beside the inputs."""

    states: Any  # [B,n,V,N*K] entry states, compute dtype
    inverses: Any  # [B,T,N*C] of I - ab, compute dtype


class Results(NamedTuple):
    out: Any  # [B,T,N*V]
    final: Any  # [B,V,N*K]
    kept: Residuals | None


def tpu_forward(
    inputs: Inputs, state: jax.Array, layout: Layout, keep: bool
) -> tuple[tuple[jax.Array, jax.Array], Residuals | None]:
    """((out, final state), residuals if they are to be kept); see `dplr_attention`. state [B,N,K,V] float32."""
    B, T, N = layout.B, layout.T, layout.N
    shape = jax.ShapeDtypeStruct
    results = launch(
        partial(_kernel, layout=layout),
        "dplr_forward",
        layout,
        (lay_out_inputs(inputs, layout), lay_out_state(state, layout), constants(layout.exact)),
        (input_blocks(layout), state_block(layout), constant_blocks(layout)),
        Results(
            shape((B, T, N * layout.V), inputs.v.dtype),
            shape((B, layout.V, N * layout.K), jnp.float32),
            residual_shapes(layout) if keep else None,
        ),
        Results(token_block(layout, layout.V), state_block(layout), residual_blocks(layout) if keep else None),
    )
    out = take_back(results.out, inputs.v, inputs.segment_ids, layout)
    return (out, take_back_state(results.final, state.shape, layout)), results.kept


def lay_out_inputs(inputs: Inputs, layout: Layout) -> Arrays:
    ids = inputs.segment_ids
    q, k, v, a, b = (lay_out(x, ids, layout, layout.dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.a, inputs.b))
    log_decay = lay_out(inputs.log_decay, ids, layout, jnp.float32)
    return Arrays(q, k, v, log_decay, a, b, None if ids is None else lay_out_segments(ids, layout))


def token_block(layout: Layout, width: int) -> Block:
    """Of [B,T,N*width]."""
    return Block((1, CHUNK, layout.heads * width), ("batch", "chunk", "head"))


def state_block(layout: Layout) -> Block:
    """Of [B,V,N*K]."""
    return Block((1, layout.V, layout.heads * layout.K), ("batch", None, "head"))


def input_blocks(layout: Layout) -> Arrays:
    keys = token_block(layout, layout.K)
    segments = Block((1, CHUNK, 2 * CHUNK), ("batch", "chunk", None)) if layout.segments else None
    return Arrays(keys, keys, token_block(layout, layout.V), keys, keys, keys, segments)


def residual_shapes(layout: Layout) -> Residuals:
    states = (layout.B, layout.chunks, layout.V, layout.N * layout.K)
    inverses = (layout.B, layout.T, layout.N * CHUNK)
    return Residuals(*(jax.ShapeDtypeStruct(shape, layout.dtype) for shape in (states, inverses)))


def residual_blocks(layout: Layout) -> Residuals:
    states = Block((1, 1, layout.V, layout.heads * layout.K), ("batch", "chunk", None, "head"))
    return Residuals(states, token_block(layout, CHUNK))


def constant_blocks(layout: Layout) -> Constants:
    return Constants(*(Block(x.shape, (None, None)) for x in constants(layout.exact)))


def _kernel(arrays: Arrays, initial: Any, known: Constants, results: Results, states: Any, *, layout: Layout) -> None:
    load_states(states, initial, layout, pl.program_id(2) == 0)
    take_turns([_pair(i, arrays, known, results, states, layout) for i in range(layout.heads // 2)])
    store_states(states, results.final, layout, pl.program_id(2) == layout.chunks - 1)


def load_states(states: Any, ref: Any, layout: Layout, when: jax.Array) -> None:
    """From a block [1,V,heads*K] to the scratch [groups,group*V,group*K]."""

    @pl.when(when)
    def _():
        for group in range(states.shape[0]):
            lanes = Lanes(layout.group, group * layout.group, layout.dtype)
            states[group] = lanes.spread(ref[0, :, lanes.of_block(layout.K)])


def store_states(states: Any, ref: Any, layout: Layout, when: jax.Array) -> None:
    @pl.when(when)
    def _():
        for group in range(states.shape[0]):
            lanes = Lanes(layout.group, group * layout.group, layout.dtype)
            ref[0, :, lanes.of_block(layout.K)] = lanes.gather(states[group])


def _pair(pair: int, arrays: Arrays, known: Constants, results: Results, states: Any, layout: Layout) -> Chain[None]:
    """The chunk of two neighbouring heads."""
    chunks = yield from read_pair(arrays, known, pair, layout)
    inverse = yield from invert_blocks(_coupling(chunks), CHUNK, layout.exact, block=16)
    inverse = inverse.astype(layout.dtype)
    entries = [states[chunk.lanes.group].astype(layout.dtype) for chunk in chunks]
    if results.kept is not None:
        for chunk, entry in zip(chunks, entries):
            results.kept.states[0, 0, :, chunk.lanes.of_block(layout.K)] = chunk.lanes.gather(entry)
        results.kept.inverses[0, :, pair_lanes(pair)] = inverse
    outs, updates = yield from solve(chunks, entries, diagonal_pair(inverse))
    for chunk, out, update in zip(chunks, outs, updates):
        lanes = chunk.lanes
        for head in range(lanes.heads):
            written = lanes.stack(lanes.own(chunk.v, head), lanes.own(update, head), head)
            out = out + product(chunk.triangles[head][:CHUNK].astype(layout.dtype), written)
        results.out[0, :, lanes.of_block(layout.V)] = out.astype(results.out.dtype)
        grown = transposed_product(jnp.concatenate([chunk.v, update], axis=0), chunk.to_exit)
        states[lanes.group] = chunk.carry * states[lanes.group] + lanes.diagonal_blocks(grown)
        yield


def pair_lanes(pair: int) -> slice:
    """Where the inverses of a pair of heads lie in a grid step's block."""
    return slice(pair * 2 * CHUNK, (pair + 1) * 2 * CHUNK)


def diagonal_pair(inverse: jax.Array) -> jax.Array:
    """Both heads' inverses from side by side [C,2C] to diagonal blocks [2C,2C]."""
    return Lanes(2, 0, inverse.dtype).spread(inverse)


def _coupling(chunks: list[Chunk]) -> jax.Array:
    """-ab of both heads, as diagonal blocks [2C,2C]."""
    lane = lax.broadcasted_iota(jnp.int32, (CHUNK, 2 * CHUNK), 1)
    triangles = [triangle for chunk in chunks for triangle in chunk.triangles]
    return jnp.concatenate(
        [jnp.where((lane < CHUNK) == (i == 0), -x[CHUNK:], 0) for i, x in enumerate(triangles)], axis=0
    )


def solve(
    chunks: list[Chunk], entries: list[jax.Array], inverse: jax.Array
) -> Chain[tuple[list[jax.Array], list[jax.Array]]]:
    """For each group scale q_in S, float32, and U, both [C,group*V]."""
    outs, reads = [], []
    for chunk, entry in zip(chunks, entries):
        both = product_transposed(chunk.from_entry, entry)
        outs.append(both[:CHUNK])
        for head in range(chunk.lanes.heads):
            v = chunk.lanes.own(chunk.v, head)
            columns = chunk.lanes.stack(v, jnp.zeros_like(v), head)
            seen = product(chunk.triangles[head][CHUNK:].astype(v.dtype), columns)
            reads.append(chunk.lanes.own(both[CHUNK:], head) + seen)
    yield
    updates = solve_pair(product, inverse, reads, chunks)
    yield
    return outs, updates


def solve_pair(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    inverse: jax.Array,
    heads: list[jax.Array],
    chunks: list[Chunk],
) -> list[jax.Array]:
    """multiply(inverse, both heads' [C,group*V]) for each group; lanes of other heads are zero before and after."""
    both = multiply(inverse, jnp.concatenate(heads, axis=0).astype(inverse.dtype)).astype(inverse.dtype)
    halves = both[:CHUNK], both[CHUNK:]
    return [halves[0] + halves[1]] if len(chunks) == 1 else list(halves)
