"""Argument checks that run before anything is traced: every refusal names the argument and the value it had."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.debug import check_log_decay


class Sizes(NamedTuple):
    """B batch, T tokens, Hq query heads, Hk key heads, N states (value heads), K key width, V value width."""

    B: int
    T: int
    Hq: int
    Hk: int
    N: int
    K: int
    V: int

    @property
    def queries_per_state(self) -> int:
        return max(self.Hq // self.N, 1)

    @property
    def out_heads(self) -> int:
        return max(self.Hq, self.N)


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size not in (16, 32, 64, 128):
        raise ValueError(f"chunk_size={chunk_size!r} must be 16, 32, 64 or 128.")


def check_scale(scale: float | None) -> None:
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError(f"scale={scale!r} must be a Python number or None (it is compiled in).")


def check_norm_eps(norm_eps: float | None) -> None:
    if norm_eps is not None and not (isinstance(norm_eps, (int, float)) and norm_eps > 0):
        raise ValueError(f"norm_eps={norm_eps!r} must be a positive Python number or None (it is compiled in).")


def check_floating(**arrays: jax.Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}, expected a floating dtype.")


def check_shape(name: str, array: jax.Array | None, *allowed: tuple[int, ...]) -> None:
    if array is not None and tuple(array.shape) not in allowed:
        wanted = " or ".join(str(shape) for shape in allowed)
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {wanted}.")


def check_heads(sizes: Sizes) -> None:
    if sizes.N % sizes.Hk:
        raise ValueError(f"k has Hk={sizes.Hk} heads, which does not divide the N={sizes.N} heads of v.")
    if sizes.N % sizes.Hq and sizes.Hq % sizes.N:
        raise ValueError(f"q has Hq={sizes.Hq} heads, neither a divisor nor a multiple of the N={sizes.N} heads of v.")


def check_state(name: str, state: jax.Array | None, shape: tuple[int, ...]) -> None:
    check_shape(name, state, shape)
    if state is not None and state.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"{name} has dtype {state.dtype}, expected float32 (16 bits lose a state).")


def check_sequence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    beta: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_state: jax.Array | None,
) -> Sizes:
    """Checks q [B,T,Hq,K], k [B,T,Hk,K], v [B,T,N,V] and everything that must agree with them."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected rank 4: [batch, tokens, heads, width].")
    B, T, N, V = v.shape
    sizes = Sizes(B, T, q.shape[2], k.shape[2], N, k.shape[3], V)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if 0 in array.shape:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, every axis must be at least 1.")
    check_shape("q", q, (B, T, sizes.Hq, sizes.K))
    check_shape("k", k, (B, T, sizes.Hk, sizes.K))
    check_heads(sizes)
    check_shape("log_decay", log_decay, (B, T, N), (B, T, N, sizes.K))
    check_shape("beta", beta, (B, T, N))
    check_shape("segment_ids", segment_ids, (B, T))
    check_state("initial_state", initial_state, (B, N, sizes.K, V))
    check_floating(q=q, k=k, v=v, log_decay=log_decay, beta=beta)
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}, expected an integer dtype.")
    check_log_decay(log_decay, segment_ids)
    return sizes


def check_step(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, beta: jax.Array | None, state: jax.Array
) -> Sizes:
    """The same for one token: q [B,Hq,K], k [B,Hk,K], v [B,N,V], state [B,N,K,V]."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected rank 3: [batch, heads, width].")
    B, N, V = v.shape
    sizes = Sizes(B, 1, q.shape[1], k.shape[1], N, k.shape[2], V)
    check_shape("q", q, (B, sizes.Hq, sizes.K))
    check_shape("k", k, (B, sizes.Hk, sizes.K))
    check_heads(sizes)
    check_shape("log_decay", log_decay, (B, N), (B, N, sizes.K))
    check_shape("beta", beta, (B, N))
    check_state("state", state, (B, N, sizes.K, V))
    check_floating(q=q, k=k, v=v, log_decay=log_decay, beta=beta)
    check_log_decay(log_decay)
    return sizes


def check_convolution(
    x: jax.Array, weight: jax.Array, segment_ids: jax.Array | None, state: jax.Array | None, state_name: str
) -> None:
    """Checks x [B,T,C], weight [W,C], segment_ids [B,T] and the state [B,W-1,C]."""
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected rank 3: [batch, tokens, channels].")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [taps >= 1, channels].")
    B, T, C = x.shape
    if weight.shape[1] != C:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {C} channels as in x.")
    check_shape("segment_ids", segment_ids, (B, T))
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}, expected an integer dtype.")
    check_shape(state_name, state, (B, weight.shape[0] - 1, C))
    check_floating(x=x, weight=weight, **{state_name: state})
    if state is not None and state.dtype == jnp.float16 != x.dtype:
        raise ValueError(f"{state_name} has dtype float16, expected {x.dtype} as x has (it holds inputs).")
