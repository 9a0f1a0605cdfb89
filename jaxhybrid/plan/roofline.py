"""How long a step takes, and what bounds it: products, the devices' memory, or what they send one another.

Links: the formulas of "How to Scale Your Model" (jax-ml.github.io/scaling-book), for rings of a torus.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxhybrid.plan.topology import Chip
from jaxhybrid.plan.work import ATTENTION, LINEAR, PRODUCTS

EFFICIENCY = 0.5  # of a TPU's peak, that products reach: an assumption, nothing was measured
HOP = 1e-6  # seconds from a chip to its neighbour
# Of an NVIDIA GPU's peak, and how often what products read and write passes through memory, with all that stands
# between them: fitted to five steps that were measured on one H200 (docs/plan.md).
GPU_EFFICIENCY = {PRODUCTS: 0.72, ATTENTION: 0.35, LINEAR: 0.54}
GPU_PASSES = 1.9


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step.

    Attributes:
        math, memory, links: each by itself, at what the chip can do.
        expected: on TPUs the longest, with products at `EFFICIENCY`; on GPUs, which overlap less, their sum at what was
            measured.
        bound: what of `expected` takes longest.
    """

    math: float
    memory: float
    links: float
    expected: float
    bound: str


def roofline(figures: dict[str, Any], chip: Chip) -> Roofline:
    """Of the worker's figures, which are of a device: it may be a part of a chip."""
    flops, peak = figures["flops"], chip.tflops * 1e12 / chip.devices
    math, memory = sum(flops.values()) / peak, figures["moved"] * chip.devices / (chip.memory_gbps * 1e9)
    links = links_seconds(figures["exchanges"])
    if chip.kind == "tpu":
        parts = {"products": math / EFFICIENCY, "memory": memory, "links": links}
        expected = max(parts.values())
    else:
        reached = sum(amount / (GPU_EFFICIENCY[place] * peak) for place, amount in flops.items())
        parts = {"products": reached, "memory": GPU_PASSES * memory, "links": links}
        expected = sum(parts.values())
    return Roofline(math, memory, links, expected, bound=max(parts, key=lambda name: parts[name]))


def links_seconds(exchanges: Sequence[dict[str, Any]]) -> float:
    """One after the other. All-to-all over a ring of X devices sends each part X/4 of the way round on average; what a
    neighbour gets goes over one link."""
    total = 0.0
    for part in exchanges:
        if part["kind"] == "neighbour":
            seconds, hops = part["received"] / (part["link_gbps"] * 1e9), 1.0
        else:
            detour = max(part["side"] / 4, 1.0) if part["kind"] == "exchange" else 1.0
            seconds, hops = part["received"] * detour / (part["gbps"] * 1e9), max(part["side"] / 2, 1.0)
        total += max(seconds, part["times"] * HOP * hops)
    return total
