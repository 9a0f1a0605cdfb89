"""Chunked linear attention for XLA: the fast path wherever no kernel of its own exists, and the fallback everywhere.

All that does not depend on the state is computed for all chunks at once in batched products: Gram matrices, decays, the
inverse of I + tril(beta K K' D, -1), and what the inverse does to keys and pairs:
    write = inverse' K,   pair = pair inverse.
The scan over chunks carries the float32 state and is left with two products,
    W = beta (V - K S),   S' = carry S + write' W;
outputs Q S + pair W are computed in one batch from the entry states and the W it leaves behind. The backward
(chunked_backward.py) is alike.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.channel_gates import channel_operands
from jaxhybrid_kernels.chunk_layout import Chunks, Inputs, join_output, make_chunks
from jaxhybrid_kernels.head_gates import Operands, head_operands
from jaxhybrid_kernels.numerics import materialize, product, target_platform
from jaxhybrid_kernels.triangular_inverse import inverse_unit_lower
from jaxhybrid_kernels.validation import Sizes

type Plan = tuple[float, int, Sizes]  # all that is static: scale, tokens of a chunk, sizes


class Residuals(NamedTuple):
    """What the backward keeps beside the inputs."""

    states: jax.Array  # [n,B,N,K,V] entry states, compute dtype
    inverse: jax.Array | None  # [n,B,N,C,C], state dtype


def chunk_operands(chunks: Chunks, scale: float) -> Operands:
    return channel_operands(chunks, scale) if chunks.per_channel else head_operands(chunks, scale)


def scale_rows(x: jax.Array, row: jax.Array | None) -> jax.Array:
    """Multiplies [...,C,V] by [...,C]; a missing row is one."""
    return x if row is None else x * row[..., None]


def through_inverse(operands: Operands, inverse: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """What a chunk's W adds to the exit state, inverse' (row_out k_out) [n,B,N,C,K], and to the outputs, pair inverse
    [n,B,N,R,C,C]; compute dtype. Without the delta rule (no inverse) W is v."""
    dtype = operands.k_out.dtype
    write = scale_rows(operands.k_out, operands.row_out).astype(dtype)
    if inverse is None:
        return write, operands.pair
    precision = inverse_precision(dtype)
    write = product("nbhcj,nbhck->nbhjk", inverse, write, precision).astype(dtype)
    return write, product("nbhrcj,nbhjm->nbhrcm", operands.pair, inverse, precision).astype(dtype)


def inverse_precision(dtype: Any) -> lax.Precision:
    """Of products with the inverse: its large entries of both signs cancel, so that it stays float32, and more than its
    first eight bits are multiplied with bfloat16 operands too."""
    return lax.Precision.HIGH if dtype == jnp.bfloat16 else lax.Precision.HIGHEST


def chunks_per_turn() -> int:
    """Chunks in one turn of a scan's loop. On a GPU a chunk is a row of small kernels, and the chunks of a turn share
    those that fetch operands, round states and store results; a CPU gains nothing from longer code."""
    return 8 if target_platform() == "gpu" else 1


def chunked_forward(
    inputs: Inputs, initial_state: jax.Array, plan: Plan, keep: bool
) -> tuple[tuple[jax.Array, jax.Array], Residuals | None]:
    """((out, final state), residuals if they are to be kept); initial_state [B,N,K,V] in the state's dtype."""
    scale, C, sizes = plan
    chunks = make_chunks(inputs, C, sizes)
    operands = chunk_operands(chunks, scale)
    dtype = chunks.k.dtype
    inverse = None
    if chunks.beta is not None and operands.coupling is not None:
        inverse = inverse_unit_lower(chunks.beta[..., None] * operands.coupling)
    write, pair = through_inverse(operands, inverse)

    def chunk(state, piece):
        k_in, write, v, beta, row_in, carry = piece
        entry = state.astype(dtype)
        written = v
        if beta is not None:
            predicted = scale_rows(product("bhck,bhkv->bhcv", k_in, entry), row_in)
            written = (beta[..., None] * (v - predicted)).astype(dtype)
        kept = state if carry is None else carry * state
        new = kept + product("bhck,bhcv->bhkv", write, written)
        return new, (entry, None if beta is None else written)

    sequence = (operands.k_in, write, chunks.v, chunks.beta, operands.row_in, operands.carry)
    final, (states, written) = lax.scan(chunk, initial_state, sequence, unroll=chunks_per_turn())
    read = product("nbhrck,nbhkv->nbhrcv", operands.q_in, states).astype(dtype)
    within = product("nbhrcj,nbhjv->nbhrcv", pair, chunks.v if written is None else written).astype(dtype)
    read, within = materialize((read, within))
    row_q = None if operands.row_in is None else operands.row_in[:, :, :, None]
    out = scale * scale_rows(read.astype(initial_state.dtype), row_q) + within
    residuals = Residuals(states, inverse) if keep else None
    return (join_output(out.astype(inputs.v.dtype), sizes.T), final), residuals
