"""Decoding, jitted: one token of every row (`..._step`), or a few (`..._steps`).

The argument `state` is donated: its buffer becomes the new state's, and the array passed in is gone afterwards. Inside
a larger jit the operators themselves do as well, with the state donated to that jit.

A few tokens at a time serve left-padded rows and drafts. segment_ids [B,T] marks the tokens that count: 0 is skipped,
anything else is the sequence the state belongs to. To check a draft and then keep an accepted part of it, read the
outputs from `linear_attention(..., initial_state=state, implementation="recurrent")`, which leaves the state alone, and
advance by    segment_ids = (jnp.arange(T) < accepted[:, None]).astype(jnp.int32).
"""

from functools import partial

import jax

from jaxhybrid_kernels import dplr, recurrent
from jaxhybrid_kernels.api import linear_attention
from jaxhybrid_kernels.dplr import dplr_attention
from jaxhybrid_kernels.short_convolution import short_convolution
from jaxhybrid_kernels.short_convolution import short_convolution_step as convolution_step

FEW_TOKENS = 8  # up to here a scan of steps beats the chunked form (forward alone; measured on a CPU)

_donating = partial(jax.jit, static_argnames="scale", donate_argnames="state")
_normalizing = partial(jax.jit, static_argnames=("scale", "norm_eps"), donate_argnames="state")

linear_attention_step = _normalizing(recurrent.linear_attention_step)
dplr_attention_step = _donating(dplr.dplr_attention_step)
short_convolution_step = jax.jit(convolution_step, donate_argnames="state")


@_normalizing
def linear_attention_steps(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    beta: jax.Array | None,
    state: jax.Array,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    norm_eps: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention` of T tokens from state [B,N,K,V]: (out [B,T,H,V], state after the last that counts)."""
    implementation = "recurrent" if q.shape[1] <= FEW_TOKENS else None
    return linear_attention(
        q, k, v, log_decay, beta, segment_ids, state, scale, implementation=implementation, norm_eps=norm_eps
    )


@_donating
def dplr_attention_steps(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    a: jax.Array,
    b: jax.Array,
    state: jax.Array,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`dplr_attention` of T tokens from state [B,N,K,V]: (out [B,T,N,V], state after the last that counts)."""
    implementation = "recurrent" if q.shape[1] <= FEW_TOKENS else None
    return dplr_attention(q, k, v, log_decay, a, b, segment_ids, state, scale, implementation=implementation)


@partial(jax.jit, donate_argnames="state")
def short_convolution_steps(
    x_BTC: jax.Array, weight_WC: jax.Array, state: jax.Array, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`short_convolution` of T tokens from state [B,W-1,C]: (y [B,T,C], state after the last that counts)."""
    return short_convolution(x_BTC, weight_WC, segment_ids, state)
