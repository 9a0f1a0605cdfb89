"""What a stage's step takes of one device, by kind, whether it is there, and what to change where it is not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.stages import StageConfig

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
        """Of the worker's figures.

        `all` is the compiler's peak, by which it accepts a program, and where it found no room what it says is needed:
        both count the arguments. What it calls temporary is more than that in programs with loops, and is not used.
        Without a compiler it is the estimate.
        """
        given, held, compiled = figures["given"], figures["held"], figures.get("compiled")
        known = sum(given.values()) + held
        if compiled is None:
            all_ = figures["estimate"] + held
        else:
            memory = compiled.get("memory")
            all_ = (memory["peak_memory"] if memory else compiled["out_of_memory"]["needed"]) + held
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


def advice(stage: str, settings: StageConfig, memory: Memory, mesh: Mapping[str, int]) -> str:
    """What makes a step that does not fit smaller, the likeliest first."""
    state = memory.parameters + memory.optimizer
    rows = settings.batch_size // settings.gradient_accumulation // (mesh["data"] * mesh["fsdp"])
    ways = []
    if rows > 1 and memory.beside > memory.usable / 8:
        ways.append(f"{stage}.gradient_accumulation={2 * settings.gradient_accumulation} halves the rows at a time")
    elif rows == 1 and memory.beside > memory.usable / 8:
        ways.append(f"a device has one row already: mesh.context={2 * mesh['context']} splits rows")
    if stage != "align" and settings.remat in ("none", "dots", "mlp"):
        ways.append(f"{stage}.remat=block keeps less for the backward pass")
    elif stage != "align" and settings.remat == "block":
        ways.append(f"{stage}.remat=offload keeps blocks' inputs in the host's memory")
    if memory.optimizer > memory.usable / 8:
        ways.append(
            f"{stage}.moment_dtype=bfloat16, {stage}.offload=moments or {stage}.optimizer=adafactor make the optimizer "
            "smaller"
        )
    if memory.teacher > memory.usable / 8 and stage != "score" and not settings.unroll:
        ways.append(f"{stage}.offload=teacher keeps the teacher in the host's memory")
    if state + memory.teacher > memory.usable / 2 or not ways:
        ways.append("a larger slice, or mesh.tensor, leaves each device less of the weights")
    over = memory.all - memory.usable
    return f"{stage} needs {over:.2f} GiB more than there are: " + "; ".join(ways) + "."
