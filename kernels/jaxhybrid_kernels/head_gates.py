"""What a chunk contributes apart from the state, for one decay per head or none; forward and backward.

With G the running sum of log_decay inside the chunk and M_ij = 1 where tokens i and j share a segment:
    D_ij = exp(G_i - G_j) M_ij (i >= j)      entry_i = exp(G_i) [segment of the entry state]
    exit_j = exp(G_C - G_j) [segment of the last token]      carry = exp(G_C) [no change inside the chunk]
Differences are masked before the exponential, and G is a sum of two floats, so that a difference of large sums keeps
its digits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.chunk_layout import Chunks
from jaxhybrid_kernels.numerics import materialize, product, state_dtype


class Operands(NamedTuple):
    """The chunk's step:  W = v - row_in (k_in S),  U = inverse (beta W),  S' = carry S + k_out' (row_out U),
    O = scale row_in (q_in S) + pair U.  A `None` row or carry is one."""

    q_in: jax.Array  # [n,B,N,R,C,K] compute dtype
    k_in: jax.Array  # [n,B,N,C,K]
    k_out: jax.Array  # [n,B,N,C,K]
    row_in: jax.Array | None  # [n,B,N or 1,C] state dtype
    row_out: jax.Array | None  # [n,B,N or 1,C]
    carry: jax.Array | None  # [n,B,N or 1,1 or K,1]
    pair: jax.Array  # [n,B,N,R,C,C] compute dtype, scaled
    coupling: jax.Array | None  # [n,B,N,C,C] state dtype: strictly lower k_i k_j' D_ij, beta left out; None: additive


class StateGradients(NamedTuple):
    """Gradients that came through entry and exit states, and those of the pair and coupling matrices; state dtype."""

    q_in: jax.Array
    k_in: jax.Array | None
    k_out: jax.Array
    carry: jax.Array | None  # shape of `Operands.carry`, times carry
    pair: jax.Array
    coupling: jax.Array | None


def head_operands(chunks: Chunks, scale: float) -> Operands:
    decay, row_in, row_out, carry = _gates(chunks)
    dtype = chunks.k.dtype
    pair = product("nbhrck,nbhjk->nbhrcj", chunks.q, chunks.k).astype(dtype)
    pair = (scale * pair * decay[:, :, :, None]).astype(dtype)
    coupling = None
    if chunks.beta is not None:
        coupling = jnp.tril(product("nbhck,nbhjk->nbhcj", chunks.k, chunks.k) * decay, -1)
    carry = None if carry is None else carry[..., None, None]
    return Operands(chunks.q, chunks.k, chunks.k, row_in, row_out, carry, pair, coupling)


def head_gradients(
    chunks: Chunks, operands: Operands, gradients: StateGradients, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Gradients of q [n,B,N,R,C,K], k [n,B,N,C,K] and log_decay [n,B,N,C] (None without decay)."""
    dtype = chunks.k.dtype
    decay = _gates(chunks)[0]
    d_scores = (scale * gradients.pair * decay[:, :, :, None]).astype(dtype)
    d_q = gradients.q_in + product("nbhrcj,nbhjk->nbhrck", d_scores, chunks.k)
    d_k = gradients.k_out + product("nbhrcj,nbhrck->nbhjk", d_scores, chunks.q)
    if gradients.coupling is not None and gradients.k_in is not None:
        d_gram = gradients.coupling * decay
        d_gram = (d_gram + jnp.swapaxes(d_gram, -1, -2)).astype(dtype)
        d_k = d_k + gradients.k_in + product("nbhcj,nbhjk->nbhck", d_gram, chunks.k)
    if chunks.log_decay is None or gradients.carry is None:
        return d_q, d_k, None
    exact = gradients.pair.dtype
    q, k = chunks.q.astype(exact), chunks.k.astype(exact)
    pairs = jnp.sum(gradients.pair * operands.pair, axis=3)
    d_sum = jnp.sum(gradients.q_in * q, axis=(3, 5))
    if gradients.coupling is not None and gradients.k_in is not None and operands.coupling is not None:
        pairs = pairs + gradients.coupling * operands.coupling
        d_sum = d_sum + jnp.sum(gradients.k_in * k, axis=-1)
    pairs = materialize(pairs)  # summed along both of its axes
    leaving = jnp.sum(gradients.k_out * k, axis=-1)
    d_sum = d_sum + jnp.sum(pairs, axis=-1) - jnp.sum(pairs, axis=-2) - leaving
    d_last = jnp.sum(leaving, axis=-1) + gradients.carry[..., 0, 0]
    return d_q, d_k, lax.cumsum(d_sum, axis=3, reverse=True) + d_last[..., None]


def _gates(chunks: Chunks) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """D [n,B,N or 1,C,C], entry [n,B,N or 1,C], exit [n,B,N or 1,C], carry [n,B,N or 1]."""
    C = chunks.k.shape[3]
    mask = jnp.tril(jnp.ones((C, C), bool))
    same_entry = same_exit = same_carry = None
    if chunks.segment is not None and chunks.entry_segment is not None:
        segment = chunks.segment[:, :, None]
        mask = mask & (segment[..., :, None] == segment[..., None, :])
        same_entry = segment == chunks.entry_segment[:, :, None, None]
        same_exit = segment == segment[..., -1:]
        same_carry = same_entry[..., -1]
    if chunks.log_decay is None:
        dtype = state_dtype(chunks.k)
        decay = jnp.broadcast_to(mask, (1,) * (5 - mask.ndim) + mask.shape).astype(dtype)
        ones = [None if same is None else same.astype(dtype) for same in (same_entry, same_exit, same_carry)]
        return decay, ones[0], ones[1], ones[2]
    high, low = _running_sum(chunks.log_decay)
    difference = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    decay = jnp.exp(jnp.where(mask, difference, -jnp.inf))
    entry, leaving = high, (high[..., -1:] - high) + (low[..., -1:] - low)
    if same_entry is not None and same_exit is not None:
        entry = jnp.where(same_entry, entry, -jnp.inf)
        leaving = jnp.where(same_exit, leaving, -jnp.inf)
    entry = jnp.exp(entry)
    return decay, entry, jnp.exp(leaving), entry[..., -1]


def _running_sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cumulative sum along the last axis as an unevaluated sum of two floats (Knuth's two-sum at every addition)."""

    def add(a, b):
        total = a[0] + b[0]
        back = total - a[0]
        error = (a[0] - (total - back)) + (b[0] - back)
        return total, error + a[1] + b[1]

    return lax.associative_scan(add, (x, jnp.zeros_like(x)), axis=x.ndim - 1)
