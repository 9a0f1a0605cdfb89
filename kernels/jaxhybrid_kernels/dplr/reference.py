"""The oracle: one token at a time, in float32 or float64, gradients by JAX's own differentiation of the scan.

S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (a_t' S_{t-1}) + k_t v_t',   o_t = scale S_t' q_t
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.dplr.inputs import Call
from jaxhybrid_kernels.segments import segment_starts


def reference_dplr(call: Call) -> tuple[jax.Array, jax.Array]:
    """Returns (out [B,T,N,V] in v's dtype, final state [B,N,K,V] in float32 or float64)."""
    inputs, initial_state = call.varying()
    *arrays, segment_ids = inputs
    dtype = initial_state.dtype
    B, T = inputs.v.shape[:2]
    real, start = jnp.ones((B, T), bool), jnp.zeros((B, T), bool)
    if segment_ids is not None:
        real, start = segment_ids != 0, segment_starts(segment_ids)

    def token(state, piece):
        q, k, v, log_decay, a, b, real, start = piece
        past = jnp.where(start[:, None, None, None], 0, state)
        read = jnp.einsum("bnk,bnkv->bnv", a, past, precision=lax.Precision.HIGHEST)
        new = jnp.exp(log_decay)[..., None] * past + b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
        out = call.scale * jnp.einsum("bnk,bnkv->bnv", q, new, precision=lax.Precision.HIGHEST)
        real = real[:, None, None]
        return jnp.where(real[..., None], new, state), jnp.where(real, out, 0)

    sequence = (*(x.astype(dtype) for x in arrays), real, start)
    final, out = lax.scan(token, initial_state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), sequence))
    return jnp.moveaxis(out, 0, 1).astype(inputs.v.dtype), final
