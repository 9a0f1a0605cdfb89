"""What a stage's step takes of one device, by kind, and whether it is there."""

from dataclasses import dataclass
from typing import Any

from jaxhybrid.plan.topology import Topology

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """In GiB of one device. `teacher` is all of it that lies there; `beside` is what the step takes while it runs."""

    parameters: float
    optimizer: float
    teacher: float
    beside: float
    all: float
    usable: float

    @staticmethod
    def of(figures: dict[str, Any], topology: Topology) -> "Memory":
        """Of the worker's figures. Where the compiler found no room, `all` is what it says is needed."""
        given, held, compiled = figures["given"], figures["held"], figures["compiled"]
        known = sum(given.values()) + held
        if "memory" in compiled:
            memory = compiled["memory"]
            all_ = memory["argument"] + memory["output"] - memory["alias"] + memory["temp"] + held
        else:
            all_ = compiled["out_of_memory"]["needed"] + held
        return Memory(
            given["parameters"] / GIB,
            given["optimizer"] / GIB,
            (given["teacher"] + held) / GIB,
            (all_ - known) / GIB,
            all_ / GIB,
            topology.chip.usable_gib,
        )

    @property
    def fits(self) -> bool:
        return self.all <= self.usable
