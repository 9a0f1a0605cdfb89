"""Matrix products of values held in a kernel, summed in float32."""

import jax
import jax.numpy as jnp
from jax import lax


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [M,K] times b [K,N]. bfloat16 operands lose no bits; float32 ones are multiplied at full precision."""
    return _dot(a, b, 1, 0)


def product_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [M,K] times the transpose of b [N,K]."""
    return _dot(a, b, 1, 1)


def transposed_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The transpose of a [K,M] times b [K,N]."""
    return _dot(a, b, 0, 0)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    precision = None if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
