"""How far softmax attention looks back, and how many tokens it divides itself over, in memory linear in the row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid.model.layers import exact_dtype, segment_starts
from jaxhybrid.model.softmax import MASKED, Window, visible_keys

QUERY_BLOCK = 128  # queries whose weights for all keys are held at once


class Reach(NamedTuple):
    """Of every query and head, [B,Q,H] float32."""

    distance: jax.Array  # mean distance in tokens to what is read; 0: the query's own token
    entropy: jax.Array  # of the attention weights, in nats


def attention_reach(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    key_segment_ids: jax.Array | None = None,
    first_query: jax.Array | None = None,
    window: Window | None = None,
    block: int = QUERY_BLOCK,
) -> Reach:
    """Of the softmax attention that `causal_attention` computes from the same arguments.

    The distance is weighted by what a token adds to the output: its attention weight times the length of its value
    (arXiv 2004.10102). A sink, which takes much weight and has a value near zero, so counts little. The entropy is that
    of the weights alone.

    Args:
        block: queries at once; the arrays are [B,H,block,M].
    """
    B, Q, H, K = q.shape
    M, G = k.shape[1:3]
    ids = segment_ids if key_segment_ids is None else key_segment_ids
    starts = jnp.zeros((B, M), jnp.int32) if ids is None else segment_starts(ids)
    first = jnp.int32(0) if first_query is None else first_query
    starts = starts if first_query is None else jax.lax.dynamic_slice_in_dim(starts, first, Q, 1)
    starts = starts if window is None else window.starts(starts, first)
    exact = exact_dtype(q.dtype)
    lengths = jnp.linalg.norm(v.astype(exact), axis=-1)[:, None].transpose(0, 3, 1, 2)[:, :, None]  # [B,G,1,1,M]
    size, keys = min(block, Q), jnp.arange(M, dtype=jnp.int32)

    def step(taken: tuple[jax.Array, jax.Array, jax.Array]) -> Reach:
        at, q, starts = taken
        scores = jnp.einsum("bqgrk,bmgk->bgrqm", q, k, preferred_element_type=exact) * K**-0.5
        visible = visible_keys(starts, at, M)[:, None, None]
        log_weights = jax.nn.log_softmax(jnp.where(visible, scores, MASKED), axis=-1)
        weights = jnp.exp(log_weights)
        read = weights * lengths
        back = (at + jnp.arange(size, dtype=jnp.int32))[:, None] - keys
        distance = jnp.sum(read * jnp.where(visible, back, 0), axis=-1) / jnp.maximum(jnp.sum(read, axis=-1), 1e-30)
        entropy = -jnp.sum(jnp.where(visible, weights * log_weights, 0.0), axis=-1)
        return Reach(*(x.reshape(B, H, size).transpose(0, 2, 1) for x in (distance, entropy)))

    def blocks(x: jax.Array) -> jax.Array:
        """[B,Q,...] -> [blocks,B,size,...]."""
        x = jnp.pad(x, ((0, 0), (0, -Q % size), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    places = first + jnp.arange(0, Q, size, dtype=jnp.int32)
    found = jax.lax.map(step, (places, blocks(q.reshape(B, Q, G, H // G, K)), blocks(starts)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, H)[:, :Q], found)
