"""Gated delta attention of other packages on the same GPU, whichever are installed: fla's and FlashQLA's, in PyTorch.

    python kernels/benchmarks/gpu_peers.py                        # the shapes of gpu_compare.py
    pip install fla-core einops flash-qla tilelang                # what it looks for (and torch, triton)

Inputs as in gpu_compare.py: unit keys and queries, the same ranges of decays and rates. Each function is checked first
against the token recurrence in float64 on a small case, outputs and every gradient; what is wrong there is not timed,
and what refuses says so. Where FlashQLA is installed, fla hands its calls on to it. Medians over rounds of ten calls on
two sets of inputs in turn.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_compare import SHAPES

CALLS, ROUNDS = 10, 10
NAMES = ("q", "k", "v", "g", "beta")


def make_inputs(B: int, T: int, H: int, K: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    q, k = (torch.nn.functional.normalize(draw(B, T, H, K), dim=-1).bfloat16() for _ in range(2))
    rates = torch.rand(2, B, T, H, generator=generator, device="cuda")
    tensors = (q, k, draw(B, T, H, K).bfloat16(), -0.03 * rates[0], rates[1])
    return {name: x.requires_grad_() for name, x in zip(NAMES, tensors)}


def recurrence(q, k, v, g, beta):
    """The token recurrence, outputs [B,T,H,V]."""
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=q.dtype, device=q.device)
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        innovation = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], innovation)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1)


def forward(function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [function(**inputs)]


def with_backward(function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All gradients for the cotangent v, as in gpu_compare.py."""
    out = function(**inputs)
    return list(torch.autograd.grad(out, list(inputs.values()), inputs["v"].detach().to(out.dtype)))


def least_cosine(what: Callable[..., list[torch.Tensor]], function: Callable[..., Any], K: int) -> float:
    inputs = make_inputs(1, 256, 2, K, 7)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    pairs = zip(what(function, inputs), what(recurrence, exact))
    return min(torch.nn.functional.cosine_similarity(a.double().flatten(), b.flatten(), dim=0).item() for a, b in pairs)


def median_ms(call: Callable[[dict[str, torch.Tensor]], Any], sets: list[dict[str, torch.Tensor]]) -> float:
    for inputs in sets:
        call(inputs)
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for index in range(CALLS):
            call(sets[index % len(sets)])
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / CALLS)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,T,H,width")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, module in (("fla", "fla.ops.gated_delta_rule"), ("FlashQLA", "flash_qla")):
        try:
            peer = importlib.import_module(module).chunk_gated_delta_rule
        except ImportError as error:
            print(f"{name}: not installed ({error})")
            continue

        def function(peer=peer, **inputs):
            return peer(**inputs)[0]

        for shape in arguments.shapes:
            B, T, H, K = (int(size) for size in shape.split(","))
            for kind, what in (("forward", forward), ("forward+backward", with_backward)):
                title = f"{name} B{B} T{T} H{H} K=V={K} {kind}"
                try:
                    cosine = least_cosine(what, function, K)
                    if cosine < 0.999:
                        print(f"{title}: WRONG, least cosine {cosine:.6f}", flush=True)
                        continue
                    sets = [make_inputs(B, T, H, K, seed) for seed in (0, 1)]
                    ms = median_ms(lambda inputs, what=what: what(function, inputs), sets)
                    print(f"{title}: {ms:.3f} ms, least cosine {cosine:.6f}", flush=True)
                except Exception as error:  # a peer that refuses a shape or a compiler; the next one is tried
                    print(f"{title}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
