"""From [batch, tokens, heads, width] to chunks and back.

Chunked arrays lead with the chunk axis, so that a scan slices whole contiguous pieces:
q [n,B,N,R,C,K], k [n,B,N,C,K], v [n,B,N,C,V], gates [n,B,N,C] or [n,B,N,C,K], with n chunks of C tokens and R queries
per state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.numerics import compute_dtype, materialize, state_dtype
from jaxhybrid_kernels.segments import segment_index
from jaxhybrid_kernels.validation import Sizes


class Inputs(NamedTuple):
    """The arguments of `linear_attention` that are arrays over tokens."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    beta: jax.Array | None
    segment_ids: jax.Array | None


class Chunks(NamedTuple):
    """All that a chunk needs besides the state. Padding tokens hold zeros everywhere."""

    q: jax.Array  # [n,B,N,R,C,K], compute dtype
    k: jax.Array  # [n,B,N,C,K]
    v: jax.Array  # [n,B,N,C,V]
    log_decay: jax.Array | None  # [n,B,N,C] or [n,B,N,C,K], state dtype
    beta: jax.Array | None  # [n,B,N,C], state dtype
    segment: jax.Array | None  # [n,B,C] int32: changes of id so far
    entry_segment: jax.Array | None  # [n,B] int32: that of the state at the chunk's entry

    @property
    def per_channel(self) -> bool:
        return self.log_decay is not None and self.log_decay.ndim == 5


def default_chunk_size(T: int, largest: int) -> int:
    """The power of two that covers T, between 16 and the largest."""
    return next(size for size in (16, 32, 64, 128) if size >= min(T, largest))


def make_chunks(inputs: Inputs, C: int, sizes: Sizes) -> Chunks:
    """Repeats shared heads, pads T to a multiple of C, zeroes padding tokens and brings the chunk axis to the front."""
    q, k, v, log_decay, beta, segment_ids = inputs
    real = _real(segment_ids)
    compute = compute_dtype(q, k, v)
    exact = state_dtype(q, k, v, log_decay, beta)

    def arrange(x: jax.Array, heads: int, dtype: Any) -> jax.Array:
        x = jnp.repeat(x.astype(dtype), heads // x.shape[2], axis=2)
        return _split(_zero_padding(x, real), C)

    queries = arrange(q, sizes.out_heads, compute)
    queries = queries.reshape(*queries.shape[:2], sizes.N, sizes.queries_per_state, C, sizes.K)
    segment = entry = None
    if segment_ids is not None:
        index = segment_index(segment_ids)
        pad = -sizes.T % C
        index = jnp.pad(index, ((0, 0), (0, pad)), mode="edge")
        segment = jnp.moveaxis(index.reshape(sizes.B, -1, C), 1, 0)
        entry = jnp.concatenate([jnp.zeros_like(segment[:1, :, 0]), segment[:-1, :, -1]], axis=0)
    queries, keys, values = materialize((queries, arrange(k, sizes.N, compute), arrange(v, sizes.N, compute)))
    return Chunks(
        queries,
        keys,
        values,
        None if log_decay is None else arrange(log_decay, sizes.N, exact),
        None if beta is None else arrange(beta, sizes.N, exact),
        segment,
        entry,
    )


def chunk_output_gradient(
    d_out: jax.Array, segment_ids: jax.Array | None, C: int, dtype: Any, sizes: Sizes
) -> jax.Array:
    """[B,T,H,V] -> [n,B,N,R,C,V], zero on padding."""
    chunks = _split(_zero_padding(d_out.astype(dtype), _real(segment_ids)), C)
    return chunks.reshape(*chunks.shape[:2], sizes.N, sizes.queries_per_state, C, sizes.V)


def join_output(out: jax.Array, T: int) -> jax.Array:
    """[n,B,N,R,C,V] -> [B,T,N*R,V]."""
    return materialize(_join(out.reshape(*out.shape[:2], -1, *out.shape[4:]), T))


def join_gradients(gradients: Inputs, inputs: Inputs) -> Inputs:
    """Undoes `make_chunks` for gradients: shared heads are summed before rounding, padding gets zero."""
    real = _real(inputs.segment_ids)

    def join(gradient: jax.Array, like: jax.Array) -> jax.Array:
        if gradient.ndim == 6:
            gradient = gradient.reshape(*gradient.shape[:2], -1, *gradient.shape[4:])
        heads = like.shape[2]
        if gradient.shape[2] != heads:
            gradient = gradient.reshape(*gradient.shape[:2], heads, -1, *gradient.shape[3:]).sum(axis=3)
        return _zero_padding(_join(materialize(gradient.astype(like.dtype)), like.shape[1]), real)

    return materialize(jax.tree.map(join, gradients, inputs._replace(segment_ids=None)))


def _real(segment_ids: jax.Array | None) -> jax.Array | None:
    return None if segment_ids is None else segment_ids != 0


def _zero_padding(x: jax.Array, real: jax.Array | None) -> jax.Array:
    if real is None:
        return x
    return jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, 0)


def _split(x: jax.Array, C: int) -> jax.Array:
    """[B,T,H,...] -> [n,B,H,C,...], T padded with zeros."""
    B, T, H = x.shape[:3]
    x = jnp.pad(x, ((0, 0), (0, -T % C)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(B, -1, C, H, *x.shape[3:])
    return jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))


def _join(x: jax.Array, T: int) -> jax.Array:
    """[n,B,H,C,...] -> [B,T,H,...]."""
    n, B, H, C = x.shape[:4]
    x = jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))
    return x.reshape(B, n * C, H, *x.shape[4:])[:, :T]
