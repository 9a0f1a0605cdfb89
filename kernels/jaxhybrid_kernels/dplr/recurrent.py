"""One token a step: decoding, and very short sequences."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.dplr.inputs import Call, Inputs, check_inputs
from jaxhybrid_kernels.numerics import product, state_dtype
from jaxhybrid_kernels.segments import segment_starts
from jaxhybrid_kernels.validation import check_scale


def dplr_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    a: jax.Array,
    b: jax.Array,
    state: jax.Array,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `dplr_attention`, for decoding.

    q, k, log_decay, a, b [B,N,K], v [B,N,V], state [B,N,K,V] float32.
    Returns (out [B,N,V] in v's dtype, state after the token). Raises ValueError for shapes that do not agree.
    """
    check_scale(scale)
    token = Inputs(q, k, v, log_decay, a, b)
    check_inputs(token, "batch, heads, width", "state", state)
    state = state.astype(state_dtype(*token[:6], state))
    return step(token, state, q.shape[-1] ** -0.5 if scale is None else scale)


def step(token: Inputs, state: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """`dplr_attention_step` without its checks."""
    q, k, v, log_decay, a, b = (x.astype(state.dtype) for x in token[:6])
    read = product("bnkv,bnk->bnv", state, a)
    state = jnp.exp(log_decay)[..., None] * state + b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
    return (scale * product("bnkv,bnk->bnv", state, q)).astype(token.v.dtype), state


def recurrent_dplr(call: Call) -> tuple[jax.Array, jax.Array]:
    """`dplr_attention` as a scan of steps; gradients keep one state per token: for a handful of tokens."""
    inputs, initial_state = call.varying()
    *arrays, segment_ids = inputs
    marks = None if segment_ids is None else (segment_ids != 0, segment_starts(segment_ids))

    def token(state, piece):
        *arrays, marks = piece
        if marks is None:
            out, new = step(Inputs(*arrays), state, call.scale)
            return new, out
        real, start = (mark[:, None, None] for mark in marks)
        out, new = step(Inputs(*arrays), jnp.where(start[..., None], 0, state), call.scale)
        return jnp.where(real[..., None], new, state), jnp.where(real, out, 0)

    final, out = lax.scan(token, initial_state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*arrays, marks)))
    return jnp.moveaxis(out, 0, 1), final
