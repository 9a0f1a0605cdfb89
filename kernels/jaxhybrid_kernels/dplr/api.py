"""The public operator: its implementations, the checks of its arguments, and the choice."""

import jax

from jaxhybrid_kernels.dplr.chunked import chunked_dplr
from jaxhybrid_kernels.dplr.inputs import Call, Inputs, check_chunk_size, check_inputs
from jaxhybrid_kernels.dplr.recurrent import recurrent_dplr
from jaxhybrid_kernels.dplr.reference import reference_dplr
from jaxhybrid_kernels.dplr.tpu.attention import tpu_dplr, tpu_refusal
from jaxhybrid_kernels.register import Implementation, Register, check_implementation, choose
from jaxhybrid_kernels.validation import check_scale

REGISTER: Register[Call] = {
    "pallas_tpu": Implementation(tpu_dplr, tpu_refusal, platform="tpu", fewest_tokens=2),
    "xla": Implementation(chunked_dplr, fewest_tokens=2),
    "recurrent": Implementation(recurrent_dplr),
    "reference": Implementation(reference_dplr),
}


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
    check_implementation(REGISTER, implementation)
    check_chunk_size(chunk_size)
    check_scale(scale)
    inputs = Inputs(q, k, v, log_decay, a, b, segment_ids)
    check_inputs(inputs, "batch, tokens, heads, width", "initial_state", initial_state)
    call = Call(inputs, initial_state, float(q.shape[-1] ** -0.5 if scale is None else scale), chunk_size)
    return choose(REGISTER, implementation, call, q.shape[1]).run(call)
