"""What stands around the recurrence in a layer, for tpu_schedule.py: what XLA takes for it on a TPU.

    python kernels/benchmarks/tpu_schedule.py --chips v5e v6e --callable kernels/benchmarks/tpu_neighbours.py:normalized

NAME is one of: bare (Gated DeltaNet from [B,T,H*K]), activated (SiLU of q, k, v before it), normalized (and q and k
divided by their norms inside the kernels), normalized_by_xla (before them), the same with _backward, and gated (RMS
norm of the outputs times SiLU of a gate, alone).
"""

import jax
import jax.numpy as jnp
from jaxhybrid_kernels import linear_attention

B, T, H, K = 1, 8192, 16, 128
EPS = 1e-6
FLAT = jax.ShapeDtypeStruct((B, T, H * K), jnp.bfloat16)
NARROW = jax.ShapeDtypeStruct((B, T, H), jnp.float32)


def bare():
    return _attention, (FLAT, FLAT, FLAT, NARROW, NARROW)


def activated():
    def layer(q, k, v, log_decay, beta):
        return _attention(*map(jax.nn.silu, (q, k, v)), log_decay, beta)

    return layer, bare()[1]


def normalized():
    def layer(q, k, v, log_decay, beta):
        return _attention(*map(jax.nn.silu, (q, k, v)), log_decay, beta, norm_eps=EPS)

    return layer, bare()[1]


def normalized_by_xla():
    def layer(q, k, v, log_decay, beta):
        q, k, v = map(jax.nn.silu, (q, k, v))
        return _attention(_normalize(_heads(q)), _normalize(_heads(k)), v, log_decay, beta)

    return layer, bare()[1]


def gated():
    def layer(out, gate):
        return (_normalize(_heads(out), jnp.mean) * jax.nn.silu(_heads(gate))).reshape(B, T, H * K)

    return layer, (FLAT, FLAT)


def bare_backward():
    return _with_backward(*bare())


def activated_backward():
    return _with_backward(*activated())


def normalized_backward():
    return _with_backward(*normalized())


def normalized_by_xla_backward():
    return _with_backward(*normalized_by_xla())


def _attention(q, k, v, log_decay, beta, norm_eps=None):
    q, k, v = map(_heads, (q, k, v))
    out, _ = linear_attention(q, k, v, log_decay, beta, implementation="pallas_tpu", norm_eps=norm_eps)
    return out.reshape(B, T, H * K)


def _heads(x):
    return x.reshape(B, T, H, K)


def _normalize(x, total=jnp.sum):
    exact = x.astype(jnp.float32)
    return (exact * jax.lax.rsqrt(total(exact * exact, axis=-1, keepdims=True) + EPS)).astype(x.dtype)


def _with_backward(layer, arguments):
    def gradients(d_out, *arguments):
        return jax.vjp(layer, *arguments)[1](d_out)

    return gradients, (FLAT, *arguments)
