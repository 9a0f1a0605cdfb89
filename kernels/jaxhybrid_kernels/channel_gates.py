"""What a chunk contributes apart from the state, for one decay per key channel; forward and backward.

    pair_ij = sum_c q_ic k_jc exp(G_ic - G_jc),   G the running sum of log_decay
cannot be split into exp(G_i) and exp(-G_j): the second overflows. It can be split around any moment between j and i,
    exp(G_i - G_j) = exp(sum from that moment through i) exp(sum after j until that moment),
with both exponents <= 0. So the triangle is filled by halves: for runs of s = 1, 2, 4, ... tokens, the second run of
each pair meets the first around the border between them. Every factor is a product of the decays exp(log_decay) of a
run, none above one: nothing cancels, nothing overflows, and one exponential per token and channel serves all levels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.chunk_layout import Chunks
from jaxhybrid_kernels.head_gates import Operands, StateGradients
from jaxhybrid_kernels.numerics import product

SMALL = 4  # runs shorter than this are multiplied and summed element by element: too small for a matrix product


class RunDecay(NamedTuple):
    """Products of decays in runs of s tokens; m = C / s runs."""

    head: jax.Array  # [n,B,N,m,s,K] from the run's start through the token
    tail: jax.Array  # [n,B,N,m,s,K] after the token to the run's end


def channel_operands(chunks: Chunks, scale: float) -> Operands:
    assert chunks.log_decay is not None
    dtype = chunks.k.dtype
    levels = _levels(chunks.log_decay)
    entry, leaving, carry = _state_gates(chunks, levels[-1])
    rows, k = _rows(chunks)
    gram = jnp.where(_same_segment(chunks), _gram(rows, k, levels), 0)
    pair, coupling = (scale * gram).astype(dtype), None
    if chunks.beta is not None:
        pair, coupling = pair[..., :-1, :], jnp.tril(gram[..., -1, :], -1)
    return Operands(
        (chunks.q * entry[:, :, :, None]).astype(dtype),
        (k * entry).astype(dtype),
        (k * leaving).astype(dtype),
        None,
        None,
        carry,
        jnp.moveaxis(pair, 4, 3),
        coupling,
    )


def channel_gradients(
    chunks: Chunks, operands: Operands, gradients: StateGradients, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q [n,B,N,R,C,K], k [n,B,N,C,K] and log_decay [n,B,N,C,K].

    The gradient of G has a closed form per channel: factor times its own gradient, plus for rows, minus for columns.
    """
    assert chunks.log_decay is not None
    assert gradients.carry is not None
    levels = _levels(chunks.log_decay)
    entry, leaving, _ = _state_gates(chunks, levels[-1])
    rows, k = _rows(chunks)
    d_gram = jnp.moveaxis(scale * gradients.pair, 3, 4)
    d_rows_read = jnp.moveaxis(gradients.q_in, 3, 4)
    if gradients.coupling is not None and gradients.k_in is not None:
        d_gram = jnp.concatenate([d_gram, jnp.tril(gradients.coupling, -1)[..., None, :]], axis=-2)
        d_rows_read = jnp.concatenate([d_rows_read, gradients.k_in[..., None, :]], axis=-2)
    d_rows, d_k = _gram_gradients(jnp.where(_same_segment(chunks), d_gram, 0), rows, k, levels)
    d_rows = d_rows + d_rows_read * entry[..., None, :]
    d_k_out = gradients.k_out * leaving
    d_k = d_k + d_k_out
    d_sum = jnp.sum(rows * d_rows, axis=-2) - k * d_k
    d_last = jnp.sum(k * d_k_out, axis=3) + gradients.carry[..., 0]
    d_log_decay = lax.cumsum(d_sum, axis=3, reverse=True) + d_last[..., None, :]
    if gradients.coupling is not None:
        d_rows, d_k = d_rows[..., :-1, :], d_k + d_rows[..., -1, :]
    return jnp.moveaxis(d_rows, 4, 3), d_k, d_log_decay


def _rows(chunks: Chunks) -> tuple[jax.Array, jax.Array]:
    """Queries and, with the delta rule, keys, [n,B,N,C,R or R+1,K]; and the keys that they meet. State dtype.

    The rows of a token lie together, so that those of a run are the rows of one matrix.
    """
    assert chunks.log_decay is not None
    q, k = (x.astype(chunks.log_decay.dtype) for x in (chunks.q, chunks.k))
    q = jnp.moveaxis(q, 3, 4)
    return (q if chunks.beta is None else jnp.concatenate([q, k[..., None, :]], axis=-2)), k


def _same_segment(chunks: Chunks) -> jax.Array:
    """Bool [n,B,1,C,1,C], or one that broadcasts to it."""
    if chunks.segment is None:
        return jnp.ones((1,) * 6, bool)
    return (chunks.segment[..., :, None] == chunks.segment[..., None, :])[:, :, None, :, None]


def _levels(log_decay: jax.Array) -> list[RunDecay]:
    """Runs of 1, 2, 4, ..., C tokens; log_decay [n,B,N,C,K]."""
    *lead, C, K = log_decay.shape
    head = jnp.exp(log_decay)[..., None, :]
    levels = [RunDecay(head, jnp.ones_like(head))]
    size = 1
    while size < C:
        head, tail = (x.reshape(*lead, C // (2 * size), 2, size, K) for x in levels[-1])
        first, second = head[..., 0, -1:, :], head[..., 1, -1:, :]
        size *= 2
        levels.append(
            RunDecay(
                jnp.concatenate([head[..., 0, :, :], head[..., 1, :, :] * first], axis=-2),
                jnp.concatenate([tail[..., 0, :, :] * second, tail[..., 1, :, :]], axis=-2),
            )
        )
    return levels


def _state_gates(chunks: Chunks, whole: RunDecay) -> tuple[jax.Array, jax.Array, jax.Array]:
    """entry, exit [n,B,N,C,K], carry [n,B,N,K,1]: decay since the entry, until the exit, over the chunk."""
    entry, leaving = whole.head[:, :, :, 0], whole.tail[:, :, :, 0]
    if chunks.segment is not None and chunks.entry_segment is not None:
        segment = chunks.segment[:, :, None, :, None]
        entry = jnp.where(segment == chunks.entry_segment[:, :, None, None, None], entry, 0)
        leaving = jnp.where(segment == segment[..., -1:, :], leaving, 0)
    return entry, leaving, entry[..., -1, :, None]


def _second_runs(x: jax.Array, size: int) -> jax.Array:
    """[n,B,N,C,...] -> [n,B,N,C/(2 size),size,...], the second run of each pair."""
    return x.reshape(*x.shape[:3], -1, 2, size, *x.shape[4:])[:, :, :, :, 1]


def _first_runs(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(*x.shape[:3], -1, 2, size, *x.shape[4:])[:, :, :, :, 0]


def _border_gates(level: RunDecay) -> tuple[jax.Array, jax.Array]:
    """For each pair of runs: decay from the border through the second's tokens, and from the first's to the border."""
    return level.head[:, :, :, 1::2], level.tail[:, :, :, 0::2]


def _gram(rows: jax.Array, k: jax.Array, levels: list[RunDecay]) -> jax.Array:
    """rows [n,B,N,C,R,K], k [n,B,N,C,K] -> lower triangle of sum_c rows_ic k_jc exp(G_ic - G_jc), [n,B,N,C,R,C]."""
    gram = jnp.sum(rows * k[..., None, :], axis=-1)[:, :, :, :, None, :, None]
    for level in levels[:-1]:
        size = level.head.shape[-2]
        row_gate, column_gate = _border_gates(level)
        left = _second_runs(rows, size) * row_gate[..., None, :]
        right = _first_runs(k, size) * column_gate
        if size < SMALL:
            corner = jnp.sum(left[..., None, :] * right[..., None, None, :, :], axis=-1)
        else:
            corner = product("nbhmirc,nbhmjc->nbhmirj", left, right)
        top = jnp.concatenate([gram[:, :, :, 0::2], jnp.zeros_like(corner)], axis=-1)
        gram = jnp.concatenate([top, jnp.concatenate([corner, gram[:, :, :, 1::2]], axis=-1)], axis=4)
    return gram[:, :, :, 0]


def _gram_gradients(
    d_gram: jax.Array, rows: jax.Array, k: jax.Array, levels: list[RunDecay]
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `_gram` for its rows [n,B,N,C,R,K] and for k [n,B,N,C,K]; d_gram above the diagonal is not read."""
    d_rows, d_k = jnp.zeros_like(rows), jnp.zeros_like(k)
    blocks = d_gram[:, :, :, None]  # the blocks on the diagonal, of twice the level's size
    for level in levels[-2::-1]:
        size = level.head.shape[-2]
        row_gate, column_gate = _border_gates(level)
        left = _second_runs(rows, size) * row_gate[..., None, :]
        right = _first_runs(k, size) * column_gate
        corner = blocks[..., size:, :, :size]
        if size < SMALL:
            d_left = jnp.sum(corner[..., None] * right[..., None, None, :, :], axis=-2)
            d_right = jnp.sum(corner[..., None] * left[..., None, :], axis=(4, 5))
        else:
            d_left = product("nbhmirj,nbhmjc->nbhmirc", corner, right)
            d_right = product("nbhmirj,nbhmirc->nbhmjc", corner, left)
        d_left, d_right = d_left * row_gate[..., None, :], d_right * column_gate
        d_rows = d_rows + jnp.stack([jnp.zeros_like(d_left), d_left], axis=4).reshape(rows.shape)
        d_k = d_k + jnp.stack([d_right, jnp.zeros_like(d_right)], axis=4).reshape(k.shape)
        blocks = jnp.stack([blocks[..., :size, :, :size], blocks[..., size:, :, size:]], axis=4)
        blocks = blocks.reshape(*blocks.shape[:3], -1, *blocks.shape[5:])
    diagonal = blocks[:, :, :, :, 0]  # [n,B,N,C,R,1]
    return d_rows + diagonal * k[..., None, :], d_k + jnp.sum(diagonal * rows, axis=-2)
