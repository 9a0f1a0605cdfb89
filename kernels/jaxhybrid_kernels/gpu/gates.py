"""The gates of all chunks, one number per token and head: prepared by XLA for the kernels, and their gradients after.

gates [B,n,N,6,64] float32, tokens last:
    G        running sum of log_decay inside the chunk
    segment  changes of segment so far
    beta
    row_in   what is left of the state at the chunk's entry when a token reads it
    row_out  what is left of a token's update at the chunk's end
    carry    what is left of the entry state at the end, the same number for all tokens
All are zero, not small, across a change of segment. Decays per channel are no part of them: the last three are zero or
one then.

Sums over tokens are products with a constant matrix, one a chunk. With chunks before heads these also bring tokens last
and back, and no array is transposed for them: such small steps cost by their number, not by their bytes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.gpu.plan import CHUNK, Plan
from jaxhybrid_kernels.numerics import away_from_zero, materialize
from jaxhybrid_kernels.segments import segment_index, zero_padding

RUNNING_SUM, SEGMENT, BETA, ROW_IN, ROW_OUT, CARRY = range(6)
GATES = 6
TOTAL, LEAVING, CARRIED = range(3)  # rows of sums that the gradients' kernel leaves, see gradients.py


def make_gates(inputs: Inputs, plan: Plan) -> jax.Array:
    log_decay, beta, segment_ids = inputs.log_decay, inputs.beta, inputs.segment_ids
    shape = (plan.B, plan.n, plan.N, CHUNK)
    if log_decay is None or plan.per_channel:
        total = jnp.zeros(shape, jnp.float32)
    else:
        until = np.tril(np.ones((CHUNK, CHUNK), np.float32))
        total = _product("bcjh,ij->bchi", _by_chunk(log_decay, plan, segment_ids), until)
    entry, leaving = total, total[..., -1:] - total
    changes = jnp.zeros(shape, jnp.float32)
    if segment_ids is not None:
        index = jnp.pad(segment_index(segment_ids), ((0, 0), (0, plan.padding)), mode="edge")
        index = index.reshape(plan.B, plan.n, 1, CHUNK)
        before = jnp.concatenate([jnp.zeros_like(index[:, :1, :, 0]), index[:, :-1, :, -1]], axis=1)[..., None]
        changes = jnp.broadcast_to(index - before, shape).astype(jnp.float32)
        entry = jnp.where(changes == 0, entry, -jnp.inf)
        leaving = jnp.where(changes == changes[..., -1:], leaving, -jnp.inf)
    entry = jnp.exp(entry)
    carry = jnp.broadcast_to(entry[..., -1:], shape)
    return jnp.stack([total, changes, _beta(beta, plan, segment_ids), entry, jnp.exp(leaving), carry], axis=3)


def decay_gradient(inputs: Inputs, sums: jax.Array, plan: Plan) -> jax.Array | None:
    """From the sums that the gradients' kernel leaves; None without decay."""
    if inputs.log_decay is None:
        return None
    # A token's decay is in the running sums from it on, and in all that the chunk's end has.
    weights = np.ones((CHUNK, sums.shape[3], CHUNK), np.float32)
    weights[:, TOTAL] = np.triu(weights[:, TOTAL])
    return _by_token(_product("bchrj,irj->bcih", sums, weights), inputs.log_decay, plan, inputs.segment_ids)


def beta_gradient(inputs: Inputs, gates: jax.Array, written: jax.Array | None, plan: Plan) -> jax.Array | None:
    """From dV U by token, [B,n,N,64]; None without beta."""
    if inputs.beta is None or written is None:
        return None
    d_beta = jnp.swapaxes(written / gates[:, :, :, BETA] ** 2, 2, 3)
    return _by_token(d_beta, inputs.beta, plan, inputs.segment_ids)


def _beta(beta: jax.Array | None, plan: Plan, segment_ids: jax.Array | None) -> jax.Array:
    if beta is None:
        return jnp.ones((plan.B, plan.n, plan.N, CHUNK), jnp.float32)
    # Unless it is held, XLA transposes the condition too, in a kernel of its own.
    return away_from_zero(materialize(jnp.swapaxes(_by_chunk(beta, plan, segment_ids), 2, 3)))


def _product(equation: str, x: jax.Array, weights: Any) -> jax.Array:
    return jnp.einsum(equation, x, weights, precision=lax.Precision.HIGHEST)


def _by_chunk(x: jax.Array, plan: Plan, segment_ids: jax.Array | None) -> jax.Array:
    """[B,T,N] -> [B,n,64,N] float32, zero on padding."""
    x = zero_padding(x.astype(jnp.float32), segment_ids)
    x = jnp.pad(x, ((0, 0), (0, plan.padding), (0, 0)))
    return x.reshape(plan.B, plan.n, CHUNK, plan.N)


def _by_token(x: jax.Array, like: jax.Array, plan: Plan, segment_ids: jax.Array | None) -> jax.Array:
    """[B,n,64,N] -> [B,T,N] in the dtype of `like`, zero on padding."""
    x = x.reshape(plan.B, plan.n * CHUNK, plan.N)[:, : plan.T].astype(like.dtype)
    return zero_padding(x, segment_ids)
