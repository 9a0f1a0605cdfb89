"""Times `linear_attention` (implementation "xla") beside a plain chunked scan: forward, and forward with backward.

    python kernels/benchmarks/linear_attention.py              # B8 T4096 H16 K=V=128 bfloat16 on a GPU, small on a CPU
    python kernels/benchmarks/linear_attention.py --recurrence gated_deltanet kimi_delta --tokens 8192 --batch 2

The plain scan is what one writes first: per chunk a triangular solve inside `lax.scan`, differentiated by JAX. It is
kept here, and only here, as the thing to beat. The byte floor is the time to move the arguments and the output once at
the copy rate measured on the same device; with the backward, the arguments again, the output's gradient and all
gradients. Timing: after a warm-up, the least over repeats of a row of calls that is waited for once; a row is ten calls
on a GPU, where waiting costs as much as a tenth of a call, and one on a CPU.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxhybrid_kernels import linear_attention

RECURRENCES = {
    "linear_attention": (None, False),
    "simple_gla": ("head", False),
    "gla": ("channel", False),
    "deltanet": (None, True),
    "gated_deltanet": ("head", True),
    "kimi_delta": ("channel", True),
}


def plain_scan(q, k, v, log_decay, beta, C=64):
    """The delta rule with a decay per head, q, k, v [B,T,N,K], one chunk a step, all of its work inside the scan."""
    B, T, N, K = k.shape

    def split(x):
        return jnp.moveaxis(x.astype(jnp.float32).reshape(B, T // C, C, N, *x.shape[3:]), (1, 3), (0, 2))

    def chunk(state, inputs):
        q, k, v, log_decay, beta = inputs
        total = jnp.cumsum(log_decay, axis=-1)
        lower = jnp.tril(jnp.ones((C, C), bool))
        decay = jnp.exp(jnp.where(lower, total[..., :, None] - total[..., None, :], -jnp.inf))
        strict = jnp.tril(beta[..., None] * jnp.einsum("bnik,bnjk->bnij", k, k) * decay, -1)
        predicted = jnp.exp(total)[..., None] * jnp.einsum("bnik,bnkv->bniv", k, state)
        update = lax.linalg.triangular_solve(
            jnp.eye(C) + strict, beta[..., None] * (v - predicted), left_side=True, lower=True, unit_diagonal=True
        )
        out = jnp.exp(total)[..., None] * jnp.einsum("bnik,bnkv->bniv", q, state)
        out = out + jnp.einsum("bnij,bnjv->bniv", jnp.einsum("bnik,bnjk->bnij", q, k) * decay, update)
        leaving = jnp.exp(total[..., -1:] - total)[..., None]
        state = jnp.exp(total[..., -1])[..., None, None] * state + jnp.einsum("bnik,bniv->bnkv", k * leaving, update)
        return state, out * K**-0.5

    state = jnp.zeros((B, N, K, v.shape[-1]), jnp.float32)
    final, out = lax.scan(chunk, state, jax.tree.map(split, (q, k, v, log_decay, beta)))
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(v.shape).astype(v.dtype), final


def best_ms(calls: list[tuple[Callable, Any]], repeats: int) -> list[float]:
    """Least time of each call over rounds that run all of them in turn, so that a busy machine weighs on all alike."""
    row = 1 if jax.default_backend() == "cpu" else 10
    for _ in range(2):
        for function, argument in calls:
            jax.block_until_ready(function(argument))
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for index, (function, argument) in enumerate(calls):
            start = time.perf_counter()
            for _ in range(row):
                result = function(argument)
            jax.block_until_ready(result)
            best[index] = min(best[index], 1e3 * (time.perf_counter() - start) / row)
    return best


def copy_bytes_per_second(repeats: int) -> float:
    """Reads and writes 2 x 256 MiB (CPU: 2 x 32 MiB)."""
    elements = (32 if jax.default_backend() == "cpu" else 256) * 2**18
    x = jnp.ones(elements, jnp.float32)
    return 8 * elements / (1e-3 * best_ms([(jax.jit(lambda x: x + 1), x)], repeats)[0])


def make_inputs(name: str, B: int, T: int, H: int, K: int, dtype: str) -> dict[str, jax.Array]:
    """Unit keys and queries, decays with half-lives of tens to hundreds of tokens, rates in (0, 1)."""
    decay, delta = RECURRENCES[name]
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (B, T, H, K)) for key in keys[:3])
    q, k = (x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True)) for x in (q, k))
    inputs = {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype)}
    if decay is not None:
        shape = (B, T, H) if decay == "head" else (B, T, H, K)
        inputs["log_decay"] = -0.03 * jax.random.uniform(keys[3], shape)
    if delta:
        inputs["beta"] = jax.random.uniform(keys[4], (B, T, H))
    return inputs


def call(function: Callable, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return function(**inputs)


def with_backward(function: Callable) -> Callable:
    """All gradients of <out, out> + <state, state>."""

    def loss(inputs):
        out, state = function(**inputs)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(state**2)

    return jax.grad(loss)


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recurrence", nargs="+", choices=RECURRENCES, default=list(RECURRENCES))
    parser.add_argument("--batch", type=int, default=1 if on_cpu else 8)
    parser.add_argument("--tokens", type=int, default=1024 if on_cpu else 4096, help="a multiple of 64")
    parser.add_argument("--heads", type=int, default=4 if on_cpu else 16)
    parser.add_argument("--width", type=int, default=64 if on_cpu else 128, help="of keys and values")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--chunk-size", type=int, nargs="+", default=[64])
    parser.add_argument("--repeats", type=int, default=5 if on_cpu else 20)
    args = parser.parse_args()

    B, T, H, K = args.batch, args.tokens, args.heads, args.width
    rows = [("plain scan", 64)] + [(name, size) for name in args.recurrence for size in args.chunk_size]
    calls, bytes_moved = [], []
    for name, chunk_size in rows:
        plain = name == "plain scan"
        function = plain_scan if plain else partial(linear_attention, chunk_size=chunk_size, implementation="xla")
        inputs = make_inputs("gated_deltanet" if plain else name, B, T, H, K, args.dtype)
        calls.append((jax.jit(partial(call, function)), inputs))
        calls.append((jax.jit(with_backward(function)), inputs))
        arguments, out = sum(x.nbytes for x in inputs.values()), inputs["v"].nbytes
        bytes_moved += [arguments + out, 3 * arguments + 2 * out]
    times = best_ms(calls, args.repeats)
    rate = copy_bytes_per_second(args.repeats)

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: B{B} T{T} H{H} K=V={K} {args.dtype}")
    print("plain: how many times faster than the plain scan of gated_deltanet; floor: how many times the byte floor")
    heading = "".join(f" {kind:>9}" + ("" if on_cpu else f" {'ms':>8} {'floor':>6}") for kind in ("fwd", "fwd+bwd"))
    print(f"{'':<18} {'chunk':>5} {heading}")
    for index, (name, chunk_size) in enumerate(rows):
        line = f"{name:<18} {chunk_size:>5} "
        for kind in (0, 1):
            ms = times[2 * index + kind]
            line += f" {times[kind] / ms:>8.2f}x"
            if not on_cpu:
                line += f" {ms:>8.3f} {1e-3 * ms * rate / bytes_moved[2 * index + kind]:>5.1f}x"
        print(line)


if __name__ == "__main__":
    main()
