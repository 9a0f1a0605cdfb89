"""Matrix products of one warpgroup: bfloat16 operands, float32 sums in registers, 64 rows or a multiple."""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

# How the tensor cores read shared memory.
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]

UPPER_HALF = -0x10000  # of a float32: sign, exponent and the first seven bits, a bfloat16


def shared(*shape: int) -> Any:
    """A bfloat16 operand of products in shared memory."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED)


def multiply(left: Any, right: Any, *, interpret: bool) -> jax.Array:
    """left @ right; left in registers or shared memory, right in shared memory. Waits for the result."""
    if interpret:
        return _interpreted(left, right)

    def fresh(total):
        plgpu.wgmma(total, left, right)
        return total[...]

    return pl.run_scoped(fresh, _sums(left, right))


def multiply_all(*terms: tuple[Any, Any], interpret: bool) -> list[jax.Array]:
    """left @ right of every term, all issued together."""
    if interpret:
        return [_interpreted(*term) for term in terms]

    def fresh(*totals):
        for total, term in zip(totals, terms, strict=True):
            plgpu.wgmma(total, *term)
        return [total[...] for total in totals]

    return pl.run_scoped(fresh, *(_sums(*term) for term in terms))


def multiply_both(
    left: Any, first: Any, second: Any, meanwhile: Callable[[jax.Array], jax.Array], *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """(meanwhile(left @ first), left @ second): the second product is under way while the first is used."""
    if interpret:
        return meanwhile(_interpreted(left, first)), _interpreted(left, second)

    def fresh(one, two):
        plgpu.wgmma(one, left, first)
        plgpu.wgmma(two, left, second)
        return meanwhile(plgpu.wgmma_accumulator_load(one, wait_n=1)), two[...]

    return pl.run_scoped(fresh, _sums(left, first), _sums(left, second))


def accumulate(*sums: tuple[jax.Array, list[tuple[Any, Any]]], interpret: bool) -> tuple[jax.Array, ...]:
    """start + sum of left @ right for every (start, [(left, right), ...]), all issued together."""
    if interpret:
        return tuple(start + sum(_interpreted(*term) for term in terms) for start, terms in sums)

    def add(totals):
        for total, (_, terms) in zip(totals, sums, strict=True):
            for left, right in terms:
                plgpu.wgmma(total, left, right)

    return pl.run_state(add)(tuple(plgpu.ACC.init(start) for start, _ in sums))


def _sums(left: Any, right: Any) -> Any:
    return plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32)


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 numbers whose sum is x to 16 bits: its upper half as it is, and the rest rounded."""
    upper = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & UPPER_HALF, jnp.float32)
    return upper.astype(jnp.bfloat16), (x - upper).astype(jnp.bfloat16)


def multiply_split(left: jax.Array, high: Any, low: Any, *, interpret: bool) -> jax.Array:
    """left @ (high + low) to 16 bits, left float32 in registers."""
    upper, lower = split(left)
    if interpret:
        return _interpreted(upper, low) + _interpreted(lower, high) + _interpreted(upper, high)

    def fresh(total):
        plgpu.wgmma(total, upper, low)
        plgpu.wgmma(total, lower, high)
        plgpu.wgmma(total, upper, high)
        return total[...]

    return pl.run_scoped(fresh, _sums(left, high))


def _interpreted(left: Any, right: Any) -> jax.Array:
    """The interpreter has no rule for products with an operand or a starting sum in registers."""
    return jnp.dot(left[...], right[...], preferred_element_type=jnp.float32)


def rows(vector: Any) -> jax.Array:
    """[64] of memory, one number per row of a product's result."""
    return plgpu.load(vector, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def columns(vector: Any) -> jax.Array:
    """[64] of memory, one number per column of a product's result."""
    return plgpu.load(vector, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def along_rows(vector: jax.Array, width: int) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, (64, width), [0])


def along_columns(vector: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, (64, vector.shape[0]), [1])
