"""One token of a linear-attention layer between its projections: activation, recurrence, output norm and gate."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.layer_token import Blocks, Places, Steps, token_kernel
from jaxhybrid_kernels.gpu.read_on import BETWEEN_PRODUCTS
from jaxhybrid_kernels.numerics import on_nvidia, split_axes
from jaxhybrid_kernels.recurrent import linear_attention_step

WIDTHS = (64, 128)  # of a head
# How a program goes through a state, by whether all have multiprocessors of their own. As measured on an H200 with 12
# states of 128 channels: whole states 6.8 us against 7.4, and of 64 rows 52.4 against 40.0.
FEW, MANY = Blocks(values=128, warps=8, read_on=BETWEEN_PRODUCTS), Blocks(values=64, warps=4, ahead=1)
MANY_STATES = 133  # one more than an H100 or H200 has multiprocessors


def linear_attention_token(
    projections_BO: jax.Array,
    places: Places,
    gates: tuple[jax.Array, jax.Array | None] | Steps,
    state_BNKV: jax.Array,
    *,
    out_norm: tuple[jax.Array, float],
    silu: bool = False,
    norm_eps: float | None = None,
    dtype: Any,
    then: Sequence[jax.Array] = (),
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention_step` of a layer's projections, and what follows up to its last projection.

    With the heads q, k, v, g of a token:  o, state = step(silu q, silu k, silu v);  o / rms(o) scale silu g.

    projections:    [B,O]: heads of K values one after the other, those of each kind together, anything after them.
    places:         the first head of each kind, N of each; without `gate` there is none.
    gates:          log_decay [B,N] or [B,N,K], and beta [B,N] or None, as `linear_attention_step` has them; or how they
                    come from the projections.
    state:          [B,N,K,K], float32.
    out_norm:       (scale [K], eps).
    silu:           of q, k and v.
    norm_eps:       as in `linear_attention`.
    dtype:          of q, k, v, g and of what is returned.
    then:           what the next kernels read first: on Hopper and later "triton" has some of it in the cache by then,
                    where states are few.
    implementation: "triton" (64 or 128 channels, on NVIDIA GPUs; interpreted on a CPU): one kernel, which writes the
                    state in place where it is donated; "xla", or None: "triton" where it serves.

    Returns out [B,N*K] and the state after the token. Raises ValueError if "triton" is asked for by name and cannot.
    """
    refusal = _refusal(projections_BO, gates, state_BNKV)
    if implementation == "triton" and refusal is not None:
        raise ValueError(refusal)
    scale, eps = out_norm
    if implementation == "triton" or (implementation is None and refusal is None and on_nvidia()):
        return token_kernel(
            projections_BO, places, gates, state_BNKV, scale, eps, silu, norm_eps, dtype,
            blocks_of(*state_BNKV.shape),
            interpret=not on_nvidia(),
            then=then,
        )  # fmt: skip
    B, N, K, _ = state_BNKV.shape

    def heads(first: int) -> jax.Array:
        return projections_BO[:, first * K : (first + N) * K].reshape(B, N, K).astype(dtype)

    q, k, v = map(heads, places[:3])
    if silu:
        q, k, v = map(jax.nn.silu, (q, k, v))
    log_decay, beta = _by_steps(projections_BO, gates) if isinstance(gates, Steps) else gates
    out, state = linear_attention_step(q, k, v, log_decay, beta, state_BNKV, norm_eps=norm_eps)
    exact = out.astype(jnp.promote_types(dtype, jnp.float32))
    exact = exact * lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + eps)
    out = exact.astype(dtype) * scale.astype(dtype)
    if places.gate is not None:
        out = out * jax.nn.silu(heads(places.gate))
    return out.reshape(B, -1), state


def blocks_of(rows: int, states: int, keys: int, values: int) -> Blocks:
    """How programs go through states [rows,states,keys,values]."""
    blocks = FEW if rows * states < MANY_STATES else MANY
    return blocks._replace(values=min(blocks.values, values))


def _by_steps(projections_BO: jax.Array, steps: Steps) -> tuple[jax.Array, jax.Array]:
    """log_decay and beta [B,N]."""
    exact, N = jnp.promote_types(projections_BO.dtype, jnp.float32), steps.A_log_N.shape[0]
    a, b = (projections_BO[:, first : first + N].astype(exact) for first in (steps.a, steps.b))
    return -jnp.exp(steps.A_log_N) * jax.nn.softplus(a + steps.bias_N), jax.nn.sigmoid(b)


def _refusal(projections: jax.Array, gates: tuple[Any, ...], state: jax.Array) -> str | None:
    """Why the kernel cannot take these arguments, naming the value in the way; None if it can."""
    names = ("A_log", "bias") if isinstance(gates, Steps) else ("log_decay", "beta")
    exact = dict(zip(names, gates[-2:])) | {"state": state}
    if axes := split_axes(projections, *exact.values()):
        return f"implementation='triton' runs on whole arrays: they are split over {axes}."
    if state.shape[2] not in WIDTHS or state.shape[2] != state.shape[3]:
        return f"state has shape {tuple(state.shape)}, implementation='triton' takes 64 or 128 channels, K = V."
    for name, array in exact.items():
        if array is not None and array.dtype != jnp.float32:
            return f"{name} has dtype {array.dtype}, implementation='triton' computes in float32."
    return None
