"""One token a step: decoding, and very short sequences."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.call import Call
from jaxhybrid_kernels.norms import l2_normalize
from jaxhybrid_kernels.numerics import product, state_dtype, varying_zero
from jaxhybrid_kernels.segments import segment_starts, zero_padding
from jaxhybrid_kernels.validation import Sizes, check_norm_eps, check_scale, check_step


def linear_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    beta: jax.Array | None,
    state: jax.Array,
    scale: float | None = None,
    norm_eps: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_attention`, for decoding.

    q [B,Hq,K], k [B,Hk,K], v [B,N,V], log_decay None, [B,N] or [B,N,K], beta None or [B,N], state [B,N,K,V] float32.
    Returns (out [B,max(Hq,N),V] in v's dtype, state after the token). Raises ValueError for shapes that do not agree.
    """
    check_scale(scale)
    check_norm_eps(norm_eps)
    sizes = check_step(q, k, v, log_decay, beta, state)
    if norm_eps is not None:
        q, k = l2_normalize(q, norm_eps), l2_normalize(k, norm_eps)
    return step(q, k, v, log_decay, beta, state, sizes.K**-0.5 if scale is None else scale, sizes)


def step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    beta: jax.Array | None,
    state: jax.Array,
    scale: float,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention_step` without its checks.

    The state is read once for both products and once to become the next: with decay a,
    k' (a S) = (a k)' S and q' (a S + k u') = (a q)' S + (q' k) u'.
    """
    dtype = state_dtype(q, k, v, log_decay, beta, state)
    B, N = v.shape[:2]
    queries = jnp.repeat(q, sizes.out_heads // sizes.Hq, axis=1).astype(dtype)
    queries = queries.reshape(B, N, sizes.queries_per_state, sizes.K)
    keys = jnp.repeat(k, N // sizes.Hk, axis=1).astype(dtype)
    state = state.astype(dtype)
    decay = jnp.ones((B, N, 1), dtype) if log_decay is None else jnp.exp(log_decay.astype(dtype)).reshape(B, N, -1)
    rows = jnp.concatenate([keys[:, :, None], queries], axis=2) * decay[:, :, None]
    read = product("bnrk,bnkv->bnrv", rows if beta is not None else rows[:, :, 1:], state)
    update = v.astype(dtype)
    if beta is not None:
        update, read = beta.astype(dtype)[..., None] * (update - read[:, :, 0]), read[:, :, 1:]
    state = state * decay[..., None] + keys[..., None] * update[..., None, :]
    out = scale * (read + product("bnrk,bnk->bnr", queries, keys)[..., None] * update[:, :, None])
    return out.reshape(B, sizes.out_heads, sizes.V).astype(v.dtype), state


def recurrent_linear_attention(call: Call) -> tuple[jax.Array, jax.Array]:
    """`linear_attention` as a scan of steps; gradients keep one state per token: for a handful of tokens."""
    call = call.normalized()
    *sequence, segment_ids = call.inputs
    state = call.state()
    state = state + varying_zero(*call.inputs, call.initial_state).astype(state.dtype)
    starts = None if segment_ids is None else segment_starts(segment_ids)[..., None, None, None]

    def token(state, inputs):
        q_t, k_t, v_t, decay_t, beta_t, start = inputs
        state = state if start is None else jnp.where(start, 0, state)
        out, state = step(q_t, k_t, v_t, decay_t, beta_t, state, call.scale, call.sizes)
        return state, out

    # Of zeros throughout, a token leaves the state as it is and puts out zero: that is all that padding takes.
    arrays = jax.tree.map(lambda x: zero_padding(x, segment_ids), sequence)
    final, out = lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*arrays, starts)))
    return jnp.moveaxis(out, 0, 1), final
