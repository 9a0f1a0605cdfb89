"""Would a race be noticed? A kernel without one of its waits, fences or barriers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from compiler import Compiled
from errors import Fault
from machine import Outcome, emulate
from program import Instruction

# Waits for products are left out: most of them order registers alone, which is not modelled.
KINDS = {
    "barrier": "bar.sync",
    "fence": "fence.proxy.async",
    "wait": "mbarrier.try_wait",
    "wait for copies": "cp.async.bulk.wait_group",
}


class Planted(NamedTuple):
    kind: str
    place: Instruction
    noticed: str  # empty if it was not


def planted(kernel: Compiled, right: Outcome, most: int) -> Iterator[Planted]:
    """As many of each kind at most, spread over the program."""
    for kind, beginning in KINDS.items():
        sites = [i for i, one in enumerate(kernel.program.instructions) if one.name.startswith(beginning)]
        chosen = sorted({sites[round(i)] for i in np.linspace(0, len(sites) - 1, min(most, len(sites)))})
        for site in chosen:
            yield Planted(kind, kernel.program.instructions[site], _noticed(kernel, right, site))


def _noticed(kernel: Compiled, right: Outcome, site: int) -> str:
    instruction = kernel.program.instructions[site]
    without = kernel.program.with_instruction(site, _nothing(instruction))
    try:
        outcome = emulate(without, kernel.launch, kernel.operands, kernel.results)
    except Fault as fault:
        return str(fault)
    if new := outcome.faults.keys() - right.faults.keys():
        return min(new)
    same = all(a.tobytes() == b.tobytes() for a, b in zip(outcome.results, right.results, strict=True))
    return "" if same else "other results"


def _nothing(instruction: Instruction) -> Instruction:
    """A wait in a loop says that it is over."""
    if instruction.name.startswith(KINDS["wait"]):
        return replace(instruction, name="mov.pred", operands=(instruction.operands[0], "1"))
    return replace(instruction, name="bar.warp.sync", operands=("-1",))
