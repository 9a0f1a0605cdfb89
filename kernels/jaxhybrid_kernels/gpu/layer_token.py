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


class Blocks(NamedTuple):
    """How a program goes through a state."""

    values: int  # of a state's columns at once; a power of two that divides them
    warps: int
    ahead: int = 0  # blocks of columns that are asked for before the first is used, beside it


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
    blocks: Blocks,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention_token`, where every state has its own query and K = V.

    With S the decayed state the output is S' q + (k q) v, v the value that is written: so both products with the state
    are of what was read, and nothing waits for the state after the token.
    """
    B, N, K, V = state_BNKV.shape
    per_channel = log_decay.ndim == 3
    per_head = pl.BlockSpec((None, None), lambda row, head: (row, head))

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
        parts = [pl.ds(begin, blocks.values) for begin in range(0, V, blocks.values)]
        asked = [ref["state"][:, part] for part in parts[: 1 + blocks.ahead]]

        def activated(x: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32)
            return x * lax.logistic(x) if silu else x

        q, k = activated(ref["q"][...]), activated(ref["k"][...])
        if norm_eps is not None:
            q, k = (x * lax.rsqrt(jnp.sum(x * x) + norm_eps) for x in (q, k))
        q, decay = K**-0.5 * q, jnp.exp(ref["decay"][...])
        own = jnp.sum(q * k)
        outs, squares = [], jnp.zeros((), jnp.float32)
        for number, part in enumerate(parts):
            decayed = asked.pop(0) * (decay[:, None] if per_channel else decay)
            if number + 1 + blocks.ahead < len(parts):
                asked.append(ref["state"][:, parts[number + 1 + blocks.ahead]])
            v, out = activated(ref["v"][part]), jnp.sum(decayed * q[:, None], axis=0)
            if beta_BN is not None:
                v = ref["beta"][...] * (v - jnp.sum(decayed * k[:, None], axis=0))
            new_ref[:, part] = decayed + k[:, None] * v[None]
            outs.append(out + own * v)
            squares += jnp.sum(outs[-1] * outs[-1])
        inverse = lax.rsqrt(squares / V + out_eps)
        for part, out in zip(parts, outs):
            out = out * inverse * ref["scale"][part].astype(jnp.float32)
            if places.gate is not None:
                gate = ref["gate"][part].astype(jnp.float32)
                out = out * gate * lax.logistic(gate)
            out_ref[part] = out.astype(dtype)

    out, state = pl.pallas_call(
        body,
        grid=(B, N),
        in_specs=specs,
        out_specs=[pl.BlockSpec((None, V), lambda row, head: (row, head)), own_state],
        out_shape=[jax.ShapeDtypeStruct((B, N * V), dtype), jax.ShapeDtypeStruct(state_BNKV.shape, state_BNKV.dtype)],
        input_output_aliases={names.index("state"): 1},
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=interpret,
        name="linear_attention_token",
    )(*operands)
    return out, state
