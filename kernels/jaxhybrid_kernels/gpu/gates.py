"""The gates of all chunks, one number per token and head: prepared by XLA for the kernels, and their gradients after.

gates [B,N,n,6,64] float32, tokens last:
    G        running sum of log_decay inside the chunk
    segment  changes of segment so far
    beta
    row_in   what is left of the state at the chunk's entry when a token reads it
    row_out  what is left of a token's update at the chunk's end
    carry    what is left of the entry state at the end, the same number for all tokens
All are zero, not small, across a change of segment. Decays per channel are no part of them: the last three are zero or
one then.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.gpu.plan import CHUNK, Plan
from jaxhybrid_kernels.segments import segment_index, zero_padding

RUNNING_SUM, SEGMENT, BETA, ROW_IN, ROW_OUT, CARRY = range(6)
GATES = 6
TOTAL, LEAVING, UPDATE = range(3)  # rows that the gradients' kernel leaves, see gradients.py

# A beta of zero is taken for this one, far below what float32 adds to anything else: the gradient of beta is found from
# the update divided by beta.
SMALLEST_BETA = 2.0**-40


def make_gates(inputs: Inputs, plan: Plan) -> jax.Array:
    log_decay, beta, segment_ids = inputs.log_decay, inputs.beta, inputs.segment_ids
    shape = (plan.B, plan.N, plan.n, CHUNK)
    if log_decay is None or plan.per_channel:
        total = jnp.zeros(shape, jnp.float32)
    else:
        total = running_sum(_by_chunk(log_decay, plan, segment_ids))
    entry, leaving = total, total[..., -1:] - total
    changes = jnp.zeros(shape, jnp.float32)
    if segment_ids is not None:
        index = jnp.pad(segment_index(segment_ids), ((0, 0), (0, plan.padding)), mode="edge")
        index = index.reshape(plan.B, 1, plan.n, CHUNK)
        before = jnp.concatenate([jnp.zeros_like(index[:, :, :1, 0]), index[:, :, :-1, -1]], axis=2)[..., None]
        changes = jnp.broadcast_to(index - before, shape).astype(jnp.float32)
        entry = jnp.where(changes == 0, entry, -jnp.inf)
        leaving = jnp.where(changes == changes[..., -1:], leaving, -jnp.inf)
    entry = jnp.exp(entry)
    carry = jnp.broadcast_to(entry[..., -1:], shape)
    return jnp.stack([total, changes, _beta(beta, plan, segment_ids), entry, jnp.exp(leaving), carry], axis=3)


def gate_gradients(inputs: Inputs, gates: jax.Array, vectors: jax.Array, dots: jax.Array, plan: Plan) -> Inputs:
    """Gradients of log_decay and beta, None where there is none, from what the gradients' kernel leaves; `inputs` with
    these two in place."""
    d_log_decay = None
    if inputs.log_decay is not None:
        end = jnp.sum(vectors[:, :, :, LEAVING], axis=-1) + gates[:, :, :, CARRY, 0] * jnp.sum(dots, axis=-1)
        after = running_sum(vectors[:, :, :, TOTAL], from_end=True)
        d_log_decay = _by_token(after + end[..., None], inputs.log_decay, plan, inputs.segment_ids)
    d_beta = beta_gradient(inputs, gates, vectors[:, :, :, UPDATE], plan)
    return inputs._replace(log_decay=d_log_decay, beta=d_beta, segment_ids=None)


def beta_gradient(inputs: Inputs, gates: jax.Array, written: jax.Array, plan: Plan) -> jax.Array | None:
    """From dV U by token, [B,N,n,64]; None without beta."""
    if inputs.beta is None:
        return None
    return _by_token(written / gates[:, :, :, BETA] ** 2, inputs.beta, plan, inputs.segment_ids)


def running_sum(x: jax.Array, from_end: bool = False) -> jax.Array:
    """Sums along the last axis up to each token, or from it on, as a product: on a GPU faster than a scan."""
    lower = np.tril(np.ones((CHUNK, CHUNK), np.float32))
    return jnp.einsum("...j,ij->...i", x, lower.T if from_end else lower, precision=lax.Precision.HIGHEST)


def _beta(beta: jax.Array | None, plan: Plan, segment_ids: jax.Array | None) -> jax.Array:
    if beta is None:
        return jnp.ones((plan.B, plan.N, plan.n, CHUNK), jnp.float32)
    beta = _by_chunk(beta, plan, segment_ids)
    return jnp.where(lax.abs(beta) < SMALLEST_BETA, SMALLEST_BETA, beta)


def _by_chunk(x: jax.Array, plan: Plan, segment_ids: jax.Array | None) -> jax.Array:
    """[B,T,N] -> [B,N,n,64] float32, zero on padding."""
    x = zero_padding(x.astype(jnp.float32), segment_ids)
    x = jnp.pad(x, ((0, 0), (0, plan.padding), (0, 0)))
    return jnp.swapaxes(x, 1, 2).reshape(plan.B, plan.N, plan.n, CHUNK)


def _by_token(x: jax.Array, like: jax.Array, plan: Plan, segment_ids: jax.Array | None) -> jax.Array:
    """[B,N,n,64] -> [B,T,N] in the dtype of `like`, zero on padding."""
    x = jnp.swapaxes(x.reshape(plan.B, plan.N, plan.n * CHUNK), 1, 2)[:, : plan.T].astype(like.dtype)
    return zero_padding(x, segment_ids)
