"""Backward kernel: time in reverse, the gradient of the states held in VMEM.

Per chunk, with D = diag(beta), dS' the gradient of the exit state and dO that of the outputs (row scalings left out):
    dU = pair' dO + k_out dS'        dZ = inverse' D dU        dV = dZ
    dS = carry dS' + q_in' dO - k_in' dZ        dPair = dO W' D        dCoupling = -tril(dZ W', -1) D
The inverse itself needs no gradient: W = inverse Z, so that the gradient of I + coupling D is -dZ W'. That of beta is
the sum of W (dU - coupling' dZ) over channels, which is W dZ over beta: nothing cancels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.tpu.channel_gates import Tokens, chunk_tokens, kept_operands
from jaxhybrid_kernels.tpu.channel_gradients import channel_gradients
from jaxhybrid_kernels.tpu.forward import (
    Arrays,
    Residuals,
    input_blocks,
    lay_out_inputs,
    read_channels,
    read_head,
    read_query_key,
    residual_blocks,
    scale_state,
    write_head,
)
from jaxhybrid_kernels.tpu.gates import HeadGates, gate_gradient_rows, gate_gradients, grid_step_gates, scale_rows
from jaxhybrid_kernels.tpu.head_gates import head_gradients, head_operands
from jaxhybrid_kernels.tpu.launch import chunk_block, launch, state_block, token_block
from jaxhybrid_kernels.tpu.layout import CHUNK, Layout, lay_out, lay_out_state, take_back, take_back_state
from jaxhybrid_kernels.tpu.norms import Norms, norm_arrays, norm_gradients, normalize
from jaxhybrid_kernels.tpu.operands import Operands, StateGradients
from jaxhybrid_kernels.tpu.products import product, product_transposed, transposed_product
from jaxhybrid_kernels.tpu.solve import Halves, below, solve, solve_transposed
from jaxhybrid_kernels.tpu.turns import Chain, take_turns
from jaxhybrid_kernels.tpu.waiting import set_aside, unknown_zero


class Gradients(NamedTuple):
    q: Any  # [B,n*C,heads*K], a head once per group that reads it
    k: Any
    v: Any
    log_decay: Any  # [B,n*C,N*K] when per channel, else None
    gates: Any  # [B,steps,n,rows,C]
    initial: Any  # [B,N,K,V]


class Waiting(NamedTuple):
    """Scratch for what the later turns of a head need, see waiting.py."""

    solution: Any  # [1,C,V] float32
    norms: Norms | None


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
        (
            jax.ShapeDtypeStruct((layout.heads, K, V), jnp.float32),
            waiting_arrays(layout),
        ),
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


def waiting_arrays(layout: Layout) -> list[Waiting] | None:
    """One for each head; None for the additive rule."""
    if not layout.delta:
        return None
    solution = jax.ShapeDtypeStruct((1, CHUNK, layout.V), jnp.float32)
    return [Waiting(solution, norm_arrays(layout, backward=True))] * layout.heads


def backward_kernel(
    arrays: Arrays,
    residuals: Residuals,
    d_out_ref: Any,
    d_final_ref: Any,
    results: Gradients,
    d_state_ref: Any,
    waiting: list[Waiting] | None,
    *,
    layout: Layout,
) -> None:
    time = pl.program_id(2)

    @pl.when(time == 0)
    def _():
        d_state_ref[...] = d_final_ref[0]

    gates = grid_step_gates(arrays.gates, layout)
    shared = _Shared(results, layout)
    tokens = chunk_tokens(gates[0], CHUNK) if layout.decay == "channel" else None
    zero = unknown_zero(2)

    def chain(h: int) -> Chain[tuple[jax.Array | None, jax.Array | None]]:
        aside = None if waiting is None else waiting[h]
        return _head(
            h, gates[h], tokens, arrays, residuals, d_out_ref, d_state_ref, results, aside, zero, shared, layout
        )

    chains = [chain(h) for h in range(layout.heads)]
    d_sums, d_betas = zip(*take_turns(chains))
    columns = [column for column in (*d_sums, *d_betas) if column is not None]
    if columns:
        results.gates[0, 0, 0] = columns_to_rows(columns, gate_gradient_rows(layout))

    @pl.when(time == layout.chunks - 1)
    def _():
        results.initial[0] = d_state_ref[...]


class _Shared:
    """Sums over the value heads of a grid step that share a query or key head, written once complete."""

    def __init__(self, results: Gradients, layout: Layout):
        self.results, self.layout = results, layout
        self.sums: dict[tuple[str, int], tuple[jax.Array, int]] = {}

    def add(self, name: str, head: int, gradient: jax.Array) -> None:
        heads = self.layout.q_heads if name == "q" else self.layout.k_heads
        total, count = self.sums.pop((name, head), (None, 0))
        total = gradient if total is None else total + gradient
        if count + 1 == max(self.layout.heads // heads, 1):
            write_head(getattr(self.results, name), head, total)
        else:
            self.sums[name, head] = (total, count + 1)


def _head(
    h: int,
    gates: HeadGates,
    tokens: Tokens | None,
    arrays: Arrays,
    residuals: Residuals,
    d_out_ref: Any,
    d_state_ref: Any,
    results: Gradients,
    waiting: Waiting | None,
    zero: jax.Array,
    shared: _Shared,
    layout: Layout,
) -> Chain[tuple[jax.Array | None, jax.Array | None]]:
    """One head's chunk; returns the columns [C,1] of its gate gradients, those of the sum and of beta's logarithm."""
    q, k = read_query_key(arrays, h, layout)
    v = read_head(arrays.v, h, layout.V).astype(jnp.float32)
    d_outs = [read_head(d_out_ref, h * layout.queries + r, layout.V) for r in range(layout.queries)]
    d_out = d_outs[0] if layout.queries == 1 else jnp.concatenate(d_outs, axis=0)
    norms = None
    if waiting is not None and waiting.norms is not None:
        gates, norms = normalize(q, k, gates, layout, waiting.norms, zero)
        v = scale_rows(v, norms.key[...])
        d_out = scale_rows(d_out.astype(jnp.float32), norms.query_inverse[...]).astype(layout.dtype)
    head = None if tokens is None else read_channels(arrays, h, layout)
    if tokens is None or head is None:
        operands = yield from head_operands(q, k, gates)
    else:
        operands = kept_operands(head, tokens, residuals.scores[0, h, 0], layout.delta)
        yield
    inverses = None if residuals.inverses is None else residuals.inverses[0, h, 0]
    d_entry, d_v, d_beta, gradients = yield from chunk_gradients(
        operands,
        v,
        gates,
        inverses,
        residuals.states[0, h, 0],
        d_out,
        d_state_ref[h],
        layout.scale,
        None if waiting is None else partial(set_aside, waiting.solution, zero=zero),
    )
    d_state_ref[h] = d_entry
    write_head(results.v, h, d_v if norms is None else scale_rows(d_v, norms.key[...]))
    d_sum = None
    if tokens is None or head is None:
        d_q, d_k, d_sum = yield from head_gradients(q, k, gates, gradients, layout.scale)
    else:
        d_q, d_k, d_log_decay = yield from channel_gradients(head, tokens, arrays.constants, gradients, layout.scale)
        write_head(results.log_decay, h, d_log_decay)
    if norms is not None and d_beta is not None:
        d_key = jnp.sum(v * d_v, axis=1, keepdims=True) - 2 * d_beta
        d_q, d_k = norm_gradients(q, k, norms, d_q, d_k, d_key)
    for r, at in enumerate(layout.query_heads_of(h)):
        shared.add("q", at, d_q[r * CHUNK : (r + 1) * CHUNK])
    shared.add("k", layout.key_head_of(h), d_k)
    return d_sum, d_beta


def chunk_gradients(
    operands: Operands,
    v: jax.Array,
    gates: HeadGates,
    inverses: jax.Array | None,
    entry: jax.Array,
    d_out: jax.Array,
    d_exit: jax.Array,
    scale: float,
    aside: Callable[[jax.Array], Any] | None,
) -> Chain[tuple[jax.Array, jax.Array, jax.Array | None, StateGradients]]:
    """(Gradient of the entry state [K,V] float32, of v [C,V] float32, of beta times beta [C,1], and of the operands).

    aside: stores the solution of the delta rule and gives what to read it from."""
    C, dtype, beta, beta_row = v.shape[0], entry.dtype, gates.beta, gates.beta_row
    d_exit_compute = d_exit.astype(dtype)
    solution: Any = v
    matrix = None
    if operands.coupling is not None and inverses is not None:
        matrix = Halves(inverses, below(operands.coupling, dtype), None if beta is None else beta[: C // 2])
        predicted = product(operands.k_in, entry)
        yield
        solution = yield from solve(matrix, solution - scale_rows(predicted, operands.row_in))
        if aside is not None:
            solution = aside(solution)
    written = scale_rows(scale_rows(solution[...], beta), operands.row_out).astype(dtype)
    d_read = (scale * scale_rows(d_out.astype(jnp.float32), operands.row_in)).astype(dtype)
    d_update = scale * transposed_product(operands.pair.astype(dtype), d_out)
    d_update = d_update + scale_rows(product(operands.k_out, d_exit_compute), operands.row_out)
    yield
    d_carry = None
    if operands.carry is not None:
        axis = 0 if operands.carry.shape[0] == 1 else 1
        d_carry = jnp.sum(entry.astype(jnp.float32) * scale_state(d_exit, operands.carry), axis=axis, keepdims=True)
    if matrix is None or beta_row is None:
        d_entry = scale_state(d_exit, operands.carry) + transposed_product(operands.q_in, d_read)
        d_k_out = product_transposed(written, d_exit_compute)
        d_q_in = product_transposed(d_read, entry)
        d_pair = product_transposed(d_out, solution[...].astype(dtype))
        return d_entry, d_update, None, StateGradients(d_q_in, None, d_k_out, d_carry, d_pair, None)
    d_v = yield from solve_transposed(matrix, scale_rows(d_update, beta))
    d_predicted = (-scale_rows(d_v, operands.row_in)).astype(dtype)
    reading = jnp.concatenate([operands.q_in, operands.k_in], axis=0)
    d_reading = jnp.concatenate([d_read, d_predicted], axis=0)
    d_entry = scale_state(d_exit, operands.carry) + transposed_product(reading, d_reading)
    yield
    d_pairs = product_transposed(jnp.concatenate([d_out, d_v.astype(dtype)], axis=0), solution[...].astype(dtype))
    d_k_out = product_transposed(written, d_exit_compute)
    d_in = product_transposed(d_reading, entry)
    yield
    R = d_out.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    d_strict = jnp.where(row > column, -d_pairs[R:], 0)
    d_beta = jnp.sum(d_v * solution[...], axis=1, keepdims=True)
    d_pair, d_coupling = d_pairs[:R] * beta_row, d_strict * beta_row
    gradients = StateGradients(d_in[:R], d_in[R:], d_k_out, d_carry, d_pair, d_coupling)
    return d_entry, d_v, d_beta, gradients


def columns_to_rows(columns: list[jax.Array], rows: int) -> jax.Array:
    """Columns [C,1] side by side, transposed: [rows,C], the rest zero."""
    C = columns[0].shape[0]
    lane = lax.broadcasted_iota(jnp.int32, (C, rows), 1)
    table = jnp.zeros((C, rows), jnp.float32)
    for i, column in enumerate(columns):
        table = jnp.where(lane == i, column, table)
    return table.T
