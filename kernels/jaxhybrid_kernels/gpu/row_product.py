"""The product of one row with a matrix, with the norm before it and what follows in the same kernel (Triton).

Every program reads the row, and makes a few results from their own rows of the matrix. What decides is how many bytes
are under way at once; there is next to nothing to compute.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxhybrid_kernels.gpu.read_on import pieces_of, programs, run_or_read

GROUP = 8  # inputs side by side that a thread has: 16 bytes of bfloat16


class Blocks(NamedTuple):
    """What a program takes at once, powers of two, and its warps. The outputs divide their axis; of the inputs' last
    block a part may be missing."""

    outputs: int  # rows of the matrix, of each half where it is gated
    inputs: int
    warps: int
    ahead: int = 1  # blocks of the matrix that are asked for before the first is used
    read_on: int = 0  # bytes of what comes next


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
    then: Sequence[jax.Array] = (),
) -> jax.Array:
    """`row_product` of one row; norm, sums and what follows in float32."""
    halves, D = 2 if gated else 1, weight_OD.shape[1]
    outputs, groups = weight_OD.shape[0] // halves, blocks.inputs // GROUP
    arrays = {
        "x": x_1D.reshape(-1, GROUP), "weight": weight_OD.reshape(-1, D // GROUP, GROUP), "bias": bias_O,
        "scale": None if scale_D is None else scale_D.reshape(-1, GROUP),
        "residual": None if residual_1O is None else residual_1O[0],
    }  # fmt: skip
    given = {name: array for name, array in arrays.items() if array is not None}
    own_programs, pieces = outputs // blocks.outputs, pieces_of(then, blocks.read_on, blocks.warps)

    def body(*refs: Any) -> None:
        program, run = pl.program_id(0), lambda: results_of(program, *refs)
        run_or_read(run, program < own_programs, pieces, program - own_programs, refs[len(given) :], refs[-1])

    def results_of(program: Any, *refs: Any) -> None:
        ref, out_ref = dict(zip(given, refs)), refs[-1]
        first = program * blocks.outputs
        rows = [pl.ds(half * outputs + first, blocks.outputs) for half in range(halves)]
        # What the end needs is asked for first.
        biases = None if bias_O is None else [ref["bias"][own] for own in rows]
        residual = None if residual_1O is None else ref["residual"][rows[0]]

        def read(name: str, rows: pl.Slice | None, begin: int, **how: Any) -> jax.Array:
            """Groups of inputs from `begin` on, zeros behind the last, of a vector or of rows of the matrix."""
            if begin + groups <= D // GROUP:
                own = pl.ds(begin, groups)
                return plt.load(ref[name].at[own] if rows is None else ref[name].at[rows, own], **how)
            at = [begin + jnp.arange(groups)[:, None], jnp.arange(GROUP)[None]]
            if rows is not None:
                at = [rows.start + jnp.arange(rows.size)[:, None, None], *(x[None] for x in at)]
            *outer, number, channel = jnp.broadcast_arrays(*at)
            return plt.load(ref[name].at[*outer, number, channel], mask=number < D // GROUP, other=0.0, **how)

        def tiles(begin: int) -> list[jax.Array]:  # each part of the matrix is read once by one program
            return [read("weight", own, begin, eviction_policy="evict_first") for own in rows]

        products = [jnp.zeros((blocks.outputs, groups), jnp.float32) for _ in rows]
        squares = jnp.zeros((groups,), jnp.float32)
        begins = list(range(0, D // GROUP, groups))
        asked = [tiles(begin) for begin in begins[: blocks.ahead]]
        for number, begin in enumerate(begins):
            x = read("x", None, begin).astype(jnp.float32)
            if scale_D is not None:
                squares, x = squares + jnp.sum(x * x, axis=1), x * read("scale", None, begin).astype(jnp.float32)
            for half, tile in enumerate(asked.pop(0)):
                products[half] += jnp.sum(tile.astype(jnp.float32) * x[None], axis=2)
            if number + blocks.ahead < len(begins):
                asked.append(tiles(begins[number + blocks.ahead]))
        results = [jnp.sum(product, axis=1) for product in products]
        if scale_D is not None:
            inverse = lax.rsqrt(jnp.sum(squares) / D + eps)
            results = [result * inverse for result in results]
        if biases is not None:
            results = [result + bias.astype(jnp.float32) for result, bias in zip(results, biases)]
        result = results[0]
        if gated:
            result = result * lax.logistic(result) * results[1]
        if residual is not None:
            result += residual.astype(jnp.float32)
        out_ref[rows[0]] = result.astype(dtype)

    return pl.pallas_call(
        body,
        grid=(own_programs + programs(pieces),),
        out_shape=jax.ShapeDtypeStruct((outputs,), dtype),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=interpret,
        name="row_product",
    )(*given.values(), *(each.array for each in pieces))[None]
