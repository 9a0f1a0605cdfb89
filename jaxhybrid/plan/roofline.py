"""How long a step takes at least, and what bounds it: products, the devices' memory, or what they send one another.

The formulas are those of "How to Scale Your Model" (jax-ml.github.io/scaling-book), for rings of a torus.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxhybrid.plan.topology import Chip

EFFICIENCY = 0.5  # of a TPU's peak, that large products reach beside all else: an assumption, not measured here
HOP = 1e-6  # seconds from a chip to its neighbour


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step: of products at the chip's peak, of its memory, of its links."""

    math: float
    memory: float
    links: float

    @property
    def least(self) -> float:
        """If the three overlap wholly."""
        return max(self.math, self.memory, self.links)

    @property
    def expected(self) -> float:
        """If products reach `EFFICIENCY`, and the others overlap with them."""
        return max(self.math / EFFICIENCY, self.memory, self.links)

    @property
    def bound(self) -> str:
        """What `expected` is."""
        parts = {"math": self.math / EFFICIENCY, "memory": self.memory, "interconnect": self.links}
        return max(parts, key=lambda name: parts[name])


def tpu_roofline(figures: dict[str, Any], chip: Chip) -> Roofline:
    """Of the worker's figures; `flops` and `moved` are of a device, which may be a part of a chip."""
    return Roofline(
        math=sum(figures["flops"].values()) * chip.devices / (chip.tflops * 1e12),
        memory=figures["moved"] * chip.devices / (chip.memory_gbps * 1e9),
        links=links_seconds(figures["exchanges"], chip),
    )


def links_seconds(exchanges: Sequence[dict[str, Any]], chip: Chip) -> float:
    """One after the other. All-to-all over a ring of X devices sends each part X/4 of the way round on average."""
    total = 0.0
    for part in exchanges:
        count, longest = part["links"]["count"], part["links"]["longest"]
        detour = max(longest / 4, 1.0) if part["kind"] == "exchange" else 1.0
        total += max(
            part["received"] * detour / (count * chip.link_gbps * 1e9), part["times"] * HOP * max(longest / 2, 1)
        )
    return total
