"""Gated delta attention on one Hopper GPU: "pallas_gpu", "xla" and cuDNN softmax attention in one process.

    python kernels/benchmarks/gpu_compare.py                          # check, then every shape of the table
    python kernels/benchmarks/gpu_compare.py --check-only             # also on a CPU, interpreted
    python kernels/benchmarks/gpu_compare.py --shapes 8,4096,16,128   # B,T,H,width

Nothing is timed before both of our forms agree with the float64 token recurrence: cosine above 0.999 of the outputs,
the state and every gradient. Times are medians over rounds that run all candidates in turn, each a row of calls over
two sets of inputs, waited for once; a row lasts long enough for that wait not to count. A candidate that fails is
reported and left out, and the command ends with an error.
"""

import argparse
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxhybrid_kernels import linear_attention
from jaxhybrid_kernels.gpu import linear_attention as gpu_linear_attention

SHAPES = ("8,4096,16,128", "1,32768,16,128", "4,8192,32,128", "8,4096,9,64")
RECURRENCES = ("gated_deltanet", "deltanet", "simple_gla", "kimi_delta", "gla")
ROW_MS = 40.0  # of calls per measurement, at least ten of them


def make_inputs(B: int, T: int, H: int, K: int, seed: int, recurrence: str) -> dict[str, jax.Array]:
    """Unit keys and queries, decays with half-lives of tens to hundreds of tokens, rates in (0, 1)."""
    keys = jax.random.split(jax.random.key(seed), 5)
    q, k, v = (jax.random.normal(key, (B, T, H, K)) for key in keys[:3])
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    inputs = {name: x.astype(jnp.bfloat16) for name, x in (("q", q), ("k", k), ("v", v))}
    if recurrence != "deltanet":
        shape = (B, T, H, K) if recurrence in ("kimi_delta", "gla") else (B, T, H)
        inputs["log_decay"] = -0.03 * jax.random.uniform(keys[3], shape)
    if recurrence not in ("simple_gla", "gla"):
        inputs["beta"] = jax.random.uniform(keys[4], (B, T, H))
    return inputs


def softmax(q: jax.Array, k: jax.Array, v: jax.Array, **gates: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"), jnp.zeros(())


def in_one_span(**inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """pallas_gpu with every sequence in one run, as it is not for few heads; where it is, the same program."""
    fewest = gpu_linear_attention.FEWEST_SPANS
    gpu_linear_attention.FEWEST_SPANS = inputs["k"].shape[1]
    try:
        return linear_attention(**inputs, implementation="pallas_gpu")
    finally:
        gpu_linear_attention.FEWEST_SPANS = fewest


def forward(function: Callable[..., Any], inputs: dict[str, jax.Array]) -> Any:
    return function(**inputs)


def with_backward(function: Callable[..., Any], inputs: dict[str, jax.Array]) -> Any:
    """All gradients for the cotangent v of the outputs; nobody asks for the final state, as in training."""
    out, pull = jax.vjp(lambda inputs: function(**inputs)[0], inputs)
    return pull(inputs["v"].astype(out.dtype))[0]


def check(implementation: str, B: int, T: int, H: int, K: int, recurrence: str) -> None:
    inputs = make_inputs(B, T, H, K, 7, recurrence)
    function = partial(linear_attention, implementation=implementation)
    actual = (jax.jit(partial(forward, function))(inputs), jax.jit(partial(with_backward, function))(inputs))
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in inputs.items()}
        oracle = partial(linear_attention, implementation="reference")
        expected = (forward(oracle, exact), with_backward(oracle, exact))
    cosines = []
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
        cosines.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
    verdict = "right" if min(cosines) > 0.999 else "WRONG"
    print(
        f"{implementation} {recurrence} B{B} T{T} H{H} K=V={K}: {verdict}, least cosine {min(cosines):.6f}", flush=True
    )
    if verdict == "WRONG":
        raise SystemExit(1)


def median_ms(calls: Mapping[str, tuple[Callable[..., Any], list[Any]]], rounds: int) -> dict[str, float]:
    def row_ms(name: str, count: int) -> float:
        function, sets = calls[name]
        start = time.perf_counter()
        for index in range(count):
            result = function(sets[index % len(sets)])
        jax.block_until_ready(result)
        return 1e3 * (time.perf_counter() - start) / count

    times: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for name, (function, sets) in calls.items():
        try:
            jax.block_until_ready([function(inputs) for inputs in sets])
            counts[name] = max(10, round(ROW_MS / row_ms(name, 10)))
            times[name] = []
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc(limit=3)}", flush=True)
    for _ in range(rounds):
        for name, measured in times.items():
            measured.append(row_ms(name, counts[name]))
    return {name: float(np.median(measured)) for name, measured in times.items()}


def compare(shape: str, recurrence: str, rounds: int, one_span: bool) -> set[str]:
    """Prints the times of one shape; returns the candidates that failed."""
    B, T, H, K = (int(size) for size in shape.split(","))
    sets = [make_inputs(B, T, H, K, seed, recurrence) for seed in (0, 1)]
    candidates: dict[str, Callable[..., Any]] = {
        name: partial(linear_attention, implementation=name) for name in ("pallas_gpu", "xla")
    }
    candidates["cuDNN softmax"] = softmax
    if one_span:
        candidates = {"pallas_gpu": candidates["pallas_gpu"], "in one span": in_one_span}
    failed: set[str] = set()
    for kind, what in (("forward", forward), ("forward+backward", with_backward)):
        calls = {name: (jax.jit(partial(what, function)), sets) for name, function in candidates.items()}
        times = median_ms(calls, rounds)
        failed |= set(calls) - set(times)
        listed = ", ".join(f"{name} {ms:.3f}" for name, ms in times.items())
        print(f"B{B} T{T} H{H} K=V={K} {recurrence} {kind}, ms: {listed}", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,T,H,width")
    parser.add_argument("--recurrence", default="gated_deltanet", choices=RECURRENCES)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--one-span", action="store_true", help="beside pallas_gpu only what it would be without spans")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--no-check", action="store_true", help="time only, as after `make test-gpu`")
    args = parser.parse_args()

    on_cpu = jax.default_backend() == "cpu"
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for K in () if args.no_check else (64,) if on_cpu else (64, 128):
        for B, H in ((1, 2),) if on_cpu else ((1, 2), (4, 32)):  # few thread blocks, and enough to fill a GPU
            for implementation in ("xla", "pallas_gpu"):
                check(implementation, B, 70 if on_cpu else 333, H, K, args.recurrence)
    if not args.check_only:
        failed = [compare(shape, args.recurrence, args.rounds, args.one_span) for shape in args.shapes]
        if names := sorted(set().union(*failed)):
            raise SystemExit(f"failed: {', '.join(names)}")


if __name__ == "__main__":
    main()
