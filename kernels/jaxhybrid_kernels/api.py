"""The public operator: its implementations, the checks of its arguments, and the choice."""

import jax

from jaxhybrid_kernels.call import Call
from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.gpu.linear_attention import gpu_linear_attention, gpu_refusal
from jaxhybrid_kernels.recurrent import recurrent_linear_attention
from jaxhybrid_kernels.reference import reference_linear_attention
from jaxhybrid_kernels.register import Implementation, Register, check_implementation, choose
from jaxhybrid_kernels.tpu.linear_attention import tpu_linear_attention, tpu_refusal
from jaxhybrid_kernels.validation import check_chunk_size, check_norm_eps, check_scale, check_sequence
from jaxhybrid_kernels.xla import chunked_linear_attention

REGISTER: Register[Call] = {
    "pallas_gpu": Implementation(gpu_linear_attention, gpu_refusal, platform="gpu", fewest_tokens=2),
    "pallas_tpu": Implementation(tpu_linear_attention, tpu_refusal, platform="tpu", fewest_tokens=2),
    "xla": Implementation(chunked_linear_attention, fewest_tokens=2),
    "recurrent": Implementation(recurrent_linear_attention),
    "reference": Implementation(reference_linear_attention),
}
IMPLEMENTATIONS = tuple(reversed(REGISTER))  # the plainest first


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
                    "pallas_gpu" on a GPU if it takes the arguments, else "xla"; with JAXHYBRID_LINEAR_KERNELS=0 in the
                    environment, read when a program is traced, no kernel.
    norm_eps:       None, or a positive Python number: then q and k are first divided by sqrt(sum of squares + norm_eps)
                    over K, as the delta rules want keys. "pallas_tpu" does it inside its delta-rule kernels.

    Returns out [B,T,max(Hq,N),V] in v's dtype and the state after the last non-padding token, [B,N,K,V] float32. All
    arguments but segment_ids are differentiable, through both results. Arguments in float64 are computed in float64.
    Raises ValueError, before anything is compiled, naming the argument that is wrong and its value.
    """
    check_implementation(REGISTER, implementation)
    check_chunk_size(chunk_size)
    check_scale(scale)
    check_norm_eps(norm_eps)
    sizes = check_sequence(q, k, v, log_decay, beta, segment_ids, initial_state)
    scale = float(sizes.K**-0.5 if scale is None else scale)
    inputs = Inputs(q, k, v, log_decay, beta, segment_ids)
    call = Call(inputs, initial_state, scale, chunk_size, norm_eps, sizes)
    return choose(REGISTER, implementation, call, sizes.T).run(call)
