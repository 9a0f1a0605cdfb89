"""One token of a linear-attention layer in one kernel (Triton): a program reads a state once and writes it in place."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxhybrid_kernels.gpu.read_on import pieces_of, programs, run_or_read


class Places(NamedTuple):
    """Where the heads of queries, keys, values and gates begin in a row of projections, counted in heads."""

    q: int
    k: int
    v: int
    gate: int | None = None


class Steps(NamedTuple):
    """How Gated DeltaNet's gates come from that row: log_decay = -exp(A_log) softplus(a + bias), beta = sigmoid(b)."""

    a: int  # the first column of N
    b: int
    A_log_N: jax.Array
    bias_N: jax.Array


class Blocks(NamedTuple):
    """How a program goes through a state."""

    values: int  # of a state's columns at once; a power of two that divides them
    warps: int
    ahead: int = 0  # blocks of columns that are asked for before the first is used, beside it
    read_on: int = 0  # bytes of what comes next


def token_kernel(
    projections_BO: jax.Array,
    places: Places,
    gates: tuple[jax.Array, jax.Array | None] | Steps,
    state_BNKV: jax.Array,
    out_scale_V: jax.Array,
    out_eps: float,
    silu: bool,
    norm_eps: float | None,
    dtype: Any,
    blocks: Blocks,
    interpret: bool,
    then: Sequence[jax.Array] = (),
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention_token`, where every state has its own query and K = V.

    With S the decayed state the output is S' q + (k q) v, v the value that is written: so both products with the state
    are of what was read, and nothing waits for the state after the token.
    """
    B, N, K, V = state_BNKV.shape
    own_state = pl.BlockSpec((None, None, K, V), lambda row, head: (row, head, 0, 0))

    def heads(first: int) -> Any:
        return pl.BlockSpec((None, K), lambda row, head: (row, first + head))

    def column(first: int) -> Any:
        return pl.BlockSpec((None, None), lambda row, head: (row, first + head))

    of_head, per_channel = pl.BlockSpec((None,), lambda row, head: (head,)), False
    given: dict[str, tuple[jax.Array, Any]] = {
        "q": (projections_BO, heads(places.q)), "k": (projections_BO, heads(places.k)),
        "v": (projections_BO, heads(places.v)), "state": (state_BNKV, own_state),
        "scale": (out_scale_V, pl.BlockSpec((V,), lambda row, head: (0,))),
    }  # fmt: skip
    if isinstance(gates, Steps):
        given |= {name: (projections_BO, column(first)) for name, first in (("a", gates.a), ("b", gates.b))}
        given |= {"A_log": (gates.A_log_N, of_head), "bias": (gates.bias_N, of_head)}
    else:
        log_decay, beta_BN = gates
        per_channel = log_decay.ndim == 3
        own_channels = pl.BlockSpec((None, None, K), lambda row, head: (row, head, 0))
        given["decay"] = log_decay, own_channels if per_channel else column(0)
        if beta_BN is not None:
            given["beta"] = beta_BN, column(0)
    if places.gate is not None:
        given["gate"] = projections_BO, heads(places.gate)

    pieces = pieces_of(then, blocks.read_on, blocks.warps)
    more = pl.cdiv(programs(pieces), B)  # of each row

    def body(*refs: Any) -> None:
        row, head = pl.program_id(0), pl.program_id(1)
        number = row * more + head - N
        run_or_read(lambda: token(*refs), head < N, pieces, number, refs[len(given) :], refs[-2])

    def token(*refs: Any) -> None:
        ref, (out_ref, new_ref) = dict(zip(given, refs)), refs[-2:]
        parts = [pl.ds(begin, blocks.values) for begin in range(0, V, blocks.values)]
        asked = [ref["state"][:, part] for part in parts[: 1 + blocks.ahead]]

        def activated(x: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32)
            return x * lax.logistic(x) if silu else x

        q, k = activated(ref["q"][...]), activated(ref["k"][...])
        if norm_eps is not None:
            q, k = (x * lax.rsqrt(jnp.sum(x * x) + norm_eps) for x in (q, k))
        beta = ref["beta"][...] if "beta" in ref else None
        if isinstance(gates, Steps):
            a, b = (ref[name][...].astype(jnp.float32) for name in "ab")
            a = a + ref["bias"][...]
            softplus = jnp.maximum(a, 0) + jnp.log1p(jnp.exp(-jnp.abs(a)))
            log_decay, beta = -jnp.exp(ref["A_log"][...]) * softplus, lax.logistic(b)
        else:
            log_decay = ref["decay"][...]
        q, decay = K**-0.5 * q, jnp.exp(log_decay)
        own = jnp.sum(q * k)
        outs, squares = [], jnp.zeros((), jnp.float32)
        for number, part in enumerate(parts):
            decayed = asked.pop(0) * (decay[:, None] if per_channel else decay)
            if number + 1 + blocks.ahead < len(parts):
                asked.append(ref["state"][:, parts[number + 1 + blocks.ahead]])
            v, out = activated(ref["v"][part]), jnp.sum(decayed * q[:, None], axis=0)
            if beta is not None:
                v = beta * (v - jnp.sum(decayed * k[:, None], axis=0))
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
        grid=(B, N + more),
        in_specs=[*(spec for _, spec in given.values()), *[pl.no_block_spec] * len(pieces)],
        out_specs=[pl.BlockSpec((None, V), lambda row, head: (row, head)), own_state],
        out_shape=[jax.ShapeDtypeStruct((B, N * V), dtype), jax.ShapeDtypeStruct(state_BNKV.shape, state_BNKV.dtype)],
        input_output_aliases={list(given).index("state"): 1},
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=interpret,
        name="linear_attention_token",
    )(*(array for array, _ in given.values()), *(each.array for each in pieces))
    return out, state
