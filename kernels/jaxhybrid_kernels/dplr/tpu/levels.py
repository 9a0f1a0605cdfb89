"""The four triangles of a chunk and their gradients inside a kernel, with decays per channel; see dplr/operands.py.

The rows are q and a, the columns k and b, each [C,W]. At the level of runs of s = 1, 2, 4, ... tokens every token is in
a first run (a column) or in a second one (a row), so one gate per token and level serves: the decay from the border
between the two runs through a row, or from behind a column to the border. A level is one product of all gated rows with
all gated columns, of which the blocks where that level's runs meet are kept. a reads the state before its own token: it
is moved up by one token, as if it read the state after the token before, and its triangles are moved back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid_kernels.dplr.tpu.lanes import Lanes
from jaxhybrid_kernels.tpu.products import product, product_transposed

THROUGH, BEFORE, AFTER = range(-3, 0)  # sums over a chunk, behind those of the levels


def level_count(C: int) -> int:
    return C.bit_length() - 1


def run_sums(C: int) -> np.ndarray:
    """0/1 [levels + 3, C, C]: which decays are summed for each token's gate at each level, and from the chunk's start
    through the token, before it, and after it."""
    i, j = np.indices((C, C))
    sums = []
    for level in range(level_count(C)):
        second = (i >> level) & 1 == 1
        sums.append((i >> level == j >> level) & np.where(second, j <= i, j > i))
    return np.stack([*sums, j <= i, j < i, j > i])


def meeting_levels(C: int) -> np.ndarray:
    """int32 [2C,2C] by rows (q, a moved up) and columns: the level at which they meet, -1 on the diagonal, else -2."""
    i, j = np.indices((C, C))
    level = np.where(i > j, np.log2(np.maximum(i ^ j, 1)).astype(np.int32), -2)
    level = np.where(i == j, -1, level)
    moved = np.where(i == C - 1, -2, level)  # the last row is the first token's, which meets nothing
    return np.block([[level, level], [moved, moved]]).astype(np.int32)


def three_parts(x: jax.Array) -> jax.Array:
    """float32 [C,W] -> bfloat16 [3C,W] that sum to it exactly."""
    high = x.astype(jnp.bfloat16)
    rest = x - high.astype(jnp.float32)
    middle = rest.astype(jnp.bfloat16)
    low = (rest - middle.astype(jnp.float32)).astype(jnp.bfloat16)
    return jnp.concatenate([high, middle, low], axis=0)


class Tokens(NamedTuple):
    """Float32 [C,W], the heads of a group side by side. q is scaled."""

    q: jax.Array
    a_up: jax.Array  # moved up by one token, the first token's at the end
    k: jax.Array
    b: jax.Array


def gates(sums: jax.Array, log_decay: jax.Array) -> list[jax.Array]:
    """The gates [C,W] of log_decay [C,W], one for each matrix of `run_sums`.

    sums: bfloat16 [(levels + 3) C,3C], those matrices one above the other, three times side by side.
    """
    C = log_decay.shape[0]
    exponential = jnp.exp(product(sums, _three_parts(log_decay)))
    return [exponential[i : i + C] for i in range(0, exponential.shape[0], C)]


def _three_parts(x: jax.Array) -> jax.Array:
    """float32 [C,W] -> bfloat16 [3C,W]: three numbers that sum to it exactly, one above the other."""
    high = x.astype(jnp.bfloat16)
    rest = x - high.astype(jnp.float32)
    middle = rest.astype(jnp.bfloat16)
    low = (rest - middle.astype(jnp.float32)).astype(jnp.bfloat16)
    return jnp.concatenate([high, middle, low], axis=0)


def triangles(tokens: Tokens, gates: list[jax.Array], meeting: jax.Array, lanes: Lanes) -> list[jax.Array]:
    """For each head of the group the triangles [2C,2C] float32 of rows (q, a_up) and columns (k, b) in its own order.

    meeting: `meeting_levels`.
    """
    C = tokens.k.shape[0]
    result = [jnp.zeros((2 * C, 2 * C), jnp.float32)] * lanes.heads
    for level in range(-1, level_count(C)):
        q, a_up, k, b = tokens if level < 0 else (x * gates[level] for x in tokens)
        rows = jnp.concatenate([q, a_up], axis=0).astype(lanes.dtype)
        for head in range(lanes.heads):
            columns = lanes.stack(lanes.own(k, head), lanes.own(b, head), head).astype(lanes.dtype)
            result[head] = jnp.where(meeting == level, product_transposed(rows, columns), result[head])
    return result
