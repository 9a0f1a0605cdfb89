"""The product of one row with a matrix, with the norm before it and what follows in the same kernel (Triton).

Every program reads the row, and makes a few results from their own rows of the matrix. What decides is how many bytes
are under way at once; there is next to nothing to compute.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


class Blocks(NamedTuple):
    """What a program takes at once, powers of two that divide their axis, and its warps."""

    outputs: int  # rows of the matrix, of each half where it is gated
    inputs: int
    warps: int


def row_product_kernel(
    x_1D: jax.Array,
    weight_OD: jax.Array,
    bias_O: jax.Array | None,
    scale_D: jax.Array | None,
    eps: float,
    residual_1O: jax.Array | None,
    gated: bool,
    dtype: Any,
    blocks: Blocks,
    interpret: bool,
) -> jax.Array:
    """`row_product` of one row; norm, sums and what follows in float32."""
    halves, D = 2 if gated else 1, weight_OD.shape[1]
    outputs = weight_OD.shape[0] // halves
    arrays = {
        "x": x_1D[0], "weight": weight_OD, "bias": bias_O, "scale": scale_D,
        "residual": None if residual_1O is None else residual_1O[0],
    }  # fmt: skip
    given = {name: array for name, array in arrays.items() if array is not None}

    def body(*refs: Any) -> None:
        ref, out_ref = dict(zip(given, refs)), refs[-1]
        first = pl.program_id(0) * blocks.outputs
        rows = [pl.ds(half * outputs + first, blocks.outputs) for half in range(halves)]
        products = [jnp.zeros((blocks.outputs, blocks.inputs), jnp.float32) for _ in rows]
        squares = jnp.zeros((blocks.inputs,), jnp.float32)
        for begin in range(0, D, blocks.inputs):
            inputs = pl.ds(begin, blocks.inputs)
            x = ref["x"][inputs].astype(jnp.float32)
            if scale_D is not None:
                squares, x = squares + x * x, x * ref["scale"][inputs].astype(jnp.float32)
            for half, own in enumerate(rows):  # each part of the matrix is read once by one program
                tile = plt.load(ref["weight"].at[own, inputs], eviction_policy="evict_first")
                products[half] += tile.astype(jnp.float32) * x[None]
        results = [jnp.sum(product, axis=1) for product in products]
        if scale_D is not None:
            inverse = lax.rsqrt(jnp.sum(squares) / D + eps)
            results = [result * inverse for result in results]
        if bias_O is not None:
            results = [result + ref["bias"][own].astype(jnp.float32) for result, own in zip(results, rows)]
        result = results[0]
        if gated:
            result = result * lax.logistic(result) * results[1]
        if residual_1O is not None:
            result += ref["residual"][rows[0]].astype(jnp.float32)
        out_ref[rows[0]] = result.astype(dtype)

    return pl.pallas_call(
        body,
        grid=(outputs // blocks.outputs,),
        out_shape=jax.ShapeDtypeStruct((outputs,), dtype),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=interpret,
        name="row_product",
    )(*given.values())[None]
