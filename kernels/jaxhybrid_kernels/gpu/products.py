"""Matrix products of one warpgroup: operands of 16 bits, float32 sums in registers, 64 rows or a multiple."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

# How the tensor cores read shared memory.
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


def shared(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """An operand of products in shared memory."""
    return plgpu.SMEM(shape, dtype, transforms=TILED)


def multiply(left: Any, right: Any, *, interpret: bool, issued: Callable[[], None] = lambda: None) -> jax.Array:
    """left @ right; left in registers or shared memory, right in shared memory.

    Waits for the result, and calls `issued` before.
    """
    if interpret:
        issued()
        return _interpreted(left, right)

    def fresh(total):
        plgpu.wgmma(total, left, right)
        issued()
        return total[...]

    return pl.run_scoped(fresh, _sums(left, right))


def multiply_sum(*terms: tuple[Any, Any], interpret: bool) -> jax.Array:
    """The sum of left @ right over the terms."""
    return multiply_sums(terms, interpret=interpret)[0]


def multiply_sums(*sums: Sequence[tuple[Any, Any]], interpret: bool) -> list[jax.Array]:
    """The sum of left @ right over the terms of each, all issued together."""
    if interpret:
        products = [[_interpreted(*term) for term in terms] for terms in sums]
        return [sum(rest, first) for first, *rest in products]

    def fresh(*totals):
        for total, terms in zip(totals, sums, strict=True):
            for left, right in terms:
                plgpu.wgmma(total, left, right)
        return [total[...] for total in totals]

    return pl.run_scoped(fresh, *(_sums(*terms[0]) for terms in sums))


def multiply_all(*terms: tuple[Any, Any], interpret: bool) -> list[jax.Array]:
    """left @ right of every term, all issued together."""
    return multiply_sums(*([term] for term in terms), interpret=interpret)


def multiply_both(
    first: tuple[Any, Any], second: tuple[Any, Any], meanwhile: Callable[[jax.Array], Any], *, interpret: bool
) -> tuple[Any, jax.Array]:
    """(meanwhile(first product), second product): the second is under way while the first is used."""
    if interpret:
        return meanwhile(_interpreted(*first)), _interpreted(*second)

    def fresh(one, two):
        plgpu.wgmma(one, *first)
        plgpu.wgmma(two, *second)
        return meanwhile(plgpu.wgmma_accumulator_load(one, wait_n=1)), two[...]

    return pl.run_scoped(fresh, _sums(*first), _sums(*second))


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


def _interpreted(left: Any, right: Any) -> jax.Array:
    """The interpreter has no rule for products with an operand or a starting sum in registers."""
    return jnp.dot(left[...], right[...], preferred_element_type=jnp.float32)


def rows(vector: Any) -> jax.Array:
    """[64] of memory, one number per row of a product's result."""
    return plgpu.load(vector, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def columns(vector: Any) -> jax.Array:
    """Of memory, one number per column of a product's result."""
    return plgpu.load(vector, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def along_rows(vector: jax.Array, width: int) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, (64, width), [0])


def along_columns(vector: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, (64, vector.shape[0]), [1])


def equal_pairs(vector: Any) -> jax.Array:
    """[64,64], true where row and column have the same number; vector [64] in memory."""
    return along_rows(rows(vector), 64) == along_columns(columns(vector))


def indices() -> tuple[jax.Array, jax.Array]:
    """Row and column of the elements of a [64,64] product's result."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, (64, 64), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    return row, column


def load(block: Any) -> jax.Array:
    """A block of shared memory as a product's result, in float32."""
    return plgpu.load(block, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def load_rounded(block: Any) -> jax.Array:
    """The same in the block's own dtype."""
    return plgpu.load(block, layout=plgpu.Layout.WGMMA)
