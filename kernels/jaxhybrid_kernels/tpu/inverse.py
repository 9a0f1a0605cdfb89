"""Inverse of unit lower triangular matrices inside a kernel, several heads side by side.

A matrix of C tokens is kept packed: its diagonal blocks of `size` tokens lie side by side in the lanes of a
[size,C] array, each in the lanes it has in the full matrix, so that packing and unpacking are masks and nothing moves.
Blocks of 8 or 16 come from forward substitution, larger ones from doubling: [[X, 0], [-Y S X, Y]] inverts
[[L, 0], [S, M]] if X, Y invert L, M. Every step is exact up to rounding; a power series would not be.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.tpu.products import product
from jaxhybrid_kernels.tpu.runs import pieces
from jaxhybrid_kernels.tpu.turns import Chain

SUBLANES = 8


def invert_blocks(lower: jax.Array, size: int, exact: bool, block: int = SUBLANES) -> Chain[jax.Array]:
    """Inverts the diagonal blocks of I + strict, packed [size,C], where strict is what lower [C,C] float32 holds below
    its diagonal; above it lower is zero. size is `block` times a power of two, and blocks of that size are substituted.

    exact: block products in float32 throughout; otherwise in three bfloat16 products, a relative error of about 1e-5.
    """
    packed = yield from _substitute(_diagonal_blocks(lower, block))
    done = block
    while done < size:
        packed = yield from (_double_exact if exact else _double)(packed, lower, done)
        done *= 2
    return packed


def _lane_block(shape: tuple[int, ...], size: int) -> jax.Array:
    """The index of the block of `size` lanes, a power of two, that each lane belongs to."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) >> (size.bit_length() - 1)


def _diagonal_blocks(matrix: jax.Array, size: int) -> jax.Array:
    """[C,C] -> the diagonal blocks, packed [size,C]."""
    C = matrix.shape[0]
    block = _lane_block((size, C), size)
    packed = matrix[:size]
    for i in range(1, C // size):
        packed = jnp.where(block == i, matrix[i * size : (i + 1) * size], packed)
    return packed


def _substitute(lower: jax.Array) -> Chain[jax.Array]:
    """Inverts packed blocks: once row j of the inverse is known, strict_ij times it leaves every row i below (of whole
    registers that have any)."""
    size, C = lower.shape
    lane = lax.broadcasted_iota(jnp.int32, (size, C), 1)
    row = lax.broadcasted_iota(jnp.int32, (size, C), 0)
    column = lane & (size - 1)
    strict = pieces(jnp.where(row > column, lower, 0), SUBLANES)
    inverse = pieces((row == column).astype(jnp.float32), SUBLANES)
    for j in range(size - 1):
        at = (lane - column)[:SUBLANES] + j
        known = inverse[j // SUBLANES][j % SUBLANES : j % SUBLANES + 1]
        for i in range(j // SUBLANES, size // SUBLANES):
            inverse[i] = inverse[i] - jnp.take_along_axis(strict[i], at, axis=1) * known
        yield
    return jnp.concatenate(inverse, axis=0)


def _below(lower: jax.Array, size: int) -> jax.Array:
    """The blocks below the diagonal of each pair, packed [size,C] in the lanes of the pair's first block; else zero."""
    C = lower.shape[0]
    block = _lane_block((size, C), size)
    packed = jnp.zeros((size, C), lower.dtype)
    for pair in range(0, C // size, 2):
        packed = jnp.where(block == pair, lower[(pair + 1) * size : (pair + 2) * size], packed)
    return packed


def _join(packed: jax.Array, corner: jax.Array, size: int) -> jax.Array:
    """Packed inverses [size,C] and the corners in the lanes of each pair's first block -> packed [2 size,C]."""
    first = _lane_block(packed.shape, size) & 1 == 0
    return jnp.concatenate([jnp.where(first, packed, 0), jnp.where(first, corner, packed)], axis=0)


def _double_exact(inverse: jax.Array, lower: jax.Array, size: int) -> Chain[jax.Array]:
    C = lower.shape[0]
    block = _lane_block((size, C), size)
    diagonal = jnp.concatenate([jnp.where(block == i, inverse, 0) for i in range(C // size)], axis=0)
    right = product(_below(lower, size), diagonal)
    yield
    under = jnp.concatenate([jnp.where(block == i - 1, right, 0) for i in range(C // size)], axis=0)
    corner = -product(jnp.where(block & 1 == 0, 0, inverse), under)
    yield
    return _join(inverse, corner, size)


def _double(inverse: jax.Array, lower: jax.Array, size: int) -> Chain[jax.Array]:
    """A pair's lanes are twice as deep as a product of its blocks needs: they hold the high and low part of the right
    operand, so that one pass with [high|high] and one with [low|0] on the left make a product to about 2**-16."""
    C = lower.shape[0]
    block = _lane_block((size, C), size)
    first = block & 1 == 0

    def multiply(left: jax.Array, shift: int, right: jax.Array, order: tuple[int, int]) -> jax.Array:
        """left lies in one block of each pair and is zero in the other, `shift` lanes on."""
        high, low = _split(left)
        rows = jnp.concatenate([high + jnp.roll(high, shift, axis=1), low], axis=0)
        parts = _split(right)
        columns = [jnp.where(block >> 1 == i // 2, parts[order[i % 2]], 0) for i in range(C // size)]
        both = product(rows.astype(jnp.bfloat16), jnp.concatenate(columns, axis=0).astype(jnp.bfloat16))
        return both[:size] + both[size:]

    right = multiply(_below(lower, size), size, inverse, (0, 1))
    yield
    corner = multiply(jnp.where(first, 0, inverse), C - size, right, (1, 0))
    yield
    return _join(inverse, -corner, size)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A float32 array as the sum of two bfloat16 ones, held in float32."""
    high = x.astype(jnp.bfloat16).astype(jnp.float32)
    return high, x - high
