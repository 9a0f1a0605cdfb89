"""L2 norms of queries and keys, for all that has no kernel of its own for them."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.numerics import state_dtype
from jaxhybrid_kernels.segments import zero_padding


def l2_normalize(x: jax.Array, eps: float) -> jax.Array:
    """x over sqrt(x'x + eps) along the last axis, computed in float32 (float64 if x is) and rounded to its dtype.

    eps inside the root keeps the gradient of a zero row finite.
    """
    exact = x.astype(state_dtype(x))
    return (exact * lax.rsqrt(jnp.sum(exact * exact, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def normalize_tokens(
    q: jax.Array, k: jax.Array, segment_ids: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array]:
    """q and k [B,T,H,K] by `l2_normalize`; padding, which may hold anything, is zero."""
    q, k = (l2_normalize(zero_padding(x, segment_ids), eps) for x in (q, k))
    return q, k
