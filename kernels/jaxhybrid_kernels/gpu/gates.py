"""The gates of all chunks, prepared by XLA: small arrays [B,N,n,rows,64] float32 with tokens last."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.gpu.plan import CHUNK, Plan
from jaxhybrid_kernels.segments import segment_index


class Gates(NamedTuple):
    """G is the running sum of log_decay inside the chunk; zero across a change of segment, see head_gates.py."""

    pairs: jax.Array  # [B,N,n,4,64]: beta, G, what G lost by rounding, changes of segment so far
    steps: jax.Array  # [B,N,n,5,64]: beta, beta row_in, scale row_in, row_out, carry


def make_gates(inputs: Inputs, plan: Plan) -> Gates:
    log_decay, beta, segment_ids = inputs.log_decay, inputs.beta, inputs.segment_ids
    shape = (plan.B, plan.N, plan.n, CHUNK)
    real = None if segment_ids is None else (segment_ids != 0)[..., None]

    def arrange(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x if real is None else jnp.where(real, x, 0.0)
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, plan.padding), (0, 0))), 1, 2).reshape(shape)

    beta = jnp.ones(shape, jnp.float32) if beta is None else arrange(beta)
    high = low = jnp.zeros(shape, jnp.float32)
    if log_decay is not None:
        high, low = _running_sum(arrange(log_decay))
    entry, leaving = high, (high[..., -1:] - high) + (low[..., -1:] - low)
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
    pairs = jnp.stack([beta, high, low, changes], axis=3)
    return Gates(pairs, jnp.stack([beta, beta * entry, plan.scale * entry, jnp.exp(leaving), carry], axis=3))


def _running_sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cumulative sum along the last axis as an unevaluated sum of two floats, every sum from scratch in one kernel."""

    def add(a, b):
        total = a[0] + b[0]
        back = total - a[0]
        error = (a[0] - (total - back)) + (b[0] - back)
        return total, error + a[1] + b[1]

    terms = jnp.where(jnp.tril(jnp.ones((CHUNK, CHUNK), bool)), x[..., None, :], 0.0)
    zero = jnp.float32(0)
    return lax.reduce((terms, jnp.zeros_like(terms)), (zero, zero), add, (terms.ndim - 1,))
