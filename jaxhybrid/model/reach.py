"""How far softmax attention looks back, in memory linear in the row."""

import jax
import jax.numpy as jnp

from jaxhybrid.model.layers import capped, exact_dtype
from jaxhybrid.model.softmax import MASKED, Seen, Window, document_starts

QUERY_BLOCK = 128  # queries whose weights for all keys are held at once


def attention_distance(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    key_segment_ids: jax.Array | None = None,
    first_query: jax.Array | None = None,
    window: Window | None = None,
    cap: float | None = None,
    block: int = QUERY_BLOCK,
) -> jax.Array:
    """Mean distance in tokens to what each query and head reads [B,Q,H], float32; 0: the query's own token.

    Of the softmax attention that `causal_attention` computes from the same arguments, weighted by what a token adds to
    the output: its attention weight times the length of its value (arXiv 2004.10102). A sink, which takes much weight
    and has a value near zero, so counts little.

    Args:
        block: queries at once; the arrays are [B,H,block,M].
    """
    B, Q, H, K = q.shape
    M, G = k.shape[1:3]
    ids = segment_ids if key_segment_ids is None else key_segment_ids
    _, starts, first = document_starts(ids, k, Q, first_query)
    starts = starts if window is None else window.starts(starts, first)
    exact = exact_dtype(q.dtype)
    lengths = jnp.linalg.norm(v.astype(exact), axis=-1)[:, None].transpose(0, 3, 1, 2)[:, :, None]  # [B,G,1,1,M]
    size, keys = min(block, Q), jnp.arange(M, dtype=jnp.int32)

    def step(taken: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        at, q, starts = taken
        scores = capped(jnp.einsum("bqgrk,bmgk->bgrqm", q, k, preferred_element_type=exact) * K**-0.5, cap)
        visible = Seen(starts, starts).visible(at, M)[:, None, None]
        read = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1) * lengths
        back = (at + jnp.arange(size, dtype=jnp.int32))[:, None] - keys
        distance = jnp.sum(read * jnp.where(visible, back, 0), axis=-1) / jnp.maximum(jnp.sum(read, axis=-1), 1e-30)
        return distance.reshape(B, H, size).transpose(0, 2, 1)

    def blocks(x: jax.Array) -> jax.Array:
        """[B,Q,...] -> [blocks,B,size,...]."""
        x = jnp.pad(x, ((0, 0), (0, -Q % size), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    places = first + jnp.arange(0, Q, size, dtype=jnp.int32)
    found = jax.lax.map(step, (places, blocks(q.reshape(B, Q, G, H // G, K)), blocks(starts)))
    return jnp.moveaxis(found, 0, 1).reshape(B, -1, H)[:, :Q]
