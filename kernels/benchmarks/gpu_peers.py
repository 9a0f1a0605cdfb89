"""Linear attention of other packages on the same GPU, whichever are installed: fla's and FlashQLA's, in PyTorch.

    python kernels/benchmarks/gpu_peers.py                        # the shapes of gpu_compare.py
    python kernels/benchmarks/gpu_peers.py --recurrence kimi_delta --shapes 8,4096,16,128
    pip install fla-core einops flash-qla tilelang                # what it looks for (and torch, triton)

Inputs as in gpu_compare.py: unit keys and queries, the same ranges of decays and rates. Each function is checked first
against the token recurrence in float64 on a small case, outputs and every gradient; what is wrong there is not timed,
and what refuses says so. Where FlashQLA is installed, fla hands its gated delta rule on to it: leave it out to time
fla's own. Medians over rounds of rows of calls on two sets of inputs in turn.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_compare import ROW_MS, SHAPES

ROUNDS = 10
FUNCTIONS = {  # by recurrence: package, module and name
    "gated_deltanet": [
        ("fla", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        ("FlashQLA", "flash_qla", "chunk_gated_delta_rule"),
    ],
    "deltanet": [("fla", "fla.ops.delta_rule", "chunk_delta_rule")],
    "simple_gla": [("fla", "fla.ops.simple_gla", "chunk_simple_gla")],
    "kimi_delta": [("fla", "fla.ops.kda", "chunk_kda")],
    "gla": [("fla", "fla.ops.gla", "chunk_gla")],
}


def make_inputs(B: int, T: int, H: int, K: int, seed: int, recurrence: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    q, k = (torch.nn.functional.normalize(draw(B, T, H, K), dim=-1).bfloat16() for _ in range(2))
    inputs = {"q": q, "k": k, "v": draw(B, T, H, K).bfloat16()}
    if recurrence != "deltanet":
        channels = (K,) if recurrence in ("kimi_delta", "gla") else ()
        inputs["g"] = -0.03 * torch.rand(B, T, H, *channels, generator=generator, device="cuda")
    if recurrence not in ("simple_gla", "gla"):
        inputs["beta"] = torch.rand(B, T, H, generator=generator, device="cuda")
    return {name: x.requires_grad_() for name, x in inputs.items()}


def token_recurrence(q, k, v, g=None, beta=None):
    """Outputs [B,T,H,V]; g [B,T,H] or [B,T,H,K]."""
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=q.dtype, device=q.device)
    out = []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * g[:, t].exp().reshape(*g.shape[:1], g.shape[2], -1, 1)
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None] * (new - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], new)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1)


def forward(function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [function(**inputs)]


def with_backward(function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All gradients for the cotangent v, as in gpu_compare.py."""
    out = function(**inputs)
    return list(torch.autograd.grad(out, list(inputs.values()), inputs["v"].detach().to(out.dtype)))


def least_cosine(
    what: Callable[..., list[torch.Tensor]], function: Callable[..., Any], K: int, recurrence: str
) -> float:
    inputs = make_inputs(1, 256, 2, K, 7, recurrence)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    pairs = zip(what(function, inputs), what(token_recurrence, exact), strict=True)
    return min(torch.nn.functional.cosine_similarity(a.double().flatten(), b.flatten(), dim=0).item() for a, b in pairs)


def row_ms(call: Callable[[dict[str, torch.Tensor]], Any], sets: list[dict[str, torch.Tensor]], count: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for index in range(count):
        call(sets[index % len(sets)])
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def median_ms(call: Callable[[dict[str, torch.Tensor]], Any], sets: list[dict[str, torch.Tensor]]) -> float:
    for inputs in sets:
        call(inputs)
    count = max(10, round(ROW_MS / row_ms(call, sets, 10)))
    return float(np.median([row_ms(call, sets, count) for _ in range(ROUNDS)]))


def time_peer(title: str, function: Callable[..., Any], shapes: list[str], recurrence: str) -> None:
    for shape in shapes:
        B, T, H, K = (int(size) for size in shape.split(","))
        for kind, what in (("forward", forward), ("forward+backward", with_backward)):
            line = f"{title} B{B} T{T} H{H} K=V={K} {recurrence} {kind}"
            try:
                cosine = least_cosine(what, function, K, recurrence)
                if cosine < 0.999:
                    print(f"{line}: WRONG, least cosine {cosine:.6f}", flush=True)
                    continue
                sets = [make_inputs(B, T, H, K, seed, recurrence) for seed in (0, 1)]
                ms = median_ms(lambda inputs, what=what: what(function, inputs), sets)
                print(f"{line}: {ms:.3f} ms, least cosine {cosine:.6f}", flush=True)
            except Exception as error:  # a peer that refuses a shape or a compiler; the next one is tried
                print(f"{line}: {type(error).__name__}: {str(error)[:300]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,T,H,width")
    parser.add_argument("--recurrence", default="gated_deltanet", choices=FUNCTIONS)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for package, module, name in FUNCTIONS[arguments.recurrence]:
        try:
            peer = getattr(importlib.import_module(module), name)
        except ImportError as error:
            print(f"{package}: not installed ({error})")
            continue

        def function(peer=peer, **inputs):
            return peer(**inputs)[0]

        time_peer(package, function, arguments.shapes, arguments.recurrence)


if __name__ == "__main__":
    main()
