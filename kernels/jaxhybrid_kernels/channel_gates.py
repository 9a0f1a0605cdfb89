"""What a chunk contributes apart from the state, for one decay per key channel; forward and backward.

    pair_ij = sum_c q_ic k_jc exp(G_ic - G_jc),   G the running sum of log_decay
cannot be split into exp(G_i) and exp(-G_j): the second overflows. Blocks of 16 tokens split it around a gate between,
    exp(G_i - G_j) = exp(G_i - ref) exp(ref - G_j),   ref = G at the start of i's block, j in an earlier block,
with both exponents <= 0; inside a block the difference is taken token by token. The exponents sum log decays over
disjoint runs of tokens (head of a block, whole blocks, tail of a block), so nothing cancels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.chunk_layout import Chunks
from jaxhybrid_kernels.head_gates import Operands, StateGradients
from jaxhybrid_kernels.numerics import BLOCK, product


class BlockDecay(NamedTuple):
    """Sums of log_decay by block of 16 tokens; m blocks."""

    head: jax.Array  # [n,B,N,m,16,K] from the block's start through the token
    tail: jax.Array  # [n,B,N,m,16,K] after the token to the block's end
    total: jax.Array  # [n,B,N,m,K]


def channel_operands(chunks: Chunks, scale: float) -> Operands:
    assert chunks.log_decay is not None
    exact, dtype = chunks.log_decay.dtype, chunks.k.dtype
    blocks = _block_decay(chunks.log_decay)
    entry, leaving, carry = _state_gates(chunks, blocks)
    q, k = chunks.q.astype(exact), chunks.k.astype(exact)
    same = _same_segment(chunks)
    pair = scale * jnp.where(same, _gram(q, k, blocks), 0)
    coupling = None
    if chunks.beta is not None:
        coupling = jnp.where(same, jnp.tril(_gram(k[:, :, :, None], k, blocks), -1), 0)[:, :, :, 0]
    return Operands(
        (q * entry[:, :, :, None]).astype(dtype),
        (k * entry).astype(dtype),
        (k * leaving).astype(dtype),
        None,
        None,
        carry,
        pair,
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
    exact = chunks.log_decay.dtype
    blocks = _block_decay(chunks.log_decay)
    entry, leaving, _ = _state_gates(chunks, blocks)
    q, k = chunks.q.astype(exact), chunks.k.astype(exact)
    same = _same_segment(chunks)
    d_pair = jnp.where(same, scale * gradients.pair, 0)
    d_q, d_k_columns = _gram_gradients(jnp.tril(d_pair), q, k, blocks)
    d_q = d_q + gradients.q_in * entry[:, :, :, None]
    d_k_rows = jnp.zeros_like(k)
    if gradients.coupling is not None and gradients.k_in is not None:
        d_coupling = jnp.where(same, jnp.tril(gradients.coupling, -1)[:, :, :, None], 0)
        rows, columns = _gram_gradients(d_coupling, k[:, :, :, None], k, blocks)
        d_k_rows = rows[:, :, :, 0] + gradients.k_in * entry
        d_k_columns = d_k_columns + columns
    d_k_out = gradients.k_out * leaving
    d_k_columns = d_k_columns + d_k_out
    d_sum = jnp.sum(q * d_q, axis=3) + k * (d_k_rows - d_k_columns)
    d_last = jnp.sum(k * d_k_out, axis=3) + gradients.carry[..., 0]
    d_log_decay = lax.cumsum(d_sum, axis=3, reverse=True) + d_last[..., None, :]
    return d_q, d_k_rows + d_k_columns, d_log_decay


def _same_segment(chunks: Chunks) -> jax.Array:
    """Bool [n,B,1,1,C,C], or one that broadcasts to it."""
    if chunks.segment is None:
        return jnp.ones((1,) * 6, bool)
    return (chunks.segment[..., :, None] == chunks.segment[..., None, :])[:, :, None, None]


def _block_decay(log_decay: jax.Array) -> BlockDecay:
    *lead, C, K = log_decay.shape
    x = log_decay.reshape(*lead, C // BLOCK, BLOCK, K)
    axis = x.ndim - 2
    head = lax.cumsum(x, axis=axis)
    shifted = jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], axis=axis)
    return BlockDecay(head, lax.cumsum(shifted, axis=axis, reverse=True), head[..., -1, :])


def _state_gates(chunks: Chunks, blocks: BlockDecay) -> tuple[jax.Array, jax.Array, jax.Array]:
    """entry, exit [n,B,N,C,K], carry [n,B,N,K,1]: decay since the entry, until the exit, over the chunk."""
    *lead, m, K = blocks.total.shape
    zero = jnp.zeros((*lead, 1, K), blocks.total.dtype)
    before = jnp.concatenate([zero, lax.cumsum(blocks.total, axis=len(lead))[..., :-1, :]], axis=-2)
    after = jnp.concatenate([lax.cumsum(blocks.total, axis=len(lead), reverse=True)[..., 1:, :], zero], axis=-2)
    entry = (before[..., None, :] + blocks.head).reshape(*lead, m * BLOCK, K)
    leaving = (after[..., None, :] + blocks.tail).reshape(*lead, m * BLOCK, K)
    if chunks.segment is not None and chunks.entry_segment is not None:
        segment = chunks.segment[:, :, None, :, None]
        entry = jnp.where(segment == chunks.entry_segment[:, :, None, None, None], entry, -jnp.inf)
        leaving = jnp.where(segment == segment[..., -1:, :], leaving, -jnp.inf)
    entry = jnp.exp(entry)
    return entry, jnp.exp(leaving), entry[..., -1, :, None]


def _in_blocks(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1, BLOCK, x.shape[-1])


def _within_block(blocks: BlockDecay) -> jax.Array:
    """exp(G_i - G_j) for i >= j in one block, else zero: [n,B,N,m,16,16,K], meant to be fused into a reduction."""
    lower = jnp.tril(jnp.ones((BLOCK, BLOCK), bool))[..., None]
    difference = blocks.head[..., :, None, :] - blocks.head[..., None, :, :]
    return jnp.exp(jnp.where(lower, difference, -jnp.inf))


def _column_gates(blocks: BlockDecay) -> list[jax.Array]:
    """For each block a >= 1: decay from every earlier token to the block's start, [n,B,N,16a,K]."""
    gates: list[jax.Array] = []
    for a in range(1, blocks.total.shape[-2]):
        latest = jnp.exp(blocks.tail[..., a - 1, :, :])
        if gates:
            earlier = gates[-1] * jnp.exp(blocks.total[..., a - 1, None, :])
            latest = jnp.concatenate([earlier, latest], axis=-2)
        gates.append(latest)
    return gates


def _gram(rows: jax.Array, k: jax.Array, blocks: BlockDecay) -> jax.Array:
    """rows [n,B,N,R,C,K], k [n,B,N,C,K] -> lower triangle of sum_c rows_ic k_jc exp(G_ic - G_jc), [n,B,N,R,C,C]."""
    C = k.shape[-2]
    rows_b, k_b = _in_blocks(rows), _in_blocks(k)
    within = _within_block(blocks)[:, :, :, None]
    diagonal = jnp.sum(rows_b[..., :, None, :] * k_b[:, :, :, None, :, None, :, :] * within, axis=-1)
    left = rows_b * jnp.exp(blocks.head)[:, :, :, None]
    columns = _column_gates(blocks)
    strips = []
    for a in range(C // BLOCK):
        strip = diagonal[..., a, :, :]
        if a:
            right = k[..., : a * BLOCK, :] * columns[a - 1]
            strip = jnp.concatenate([product("nbhric,nbhjc->nbhrij", left[..., a, :, :], right), strip], axis=-1)
        strips.append(jnp.pad(strip, ((0, 0),) * 5 + ((0, C - (a + 1) * BLOCK),)))
    return jnp.concatenate(strips, axis=-2)


def _gram_gradients(
    d_gram: jax.Array, rows: jax.Array, k: jax.Array, blocks: BlockDecay
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `_gram` (lower triangular d_gram [n,B,N,R,C,C]) for its rows [n,B,N,R,C,K] and for k [n,B,N,C,K]."""
    C = k.shape[-2]
    rows_b, k_b = _in_blocks(rows), _in_blocks(k)
    within = _within_block(blocks)[:, :, :, None]
    diagonal = jnp.stack([_block(d_gram, a, a) for a in range(C // BLOCK)], axis=4)
    d_rows = jnp.sum(diagonal[..., None] * within * k_b[:, :, :, None, :, None, :, :], axis=-2)
    d_k = jnp.sum(diagonal[..., None] * within * rows_b[..., :, None, :], axis=(3, -3)).reshape(k.shape)
    head = jnp.exp(blocks.head)[:, :, :, None]
    left = rows_b * head
    strips = [d_rows[..., 0, :, :]]
    for a, columns in enumerate(_column_gates(blocks), start=1):
        end = a * BLOCK
        d_strip = d_gram[..., end : end + BLOCK, :end]
        d_left = product("nbhrij,nbhjc->nbhric", d_strip, k[..., :end, :] * columns)
        strips.append(d_rows[..., a, :, :] + d_left * head[..., a, :, :])
        d_right = product("nbhrij,nbhric->nbhjc", d_strip, left[..., a, :, :]) * columns
        d_k = d_k + jnp.pad(d_right, ((0, 0),) * 3 + ((0, C - end), (0, 0)))
    return jnp.concatenate(strips, axis=-2), d_k


def _block(matrix: jax.Array, a: int, b: int) -> jax.Array:
    return matrix[..., a * BLOCK : (a + 1) * BLOCK, b * BLOCK : (b + 1) * BLOCK]
