"""Chunked linear attention for XLA: the fast path wherever no kernel of its own exists, and the fallback everywhere.

All that does not depend on the state is computed for all chunks at once in batched products: Gram matrices, decays and
the inverse of I + tril(beta K K' D, -1). The scan over chunks carries the float32 state and runs the reduced form
    U = inverse (beta (V - K S)),   S' = carry S + K' U;
outputs are computed in one batch from the entry states it leaves behind. The backward (chunked_backward.py) is alike.
"""

from typing import NamedTuple

import jax
from jax import lax

from jaxhybrid_kernels.channel_gates import channel_operands
from jaxhybrid_kernels.chunk_layout import Chunks, Inputs, join_output, make_chunks
from jaxhybrid_kernels.head_gates import Operands, head_operands
from jaxhybrid_kernels.numerics import product
from jaxhybrid_kernels.triangular_inverse import inverse_unit_lower
from jaxhybrid_kernels.validation import Sizes


class Residuals(NamedTuple):
    """What the backward keeps beside the inputs."""

    states: jax.Array  # [n,B,N,K,V] entry states, compute dtype
    inverse: jax.Array | None  # [n,B,N,C,C], compute dtype


def chunk_operands(chunks: Chunks, scale: float) -> Operands:
    return channel_operands(chunks, scale) if chunks.per_channel else head_operands(chunks, scale)


def scale_rows(x: jax.Array, row: jax.Array | None) -> jax.Array:
    """Multiplies [...,C,V] by [...,C]; a missing row is one."""
    return x if row is None else x * row[..., None]


def chunked_forward(
    inputs: Inputs, initial_state: jax.Array, scale: float, C: int, sizes: Sizes
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    """((out, final state), residuals); see `linear_attention`. initial_state [B,N,K,V] in the state's dtype."""
    chunks = make_chunks(inputs, C, sizes)
    operands = chunk_operands(chunks, scale)
    dtype = chunks.k.dtype
    inverse = None
    if chunks.beta is not None and operands.coupling is not None:
        inverse = inverse_unit_lower(chunks.beta[..., None] * operands.coupling).astype(dtype)

    def chunk(state, piece):
        k_in, k_out, v, beta, inverse, row_in, row_out, carry = piece
        entry = state.astype(dtype)
        update = v
        if beta is not None:
            predicted = scale_rows(product("bhck,bhkv->bhcv", k_in, entry), row_in)
            update = product("bhcj,bhjv->bhcv", inverse, (beta[..., None] * (v - predicted)).astype(dtype))
        written = scale_rows(update.astype(state.dtype), row_out).astype(dtype)
        kept = state if carry is None else carry * state
        new = kept + product("bhck,bhcv->bhkv", k_out, written)
        return new, (entry, None if beta is None else update.astype(dtype))

    sequence = (
        operands.k_in,
        operands.k_out,
        chunks.v,
        chunks.beta,
        inverse,
        operands.row_in,
        operands.row_out,
        operands.carry,
    )
    final, (states, updates) = lax.scan(chunk, initial_state, sequence)
    updates = chunks.v if updates is None else updates
    row_q = None if operands.row_in is None else operands.row_in[:, :, :, None]
    out = scale * scale_rows(product("nbhrck,nbhkv->nbhrcv", operands.q_in, states), row_q)
    out = out + product("nbhrcj,nbhjv->nbhrcv", operands.pair.astype(dtype), updates)
    return (join_output(out.astype(inputs.v.dtype), sizes.T), final), Residuals(states, inverse)
