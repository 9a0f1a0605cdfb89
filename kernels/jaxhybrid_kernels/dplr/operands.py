"""What a chunk contributes apart from the state. With G the running sum of log_decay inside the chunk,

    qk_ij = sum_c q_ic k_jc exp(G_ic - G_jc)      (j <= i),  qb alike
    ak_ij = sum_c a_ic k_jc exp(G_(i-1)c - G_jc)  (j < i),   ab alike: a reads the state before its own token decays it

cannot be split into exp(G_i) and exp(-G_j): the second overflows. It can be split around any moment between j and i,
with both exponents <= 0. So the triangle is filled by halves: for runs of s = 1, 2, 4, ... tokens, the second run of
each pair meets the first around the border between them. Every exponent sums the decays of a run, so nothing cancels,
and JAX differentiates it without cancellation; rematerialised by level, so that no gated copy is kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.dplr.chunks import Segments, Tokens
from jaxhybrid_kernels.numerics import product


class Operands(NamedTuple):
    """The chunk's step:  U = (I - ab)^-1 (a_in S + ak V),  O = scale q_in S + qk V + qb U,
    S' = carry S + k_out' V + b_out' U."""

    q_in: jax.Array  # [n,B,N,C,K] compute dtype
    a_in: jax.Array
    k_out: jax.Array
    b_out: jax.Array
    carry: jax.Array  # [n,B,N,K,1] state dtype
    qk: jax.Array  # [n,B,N,C,C] state dtype, lower, scaled
    qb: jax.Array
    ak: jax.Array  # strictly lower
    ab: jax.Array


def make_operands(tokens: Tokens, segments: Segments | None, scale: float) -> Operands:
    dtype, exact = tokens.k.dtype, tokens.log_decay.dtype
    q, k, a, b = (x.astype(exact) for x in (tokens.q, tokens.k, tokens.a, tokens.b))
    through = lax.cumsum(tokens.log_decay, axis=3)
    leaving = lax.cumsum(_later(tokens.log_decay), axis=3, reverse=True)
    if segments is not None:
        through = jnp.where(segments.entry, through, -jnp.inf)
        leaving = jnp.where(segments.exit, leaving, -jnp.inf)
    before = _earlier(through)
    if segments is not None:
        before = jnp.where(segments.entry, before, -jnp.inf)
    leaving = jnp.exp(leaving)
    gram = _gram(jnp.stack([q, a], axis=3), jnp.stack([k, b], axis=3), tokens.log_decay)
    if segments is not None:
        gram = jnp.where(segments.pairs[:, :, :, None, None], gram, 0)
    return Operands(
        (q * jnp.exp(through)).astype(dtype),
        (a * jnp.exp(before)).astype(dtype),
        (k * leaving).astype(dtype),
        (b * leaving).astype(dtype),
        jnp.exp(through[..., -1, :, None]),
        scale * gram[:, :, :, 0, 0],
        scale * gram[:, :, :, 0, 1],
        gram[:, :, :, 1, 0],
        gram[:, :, :, 1, 1],
    )


def _earlier(x: jax.Array) -> jax.Array:
    """[...,C,K] -> what the token before has; zero for the first."""
    return jnp.concatenate([jnp.zeros_like(x[..., :1, :]), x[..., :-1, :]], axis=-2)


def _later(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], axis=-2)


def _gram(rows: jax.Array, columns: jax.Array, log_decay: jax.Array) -> jax.Array:
    """rows (q, a), columns (k, b) [n,B,N,2,C,K] -> the four lower triangles [n,B,N,2,2,C,C]."""
    C = log_decay.shape[-2]
    own = jnp.sum(rows[:, :, :, 0, None] * columns, axis=-1)  # q meets k and b of its own token, a does not
    gram = jnp.stack([own, jnp.zeros_like(own)], axis=3)[..., None, None]
    size = 1
    while size < C:
        corner = _corner(size, rows, columns, log_decay)
        top = jnp.concatenate([gram[..., 0::2, :, :], jnp.zeros_like(corner)], axis=-1)
        gram = jnp.concatenate([top, jnp.concatenate([corner, gram[..., 1::2, :, :]], axis=-1)], axis=-2)
        size *= 2
    return gram[..., 0, :, :]


@partial(jax.checkpoint, static_argnums=0)
def _corner(size: int, rows: jax.Array, columns: jax.Array, log_decay: jax.Array) -> jax.Array:
    """Second runs of `size` tokens against the first runs before them, [n,B,N,2,2,pairs,size,size]."""
    first, second = _runs(log_decay, size)
    through = lax.cumsum(second, axis=second.ndim - 2)
    left = _runs(rows, size)[1] * jnp.exp(jnp.stack([through, _earlier(through)], axis=3))
    after = lax.cumsum(_later(first), axis=first.ndim - 2, reverse=True)
    right = _runs(columns, size)[0] * jnp.exp(after)[:, :, :, None]
    return product("nbhrmic,nbhsmjc->nbhrsmij", left, right)


def _runs(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """[...,C,K] -> the first and the second run of each pair, [...,C/(2 size),size,K]."""
    x = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]
