"""Backward of chunked linear attention, written by hand.

Per chunk, with dS' the gradient of the exit state and dO that of the outputs, write and pair as in the forward (through
the inverse; row scalings left out):
    dZ = pair' dO + write dS'        dW = beta dZ = dV        dS = carry dS' + q_in' dO - k_in' dW
Only this runs in a reverse scan. The rest is batched over chunks. With U = inverse W, what the chunk's tokens write:
dPair = dO U' (of the pair before the inverse) and dCoupling = -beta tril(dZ U', -1), which needs no gradient of the
inverse (the gradient of I + strict is -dZ U'), and what follows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.channel_gates import channel_gradients
from jaxhybrid_kernels.chunk_layout import Chunks, Inputs, chunk_output_gradient, join_gradients, make_chunks
from jaxhybrid_kernels.chunked import (
    Plan,
    Residuals,
    chunk_operands,
    chunks_per_turn,
    inverse_precision,
    scale_rows,
    through_inverse,
)
from jaxhybrid_kernels.head_gates import Operands, StateGradients, head_gradients
from jaxhybrid_kernels.numerics import materialize, product, state_dtype
from jaxhybrid_kernels.validation import Sizes


class StepGradients(NamedTuple):
    """What the reverse recurrence leaves behind, compute dtype."""

    out: jax.Array  # [n,B,N,R,C,V] dO
    exits: jax.Array  # [n,B,N,K,V] dS', of the state after each chunk
    updates: jax.Array  # [n,B,N,C,V] dZ; without beta dV


def chunked_backward(
    inputs: Inputs, residuals: Residuals, d_out: jax.Array, d_final: jax.Array, plan: Plan
) -> tuple[Inputs, jax.Array]:
    """(Gradients of the inputs in their dtypes and shapes, gradient of the initial state)."""
    scale, C, sizes = plan
    chunks = make_chunks(inputs, C, sizes)
    operands = chunk_operands(chunks, scale)
    write, pair = through_inverse(operands, residuals.inverse)
    dtype, exact = chunks.k.dtype, d_final.dtype
    d_out = chunk_output_gradient(d_out, inputs.segment_ids, C, dtype, sizes)
    row_q = None if operands.row_in is None else operands.row_in[:, :, :, None]
    d_read = (scale * scale_rows(d_out.astype(exact), row_q)).astype(dtype)  # gradient of q_in S
    from_pair = product("nbhrcj,nbhrcv->nbhjv", pair, d_out).astype(dtype)
    from_read = product("nbhrck,nbhrcv->nbhkv", operands.q_in, d_read).astype(dtype)

    def chunk(d_exit, piece):
        k_in, write, beta, row_in, carry, from_pair, from_read = piece
        d_exit_compute = d_exit.astype(dtype)
        d_written = (from_pair + product("bhck,bhkv->bhcv", write, d_exit_compute)).astype(dtype)
        d_entry = from_read + (d_exit if carry is None else carry * d_exit)
        if beta is not None:
            d_predicted = scale_rows(beta[..., None] * d_written, row_in).astype(dtype)
            d_entry = d_entry - product("bhck,bhcv->bhkv", k_in, d_predicted)
        return d_entry, (d_exit_compute, d_written)

    sequence = (operands.k_in, write, chunks.beta, operands.row_in, operands.carry, from_pair, from_read)
    d_initial, (d_exits, d_updates) = lax.scan(chunk, d_final, sequence, reverse=True, unroll=chunks_per_turn())
    steps = StepGradients(d_out, d_exits, d_updates)
    return input_gradients(inputs, chunks, operands, residuals, steps, scale, sizes), d_initial


def input_gradients(
    inputs: Inputs,
    chunks: Chunks,
    operands: Operands,
    residuals: Residuals,
    steps: StepGradients,
    scale: float,
    sizes: Sizes,
) -> Inputs:
    """What follows from the reverse recurrence, for all chunks at once, in the dtypes and shapes of the inputs."""
    states, inverse = residuals
    dtype, exact = chunks.k.dtype, state_dtype(states)
    updates, d_v = chunks.v, steps.updates
    d_beta = d_coupling = d_k_in = None
    if chunks.beta is not None and inverse is not None and operands.coupling is not None:
        innovation = chunks.v - scale_rows(product("nbhck,nbhkv->nbhcv", operands.k_in, states), operands.row_in)
        written = (chunks.beta[..., None] * innovation).astype(dtype)
        updates = product("nbhcj,nbhjv->nbhcv", inverse, written, inverse_precision(dtype)).astype(dtype)
        d_strict = -jnp.tril(product("nbhcv,nbhjv->nbhcj", steps.updates, updates), -1)
        d_coupling = chunks.beta[..., None] * d_strict
        d_beta = jnp.sum(steps.updates * innovation, axis=-1) + jnp.sum(d_strict * operands.coupling, axis=-1)
        # What follows is work on [C,K]. Where C = K and it shares an operand with work on [C,C], XLA for GPUs makes one
        # kernel of both, which took 6 ms of 14 on an H200.
        read_k, beta = materialize(
            (product("nbhcv,nbhkv->nbhck", steps.updates, states).astype(dtype), chunks.beta[..., None])
        )
        d_v = beta * steps.updates
        d_k_in = -scale_rows(beta * read_k, operands.row_in)
    read_q = product("nbhrcv,nbhkv->nbhrck", steps.out, states).astype(dtype)
    leaving = product("nbhcv,nbhkv->nbhck", updates, steps.exits).astype(dtype)
    row_q = None if operands.row_in is None else operands.row_in[:, :, :, None]
    d_carry = None
    if operands.carry is not None:
        axes = (-2, -1) if operands.carry.shape[-2] == 1 else (-1,)
        d_carry = operands.carry * jnp.sum(states.astype(exact) * steps.exits.astype(exact), axis=axes, keepdims=True)
    gradients = StateGradients(
        q_in=scale * scale_rows(read_q.astype(exact), row_q),
        k_in=d_k_in,
        k_out=scale_rows(leaving.astype(exact), operands.row_out),
        carry=d_carry,
        pair=product("nbhrcv,nbhjv->nbhrcj", steps.out, updates),
        coupling=d_coupling,
    )
    finish = channel_gradients if chunks.per_channel else head_gradients
    d_q, d_k, d_log_decay = finish(chunks, operands, gradients, scale)
    return join_gradients(Inputs(d_q, d_k, d_v, d_log_decay, d_beta, None), inputs)
