"""Which blocks of keys a block of queries sees, and the reverse, where each query sees a range of keys up to its own.

The first key that a query sees never falls along a row, so what a block sees is a range of blocks as well. Whatever
lies outside of it is not loaded. Inside it the blocks of which every query sees every key are a range again: only the
others need a mask.
"""

import jax
import jax.numpy as jnp

BEGIN, FULL_BEGIN, FULL_END, END, PLACE = range(5)  # of a range: blocks from, before; the first query's place
ENTRIES = 5


def key_blocks_seen(starts: jax.Array, first: jax.Array, tokens: int, queries: int, keys: int) -> jax.Array:
    """int32 [B,Q/queries,5]: of each block of queries the blocks of keys it sees, of `tokens` in all.

    The queries are at first, first+1, ... and see the keys from starts [B,Q] on.
    """
    place = first + jnp.arange(0, starts.shape[1], queries, dtype=jnp.int32)
    begin = starts[:, ::queries] // keys
    end = -(-jnp.minimum(place + queries, tokens) // keys)
    full_end = jnp.clip((place + 1) // keys, begin, end)
    full_begin = jnp.clip(-(-starts[:, queries - 1 :: queries] // keys), begin, full_end)
    return _joined(begin, full_begin, full_end, end, place)


def query_blocks_seeing(starts: jax.Array, first: jax.Array, tokens: int, queries: int, keys: int) -> jax.Array:
    """int32 [B,tokens/keys,5]: of each block of keys the blocks of queries that see it. Empty where nobody does."""
    blocks = starts.shape[1] // queries
    key = jnp.arange(0, tokens, keys, dtype=jnp.int32)
    last = key + keys - 1
    # Starts never fall: some query of a block sees a key if its first one starts early enough, all if its last does.
    end = jnp.sum(starts[:, None, ::queries] <= last[:, None], axis=2, dtype=jnp.int32)
    begin = jnp.minimum(jnp.clip((key - first) // queries, 0, blocks), end)
    full_end = jnp.sum(starts[:, None, queries - 1 :: queries] <= key[:, None], axis=2, dtype=jnp.int32)
    full_end = jnp.clip(full_end, begin, end)
    full_begin = jnp.clip(-((first - last) // queries), begin, full_end)
    return _joined(begin, full_begin, full_end, end, first)


def _joined(*columns: jax.Array) -> jax.Array:
    return jnp.stack(jnp.broadcast_arrays(*columns), axis=2).astype(jnp.int32)
