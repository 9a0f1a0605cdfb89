"""The public operator: argument checks, choice of implementation, and the custom gradient of the chunked one."""

from functools import partial

import jax

from jaxhybrid_kernels.api import target_platform
from jaxhybrid_kernels.dplr.chunked import Residuals, chunked_backward, chunked_forward
from jaxhybrid_kernels.dplr.inputs import Inputs, check_chunk_size, check_implementation, check_inputs, make_varying
from jaxhybrid_kernels.dplr.recurrent import recurrent_dplr
from jaxhybrid_kernels.dplr.reference import reference_dplr
from jaxhybrid_kernels.dplr.tpu.attention import tpu_dplr, tpu_refusal
from jaxhybrid_kernels.dplr.tpu.layout import make_layout
from jaxhybrid_kernels.validation import check_scale


def dplr_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    a: jax.Array,
    b: jax.Array,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention with a diagonal plus low-rank transition of a [K,V] state per head:

        S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (a_t' S_{t-1}) + k_t v_t',   o_t = scale S_t' q_t.

    RWKV-7 is a = -kappa, b = kappa * rate with unit keys kappa and in-context rates in (0, 1), and scale = 1.

    q, k, a, b:     [B,T,N,K], floating. a and b must contract, as RWKV-7's do, or the state grows without bound.
    v:              [B,T,N,V].
    log_decay:      [B,T,N,K]; finite and <= 0, best in float32. Decays of any strength are exact.
    segment_ids:    None or int [B,T]. The state is dropped where the id changes; 0 is padding, which is skipped: it
                    neither writes nor decays a state, its output is 0 and its gradients are 0.
    initial_state:  None (zeros) or [B,N,K,V] float32: the state before the first non-padding token.
    scale:          Python number, K**-0.5 by default.
    chunk_size:     16, 32, 64 or 128, for "xla"; by default the power of two that covers T, at most 64. 64 for
                    "pallas_tpu".
    implementation: "reference", "recurrent", "xla", "pallas_tpu" (at most 256 channels in bfloat16, 128 in float32;
                    interpreted on a CPU), or None: "recurrent" for one token, else "pallas_tpu" on a TPU if it takes
                    the arguments, else "xla".

    Returns out [B,T,N,V] in v's dtype and the state after the last non-padding token, [B,N,K,V] float32. All arguments
    but segment_ids are differentiable, through both results. Arguments in float64 are computed in float64.
    Raises ValueError, before anything is compiled, naming the argument that is wrong and its value.
    """
    check_implementation(implementation)
    check_chunk_size(chunk_size)
    check_scale(scale)
    inputs = Inputs(q, k, v, log_decay, a, b, segment_ids)
    check_inputs(inputs, "batch, tokens, heads, width", "initial_state", initial_state)
    refusal = tpu_refusal(inputs, initial_state, chunk_size)
    T = q.shape[1]
    if implementation is None:
        on_tpu = target_platform() == "tpu" and refusal is None
        implementation = "recurrent" if T == 1 else "pallas_tpu" if on_tpu else "xla"
    if implementation == "pallas_tpu" and refusal is not None:
        raise ValueError(refusal)
    inputs, state = make_varying(inputs, initial_state)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if implementation == "reference":
        return reference_dplr(inputs, state, scale)
    if implementation == "recurrent":
        return recurrent_dplr(inputs, state, scale)
    if implementation == "pallas_tpu":
        return tpu_dplr(make_layout(inputs, scale), inputs, state)
    return _chunked(scale, chunk_size or default_chunk_size(T), inputs, state)


def default_chunk_size(T: int) -> int:
    """The power of two that covers T, between 16 and 64."""
    return next(size for size in (16, 32, 64) if size >= min(T, 64))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(scale: float, C: int, inputs: Inputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    return chunked_forward(inputs, state, scale, C)[0]


def _chunked_fwd(
    scale: float, C: int, inputs: Inputs, state: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[Inputs, Residuals]]:
    results, residuals = chunked_forward(inputs, state, scale, C)
    return results, (inputs, residuals)


def _chunked_bwd(
    scale: float, C: int, kept: tuple[Inputs, Residuals], gradients: tuple[jax.Array, jax.Array]
) -> tuple[Inputs, jax.Array]:
    return chunked_backward(*kept, *gradients, scale, C)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
