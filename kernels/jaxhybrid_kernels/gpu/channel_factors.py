"""Decays per channel between tokens of a chunk, as factors that never exceed one.

exp(G_i - G_j), G the running sum of log_decay, has to be split between the operands of a product, and neither exp(G)
nor exp(-G) has a bound. It can be split around a border between j and i. So the triangle is filled by halves: for runs
of 32, 16, ..., 1 tokens, the second run of a pair of runs meets the first around the border between them,
    exp(G_i - G_j) = exp(sum from the border through i) exp(sum after j until the border).
All these sums are products of a matrix of zeros and ones with log_decay in float16: no differences, hence nothing
cancels and no exponent is above zero. Eleven bits of log_decay move a factor by 2^-12 of its own logarithm, less than
the rounding of the operands to bfloat16 where it is not small.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhybrid_kernels.gpu.plan import CHUNK
from jaxhybrid_kernels.gpu.products import equal_pairs, multiply_sums

RUNS = (32, 16, 8, 4, 2, 1)
LEVELS = len(RUNS)
THROUGH, AFTER = LEVELS, LEVELS + 1  # in `windows`, behind one matrix a level
FROM, ABOVE, BELOW, DIAGONAL = range(LEVELS, LEVELS + 4)  # in `masks`, likewise
LEAST = -6e4  # a float16 whose exponential is zero in float32
UPPER_HALF = -0x10000  # of a float32: sign, exponent and the first seven bits, a bfloat16
LOG2_E = float(np.log2(np.e))


def split(x: jax.Array, high: Any, low: Any) -> None:
    """Writes two bfloat16 parts of x [64,64] with 16 bits together: its upper half as it is, and the rest rounded."""
    upper = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & UPPER_HALF, jnp.float32)
    high[...] = upper.astype(jnp.bfloat16)
    low[...] = (x - upper).astype(jnp.bfloat16)


def windows() -> jax.Array:
    """[8,64,64] float16 of zeros and ones, by row the tokens whose decays are summed up. By level: those between the
    row's token and the border of its pair of runs, that is of its own run those through it in a second run and after it
    in a first one. Then those through it, and those after it.

    A kernel reads such matrices faster than it makes them.
    """
    row, column, apart = _indices()
    until = [(apart < size) & np.where(row & size, column <= row, column > row) for size in RUNS]
    return jnp.asarray(np.stack([*until, column <= row, column > row]), jnp.float16)


def masks() -> jax.Array:
    """[10,64,64] bfloat16 of zeros and ones. By level, the tokens that meet; then those not before a row's, the
    triangles above and below the diagonal, and the diagonal."""
    row, column, apart = _indices()
    meets = [(apart >= size) & (apart < 2 * size) for size in RUNS]
    return jnp.asarray(np.stack([*meets, column >= row, column > row, column < row, column == row]), jnp.bfloat16)


def _indices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    row, column = np.arange(CHUNK)[:, None], np.arange(CHUNK)
    return row, column, row ^ column


def selection(matrices: Any, index: int | jax.Array) -> jax.Array:
    return plgpu.load(matrices.at[index], layout=plgpu.Layout.WGMMA, optimized=False)


def same_segment(segment: Any) -> jax.Array:
    """[64,64] bfloat16: ones where both tokens are of one segment; segment [64] in memory."""
    return jnp.where(equal_pairs(segment), 1.0, 0.0).astype(jnp.bfloat16)


def factors(*sums: tuple[jax.Array, Any], interpret: bool) -> list[jax.Array]:
    """exp of sums of log_decay, for each (window, decay): one sum per row and channel over the row's tokens in window
    [64,64]; decay [64,64] as `log_decay` gives it, in shared memory."""
    return [lax.exp2(total) for total in multiply_sums(*([term] for term in sums), interpret=interpret)]


def load_rounded(block: Any) -> jax.Array:
    return plgpu.load(block, layout=plgpu.Layout.WGMMA)


def log_decay(decay: Any) -> jax.Array:
    """log2(e) log_decay [64,64] in float16, from float32 in the GPU's memory."""
    decay = plgpu.load(decay, layout=plgpu.Layout.WGMMA, optimized=False)
    return jnp.maximum(decay * LOG2_E, LEAST).astype(jnp.float16)
