"""Chunked DPLR for XLA, forward and backward; see `operands` for the letters.

All that does not depend on the state is computed for all chunks at once; only the states themselves are scanned. The
backward recomputes the operands and keeps the entry states and inverses. Per chunk, with dS' the gradient of the exit
state and dO that of the outputs,
    dU = qb' dO + b_out dS',   dZ = (I - ab)^-T dU,   dS = carry dS' + scale q_in' dO + a_in' dZ,
and d ab = tril(dZ U', -1): the inverse itself needs no gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.chunk_layout import default_chunk_size
from jaxhybrid_kernels.differentiable import differentiable
from jaxhybrid_kernels.dplr.chunks import join, make_segments, make_tokens, split, zero_padding
from jaxhybrid_kernels.dplr.inputs import Call, Inputs
from jaxhybrid_kernels.dplr.operands import Operands, make_operands
from jaxhybrid_kernels.numerics import product
from jaxhybrid_kernels.triangular_inverse import inverse_unit_lower

type Plan = tuple[float, int]  # all that is static: scale, tokens of a chunk


class Residuals(NamedTuple):
    """What the backward keeps beside the inputs."""

    states: jax.Array  # [n,B,N,K,V] entry states, compute dtype
    inverse: jax.Array  # [n,B,N,C,C] of I - ab, compute dtype


def chunked_dplr(call: Call) -> tuple[jax.Array, jax.Array]:
    """(out, final state), see `dplr_attention`."""
    inputs, state = call.varying()
    C = call.chunk_size or default_chunk_size(inputs.v.shape[1], largest=64)
    return chunked_operator((call.scale, C), inputs, state)


def chunked_forward(
    inputs: Inputs, initial_state: jax.Array, plan: Plan, keep: bool
) -> tuple[tuple[jax.Array, jax.Array], Residuals | None]:
    """((out, final state), residuals if they are to be kept); initial_state [B,N,K,V] in the state's dtype."""
    scale, C = plan
    tokens, v = make_tokens(inputs, C, initial_state.dtype)
    operands = make_operands(tokens, make_segments(inputs.segment_ids, C), scale)
    dtype = v.dtype
    inverse = inverse_unit_lower(-operands.ab).astype(dtype)
    from_v = product("nbhij,nbhjv->nbhiv", operands.ak.astype(dtype), v)

    def chunk(state, piece):
        a_in, k_out, b_out, carry, inverse, v, from_v = piece
        entry = state.astype(dtype)
        read = product("bhck,bhkv->bhcv", a_in, entry) + from_v
        update = product("bhcj,bhjv->bhcv", inverse, read.astype(dtype)).astype(dtype)
        new = carry * state + product("bhck,bhcv->bhkv", k_out, v) + product("bhck,bhcv->bhkv", b_out, update)
        return new, (entry, update)

    sequence = (operands.a_in, operands.k_out, operands.b_out, operands.carry, inverse, v, from_v)
    final, (states, updates) = lax.scan(chunk, initial_state, sequence)
    out = scale * product("nbhck,nbhkv->nbhcv", operands.q_in, states)
    out = out + product("nbhcj,nbhjv->nbhcv", operands.qk.astype(dtype), v)
    out = out + product("nbhcj,nbhjv->nbhcv", operands.qb.astype(dtype), updates)
    residuals = Residuals(states, inverse) if keep else None
    return (join(out.astype(inputs.v.dtype), inputs.v.shape[1]), final), residuals


def chunked_backward(
    inputs: Inputs, residuals: Residuals, d_out: jax.Array, d_final: jax.Array, plan: Plan
) -> tuple[Inputs, jax.Array]:
    """(Gradients of the inputs in their dtypes, gradient of the initial state)."""
    scale, C = plan
    segments = make_segments(inputs.segment_ids, C)
    real = None if inputs.segment_ids is None else inputs.segment_ids != 0
    tokens, v = make_tokens(inputs, C, d_final.dtype)
    operands, pull = jax.vjp(lambda tokens: make_operands(tokens, segments, scale), tokens)
    states, inverse = residuals
    dtype = v.dtype
    d_out = split(zero_padding(d_out.astype(dtype), real), C)
    d_read = (scale * d_out.astype(d_final.dtype)).astype(dtype)  # gradient of q_in S
    to_update = product("nbhcj,nbhcv->nbhjv", operands.qb.astype(dtype), d_out)
    to_entry = product("nbhck,nbhcv->nbhkv", operands.q_in, d_read)

    def chunk(d_exit, piece):
        a_in, b_out, carry, inverse, to_update, to_entry = piece
        d_update = to_update + product("bhck,bhkv->bhcv", b_out, d_exit.astype(dtype))
        d_solved = product("bhcj,bhcv->bhjv", inverse, d_update.astype(dtype)).astype(dtype)
        d_entry = carry * d_exit + to_entry + product("bhck,bhcv->bhkv", a_in, d_solved)
        return d_entry, (d_exit.astype(dtype), d_solved)

    sequence = (operands.a_in, operands.b_out, operands.carry, inverse, to_update, to_entry)
    d_initial, (d_exits, d_solved) = lax.scan(chunk, d_final, sequence, reverse=True)

    ak = operands.ak.astype(dtype)
    read = product("nbhck,nbhkv->nbhcv", operands.a_in, states) + product("nbhij,nbhjv->nbhiv", ak, v)
    updates = product("nbhcj,nbhjv->nbhcv", inverse, read.astype(dtype)).astype(dtype)
    d_v = product("nbhcj,nbhcv->nbhjv", operands.qk.astype(dtype), d_out)
    d_v = d_v + product("nbhcj,nbhcv->nbhjv", ak, d_solved) + product("nbhck,nbhkv->nbhcv", operands.k_out, d_exits)
    exact = d_final.dtype
    gradients = Operands(
        q_in=product("nbhcv,nbhkv->nbhck", d_read, states).astype(dtype),
        a_in=product("nbhcv,nbhkv->nbhck", d_solved, states).astype(dtype),
        k_out=product("nbhcv,nbhkv->nbhck", v, d_exits).astype(dtype),
        b_out=product("nbhcv,nbhkv->nbhck", updates, d_exits).astype(dtype),
        carry=jnp.sum(states.astype(exact) * d_exits.astype(exact), axis=-1, keepdims=True),
        qk=product("nbhcv,nbhjv->nbhcj", d_out, v),
        qb=product("nbhcv,nbhjv->nbhcj", d_out, updates),
        ak=product("nbhcv,nbhjv->nbhcj", d_solved, v),
        ab=product("nbhcv,nbhjv->nbhcj", d_solved, updates),
    )
    d_tokens = pull(gradients)[0]

    def finish(gradient: jax.Array, like: jax.Array) -> jax.Array:
        return zero_padding(join(gradient.astype(like.dtype), like.shape[1]), real)

    chunked = Inputs(d_tokens.q, d_tokens.k, d_v, d_tokens.log_decay, d_tokens.a, d_tokens.b)
    return jax.tree.map(finish, chunked, inputs._replace(segment_ids=None)), d_initial


chunked_operator = differentiable(chunked_forward, chunked_backward)
