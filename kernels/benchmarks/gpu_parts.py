"""Times the Hopper kernels one by one, on a GPU.

    python kernels/benchmarks/gpu_parts.py                         # B8 T4096 H16 K=V=128, gated delta rule
    python kernels/benchmarks/gpu_parts.py --shape 8,4096,9,64

Each is called in a row of calls over the same arrays, waited for once; the median of ten rows. The floor is what it
reads and writes, once each, at the copy rate measured on the same device.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_compare import RECURRENCES, make_inputs
from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.gpu.channel_gradients import channel_gradients_kernel
from jaxhybrid_kernels.gpu.channel_prepare import channel_prepare_kernel
from jaxhybrid_kernels.gpu.gates import beta_gradient, decay_gradient, make_gates
from jaxhybrid_kernels.gpu.gradients import gradients_kernel
from jaxhybrid_kernels.gpu.linear_attention import make_plan
from jaxhybrid_kernels.gpu.prepare import prepare_kernel
from jaxhybrid_kernels.gpu.recurrence import recurrence_kernel
from jaxhybrid_kernels.validation import check_sequence

CALLS = 100


def median_ms(function: Callable[..., Any], *arguments: Any) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = function(*arguments)
        jax.block_until_ready(result)
        times.append(1e3 * (time.perf_counter() - start) / CALLS)
    return float(np.median(times))


def parts(call: Callable[..., Any], B: int, T: int, H: int, K: int, recurrence: str) -> None:
    """Runs call(name, function, *arguments), which gives the function's results, on every part of both directions."""
    given = make_inputs(B, T, H, K, 0, recurrence)
    inputs = Inputs(given["q"], given["k"], given["v"], given.get("log_decay"), given.get("beta"), None)
    sizes = check_sequence(*inputs[:5], None, None)
    chosen = make_plan(inputs, None, K**-0.5, sizes)
    plan, fused = (chosen._replace(fused=value) for value in (False, True))
    fused = fused._replace(spans=1)

    q, k, v = inputs.q, inputs.k, inputs.v
    narrow = inputs._replace(q=q[:, :0], k=k[:, :0], v=v[:, :0])
    gates = call("gates", lambda narrow: make_gates(narrow, plan), narrow)
    if plan.per_channel:
        q_in, *k_in, k_out, carry, matrices = call(
            "prepare", channel_prepare_kernel(plan), q, k, inputs.log_decay, gates
        )
        operands = [q_in, k_in[0] if k_in else k_out, v, gates, matrices, k_out, carry]
    else:
        operands = [q, k, v, gates, call("prepare", prepare_kernel(plan), q, k, gates)]
    starts, spanned = [], plan.spans > 1
    if spanned:
        starts, first = [jnp.zeros((B, H, plan.spans, K, K))], jnp.zeros((B, H, plan.spans - 1, 2 * K, K))
        summary = partial(recurrence_kernel, plan, keep=False, started=True, summary=True)
        call("summary", summary(), *operands, first)
        call("back summary", summary(reverse=True), *operands, first[..., :K, :])
    call("forward", recurrence_kernel(plan, keep=False, started=spanned), *operands, *starts)
    kept = call("forward kept", recurrence_kernel(plan, keep=True, started=spanned), *operands, *starts)
    _, out, states, *updates = kept
    reverse = recurrence_kernel(plan, keep=True, reverse=True, started=spanned)
    _, d_v, d_states = call("reverse", reverse, *operands[:2], out, *operands[3:], *starts)
    if not plan.per_channel:
        call("fused", recurrence_kernel(fused, keep=False), q, k, v, gates)
        call("fused kept", recurrence_kernel(fused, keep=True), q, k, v, gates)
        call("fused reverse", recurrence_kernel(fused, keep=True, reverse=True), q, k, out, gates)
    arguments = (q, k, updates[0] if updates else v, d_v, out, states, d_states)
    if plan.per_channel:
        call("gradients", channel_gradients_kernel(plan), *arguments, inputs.log_decay, carry)
    else:
        _, _, sums, *written = call("gradients", gradients_kernel(plan), *arguments, gates)
        call("decay grads", lambda sums: decay_gradient(narrow, sums, plan), sums)
        if written:
            call("beta grads", lambda gates, x: beta_gradient(narrow, gates, x, plan), gates, *written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8,4096,16,128", metavar="B,T,H,width")
    parser.add_argument("--recurrence", default="gated_deltanet", choices=RECURRENCES)
    args = parser.parse_args()

    x = jnp.ones(2**29, jnp.bfloat16)
    rate = 2 * x.nbytes / median_ms(jax.jit(lambda x: x + 1), x)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, copy {rate / 1e9:.2f} TB/s")

    def measure(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        compiled = jax.jit(function)
        results = compiled(*arguments)
        moved = sum(a.nbytes for a in jax.tree.leaves((arguments, results)))
        print(f"{name:13} {median_ms(compiled, *arguments):.3f} ms, floor {moved / rate:.3f} ms", flush=True)
        return results

    parts(measure, *(int(size) for size in args.shape.split(",")), args.recurrence)


if __name__ == "__main__":
    main()
