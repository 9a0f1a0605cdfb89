"""Packed sequences: where a state resets, and which tokens are padding.

Segment ids are any integers; 0 marks padding. Padding is skipped: it belongs to the segment before it, so that a change
of id is judged between neighbouring non-padding tokens, and padding on the left belongs to the first segment.
"""

import jax
import jax.numpy as jnp
from jax import lax


def segment_index(segment_ids_BT: jax.Array) -> jax.Array:
    """Counts the changes of id up to each token: int32 [B,T], 0 for the first segment, never falling along T."""
    real = segment_ids_BT != 0
    position = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    latest = lax.cummax(jnp.where(real, position, -1), axis=1)
    before = jnp.concatenate([jnp.full_like(latest[:, :1], -1), latest[:, :-1]], axis=1)
    id_before = jnp.take_along_axis(segment_ids_BT, jnp.maximum(before, 0), axis=1)
    change = real & (before >= 0) & (id_before != segment_ids_BT)
    return jnp.cumsum(change.astype(jnp.int32), axis=1, dtype=jnp.int32)


def segment_starts(segment_ids_BT: jax.Array) -> jax.Array:
    """True where a token opens a new segment and the state before it is dropped: bool [B,T]."""
    index = segment_index(segment_ids_BT)
    return jnp.concatenate([jnp.zeros_like(index[:, :1], dtype=bool), index[:, 1:] != index[:, :-1]], axis=1)


def zero_padding(x: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """x [B,T,...] with zeros at padding tokens, whatever they held."""
    if segment_ids_BT is None:
        return x
    return jnp.where((segment_ids_BT != 0).reshape(*x.shape[:2], *(1,) * (x.ndim - 2)), x, 0)
