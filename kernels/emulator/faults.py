"""Would a race be noticed? A kernel without its waits, fences or barriers.

Without all of a kind a kernel is wrong, except that one without copies to global memory (a summary of spans) may do
without fences and has no copies to wait for. A single one may be redundant, as most barriers are: Mosaic puts several
where one would do, and a wait may follow from another.
"""

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
FOR_COPIES = ("fence", "wait for copies")
TO_GLOBAL = ".bulk_group"  # ends a copy's name


class Planted(NamedTuple):
    kind: str
    place: Instruction | None  # None for all of the kind
    noticed: bool


def planted(kernel: Compiled, right: Outcome, most: int) -> Iterator[Planted]:
    """All of a kind where that is wrong, then single ones, as many at most, spread over the program."""
    copies = any(one.name.endswith(TO_GLOBAL) for one in kernel.program.instructions)
    for kind, beginning in KINDS.items():
        sites = [i for i, one in enumerate(kernel.program.instructions) if one.name.startswith(beginning)]
        if sites and (copies or kind not in FOR_COPIES):
            yield Planted(kind, None, _noticed(kernel, right, sites))
        for i in np.unique(np.linspace(0, len(sites) - 1, min(most, len(sites))).round().astype(int)):
            yield Planted(kind, kernel.program.instructions[sites[i]], _noticed(kernel, right, [sites[i]]))


def _noticed(kernel: Compiled, right: Outcome, sites: list[int]) -> bool:
    program = kernel.program.replaced({site: _nothing(kernel.program.instructions[site]) for site in sites})
    try:
        outcome = emulate(program, kernel.launch, kernel.operands, kernel.results)
    except Fault:
        return True
    same = all(a.tobytes() == b.tobytes() for a, b in zip(outcome.results, right.results, strict=True))
    return not same or bool(outcome.faults.keys() - right.faults.keys())


def _nothing(instruction: Instruction) -> Instruction:
    """A wait in a loop says that it is over."""
    if instruction.name.startswith(KINDS["wait"]):
        return replace(instruction, name="mov.pred", operands=(instruction.operands[0], "1"))
    return replace(instruction, name="bar.warp.sync", operands=("-1",))
