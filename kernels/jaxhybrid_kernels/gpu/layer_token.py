"""One token of a linear-attention layer in one kernel (Triton): a program reads a state once and writes it in place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


class Places(NamedTuple):
    """Where the heads of queries, keys, values and gates begin in a row of projections, counted in heads."""

    q: int
    k: int
    v: int
    gate: int | None = None


def token_kernel(
    projections_BO: jax.Array,
    places: Places,
    log_decay: jax.Array,
    beta_BN: jax.Array | None,
    state_BNKV: jax.Array,
    out_scale_V: jax.Array,
    out_eps: float,
    silu: bool,
    norm_eps: float | None,
    dtype: Any,
    warps: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention_token`, where every state has its own query and K = V."""
    B, N, K, V = state_BNKV.shape
    per_channel = log_decay.ndim == 3
    per_head = pl.BlockSpec((None, 1), lambda row, head: (row, head))

    def heads(first: int) -> Any:
        return pl.BlockSpec((None, K), lambda row, head: (row, first + head))

    own_state = pl.BlockSpec((None, None, K, V), lambda row, head: (row, head, 0, 0))
    names = ["q", "k", "v", "decay", "state", "scale"]
    operands = [*[projections_BO] * 3, log_decay, state_BNKV, out_scale_V]
    specs = [
        heads(places.q), heads(places.k), heads(places.v),
        pl.BlockSpec((None, None, K), lambda row, head: (row, head, 0)) if per_channel else per_head,
        own_state, pl.BlockSpec((V,), lambda row, head: (0,)),
    ]  # fmt: skip
    if beta_BN is not None:
        names, operands, specs = [*names, "beta"], [*operands, beta_BN], [*specs, per_head]
    if places.gate is not None:
        names, operands, specs = [*names, "gate"], [*operands, projections_BO], [*specs, heads(places.gate)]

    def body(*refs: Any) -> None:
        ref, (out_ref, new_ref) = dict(zip(names, refs)), refs[-2:]
        q, k, v = (ref[name][...].astype(jnp.float32) for name in ("q", "k", "v"))
        if silu:
            q, k, v = (x * lax.logistic(x) for x in (q, k, v))
        if norm_eps is not None:
            q, k = (x * lax.rsqrt(jnp.sum(x * x) + norm_eps) for x in (q, k))
        decay = jnp.exp(ref["decay"][...])
        state = ref["state"][...] * (decay[:, None] if per_channel else decay[None])
        if beta_BN is not None:
            v = ref["beta"][...] * (v - jnp.sum(state * k[:, None], axis=0))
        state = state + k[:, None] * v[None]
        new_ref[...] = state
        out = K**-0.5 * jnp.sum(state * q[:, None], axis=0)
        out = out * lax.rsqrt(jnp.sum(out * out) / V + out_eps) * ref["scale"][...].astype(jnp.float32)
        if places.gate is not None:
            gate = ref["gate"][...].astype(jnp.float32)
            out = out * gate * lax.logistic(gate)
        out_ref[...] = out.astype(dtype)

    out, state = pl.pallas_call(
        body,
        grid=(B, N),
        in_specs=specs,
        out_specs=[pl.BlockSpec((None, V), lambda row, head: (row, head)), own_state],
        out_shape=[jax.ShapeDtypeStruct((B, N * V), dtype), jax.ShapeDtypeStruct(state_BNKV.shape, state_BNKV.dtype)],
        input_output_aliases={names.index("state"): 1},
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="linear_attention_token",
    )(*operands)
    return out, state
