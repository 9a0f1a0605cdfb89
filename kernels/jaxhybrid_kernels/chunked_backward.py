"""Backward of chunked linear attention, written by hand.

Per chunk, with dS' the gradient of the exit state and dO that of the outputs (row scalings left out):
    dU = pair' dO + k_out dS'        dZ = inverse' dU        dW = beta dZ = dV
    dS = carry dS' + q_in' dO - k_in' dW
Only this runs in a reverse scan. The rest is batched over chunks: dPair = dO U' and dCoupling = -beta tril(dZ U', -1)
needs no gradient of the inverse (U = inverse Z, so the gradient of I + strict is -dZ U'), and what follows.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.channel_gates import channel_gradients
from jaxhybrid_kernels.chunk_layout import Inputs, chunk_output_gradient, join_gradients, make_chunks
from jaxhybrid_kernels.chunked import Residuals, chunk_operands, scale_rows
from jaxhybrid_kernels.head_gates import StateGradients, head_gradients
from jaxhybrid_kernels.numerics import product
from jaxhybrid_kernels.validation import Sizes


def chunked_backward(
    inputs: Inputs,
    residuals: Residuals,
    d_out: jax.Array,
    d_final: jax.Array,
    scale: float,
    C: int,
    sizes: Sizes,
) -> tuple[Inputs, jax.Array]:
    """(Gradients of the inputs in their dtypes and shapes, gradient of the initial state)."""
    chunks = make_chunks(inputs, C, sizes)
    operands = chunk_operands(chunks, scale)
    states, inverse = residuals
    dtype, exact = chunks.k.dtype, d_final.dtype
    d_out = chunk_output_gradient(d_out, inputs.segment_ids, C, dtype, sizes)
    row_q = None if operands.row_in is None else operands.row_in[:, :, :, None]
    d_read = (scale * scale_rows(d_out.astype(exact), row_q)).astype(dtype)  # gradient of q_in S
    from_pair = product("nbhrcj,nbhrcv->nbhjv", operands.pair.astype(dtype), d_out).astype(dtype)
    from_read = product("nbhrck,nbhrcv->nbhkv", operands.q_in, d_read).astype(dtype)

    def chunk(d_exit, piece):
        k_in, k_out, beta, inverse, row_in, row_out, carry, from_pair, from_read = piece
        d_exit_compute = d_exit.astype(dtype)
        d_update = from_pair + scale_rows(product("bhck,bhkv->bhcv", k_out, d_exit_compute), row_out)
        d_entry = from_read + (d_exit if carry is None else carry * d_exit)
        if beta is not None:
            d_update = product("bhcj,bhcv->bhjv", inverse, d_update.astype(dtype))
            d_predicted = scale_rows(beta[..., None] * d_update, row_in).astype(dtype)
            d_entry = d_entry - product("bhck,bhcv->bhkv", k_in, d_predicted)
        return d_entry, (d_exit_compute, d_update.astype(dtype))

    sequence = (
        operands.k_in,
        operands.k_out,
        chunks.beta,
        inverse,
        operands.row_in,
        operands.row_out,
        operands.carry,
        from_pair,
        from_read,
    )
    d_initial, (d_exits, d_updates) = lax.scan(chunk, d_final, sequence, reverse=True)

    d_beta = d_k_in = d_coupling = None
    updates, d_v = chunks.v, d_updates
    if chunks.beta is not None and inverse is not None and operands.coupling is not None:
        predicted = scale_rows(product("nbhck,nbhkv->nbhcv", operands.k_in, states), operands.row_in)
        innovation = chunks.v - predicted
        updates = product("nbhcj,nbhjv->nbhcv", inverse, (chunks.beta[..., None] * innovation).astype(dtype))
        updates = updates.astype(dtype)
        d_strict = -jnp.tril(product("nbhcv,nbhjv->nbhcj", d_updates, updates), -1)
        d_beta = jnp.sum(d_updates * innovation, axis=-1) + jnp.sum(d_strict * operands.coupling, axis=-1)
        d_coupling = chunks.beta[..., None] * d_strict
        d_v = chunks.beta[..., None] * d_updates
        d_predicted = scale_rows(d_v, operands.row_in).astype(dtype)
        d_k_in = -product("nbhcv,nbhkv->nbhck", d_predicted, states)
    written = scale_rows(updates.astype(exact), operands.row_out).astype(dtype)
    d_carry = None
    if operands.carry is not None:
        axes = (-2, -1) if operands.carry.shape[-2] == 1 else (-1,)
        d_carry = operands.carry * jnp.sum(states.astype(exact) * d_exits.astype(exact), axis=axes, keepdims=True)
    gradients = StateGradients(
        q_in=product("nbhrcv,nbhkv->nbhrck", d_read, states),
        k_in=d_k_in,
        k_out=product("nbhcv,nbhkv->nbhck", written, d_exits),
        carry=d_carry,
        pair=product("nbhrcv,nbhjv->nbhrcj", d_out, updates),
        coupling=d_coupling,
    )
    finish = channel_gradients if chunks.per_channel else head_gradients
    d_q, d_k, d_log_decay = finish(chunks, operands, gradients, scale)
    return join_gradients(Inputs(d_q, d_k, d_v, d_log_decay, d_beta, None), inputs), d_initial
