"""From [batch, tokens, heads, width] to chunks of C tokens and back; chunked arrays are [n,B,N,C,width]."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.dplr.inputs import Inputs
from jaxhybrid_kernels.numerics import compute_dtype, materialize
from jaxhybrid_kernels.segments import segment_index


class Tokens(NamedTuple):
    """The tokens of all chunks, padding zeroed. `Inputs` but for v and the segments."""

    q: jax.Array  # [n,B,N,C,K], compute dtype
    k: jax.Array
    log_decay: jax.Array  # state dtype
    a: jax.Array
    b: jax.Array


class Segments(NamedTuple):
    """Which tokens share a segment, with one another and with the states at the borders of their chunk."""

    pairs: jax.Array  # bool [n,B,1,C,C]
    entry: jax.Array  # bool [n,B,1,C,1]
    exit: jax.Array  # bool [n,B,1,C,1]


def make_tokens(inputs: Inputs, C: int, exact: Any) -> tuple[Tokens, jax.Array]:
    """Tokens, and v [n,B,N,C,V]: T padded to a multiple of C, padding tokens zeroed. exact: the state's dtype."""
    dtype = compute_dtype(inputs.q, inputs.k, inputs.v, inputs.a, inputs.b)
    real = None if inputs.segment_ids is None else inputs.segment_ids != 0
    q, k, v, a, b = (split(zero_padding(x.astype(dtype), real), C) for x in (*inputs[:3], inputs.a, inputs.b))
    return Tokens(q, k, split(zero_padding(inputs.log_decay.astype(exact), real), C), a, b), v


def make_segments(segment_ids: jax.Array | None, C: int) -> Segments | None:
    if segment_ids is None:
        return None
    index = segment_index(segment_ids)
    B, T = index.shape
    index = jnp.pad(index, ((0, 0), (0, -T % C)), mode="edge")
    index = jnp.moveaxis(index.reshape(B, -1, C), 1, 0)[:, :, None]
    entry = jnp.concatenate([jnp.zeros_like(index[:1, ..., :1]), index[:-1, ..., -1:]])
    return Segments(
        index[..., :, None] == index[..., None, :],
        (index == entry)[..., None],
        (index == index[..., -1:])[..., None],
    )


def zero_padding(x: jax.Array, real: jax.Array | None) -> jax.Array:
    """Zeroes the tokens of x [B,T,N,width] where real [B,T] is false."""
    return x if real is None else jnp.where(real[..., None, None], x, 0)


def split(x: jax.Array, C: int) -> jax.Array:
    """[B,T,N,width] -> [n,B,N,C,width], T padded with zeros."""
    B, T, N, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % C), (0, 0), (0, 0)))
    return jnp.transpose(x.reshape(B, -1, C, N, width), (1, 0, 3, 2, 4))


def join(x: jax.Array, T: int) -> jax.Array:
    """[n,B,N,C,width] -> [B,T,N,width]."""
    n, B, N, C, width = x.shape
    return materialize(jnp.transpose(materialize(x), (1, 0, 3, 2, 4)).reshape(B, n * C, N, width)[:, :T])
