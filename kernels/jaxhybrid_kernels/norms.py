"""L2 norms of queries and keys, for all that has no kernel of its own for them."""

from functools import partial

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
    return (exact * _inverse_norm(exact, eps)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalize_tokens(x: jax.Array, segment_ids: jax.Array | None, eps: float) -> jax.Array:
    """x [B,T,H,K] by `l2_normalize`; padding, which may hold anything, becomes zero and so does its gradient.

    Both are masked at the end: XLA for GPUs makes norms in one pass with what is before them, but not through a mask
    (an alignment step of SmolLM2 took 14 % longer on an H100), nor are zeros times what padding holds zero.
    """
    return zero_padding(l2_normalize(x, eps), segment_ids)


def _forward(
    x: jax.Array, segment_ids: jax.Array | None, eps: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    return normalize_tokens(x, segment_ids, eps), (x, segment_ids)


def _backward(eps: float, kept: tuple[jax.Array, jax.Array | None], gradient: jax.Array) -> tuple[jax.Array, None]:
    """With y = r x and dy its gradient:  r (dy - y (y'dy))."""
    x, segment_ids = kept
    exact = x.astype(state_dtype(x))
    inverse = _inverse_norm(exact, eps)
    y, d_y = exact * inverse, gradient.astype(exact.dtype)
    d_x = inverse * (d_y - y * jnp.sum(y * d_y, axis=-1, keepdims=True))
    return zero_padding(d_x.astype(x.dtype), segment_ids), None


normalize_tokens.defvjp(_forward, _backward)


def _inverse_norm(x: jax.Array, eps: float) -> jax.Array:
    """1 / sqrt(x'x + eps) [...,1]."""
    return lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)
