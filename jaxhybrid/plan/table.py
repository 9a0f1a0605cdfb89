"""Plans as Markdown tables, which read well on a terminal, too."""

from collections.abc import Mapping
from typing import Any

from jaxhybrid.plan.memory import GIB, Memory
from jaxhybrid.plan.topology import Topology

HEAD = """| stage | params | optimizer | teacher | beside | all, of {usable:.2f} | received, GiB |
|---|---|---|---|---|---|---|"""


def steps_table(figures: Mapping[str, dict[str, Any]], topology: Topology) -> str:
    """A line for every stage: GiB of one device, and what it receives in a step."""
    lines = [HEAD.format(usable=topology.chip.usable_gib)]
    for stage, found in figures.items():
        memory = Memory.of(found, topology)
        kinds: dict[str, float] = {}
        for part in found["received"]:
            kinds[part["kind"]] = kinds.get(part["kind"], 0) + part["bytes"] / GIB
        told = ", ".join(f"{kind} {amount:.2f}" for kind, amount in kinds.items())
        verdict = "" if memory.fits else " does not fit"
        lines.append(
            f"| {stage} | {memory.parameters:.2f} | {memory.optimizer:.2f} | {memory.teacher:.2f} | "
            f"{memory.beside:.2f} | {memory.all:.2f}{verdict} | {told} |"
        )
    return "\n".join(lines)
