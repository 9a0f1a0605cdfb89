"""The short convolution inside `jax.shard_map`, with the token axis split over a mesh axis: a halo of W-1 tokens."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.mesh_axis import axis_size, on_last_shard, shift
from jaxhybrid_kernels.short_convolution import short_convolution
from jaxhybrid_kernels.validation import check_convolution


def context_short_convolution(
    x_BTC: jax.Array,
    weight_WC: jax.Array,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    *,
    axis_name: str,
) -> tuple[jax.Array, jax.Array]:
    """`short_convolution` inside `jax.shard_map`, on this shard's T tokens of a sequence split over `axis_name`.

    initial_state is that before the whole sequence and the returned state that after it, both the same on all shards.
    Every shard takes the last W-1 tokens of the one before it; fewer tokens per shard than that raise ValueError, and
    so does an `axis_name` that is no axis of a shard_map here. All else as for `short_convolution`.
    """
    check_convolution(x_BTC, weight_WC, segment_ids, initial_state, "initial_state")
    (B, T, C), reach = x_BTC.shape, weight_WC.shape[0] - 1
    shards = axis_size(axis_name)
    if shards > 1 and reach > T:
        raise ValueError(
            f"x has T={T} tokens per shard, fewer than the {reach} that a filter of {reach + 1} taps needs."
        )
    state = jnp.zeros((B, reach, C), x_BTC.dtype) if initial_state is None else initial_state.astype(x_BTC.dtype)
    place = lax.axis_index(axis_name)
    halo = shift(x_BTC[:, T - reach :], 1, axis_name)
    if segment_ids is None:
        y, final = short_convolution(x_BTC, weight_WC, None, jnp.where(place == 0, state, halo))
        return y, lax.psum(on_last_shard(final, axis_name), axis_name)
    # The halo's tokens go before the shard's own. The initial state still goes before the first token of all, which
    # this shard sees if it lies in the halo or later; if it lies earlier, zeros take its place.
    real = segment_ids != 0
    position = place * T + jnp.arange(T)
    first = lax.pmin(jnp.min(jnp.where(real, position, shards * T), axis=1), axis_name)
    last = lax.pmax(jnp.max(jnp.where(real, position, -1), axis=1), axis_name)
    seen = (first >= place * T - reach)[:, None, None]
    y, final = short_convolution(
        jnp.concatenate([halo, x_BTC], axis=1),
        weight_WC,
        jnp.concatenate([shift(segment_ids[:, T - reach :], 1, axis_name), segment_ids], axis=1),
        jnp.where(seen, state, 0),
    )
    ends_here = (jnp.maximum(last, 0) // T == place)[:, None, None]
    return y[:, reach:], lax.psum(jnp.where(ends_here, final, 0), axis_name)
