"""The forward kernel: a grid step takes a chunk of several heads, whose states stay in VMEM from chunk to chunk."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxhybrid_kernels.dplr.inputs import Inputs
from jaxhybrid_kernels.dplr.tpu.chunk import Arrays, Chunk, Constants, constants, read_group
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
from jaxhybrid_kernels.tpu.inverse import inverse_unit_lower
from jaxhybrid_kernels.tpu.products import product, product_transposed, transposed_product


class Residuals(NamedTuple):
    """What the backward keeps beside the inputs."""

    states: Any  # [B,n,V,N*K] entry states, compute dtype
    inverses: Any  # [B,T,N*C] of I - ab, compute dtype


class Results(NamedTuple):
    out: Any  # [B,T,N*V]
    final: Any  # [B,V,N*K]
    kept: Residuals


def tpu_forward(
    inputs: Inputs, initial_state: jax.Array, layout: Layout
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    """((out, final state), residuals); see `dplr_attention`."""
    B, T, N, C = layout.B, layout.T, layout.N, CHUNK
    shape = jax.ShapeDtypeStruct
    results = launch(
        partial(_kernel, layout=layout),
        "dplr_forward",
        layout,
        (lay_out_inputs(inputs, layout), lay_out_state(initial_state, layout), constants()),
        (input_blocks(layout), state_block(layout), constant_blocks()),
        Results(
            shape((B, T, N * layout.V), inputs.v.dtype),
            shape((B, layout.V, N * layout.K), jnp.float32),
            Residuals(
                shape((B, layout.chunks, layout.V, N * layout.K), layout.dtype), shape((B, T, N * C), layout.dtype)
            ),
        ),
        Results(token_block(layout, layout.V), state_block(layout), residual_blocks(layout)),
    )
    out = take_back(results.out, inputs.v, inputs.segment_ids, layout)
    return (out, take_back_state(results.final, initial_state.shape, layout)), results.kept


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


def residual_blocks(layout: Layout) -> Residuals:
    states = Block((1, 1, layout.V, layout.heads * layout.K), ("batch", "chunk", None, "head"))
    return Residuals(states, token_block(layout, CHUNK))


def constant_blocks() -> Constants:
    return Constants(*(Block(x.shape, (None, None)) for x in constants()))


def _kernel(
    arrays: Arrays, initial: Any, known: Constants, results: Results, states: Any, *, layout: Layout
) -> None:
    groups = range(layout.heads // layout.group)
    load_states(states, initial, layout, pl.program_id(2) == 0)
    chunks = [read_group(arrays, known, group, layout) for group in groups]
    inverses = [x.astype(layout.dtype) for x in inverse_unit_lower(coupled_pairs(chunks), layout.exact)]
    entries = []
    for group in groups:
        lanes, chunk = chunks[group]
        entries.append(states[group].astype(layout.dtype))
        wide = slice(group * layout.group * layout.K, (group + 1) * layout.group * layout.K)
        results.kept.states[0, 0, :, wide] = lanes.gather(entries[group])
    for pair, inverse in enumerate(inverses):
        results.kept.inverses[0, :, pair * 2 * CHUNK : (pair + 1) * 2 * CHUNK] = inverse[:CHUNK] + inverse[CHUNK:]
    reads, updates = solve(chunks, entries, inverses)
    for group in groups:
        lanes, chunk = chunks[group]
        update = sum(updates[lanes.first : lanes.first + lanes.heads])
        out = reads[group]
        for head in range(lanes.heads):
            written = lanes.stack(lanes.own(chunk.v, head), updates[lanes.first + head], head)
            out = out + product(chunk.triangles[head][:CHUNK].astype(layout.dtype), written)
        wide = layout.group * layout.V
        results.out[0, :, group * wide : (group + 1) * wide] = out.astype(results.out.dtype)
        grown = transposed_product(jnp.concatenate([chunk.v, update], axis=0), chunk.to_exit)
        states[group] = chunk.carry * states[group] + lanes.diagonal_blocks(grown)
    store_states(states, results.final, layout, pl.program_id(2) == layout.chunks - 1)


def load_states(states: Any, ref: Any, layout: Layout, when: jax.Array) -> None:
    """From a block [1,V,heads*K] to the scratch [groups,group*V,group*K]."""
    wide = layout.group * layout.K

    @pl.when(when)
    def _():
        for group in range(states.shape[0]):
            lanes = Lanes(layout.group, 0, layout.dtype)
            states[group] = lanes.spread(ref[0, :, group * wide : (group + 1) * wide])


def store_states(states: Any, ref: Any, layout: Layout, when: jax.Array) -> None:
    wide = layout.group * layout.K

    @pl.when(when)
    def _():
        for group in range(states.shape[0]):
            lanes = Lanes(layout.group, 0, layout.dtype)
            ref[0, :, group * wide : (group + 1) * wide] = lanes.gather(states[group])


def coupled_pairs(chunks: list[tuple[Lanes, Chunk]]) -> list[jax.Array]:
    """-ab of every two neighbouring heads, as diagonal blocks [2C,2C]."""
    own = []
    for lanes, chunk in chunks:
        for head, triangle in enumerate(chunk.triangles):
            lane = lax.broadcasted_iota(jnp.int32, (CHUNK, 2 * CHUNK), 1)
            own.append(jnp.where((lane < CHUNK) != lanes.odd(head), -triangle[CHUNK:], 0))
    return [jnp.concatenate(own[i : i + 2], axis=0) for i in range(0, len(own), 2)]


def solve(
    chunks: list[tuple[Lanes, Chunk]], entries: list[jax.Array], inverses: list[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """scale q_in S [C,group*V] float32 of each group, and U [C,group*V] of each head, zero in other heads' lanes."""
    out, reads = [], []
    for (lanes, chunk), entry in zip(chunks, entries):
        both = product_transposed(chunk.from_entry, entry)
        out.append(both[:CHUNK])
        for head in range(lanes.heads):
            v = lanes.own(chunk.v, head)
            seen = product(chunk.triangles[head][CHUNK:].astype(v.dtype), lanes.stack(v, jnp.zeros_like(v), head))
            reads.append(lanes.own(both[CHUNK:], head) + seen)
    updates = []
    for pair, inverse in enumerate(inverses):
        read = jnp.concatenate(reads[2 * pair : 2 * pair + 2], axis=0).astype(inverse.dtype)
        update = product(inverse, read).astype(inverse.dtype)
        updates += [update[:CHUNK], update[CHUNK:]]
    return out, updates
