"""How the arguments lie in memory for the kernels, and back.

q, k, log_decay, a, b [B,T,N*K] and v [B,T,N*V]: heads lie in lanes, so that no array is transposed in memory. A grid
step takes CHUNK tokens of `heads` heads. Heads narrower than the lanes share them in groups of two, whose products are
told apart by masks and whose states are the diagonal blocks of one matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.dplr.inputs import Inputs
from jaxhybrid_kernels.numerics import compute_dtype
from jaxhybrid_kernels.segments import segment_index

CHUNK = 64  # tokens: two heads' inverses fill a matrix unit, and so do a head's four triangles
WIDTHS = (64, 128, 256)
HEADS = 8  # per grid step: enough independent chains to hide the latency of each


class Layout(NamedTuple):
    """Everything static about one call. Sizes are those in the kernels, padded."""

    B: int
    T: int
    N: int
    K: int
    V: int
    heads: int  # per grid step, even
    scale: float
    dtype: Any  # of the operands of the large products: bfloat16 or float32
    segments: bool

    @property
    def group(self) -> int:
        """Heads that share lanes."""
        return 2 if min(self.K, self.V) < 128 else 1

    @property
    def chunks(self) -> int:
        return self.T // CHUNK

    @property
    def steps(self) -> int:
        """Grid steps over heads."""
        return self.N // self.heads

    @property
    def exact(self) -> bool:
        return self.dtype == jnp.float32


def make_layout(inputs: Inputs, scale: float) -> Layout:
    B, T, N, V = inputs.v.shape
    N += N % 2
    dtype = jnp.dtype(compute_dtype(inputs.q, inputs.k, inputs.v, inputs.a, inputs.b))
    K, V = padded_width(inputs.k.shape[-1]), padded_width(V)
    most = HEADS if dtype == jnp.bfloat16 and max(K, V) <= 128 else 2  # a TPU v4 has 16 MiB of VMEM
    heads = next(heads for heads in (HEADS, 4, 2) if heads <= most and N % heads == 0)
    return Layout(B, T + -T % CHUNK, N, K, V, heads, scale, dtype, inputs.segment_ids is not None)


def padded_width(width: int) -> int:
    """The kernel's width for this many channels; the argument checks refuse more than the last of WIDTHS."""
    return next(w for w in WIDTHS if w >= width)


def lay_out(x: jax.Array, segment_ids: jax.Array | None, layout: Layout, dtype: Any) -> jax.Array:
    """[B,T,N,width] -> [B,T,N*width]: padding tokens zeroed; tokens, heads and channels padded with zeros."""
    B, T, N, width = x.shape
    x = x.astype(dtype)
    if segment_ids is not None:
        x = jnp.where((segment_ids != 0)[:, :, None, None], x, 0)
    x = jnp.pad(x, ((0, 0), (0, layout.T - T), (0, layout.N - N), (0, padded_width(width) - width)))
    return x.reshape(B, layout.T, -1)


def take_back(x: jax.Array, like: jax.Array, segment_ids: jax.Array | None, layout: Layout) -> jax.Array:
    """Undoes `lay_out` for an array of the shape and dtype of `like`; padding tokens get zero."""
    _, T, N, width = like.shape
    x = x.reshape(layout.B, layout.T, layout.N, -1)[:, :T, :N, :width].astype(like.dtype)
    return x if segment_ids is None else jnp.where((segment_ids != 0)[:, :, None, None], x, 0)


def lay_out_state(state: jax.Array, layout: Layout) -> jax.Array:
    """[B,N,K,V] -> [B,V,N*K]."""
    B, N, K, V = state.shape
    state = jnp.pad(state, ((0, 0), (0, layout.N - N), (0, layout.K - K), (0, layout.V - V)))
    return jnp.transpose(state, (0, 3, 1, 2)).reshape(B, layout.V, -1)


def take_back_state(state: jax.Array, shape: tuple[int, ...], layout: Layout) -> jax.Array:
    _, N, K, V = shape
    state = state.reshape(layout.B, layout.V, layout.N, layout.K)[:, :V, :N, :K]
    return jnp.transpose(state, (0, 2, 3, 1))


def lay_out_segments(segment_ids: jax.Array, layout: Layout) -> jax.Array:
    """[B,T] -> float32 [B,T,2*CHUNK], by row token: lanes j < CHUNK mark the chunk's tokens of the same segment, lane
    CHUNK that the entry state is of this segment, lane CHUNK + 1 that the chunk's last token is."""
    B, T = segment_ids.shape
    index = jnp.pad(segment_index(segment_ids), ((0, 0), (0, layout.T - T)), mode="edge").reshape(B, -1, CHUNK)
    last = index[:, :, -1:]
    entry = jnp.concatenate([jnp.zeros_like(last[:, :1]), last[:, :-1]], axis=1)
    marks = index[..., None] == jnp.concatenate([index, entry, last], axis=2)[:, :, None]
    marks = jnp.pad(marks, ((0, 0), (0, 0), (0, 0), (0, CHUNK - 2)))
    return marks.reshape(B, layout.T, 2 * CHUNK).astype(jnp.float32)
