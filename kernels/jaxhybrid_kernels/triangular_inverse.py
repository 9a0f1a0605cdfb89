"""Inverse of unit lower triangular matrices, many at once.

Blocks of 16 by forward substitution, then doubling: [[X, 0], [-Y S X, Y]] inverts [[L, 0], [S, M]] if X, Y invert L, M.
Every step is exact up to rounding. A power series of the strictly lower part is not: with correlated keys its powers
grow to 1e10.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.numerics import BLOCK, product


def inverse_unit_lower(strict: jax.Array) -> jax.Array:
    """Inverts I + strict, where strict [...,C,C] is zero on and above the diagonal; C is 16 times a power of two."""
    C = strict.shape[-1]
    lead = strict.shape[:-2]
    inverse = _substitute(_diagonal_blocks(strict, BLOCK))
    size = BLOCK
    while size < C:
        pairs = inverse.reshape(*lead, C // (2 * size), 2, size, size)
        upper, lower = pairs[..., 0, :, :], pairs[..., 1, :, :]
        below = _diagonal_blocks(strict, 2 * size)[..., size:, :size]
        corner = -product("...ij,...jk->...ik", product("...ij,...jk->...ik", lower, below), upper)
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
        size *= 2
    return inverse.reshape(strict.shape)


def _diagonal_blocks(matrix: jax.Array, size: int) -> jax.Array:
    """[...,C,C] -> [...,C/size,size,size]."""
    count = matrix.shape[-1] // size
    blocks = matrix.reshape(*matrix.shape[:-2], count, size, count, size)
    return jnp.stack([blocks[..., i, :, i, :] for i in range(count)], axis=-3)


def _substitute(strict: jax.Array) -> jax.Array:
    """Row i of the inverse is e_i - sum_{j<i} strict_ij (row j): sixteen steps over all blocks together."""
    size = strict.shape[-1]
    identity = jnp.eye(size, dtype=strict.dtype)

    def row(i, inverse):
        coefficients = lax.dynamic_index_in_dim(strict, i, axis=-2, keepdims=False)
        solved = identity[i] - jnp.sum(coefficients[..., None] * inverse, axis=-2)
        return lax.dynamic_update_index_in_dim(inverse, solved, i, axis=-2)

    return lax.fori_loop(0, size, row, jnp.zeros_like(strict))
