"""The gates of a call: small arrays made outside the kernels, and how a kernel reads them.

Per chunk and head they are rows of C tokens; a kernel transposes all rows of a grid step at once for those that it
needs as columns. A column is spread over lanes once, by far the dearest step, and the exponentials are taken after:
with G the running sum of log_decay inside the chunk (here in powers of two),
    entry_i = exp(G_i) [segment of the entry state]        exit_j = exp(G_C - G_j) [segment of the last token]
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.numerics import away_from_zero
from jaxhybrid_kernels.segments import segment_index
from jaxhybrid_kernels.tpu.layout import CHUNK, Layout

SUBLANES, LANES = 8, 128


def gate_names(layout: Layout) -> tuple[str, ...]:
    """The rows that a call has, in their order.

    sum, sum_low: G / log 2 and what rounding took from it. beta. end: tokens of the chunk up to the last one of this
    token's segment. first: those in the segment of the entry state. last: those before the last segment.
    """
    names: tuple[str, ...] = ()
    if layout.decay == "head":
        names += ("sum", "sum_low") if layout.exact else ("sum",)
    if layout.delta:
        names += ("beta",)
    if layout.segments:
        names += ("end", "first", "last")
    return names


def gate_rows(layout: Layout) -> int:
    count = len(gate_names(layout)) * layout.heads
    return count + -count % SUBLANES


def gate_gradient_names(layout: Layout) -> tuple[str, ...]:
    """The rows of gradients that the backward kernel writes, in their order."""
    return (("sum",) if layout.decay == "head" else ()) + (("beta",) if layout.delta else ())


def gate_gradient_rows(layout: Layout) -> int:
    count = len(gate_gradient_names(layout)) * layout.heads
    return count + -count % SUBLANES


def make_gates(inputs: Inputs, layout: Layout) -> jax.Array | None:
    """[B,steps,n,rows,C] float32, rows a multiple of 8; None when the call has no gates."""
    names = gate_names(layout)
    if not names:
        return None
    gates: dict[str, jax.Array] = {}
    if inputs.log_decay is not None and layout.decay == "head":
        powers_of_two = tokens_in_lanes(inputs.log_decay, inputs.segment_ids) * (1 / math.log(2))
        gates["sum"], gates["sum_low"] = running_sum(powers_of_two)
    if inputs.beta is not None:
        gates["beta"] = _beta_in_lanes(inputs.beta, inputs.segment_ids)
    if inputs.segment_ids is not None:
        segment, before = _segments(inputs.segment_ids)

        def count(condition: jax.Array) -> jax.Array:
            return jnp.sum(condition, axis=-1, keepdims=True, dtype=jnp.float32)

        gates["end"] = count(segment[..., None, :] <= segment[..., :, None])[..., 0]
        gates["first"] = count(segment == before)
        gates["last"] = count(segment < segment[..., -1:])
    B, N, n = layout.sizes.B, layout.sizes.N, layout.chunks
    rows = jnp.stack([jnp.broadcast_to(gates[name], (B, N, n, CHUNK)) for name in names], axis=2)
    rows = rows.reshape(B, layout.steps, layout.heads, len(names), n, CHUNK)
    rows = jnp.transpose(rows, (0, 1, 4, 3, 2, 5)).reshape(B, layout.steps, n, -1, CHUNK)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, gate_rows(layout) - rows.shape[3]), (0, 0)))


def gate_gradients(rows: jax.Array | None, inputs: Inputs, layout: Layout) -> tuple[jax.Array | None, jax.Array | None]:
    """Gradients of log_decay (per head) and beta, None where there is none, from those rows [B,steps,n,rows,C], which
    are for the sum and for beta's logarithm."""
    if rows is None:
        return None, None
    B, N, n = layout.sizes.B, layout.sizes.N, layout.chunks
    names = gate_gradient_names(layout)
    rows = rows[:, :, :, : len(names) * layout.heads].reshape(B, layout.steps, n, len(names), layout.heads, CHUNK)
    by_name = dict(zip(names, jnp.transpose(rows, (3, 0, 1, 4, 2, 5)).reshape(len(names), B, N, n, CHUNK)))
    d_log_decay = d_beta = None
    if inputs.log_decay is not None and "sum" in by_name:
        later = lax.cumsum(by_name["sum"], axis=3, reverse=True)
        d_log_decay = tokens_out_of_lanes(later, inputs.log_decay, inputs.segment_ids)
    if inputs.beta is not None:
        d_beta = by_name["beta"] / _beta_in_lanes(inputs.beta, inputs.segment_ids)
        d_beta = tokens_out_of_lanes(d_beta, inputs.beta, inputs.segment_ids)
    return d_log_decay, d_beta


def _beta_in_lanes(beta: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return away_from_zero(tokens_in_lanes(beta, segment_ids))


def tokens_in_lanes(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """[B,T,N] -> [B,N,n,C] float32, zero on padding."""
    if segment_ids is not None:
        x = jnp.where((segment_ids != 0)[:, :, None], x, 0)
    B, T, N = x.shape
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -T % CHUNK), (0, 0)))
    return jnp.transpose(x, (0, 2, 1)).reshape(B, N, -1, CHUNK)


def tokens_out_of_lanes(x: jax.Array, like: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Undoes `tokens_in_lanes` for the gradient of `like`."""
    B, T, N = like.shape
    x = jnp.transpose(x.reshape(B, N, -1), (0, 2, 1))[:, :T]
    if segment_ids is not None:
        x = jnp.where((segment_ids != 0)[:, :, None], x, 0)
    return x.astype(like.dtype)


def _segments(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Changes of id so far, [B,1,n,C], and those up to the entry state, [B,1,n,1]."""
    B, T = segment_ids.shape
    index = jnp.pad(segment_index(segment_ids), ((0, 0), (0, -T % CHUNK)), mode="edge").reshape(B, 1, -1, CHUNK)
    last = index[..., -1:]
    return index, jnp.concatenate([jnp.zeros_like(last[:, :, :1]), last[:, :, :-1]], axis=2)


def running_sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cumulative sum along the last axis as an unevaluated sum of two floats (Knuth's two-sum at every addition)."""

    def add(a, b):
        total = a[0] + b[0]
        back = total - a[0]
        error = (a[0] - (total - back)) + (b[0] - back)
        return total, error + a[1] + b[1]

    return lax.associative_scan(add, (x, jnp.zeros_like(x)), axis=x.ndim - 1)


class HeadGates(NamedTuple):
    """One head's gates in a kernel; None where the call has none. Columns hold a token's value in every lane."""

    sum: jax.Array | None  # [C,LANES]
    sum_low: jax.Array | None
    sum_row: jax.Array | None  # [1,C]
    sum_low_row: jax.Array | None
    beta: jax.Array | None  # [C,LANES]
    beta_row: jax.Array | None  # [1,C]
    end_row: jax.Array | None  # [1,C]
    entry: jax.Array | None  # [C,LANES]
    exit: jax.Array | None  # [C,LANES]
    exit_row: jax.Array | None  # [1,C]


def grid_step_gates(ref: Any, layout: Layout) -> list[HeadGates]:
    """Those of every head of a grid step, from its block [1,1,1,rows,C]; a call without gates has no block."""
    if ref is None:
        return [HeadGates(*[None] * len(HeadGates._fields))] * layout.heads
    rows = ref[0, 0, 0]
    columns = rows.T
    return [_head_gates(rows, columns, head, layout) for head in range(layout.heads)]


def _head_gates(rows: jax.Array, columns: jax.Array, head: int, layout: Layout) -> HeadGates:
    names = gate_names(layout)

    def row(name: str) -> jax.Array | None:
        if name not in names:
            return None
        at = names.index(name) * layout.heads + head
        return rows[at : at + 1]

    def column(name: str) -> jax.Array | None:
        if name not in names:
            return None
        at = names.index(name) * layout.heads + head
        return jnp.broadcast_to(columns[:, at : at + 1], (CHUNK, LANES))

    total, low = column("sum"), column("sum_low")
    first, last = row("first"), row("last")
    entry = total
    if first is not None:
        token = lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 0).astype(jnp.float32)
        entry = jnp.where(token < first, 0 if entry is None else entry, -jnp.inf)
    return HeadGates(
        total,
        low,
        row("sum"),
        row("sum_low"),
        column("beta"),
        row("beta"),
        row("end"),
        None if entry is None else jnp.exp2(entry),
        _exit_gate(total, low, last, axis=0),
        _exit_gate(row("sum"), row("sum_low"), last, axis=1),
    )


def _exit_gate(total: jax.Array | None, low: jax.Array | None, last: jax.Array | None, axis: int) -> jax.Array | None:
    """From sums whose tokens lie along the axis."""
    leaving = None
    if total is not None:
        leaving = lax.slice_in_dim(total, CHUNK - 1, CHUNK, axis=axis) - total
    if leaving is not None and low is not None:
        leaving = leaving + (lax.slice_in_dim(low, CHUNK - 1, CHUNK, axis=axis) - low)
    if last is not None:
        token = lax.broadcasted_iota(jnp.int32, (1, CHUNK) if axis else (CHUNK, LANES), axis).astype(jnp.float32)
        leaving = jnp.where(token >= last, 0 if leaving is None else leaving, -jnp.inf)
    return None if leaving is None else jnp.exp2(leaving)


def across(column: jax.Array, width: int) -> jax.Array:
    """[C,LANES] with a token's value in every lane -> [C,width]."""
    if width <= LANES:
        return column[:, :width]
    return jnp.concatenate([column] * (width // LANES), axis=1)


def scale_rows(x: jax.Array, row: jax.Array | None) -> jax.Array:
    """x [R*C,V] times row [C,LANES], for each of the R queries; a missing row is one."""
    if row is None:
        return x
    row = across(row, x.shape[1])
    times = x.shape[0] // row.shape[0]
    return x * (row if times == 1 else jnp.concatenate([row] * times, axis=0))
