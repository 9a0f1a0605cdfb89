"""Products whose operands are float8, with a scale for each row of the one and for each column of the other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxhybrid_kernels import float8_swiglu
from jaxhybrid_kernels.numerics import FLOAT8, LARGEST_FLOAT8, SMALLEST_SCALED


class Scaled(NamedTuple):
    """Numbers as `values * scale`."""

    values: jax.Array  # float8
    scale: jax.Array  # float32, of length 1 along the axis that shares it


class Sums(NamedTuple):
    """A product as it comes out, before it is scaled: `values * rows * columns`.

    In bfloat16 they are half the bytes, and what that rounds is far below float8's own rounding.
    """

    values: jax.Array  # [...,N]
    rows: jax.Array  # float32 [...,1]
    columns: jax.Array  # float32 [1,N]

    def scaled(self, dtype: Any) -> jax.Array:
        """Multiplied in float32."""
        return (self.values.astype(jnp.float32) * self.rows * self.columns).astype(dtype)


def scaled(x: jax.Array, axis: int) -> Scaled:
    """x rounded to float8, after the largest magnitude along `axis` was made the largest that float8 has."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32)
    scale = jnp.maximum(largest, SMALLEST_SCALED) / LARGEST_FLOAT8
    return Scaled((x.astype(jnp.float32) / scale).astype(FLOAT8), scale)


def product(x: Scaled, kernel: jax.Array, dtype: Any) -> Sums:
    """x [...,K], scaled along its last axis, times kernel [K,N], summed in `dtype`."""
    columns = scaled(kernel, axis=0)
    # Two axes each, as cuBLAS has it.
    rows = x.values.reshape(-1, x.values.shape[-1])
    sums = jax.lax.dot(rows, columns.values, preferred_element_type=dtype)
    return Sums(sums.reshape(*x.values.shape[:-1], -1), x.scale, columns.scale)


def swiglu(gate: Sums, up: Sums) -> Scaled:
    """silu(gate) up [...,N], two products of the same rows, as the next product takes it."""
    wide = gate.values.shape[-1]
    sums = gate.values.reshape(-1, wide), up.values.reshape(-1, wide)
    values, scale = float8_swiglu(*sums, gate.rows.reshape(-1), gate.columns[0], up.columns[0])
    return Scaled(values.reshape(gate.values.shape), scale.reshape(gate.rows.shape))
