"""The oracle: one token at a time, in float32 or float64, gradients by JAX's own differentiation of the scan.

    S_t = diag(a_t) S_{t-1} + k_t u_t',   u_t = v_t (additive) or beta_t (v_t - (diag(a_t) S_{t-1})' k_t) (delta)
    o_t = scale * S_t' q_t

Slow and hungry under differentiation (one state per token is kept): for tests.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.call import Call
from jaxhybrid_kernels.norms import l2_normalize
from jaxhybrid_kernels.numerics import state_dtype, varying_zero
from jaxhybrid_kernels.segments import segment_starts, zero_padding


def reference_linear_attention(call: Call) -> tuple[jax.Array, jax.Array]:
    """Returns (out [B,T,max(Hq,N),V] in v's dtype, final state [B,N,K,V] in float32 or float64)."""
    (q, k, v, log_decay, beta, segment_ids), sizes = call.inputs, call.sizes
    if call.norm_eps is not None:
        q, k = (l2_normalize(zero_padding(x, segment_ids), call.norm_eps) for x in (q, k))
    dtype = state_dtype(q, k, v, log_decay, beta, call.initial_state)
    out_dtype = v.dtype
    B, T, N = v.shape[:3]
    queries = jnp.repeat(q, sizes.out_heads // sizes.Hq, axis=2).astype(dtype)
    queries = queries.reshape(B, T, N, sizes.queries_per_state, sizes.K)
    keys = jnp.repeat(k, N // sizes.Hk, axis=2).astype(dtype)
    values = v.astype(dtype)
    decay = jnp.ones((B, T, N, 1), dtype) if log_decay is None else jnp.exp(log_decay.astype(dtype))
    decay = decay.reshape(B, T, N, -1)
    rate = None if beta is None else beta.astype(dtype)
    if segment_ids is None:
        real = jnp.ones((B, T), bool)
        start = jnp.zeros((B, T), bool)
    else:
        real = segment_ids != 0
        start = segment_starts(segment_ids)
    state = call.state()
    state = state + varying_zero(q, k, v, log_decay, beta, segment_ids, call.initial_state).astype(dtype)

    def token(state, inputs):
        q_t, k_t, v_t, decay_t, rate_t, real_t, start_t = inputs
        past = jnp.where(start_t[:, None, None, None], 0, state) * decay_t[..., None]
        update = v_t
        if rate_t is not None:
            predicted = jnp.einsum("bnkv,bnk->bnv", past, k_t, precision=lax.Precision.HIGHEST)
            update = rate_t[..., None] * (v_t - predicted)
        new = past + k_t[..., None] * update[..., None, :]
        new = jnp.where(real_t[:, None, None, None], new, state)
        out = call.scale * jnp.einsum("bnkv,bnrk->bnrv", new, q_t, precision=lax.Precision.HIGHEST)
        return new, jnp.where(real_t[:, None, None, None], out, 0)

    sequence = (queries, keys, values, decay, rate, real, start)
    final, out = lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), sequence))
    return jnp.moveaxis(out, 0, 1).reshape(B, T, sizes.out_heads, sizes.V).astype(out_dtype), final
