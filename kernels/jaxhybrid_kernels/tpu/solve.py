"""Solutions of (I + strict) W = Z for a chunk, and of its transpose, by halves.

Only the two diagonal halves are inverted; W_1 = X_1 Z_1 and W_2 = X_2 (Z_2 - below W_1). Merging them too would cost
more products than it saves, at the precision that an inverse needs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.tpu.gates import scale_rows
from jaxhybrid_kernels.tpu.inverse import invert_blocks
from jaxhybrid_kernels.tpu.products import product
from jaxhybrid_kernels.tpu.turns import Chain


class Halves(NamedTuple):
    """Of I + strict, in the compute dtype."""

    inverses: jax.Array  # [C/2,C]: X_1 in the first lanes, X_2 in the others
    below: jax.Array  # [C/2,C/2]: the block below the diagonal
    columns: jax.Array | None = None  # [C/2,LANES] float32: what its columns are to be multiplied by


def halves(lower: jax.Array, exact: bool, dtype: Any) -> Chain[Halves]:
    """From lower [C,C] float32, or a reference to it, strict with anything on its diagonal."""
    inverses = yield from invert_blocks(lower, lower.shape[0] // 2, exact)
    return Halves(inverses.astype(dtype), below(lower, dtype))


def below(lower: jax.Array, dtype: Any) -> jax.Array:
    half = lower.shape[0] // 2
    return lower[half:, :half].astype(dtype)


def solve(matrix: Halves, right: jax.Array) -> Chain[jax.Array]:
    """W [C,V] from Z [C,V], both float32."""
    half, dtype = matrix.below.shape[0], matrix.below.dtype
    first = product(matrix.inverses[:, :half], right[:half].astype(dtype))
    yield
    rest = right[half:] - product(matrix.below, scale_rows(first, matrix.columns).astype(dtype))
    yield
    second = product(matrix.inverses[:, half:], rest.astype(dtype))
    yield
    return jnp.concatenate([first, second], axis=0)


def solve_transposed(matrix: Halves, right: jax.Array) -> Chain[jax.Array]:
    """The same for the transpose of I + strict."""
    half, dtype = matrix.below.shape[0], matrix.below.dtype
    inverses = matrix.inverses.T
    second = product(inverses[half:], right[half:].astype(dtype))
    yield
    rest = right[:half] - scale_rows(product(matrix.below.T, second.astype(dtype)), matrix.columns)
    yield
    first = product(inverses[:half], rest.astype(dtype))
    yield
    return jnp.concatenate([first, second], axis=0)
