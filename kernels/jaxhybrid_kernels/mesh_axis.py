"""What shards of a sequence tell one another along a mesh axis, inside `jax.shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.numerics import product
from jaxhybrid_kernels.segments import segment_starts


def axis_size(axis_name: str) -> int:
    try:
        return lax.axis_size(axis_name)
    except NameError as error:
        message = f"axis_name={axis_name!r} is no mesh axis of a jax.shard_map around this call."
        raise ValueError(message) from error


def shift(arrays: Any, distance: int, axis_name: str) -> Any:
    """Those of the shard `distance` places before (after, if negative); zeros where there is none."""
    size = axis_size(axis_name)
    pairs = [(place, place + distance) for place in range(size) if 0 <= place + distance < size]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, pairs), arrays)


def on_last_shard(x: jax.Array, axis_name: str) -> jax.Array:
    """x on the last shard, zeros elsewhere."""
    return jnp.where(lax.axis_index(axis_name) == axis_size(axis_name) - 1, x, 0)


def opens_segment(segment_ids: jax.Array, axis_name: str) -> jax.Array:
    """Bool [B]: the shard's first non-padding token has another id than the last one before the shard."""
    real = segment_ids != 0
    first = jnp.argmax(real, axis=1, keepdims=True)
    last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1, keepdims=True)
    ends = jnp.take_along_axis(segment_ids, jnp.concatenate([first, last], axis=1), axis=1)
    ends = lax.all_gather(ends, axis_name, axis=1, tiled=True)  # [B, 2 shards]
    starts = segment_starts(ends)[:, ::2]
    return jnp.take(starts, lax.axis_index(axis_name), axis=1)


def apply_map(transition: jax.Array, x: jax.Array) -> jax.Array:
    """transition [...,K,K], or [...,K or 1,1] for a diagonal, times x [...,K,V]."""
    if transition.shape[-1] == 1:
        return transition * x
    return product("...kj,...jv->...kv", transition, x)


def affine_prefix(
    written: jax.Array, transition: jax.Array, start: jax.Array, axis_name: str, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(entry, exit) of every shard:  exit = transition entry + written,  entry the exit of the shard before.

    start [...,K,V] enters the first shard; reverse goes from the last shard to the first. Maps of ever longer runs of
    shards are composed, log2(shards) rounds of one exchange each. A run from the first shard on has its start folded
    in and the transition zero, so that the zeros it receives from nowhere do nothing.
    """
    size = axis_size(axis_name)
    place = lax.axis_index(axis_name)
    step, first = (-1, place == size - 1) if reverse else (1, place == 0)
    exit = jnp.where(first, apply_map(transition, start) + written, written)
    transition = jnp.where(first, 0, transition)
    distance = 1
    while distance < size:
        before, transition_before = shift((exit, transition), step * distance, axis_name)
        exit = apply_map(transition, before) + exit
        transition = apply_map(transition, transition_before)
        distance *= 2
    return jnp.where(first, start, shift(exit, step, axis_name)), exit
