"""Causal depthwise convolution over a few tokens, packed, with a state for decoding.

    y_t = sum_i weight_i x_{t-(W-1)+i},   tap W-1 is the current token
A tap that would reach into another segment contributes zero, and so does a padding token (id 0).
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.numerics import target_platform, varying_zero
from jaxhybrid_kernels.segments import segment_index
from jaxhybrid_kernels.tpu.short_convolution import convolution_refusal, tpu_short_convolution
from jaxhybrid_kernels.validation import check_convolution


def short_convolution(
    x_BTC: jax.Array,
    weight_WC: jax.Array,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x [B,T,C], weight [W,C] -> (y [B,T,C], state [B,W-1,C]), both in x's dtype; products are summed in float32.

    segment_ids int [B,T]: taps stop where the id changes; 0 is padding, whose outputs are 0. Padding belongs at the
    ends or between segments; inside a segment it counts as zero tokens.
    initial_state [B,W-1,C]: the inputs before the first non-padding token, oldest first; None is zeros. The returned
    state is the same for the token after the last non-padding one.
    implementation: "xla", "pallas_tpu" (whole lanes of 128 channels; interpreted on a CPU), or None: "pallas_tpu" on a
    TPU if it takes the arguments, else "xla". Raises ValueError for shapes that do not agree and for what the named
    implementation does not take.
    """
    check_convolution(x_BTC, weight_WC, segment_ids, initial_state, "initial_state")
    if implementation not in (None, "xla", "pallas_tpu"):
        raise ValueError(f"implementation={implementation!r} is unknown; available: xla, pallas_tpu.")
    refusal = convolution_refusal(x_BTC, weight_WC)
    if implementation == "pallas_tpu" and refusal is not None:
        raise ValueError(refusal)
    B, T, C = x_BTC.shape
    reach = weight_WC.shape[0] - 1
    state = jnp.zeros((B, reach, C), x_BTC.dtype) if initial_state is None else initial_state.astype(x_BTC.dtype)
    if implementation == "pallas_tpu" or (implementation is None and refusal is None and target_platform() == "tpu"):
        zero = varying_zero(x_BTC, weight_WC, segment_ids, state)
        x_BTC, weight_WC, state = (x + zero.astype(x.dtype) for x in (x_BTC, weight_WC, state))
        return tpu_short_convolution(x_BTC, weight_WC, segment_ids, state)
    if segment_ids is None:
        padded = jnp.concatenate([state, x_BTC], axis=1)
        return _taps(padded, weight_WC, T, None).astype(x_BTC.dtype), padded[:, T:]
    real = segment_ids != 0
    any_real = jnp.any(real, axis=1)
    position = jnp.arange(T)
    first = jnp.min(jnp.where(real, position, T), axis=1)
    last = jnp.max(jnp.where(real, position, -1), axis=1)
    index = segment_index(segment_ids)
    padded = jnp.concatenate([jnp.zeros_like(state), jnp.where(real[..., None], x_BTC, 0)], axis=1)
    # Rows [first, first + reach) of `padded` are the places just before the first non-padding token.
    slots = jnp.where(any_real, first, 0)[:, None] + jnp.arange(reach)
    padded = jax.vmap(lambda row, slot, values: row.at[slot].set(values))(padded, slots, state)
    index = jnp.concatenate([jnp.zeros((B, reach), index.dtype), index], axis=1)
    y = _taps(padded, weight_WC, T, index)
    y = jnp.where(real[..., None], y, 0).astype(x_BTC.dtype)
    # The state ends with the last non-padding token and holds nothing of earlier segments.
    slots = jnp.where(any_real, last + 1, 0)[:, None] + jnp.arange(reach)
    final = jnp.take_along_axis(padded, slots[..., None], axis=1)
    same = jnp.take_along_axis(index, slots, axis=1) == index[:, -1:]
    return y, jnp.where(same[..., None], final, 0)


def _taps(padded: jax.Array, weight_WC: jax.Array, T: int, index: jax.Array | None) -> jax.Array:
    """Sum of shifted slices; padded [B,W-1+T,C], index (segment of each row) [B,W-1+T]."""
    W = weight_WC.shape[0]
    exact = jnp.promote_types(jnp.promote_types(padded.dtype, weight_WC.dtype), jnp.float32)
    y = jnp.zeros((), exact)
    for tap in range(W):
        inputs = lax.slice_in_dim(padded, tap, tap + T, axis=1).astype(exact)
        if index is not None and tap < W - 1:
            same = lax.slice_in_dim(index, tap, tap + T, axis=1) == index[:, W - 1 :]
            inputs = jnp.where(same[..., None], inputs, 0)
        y = y + inputs * weight_WC[tap].astype(exact)
    return y


def short_convolution_step(x_BC: jax.Array, weight_WC: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token: x [B,C], weight [W,C], state [B,W-1,C] (oldest first) -> (y [B,C], next state), in their dtypes."""
    check_convolution(x_BC[:, None], weight_WC, None, state, "state")
    exact = jnp.promote_types(jnp.promote_types(x_BC.dtype, weight_WC.dtype), jnp.float32)
    window = jnp.concatenate([state, x_BC[:, None].astype(state.dtype)], axis=1)
    y = jnp.sum(window.astype(exact) * weight_WC.astype(exact), axis=1)
    return y.astype(x_BC.dtype), window[:, 1:]
