"""Products whose operands are float8, with a scale for each row of the one and for each column of the other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FLOAT8 = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(FLOAT8).max)
SMALLEST = 1e-30  # that a largest number counts as, so that zeros can be divided by their scale


class Scaled(NamedTuple):
    """Numbers as `values * scale`."""

    values: jax.Array  # float8
    scale: jax.Array  # float32, of length 1 along the axis that shares it


def scaled(x: jax.Array, axis: int) -> Scaled:
    """x rounded to float8, after the largest magnitude along `axis` was made the largest that float8 has."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32)
    scale = jnp.maximum(largest, SMALLEST) / LARGEST
    return Scaled((x.astype(jnp.float32) / scale).astype(FLOAT8), scale)


def product(x: Scaled, kernel: jax.Array, dtype: Any) -> jax.Array:
    """x [...,K], scaled along its last axis, times kernel [K,N]: [...,N] in `dtype`.

    Sums are scaled in float32, but come out of the product in `dtype`: in bfloat16 they are half the bytes, and what
    that rounds is far below float8's own rounding.
    """
    columns = scaled(kernel, axis=0)
    # Two axes each, as cuBLAS has it.
    rows = x.values.reshape(-1, x.values.shape[-1])
    sums = jax.lax.dot(rows, columns.values, preferred_element_type=dtype).reshape(*x.values.shape[:-1], -1)
    return (sums.astype(jnp.float32) * x.scale * columns.scale).astype(dtype)
