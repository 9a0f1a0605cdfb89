"""Backward kernel: time in reverse, the gradient of the states held in VMEM.

Per chunk, with dS' the gradient of the exit state and dO that of the outputs (row scalings left out):
    dU = pair' dO + k_out dS'        dZ = inverse' dU        dV = dW = beta dZ
    dS = carry dS' + q_in' dO - k_in' dW        dPair = dO U'        dCoupling = -beta tril(dZ U', -1)
The inverse itself needs no gradient: U = inverse Z, so that the gradient of I + strict is -dZ U'.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.tpu.forward import (
    Arrays,
    Residuals,
    input_blocks,
    lay_out_inputs,
    read_head,
    read_operands,
    read_query_key,
    residual_blocks,
    scale_rows,
    write_head,
)
from jaxhybrid_kernels.tpu.gates import gate_gradient_rows, gate_gradients
from jaxhybrid_kernels.tpu.head_gates import head_gradients
from jaxhybrid_kernels.tpu.launch import chunk_block, launch, state_block, token_block
from jaxhybrid_kernels.tpu.layout import CHUNK, Layout, lay_out, lay_out_state, take_back, take_back_state
from jaxhybrid_kernels.tpu.operands import Operands, StateGradients
from jaxhybrid_kernels.tpu.products import product, product_transposed, transposed_product


class Gradients(NamedTuple):
    q: Any  # [B,n*C,heads*K], a head once per group that reads it
    k: Any
    v: Any
    log_decay: Any  # [B,n*C,N*K] when per channel, else None
    gates: Any  # [B,steps,n,rows,C]
    initial: Any  # [B,N,K,V]


def tpu_backward(
    inputs: Inputs, residuals: Residuals, d_out: jax.Array, d_final: jax.Array, layout: Layout
) -> tuple[Inputs, jax.Array]:
    """(Gradients of the inputs in their dtypes and shapes, gradient of the initial state)."""
    sizes, K, V, ids = layout.sizes, layout.K, layout.V, inputs.segment_ids
    B, length = sizes.B, layout.chunks * CHUNK

    def tokens(heads: int, width: int, like: Any) -> jax.ShapeDtypeStruct:
        copies = layout.copies(heads)
        dtype = like.dtype if copies == 1 else jnp.float32
        return jax.ShapeDtypeStruct((B, length, copies * heads * width), dtype)

    channel = layout.decay == "channel"
    rows = gate_gradient_rows(layout)
    outputs = Gradients(
        tokens(sizes.Hq, K, inputs.q),
        tokens(sizes.Hk, K, inputs.k),
        tokens(sizes.N, V, inputs.v),
        tokens(sizes.N, K, inputs.log_decay) if channel else None,
        jax.ShapeDtypeStruct((B, layout.steps, layout.chunks, rows, CHUNK), jnp.float32) if rows else None,
        jax.ShapeDtypeStruct((B, sizes.N, K, V), jnp.float32),
    )
    blocks = Gradients(
        token_block(layout, sizes.Hq * layout.copies(sizes.Hq), K),
        token_block(layout, sizes.Hk * layout.copies(sizes.Hk), K),
        token_block(layout, sizes.N, V),
        token_block(layout, sizes.N, K) if channel else None,
        chunk_block(1, rows, CHUNK) if rows else None,
        state_block(layout),
    )
    gradients = launch(
        partial(backward_kernel, layout=layout),
        "linear_attention_backward",
        layout,
        (
            lay_out_inputs(inputs, layout),
            residuals,
            lay_out(d_out, ids, V, layout.dtype),
            lay_out_state(d_final, layout),
        ),
        (
            input_blocks(layout),
            residual_blocks(layout),
            token_block(layout, sizes.out_heads, V),
            state_block(layout),
        ),
        outputs,
        blocks,
        [(layout.heads, K, V)],
        reverse=True,
    )
    d_log_decay, d_beta = gate_gradients(gradients.gates, inputs, layout)
    if inputs.log_decay is not None and channel:
        d_log_decay = take_back(gradients.log_decay, inputs.log_decay, ids, K)
    d_inputs = Inputs(
        take_back(gradients.q, inputs.q, ids, K),
        take_back(gradients.k, inputs.k, ids, K),
        take_back(gradients.v, inputs.v, ids, V),
        d_log_decay,
        d_beta,
        None,
    )
    return d_inputs, take_back_state(gradients.initial, layout)


def backward_kernel(
    arrays: Arrays,
    residuals: Residuals,
    d_out_ref: Any,
    d_final_ref: Any,
    results: Gradients,
    d_state_ref: Any,
    *,
    layout: Layout,
) -> None:
    time = pl.program_id(2)

    @pl.when(time == 0)
    def _():
        d_state_ref[...] = d_final_ref[0]

    gates, operands = read_operands(arrays, layout)
    d_sums: list[jax.Array | None] = []
    d_betas: list[jax.Array | None] = []
    d_queries: dict[int, jax.Array] = {}
    d_keys: dict[int, jax.Array] = {}
    for h in range(layout.heads):
        query_heads, key_head = layout.query_heads_of(h), layout.key_head_of(h)
        d_out = jnp.concatenate([read_head(d_out_ref, h * layout.queries + r, layout.V) for r in range(layout.queries)])
        inverse = None if residuals.inverse is None else residuals.inverse[0, h, 0]
        v = read_head(arrays.v, h, layout.V)
        d_exit = d_state_ref[h]
        d_entry, d_v, d_beta, gradients = chunk_gradients(
            operands[h], v, gates[h].beta, inverse, residuals.states[0, h, 0], d_out, d_exit, layout.scale
        )
        d_state_ref[h] = d_entry
        write_head(results.v, h, d_v)
        q, k = read_query_key(arrays, h, layout)
        d_q, d_k, d_sum = head_gradients(q, k, gates[h], gradients, layout.scale)
        d_sums.append(d_sum)
        d_betas.append(d_beta)
        for r, at in enumerate(query_heads):
            piece = d_q[r * CHUNK : (r + 1) * CHUNK]
            d_queries[at] = d_queries[at] + piece if at in d_queries else piece
        d_keys[key_head] = d_keys[key_head] + d_k if key_head in d_keys else d_k
        if h + 1 == layout.heads or layout.query_heads_of(h + 1) != query_heads:
            for at in query_heads:
                write_head(results.q, at, d_queries.pop(at))
        if h + 1 == layout.heads or layout.key_head_of(h + 1) != key_head:
            write_head(results.k, key_head, d_keys.pop(key_head))
    gate_columns = [column for column in d_sums + d_betas if column is not None]
    if gate_columns:
        results.gates[0, 0, 0] = columns_to_rows(gate_columns, gate_gradient_rows(layout))

    @pl.when(time == layout.chunks - 1)
    def _():
        results.initial[0] = d_state_ref[...]


def chunk_gradients(
    operands: Operands,
    v: jax.Array,
    beta: jax.Array | None,
    inverse: jax.Array | None,
    entry: jax.Array,
    d_out: jax.Array,
    d_exit: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array | None, StateGradients]:
    """(Gradient of the entry state [K,V] float32, of v [C,V], of beta [C,1], and of the operands)."""
    C, dtype = v.shape[0], v.dtype
    innovation = v.astype(jnp.float32)
    update = innovation
    if beta is not None and inverse is not None:
        innovation = innovation - scale_rows(product(operands.k_in, entry), operands.row_in)
        update = product(inverse, (beta * innovation).astype(dtype))
    update_compute = update.astype(dtype)
    written = scale_rows(update, operands.row_out).astype(dtype)
    d_exit_compute = d_exit.astype(dtype)
    d_read = (scale * scale_rows(d_out.astype(jnp.float32), operands.row_in)).astype(dtype)
    d_update = transposed_product(operands.pair.astype(dtype), d_out)
    d_update = d_update + scale_rows(product(operands.k_out, d_exit_compute), operands.row_out)
    d_carry = None
    d_entry = d_exit
    if operands.carry is not None:
        axes = (0, 1) if operands.carry.shape[0] == 1 else (1,)
        d_carry = operands.carry * jnp.sum(entry.astype(jnp.float32) * d_exit, axis=axes, keepdims=True)
        d_entry = operands.carry * d_exit
    d_k_out = product_transposed(written, d_exit_compute)
    if beta is None or inverse is None or operands.coupling is None:
        d_entry = d_entry + transposed_product(operands.q_in, d_read)
        d_q_in = product_transposed(d_read, entry)
        d_pair = product_transposed(d_out, update_compute)
        return d_entry, d_update, None, StateGradients(d_q_in, None, d_k_out, d_carry, d_pair, None)
    d_solved = transposed_product(inverse, d_update.astype(dtype))
    d_v = beta * d_solved
    d_predicted = -scale_rows(d_v, operands.row_in).astype(dtype)
    reading = jnp.concatenate([operands.q_in, operands.k_in], axis=0)
    d_reading = jnp.concatenate([d_read, d_predicted], axis=0)
    d_entry = d_entry + transposed_product(reading, d_reading)
    d_in = product_transposed(d_reading, entry)
    d_pairs = product_transposed(jnp.concatenate([d_out, d_solved.astype(dtype)], axis=0), update_compute)
    R = d_out.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    d_strict = jnp.where(row > column, -d_pairs[R:], 0)
    d_beta = jnp.sum(d_solved * innovation, axis=1, keepdims=True)
    d_beta = d_beta + jnp.sum(d_strict * operands.coupling, axis=1, keepdims=True)
    gradients = StateGradients(d_in[:R], d_in[R:], d_k_out, d_carry, d_pairs[:R], beta * d_strict)
    return d_entry, d_v, d_beta, gradients


def columns_to_rows(columns: list[jax.Array], rows: int) -> jax.Array:
    """Columns [C,1] side by side, transposed: [rows,C], the rest zero."""
    C = columns[0].shape[0]
    lane = lax.broadcasted_iota(jnp.int32, (C, rows), 1)
    table = jnp.zeros((C, rows), jnp.float32)
    for i, column in enumerate(columns):
        table = jnp.where(lane == i, column, table)
    return table.T
