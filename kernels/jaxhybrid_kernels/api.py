"""The public operator: argument checks, choice of implementation, and the custom gradient of the chunked one."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.chunked import Residuals, chunked_forward
from jaxhybrid_kernels.chunked_backward import chunked_backward
from jaxhybrid_kernels.gpu.linear_attention import gpu_linear_attention, gpu_refusal, make_plan
from jaxhybrid_kernels.norms import l2_normalize, normalize_tokens
from jaxhybrid_kernels.numerics import split_axes, state_dtype, target_platform, varying_zero
from jaxhybrid_kernels.recurrent import recurrent_linear_attention
from jaxhybrid_kernels.reference import reference_linear_attention
from jaxhybrid_kernels.segments import zero_padding
from jaxhybrid_kernels.tpu.layout import make_layout
from jaxhybrid_kernels.tpu.linear_attention import tpu_linear_attention, tpu_refusal
from jaxhybrid_kernels.validation import (
    Sizes,
    check_chunk_size,
    check_implementation,
    check_norm_eps,
    check_scale,
    check_sequence,
)


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    norm_eps: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention with a [K,V] state per value head:  S = diag(a) S;  S += k u';  o = scale S' q.

    u = v without beta (additive rule), u = beta (v - S' k) with it (delta rule); a = exp(log_decay).

    q, k, v:        [B,T,Hq,K], [B,T,Hk,K], [B,T,N,V], floating. One state per head of v. Hk divides N (keys shared by
                    value heads). Hq divides N, or is a multiple of it (several queries read one state).
    log_decay:      None, [B,T,N] or [B,T,N,K]; finite and <= 0, best in float32.
    beta:           None or [B,T,N]; best in float32.
    segment_ids:    None or int [B,T]. The state is dropped where the id changes; 0 is padding, which is skipped: it
                    neither writes nor decays a state, its output is 0 and its gradients are 0.
    initial_state:  None (zeros) or [B,N,K,V] float32: the state before the first non-padding token.
    scale:          Python number, K**-0.5 by default.
    chunk_size:     16, 32, 64 or 128, for "xla"; by default the power of two that covers T, at most 64, or at most 128
                    on a GPU unless log_decay is per channel. 128 for "pallas_tpu", 64 for "pallas_gpu".
    implementation: "reference", "recurrent", "xla", "pallas_tpu" (at most 256 channels; interpreted on a CPU),
                    "pallas_gpu" (Hopper, bfloat16, 64 or 128 channels, one query per state at most; interpreted on a
                    CPU), or None: "recurrent" for one token, else "pallas_tpu" on a TPU or
                    "pallas_gpu" on a GPU if it takes the arguments, else "xla".
    norm_eps:       None, or a positive Python number: then q and k are first divided by sqrt(sum of squares + norm_eps)
                    over K, as the delta rules want keys. "pallas_tpu" does it inside its delta-rule kernels.

    Returns out [B,T,max(Hq,N),V] in v's dtype and the state after the last non-padding token, [B,N,K,V] float32. All
    arguments but segment_ids are differentiable, through both results. Arguments in float64 are computed in float64.
    Raises ValueError, before anything is compiled, naming the argument that is wrong and its value.
    """
    check_implementation(implementation)
    check_chunk_size(chunk_size)
    check_scale(scale)
    check_norm_eps(norm_eps)
    sizes = check_sequence(q, k, v, log_decay, beta, segment_ids, initial_state)
    inputs = Inputs(q, k, v, log_decay, beta, segment_ids)

    def refusal(kernels: str) -> str | None:
        if axes := split_axes(*inputs, initial_state):
            return f"implementation={kernels!r} runs on whole arrays: they are split over {axes}; use jax.shard_map."
        why_not = tpu_refusal if kernels == "pallas_tpu" else gpu_refusal
        return why_not(inputs, initial_state, chunk_size, sizes)

    if implementation is None:
        own = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(target_platform())
        takes = own is not None and refusal(own) is None
        implementation = "recurrent" if sizes.T == 1 else own if takes else "xla"
    elif implementation in ("pallas_tpu", "pallas_gpu") and (reason := refusal(implementation)) is not None:
        raise ValueError(reason)
    scale = float(sizes.K**-0.5 if scale is None else scale)
    if implementation == "reference":
        if norm_eps is not None:
            q, k = (l2_normalize(zero_padding(x, segment_ids), norm_eps) for x in (q, k))
        return reference_linear_attention(q, k, v, log_decay, beta, segment_ids, initial_state, scale, sizes)
    if norm_eps is not None and (implementation != "pallas_tpu" or beta is None):
        q, k = (normalize_tokens(x, segment_ids, norm_eps) for x in (q, k))
        inputs, norm_eps = inputs._replace(q=q, k=k), None
    if implementation == "recurrent":
        return recurrent_linear_attention(q, k, v, log_decay, beta, segment_ids, initial_state, scale, sizes)
    dtype = state_dtype(q, k, v, log_decay, beta, initial_state)
    if initial_state is not None:
        initial_state = initial_state.astype(dtype)
    elif implementation != "pallas_gpu":  # whose kernels need not read zeros
        initial_state = jnp.zeros((sizes.B, sizes.N, sizes.K, sizes.V), dtype)
    zero = varying_zero(q, k, v, log_decay, beta, segment_ids, initial_state)
    inputs, initial_state = jax.tree.map(lambda x: x + zero.astype(x.dtype), (inputs, initial_state))
    if implementation == "pallas_tpu":
        return tpu_linear_attention(make_layout(inputs, scale, sizes, norm_eps), inputs, initial_state)
    if implementation == "pallas_gpu":
        return gpu_linear_attention(make_plan(inputs, initial_state, scale, sizes), inputs, initial_state)
    per_channel = log_decay is not None and log_decay.ndim == 4
    largest = 128 if target_platform() == "gpu" and not per_channel else 64
    return _chunked(scale, chunk_size or default_chunk_size(sizes.T, largest), sizes, inputs, initial_state)


def default_chunk_size(T: int, largest: int) -> int:
    """The power of two that covers T, between 16 and the largest."""
    return next(size for size in (16, 32, 64, 128) if size >= min(T, largest))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    scale: float, C: int, sizes: Sizes, inputs: Inputs, initial_state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return chunked_forward(inputs, initial_state, scale, C, sizes)[0]


def _chunked_fwd(
    scale: float, C: int, sizes: Sizes, inputs: Inputs, initial_state: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[Inputs, Residuals]]:
    results, residuals = chunked_forward(inputs, initial_state, scale, C, sizes)
    return results, (inputs, residuals)


def _chunked_bwd(
    scale: float,
    C: int,
    sizes: Sizes,
    kept: tuple[Inputs, Residuals],
    gradients: tuple[jax.Array, jax.Array],
) -> tuple[Inputs, jax.Array]:
    inputs, residuals = kept
    return chunked_backward(inputs, residuals, *gradients, scale, C, sizes)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
