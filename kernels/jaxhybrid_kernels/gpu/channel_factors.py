"""Decays per channel between tokens of a chunk, as factors that never exceed one.

exp(G_i - G_j), G the running sum of log_decay, has to be split between the operands of a product, and neither exp(G) nor
exp(-G) has a bound. It can be split around a border between j and i. So the triangle is filled by halves: for runs of
32, 16, ..., 1 tokens, the second run of a pair of runs meets the first around the border between them,
    exp(G_i - G_j) = exp(sum from the border through i) exp(sum after j until the border).
All these sums are products of a matrix of zeros and ones with log_decay, of which two bfloat16 parts are taken (16 bits of
each decay): no differences, hence nothing cancels and no exponent is above zero.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhybrid_kernels.gpu.plan import CHUNK
from jaxhybrid_kernels.gpu.products import along_columns, along_rows, columns, multiply_sums, rows

RUNS = (32, 16, 8, 4, 2, 1)
LEVELS = len(RUNS)
MEETING = LEVELS  # where these begin in `selections`
THROUGH, FROM, BEFORE, AFTER, ITSELF = range(2 * LEVELS, 2 * LEVELS + 5)
UPPER_HALF = -0x10000  # of a float32: sign, exponent and the first seven bits, a bfloat16
LOG2_E = float(np.log2(np.e))


def indices() -> tuple[jax.Array, jax.Array]:
    """Row and column of the elements of a [64,64] product's result."""
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    return row, column


def split(x: jax.Array, high: Any, low: Any) -> None:
    """Writes two bfloat16 parts of x [64,64] with 16 bits together: its upper half as it is, and the rest rounded."""
    upper = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & UPPER_HALF, jnp.float32)
    high[...] = upper.astype(jnp.bfloat16)
    low[...] = (x - upper).astype(jnp.bfloat16)


def selections() -> jax.Array:
    """[17,64,64] bfloat16 of zeros and ones. By level: which tokens lie between a row's token and the border of its pair
    of runs, those of its own run through it in a second run and after it in a first one; then, by level, those that the
    row's token meets; then those through it, from it on, before it, after it, and itself.

    A kernel reads them faster than it makes them.
    """
    row, column = np.arange(CHUNK)[:, None], np.arange(CHUNK)
    apart = row ^ column
    until = [(apart < size) & np.where(row & size, column <= row, column > row) for size in RUNS]
    meets = [(apart >= size) & (apart < 2 * size) for size in RUNS]
    triangles = [column <= row, column >= row, column < row, column > row, column == row]
    return jnp.asarray(np.stack([*until, *meets, *triangles]), jnp.bfloat16)


def selection(matrices: Any, index: int | jax.Array) -> jax.Array:
    return plgpu.load(matrices.at[index], layout=plgpu.Layout.WGMMA, optimized=False)


def same_segment(segment: Any) -> jax.Array:
    """[64,64] bfloat16: ones where both tokens are of one segment; segment [64] in memory."""
    same = along_rows(rows(segment), CHUNK) == along_columns(columns(segment))
    return jnp.where(same, 1.0, 0.0).astype(jnp.bfloat16)


def factors(summed: jax.Array, decay: tuple[Any, Any], *, interpret: bool) -> jax.Array:
    """exp of sums of log_decay: one sum per row and channel over the tokens where `summed` [64,64] has ones; decay the
    two parts of log2(e) log_decay [64,64] in shared memory."""
    return all_factors([(summed, decay)], interpret=interpret)[0]


def all_factors(sums: list[tuple[jax.Array, tuple[Any, Any]]], *, interpret: bool) -> list[jax.Array]:
    """`factors` of several, issued together."""
    terms = [[(summed, part) for part in decay] for summed, decay in sums]
    return [lax.exp2(total) for total in multiply_sums(*terms, interpret=interpret)]


def load(block: Any) -> jax.Array:
    """A block of shared memory as a product's result in float32."""
    return load_rounded(block).astype(jnp.float32)


def load_rounded(block: Any) -> jax.Array:
    return plgpu.load(block, layout=plgpu.Layout.WGMMA)


def log_decay(decay: Any) -> jax.Array:
    """log2(e) log_decay [64,64] from the GPU's memory; float32."""
    return plgpu.load(decay, layout=plgpu.Layout.WGMMA, optimized=False) * LOG2_E
