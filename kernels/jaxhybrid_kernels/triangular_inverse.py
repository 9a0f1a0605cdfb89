"""Inverse of unit lower triangular matrices, many at once.

Blocks of 16 by forward substitution, then doubling: [[X, 0], [-Y S X, Y]] inverts [[L, 0], [S, M]] if X, Y invert L, M.
Every step is exact up to rounding. A power series of the strictly lower part is not: with correlated keys its powers
grow to 1e10.
"""

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.numerics import BLOCK, materialize, product, target_platform


def inverse_unit_lower(strict: jax.Array) -> jax.Array:
    """Inverts I + strict, where strict [...,C,C] is zero on and above the diagonal; C is 16 times a power of two."""
    C = strict.shape[-1]
    lead = strict.shape[:-2]
    sizes = [BLOCK << level for level in range((C // BLOCK).bit_length() - 1)]
    corners = [_diagonal_blocks(strict, 2 * size)[..., size:, :size] for size in sizes]
    blocks = materialize(_diagonal_blocks(strict, BLOCK))
    if target_platform() == "gpu":  # so that strict itself is not written as a whole; a CPU loses by it
        corners = materialize(corners)
    inverse = _substitute(blocks)
    for size, corner in zip(sizes, corners, strict=True):
        pairs = inverse.reshape(*lead, C // (2 * size), 2, size, size)
        upper, lower = pairs[..., 0, :, :], pairs[..., 1, :, :]
        corner = -product("...ij,...jk->...ik", product("...ij,...jk->...ik", lower, corner), upper)
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
    return inverse.reshape(strict.shape)


def _diagonal_blocks(matrix: jax.Array, size: int) -> jax.Array:
    """[...,C,C] -> [...,C/size,size,size]."""
    count = matrix.shape[-1] // size
    blocks = matrix.reshape(*matrix.shape[:-2], count, size, count, size)
    return jnp.stack([blocks[..., i, :, i, :] for i in range(count)], axis=-3)


def _substitute(strict: jax.Array) -> jax.Array:
    """Row i of the inverse is e_i - sum_{j<i} strict_ij (row j), for all blocks together.

    Written out, so that XLA makes one kernel of it: as a loop it reads and writes the blocks sixteen times.
    """
    identity = jnp.eye(strict.shape[-1], dtype=strict.dtype)
    rows: list[jax.Array] = []
    for i in range(strict.shape[-1]):
        row = jnp.broadcast_to(identity[i], strict.shape[:-1])
        for j in range(i):
            row = row - strict[..., i, j, None] * rows[j]
        rows.append(row)
    return jnp.stack(materialize(rows), axis=-2)
