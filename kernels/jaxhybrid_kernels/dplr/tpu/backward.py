"""The backward kernel, from the last chunk to the first; the gradients of the states stay in VMEM.

Letters as in dplr/chunked.py. What the backward needs of a chunk is computed again, but for the entry states and the
inverses, which the forward kept.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxhybrid_kernels.dplr.inputs import Inputs
from jaxhybrid_kernels.dplr.tpu.chunk import Arrays, Chunk, Constants, constants, read_pair
from jaxhybrid_kernels.dplr.tpu.forward import (
    Residuals,
    constant_blocks,
    diagonal_pair,
    input_blocks,
    lay_out_inputs,
    load_states,
    pair_lanes,
    residual_blocks,
    solve,
    solve_pair,
    state_block,
    store_states,
)
from jaxhybrid_kernels.dplr.tpu.launch import launch
from jaxhybrid_kernels.dplr.tpu.layout import CHUNK, Layout, lay_out, lay_out_state, take_back, take_back_state
from jaxhybrid_kernels.dplr.tpu.levels import Tokens, decay_gradient, move_down, move_up, triangle_gradients
from jaxhybrid_kernels.tpu.products import product, product_transposed, transposed_product
from jaxhybrid_kernels.tpu.turns import Chain, abreast, take_turns


class Results(NamedTuple):
    q: Any  # [B,T,N*K]
    k: Any
    v: Any  # [B,T,N*V]
    log_decay: Any  # [B,T,N*K] float32
    a: Any
    b: Any
    initial: Any  # [B,V,N*K] float32


def tpu_backward(
    inputs: Inputs, residuals: Residuals, d_out: jax.Array, d_final: jax.Array, layout: Layout
) -> tuple[Inputs, jax.Array]:
    """(Gradients of the inputs in their dtypes, gradient of the initial state)."""
    ids = inputs.segment_ids
    arrays = lay_out_inputs(inputs, layout)
    blocks = input_blocks(layout)
    final = lay_out_state(d_final, layout)
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays[:6], final))
    *gradients, d_initial = launch(
        partial(_kernel, layout=layout),
        "dplr_backward",
        layout,
        (arrays, residuals, lay_out(d_out, ids, layout, layout.dtype), final, constants(layout.exact)),
        (blocks, residual_blocks(layout), blocks.v, state_block(layout), constant_blocks(layout)),
        Results(*shapes),
        Results(*blocks[:6], state_block(layout)),
        reverse=True,
    )
    d_inputs = [take_back(x, like, ids, layout) for x, like in zip(gradients, inputs[:6])]
    return Inputs(*d_inputs), take_back_state(d_initial, d_final.shape, layout)


def _kernel(
    arrays: Arrays,
    kept: Residuals,
    d_out: Any,
    d_final: Any,
    known: Constants,
    results: Results,
    d_states: Any,
    *,
    layout: Layout,
) -> None:
    load_states(d_states, d_final, layout, pl.program_id(2) == 0)
    take_turns([_pair(i, arrays, kept, d_out, known, results, d_states, layout) for i in range(layout.heads // 2)])
    store_states(d_states, results.initial, layout, pl.program_id(2) == layout.chunks - 1)


def _pair(
    pair: int,
    arrays: Arrays,
    kept: Residuals,
    d_out: Any,
    known: Constants,
    results: Results,
    d_states: Any,
    layout: Layout,
) -> Chain[None]:
    """The chunk of two neighbouring heads."""
    chunks = yield from read_pair(arrays, known, pair, layout)
    entries = [chunk.lanes.spread(kept.states[0, 0, :, chunk.lanes.of_block(layout.K)]) for chunk in chunks]
    inverse = diagonal_pair(kept.inverses[0, :, pair_lanes(pair)])
    _, updates = yield from solve(chunks, entries, inverse)
    d_outs = [d_out[0, :, chunk.lanes.of_block(layout.V)] for chunk in chunks]
    d_vs, d_updates = [], []
    for chunk, d_out_group in zip(chunks, d_outs):
        lanes = chunk.lanes
        d_written = product_transposed(chunk.to_exit, d_states[lanes.group].astype(layout.dtype))  # of V above U
        d_v = d_written[:CHUNK]
        for head in range(lanes.heads):
            lower = chunk.triangles[head][:CHUNK].astype(layout.dtype)
            to_v, to_update = lanes.unstack(transposed_product(lower, lanes.own(d_out_group, head)), head)
            d_v = d_v + to_v
            d_updates.append(to_update + lanes.own(d_written[CHUNK:], head))
        d_vs.append(d_v)
    yield
    d_solved = solve_pair(transposed_product, inverse, d_updates, chunks)
    yield
    of_group = zip(chunks, entries, updates, d_outs, d_solved, d_vs)
    yield from abreast([_group(known, results, d_states, layout, *values) for values in of_group])


def _group(
    known: Constants,
    results: Results,
    d_states: Any,
    layout: Layout,
    chunk: Chunk,
    entry: jax.Array,
    update: jax.Array,
    d_out: jax.Array,
    d_solved: jax.Array,
    d_v: jax.Array,
) -> Chain[None]:
    """From the gradient of (I - ab) U to those of the arguments; d_v: what came to v but through U."""
    lanes = chunk.lanes
    d_rows = jnp.concatenate([d_out, d_solved], axis=0)
    written = jnp.concatenate([chunk.v, update], axis=0)
    d_triangles = []
    for head in range(lanes.heads):
        lower = chunk.triangles[head][CHUNK:].astype(layout.dtype)
        d_v = d_v + lanes.unstack(transposed_product(lower, lanes.own(d_solved, head)), head)[0]
        columns = lanes.stack(lanes.own(chunk.v, head), lanes.own(update, head), head)
        d_triangle = product_transposed(d_rows, columns)
        d_triangle = d_triangle if chunk.same is None else chunk.same * d_triangle
        d_triangles.append(jnp.concatenate([d_triangle[:CHUNK], move_up(d_triangle[CHUNK:])], axis=0))
    results.v[0, :, lanes.of_block(layout.V)] = d_v.astype(layout.dtype)
    yield
    d_exit = d_states[lanes.group]
    d_from_entry = product(d_rows, entry)
    d_to_exit = product(written, d_exit.astype(layout.dtype))
    d_carry = chunk.carry * jnp.sum(entry.astype(jnp.float32) * d_exit, axis=0, keepdims=True)
    d_grown = lanes.diagonal_blocks(transposed_product(d_rows, chunk.from_entry))
    d_states[lanes.group] = chunk.carry * d_exit + d_grown
    yield
    d_tokens, d_log_decay = yield from _token_gradients(chunk, known, d_triangles, d_from_entry, d_to_exit, d_carry)
    keys = (0, slice(None), lanes.of_block(layout.K))
    results.q[keys] = (layout.scale * d_tokens.q).astype(layout.dtype)
    results.k[keys] = d_tokens.k.astype(layout.dtype)
    results.log_decay[keys] = d_log_decay
    results.a[keys] = d_tokens.a_up.astype(layout.dtype)
    results.b[keys] = d_tokens.b.astype(layout.dtype)


def _token_gradients(
    chunk: Chunk,
    known: Constants,
    d_triangles: list[jax.Array],
    d_from_entry: jax.Array,
    d_to_exit: jax.Array,
    d_carry: jax.Array,
) -> Chain[tuple[Tokens, jax.Array]]:
    """Gradients of q scaled, a (no longer moved up), k and b, and of log_decay; d_carry [1,W] times carry."""
    within, exponents = yield from triangle_gradients(
        chunk.tokens, chunk.gates.levels, known.meeting[...], d_triangles, chunk.lanes
    )
    gates, (q, a_up, k, b) = chunk.gates, chunk.tokens
    d_q, d_a = gates.through * d_from_entry[:CHUNK], gates.before * d_from_entry[CHUNK:]
    d_k, d_b = gates.after * d_to_exit[:CHUNK], gates.after * d_to_exit[CHUNK:]
    last = jnp.concatenate([jnp.zeros((CHUNK - 1, d_carry.shape[1]), jnp.float32), d_carry], axis=0)
    exponents += [q * d_q + a_up * move_up(d_a) + last, k * d_k + b * d_b]
    gradients = Tokens(within.q + d_q, move_down(within.a_up) + d_a, within.k + d_k, within.b + d_b)
    return gradients, decay_gradient(known.decays[...], exponents)
