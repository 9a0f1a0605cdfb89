"""Carries a program out in all its thread blocks, in one schedule of warps of many.

What is modelled: registers and branches of every thread; shared memory, which begins as NaN; barriers; copies with
their bounds and swizzles; products by their layouts; that copies and products see what warps wrote only after a fence;
and which accesses to shared memory are in no order, in the first block of those side by side. Blocks that part ways,
as those with unequal numbers of steps do, are emulated one by one, which takes about as long for each as for all.

What is not: when results of products reach registers, the order of lanes within a warp, that of accesses to global
memory within a kernel and of kernels among one another, clusters, and time.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blocks import LANES, Blocks
from errors import Fault, Parted
from instructions import carried_by
from launch import Launch
from memory import UNWRITTEN, GlobalMemory, SharedMemory, shared_units
from program import Instruction, Program
from races import EMPTY, Detector, Race
from warp import Warp

DESCRIPTORS = 1 << 40  # where a kernel's descriptors are
LONGEST_TURN = 400  # instructions, where turns are random


@dataclass(frozen=True)
class Schedule:
    """A warp goes on until it waits; with a seed for a random number of instructions, and any may be next."""

    seed: int | None = None
    reverse: bool = False  # the last warp first
    late_copies: bool = False
    fill: int = UNWRITTEN  # what shared memory begins with


@dataclass(frozen=True)
class Outcome:
    results: list[np.ndarray]
    races: Counter[Race]
    outside: Counter[Instruction]  # elements that copies would have had out of bounds
    damage: list[str]

    @property
    def faults(self) -> Counter[str]:
        """By what is said of them, how many."""
        faults = Counter(self.damage)
        for race, count in self.races.items():
            if not _may_be_unread(race):
                before = f", before it {race.other.brief}" if race.other else ""
                faults[f"{race.what}: {race.place.brief}{before}"] += count
        for instruction, count in self.outside.items():
            faults[f"out of bounds: {instruction.brief}"] += count
        return faults

    @property
    def remarks(self) -> set[str]:
        """Places of products with rows that nobody wrote."""
        return {race.place.place for race in self.races if _may_be_unread(race)}


def _may_be_unread(race: Race) -> bool:
    """Rows of a product that nobody uses may be anything; if they are used, the results are NaN."""
    return race.what == EMPTY and race.place.name.startswith("wgmma")


class Machine:
    def __init__(self, program: Program, blocks: Blocks, schedule: Schedule):
        self.program, self.blocks = program, blocks
        self._carried = [carried_by(instruction) for instruction in program.instructions]
        self._warps = [Warp(number, blocks) for number in range(blocks.warps)]
        self._order = self._warps[::-1] if schedule.reverse else list(self._warps)
        self._random = None if schedule.seed is None else np.random.default_rng(schedule.seed)

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while any(not warp.done for warp in self._warps):
                if (warp := self._next()) is not None:
                    self._turn(warp)
                elif self.blocks.late:
                    self.blocks.late.pop(0)()
                else:
                    raise Fault(f"deadlock: {self._waiting()}")
        if self.blocks.late:
            raise Fault(f"{len(self.blocks.late)} copies that nobody waited for")

    def unfinished(self) -> list[str]:
        barriers = self.blocks.arrival_barriers.items()
        return [f"barrier at {address:#x} left unfinished" for address, barrier in barriers if not barrier.finished]

    def _next(self) -> Warp | None:
        if self._random is not None:
            self._random.shuffle(self._order)
        return next((warp for warp in self._order if not warp.done and warp.ready()), None)

    def _turn(self, warp: Warp) -> None:
        steps = None if self._random is None else int(self._random.integers(1, LONGEST_TURN))
        while not warp.done and warp.blocked is None and steps != 0:
            self._step(warp)
            steps = None if steps is None else steps - 1

    def _step(self, warp: Warp) -> None:
        """The path that is furthest behind, so that paths meet again."""
        warp.at = min(warp.paths)
        warp.threads = warp.paths.pop(warp.at)
        instruction = self.program.instructions[warp.at]
        active = warp.threads if warp.paths else None
        if instruction.guard is not None:
            active = warp.threads & (warp.read(instruction.guard, "pred") ^ instruction.negated)
        paths = None
        if active is None or active.any():
            everyone = active is None or bool(active.all())
            paths = self._carried[warp.at](warp, instruction, None if everyone else active)
        for place, threads in ({warp.at + 1: warp.threads} if paths is None else paths).items():
            warp.paths[place] = warp.paths[place] | threads if place in warp.paths else threads

    def _waiting(self) -> str:
        """At what they wait, each with its warps."""
        places: dict[str, list[int]] = {}
        for warp in self._warps:
            if not warp.done:
                places.setdefault(str(self.program.instructions[min(warp.paths) - 1]), []).append(warp.number)
        return ", ".join(f"warps {numbers} at {place}" for place, numbers in places.items())


def emulate(
    program: Program,
    launch: Launch,
    operands: Sequence[np.ndarray],
    results: Sequence[np.ndarray],
    schedule: Schedule | None = None,
) -> Outcome:
    """Of the results shapes and dtypes are used."""
    given = program, launch, operands, results, schedule or Schedule()
    numbers = np.arange(np.prod(launch.grid))
    try:
        return _emulate(*given, [numbers])
    except Parted:
        return _emulate(*given, np.split(numbers, len(numbers)))


def _emulate(
    program: Program,
    launch: Launch,
    operands: Sequence[np.ndarray],
    results: Sequence[np.ndarray],
    schedule: Schedule,
    parts: Sequence[np.ndarray],
) -> Outcome:
    """Parts of the grid one after the other, the blocks of each side by side."""
    memory = GlobalMemory(operands, results)
    outcome = Outcome([], Counter(), Counter(), [])
    warps = launch.threads // LANES
    for numbers in parts:
        detector = Detector(warps, shared_units(launch.shared_bytes))
        blocks = Blocks(
            program=program,
            grid=launch.grid,
            numbers=numbers,
            warps=warps,
            parameters={
                name: DESCRIPTORS if argument is None else memory.addresses[argument]
                for name, argument in zip(program.parameters, launch.arguments, strict=True)
            },
            descriptors={DESCRIPTORS + offset: descriptor for offset, descriptor in launch.descriptors.items()},
            memory=memory,
            shared=SharedMemory(len(numbers), launch.shared_bytes, schedule.fill, detector),
            detector=detector,
            late=[] if schedule.late_copies else None,
        )
        machine = Machine(program, blocks, schedule)
        machine.run()
        outcome.races.update(detector.races)
        outcome.outside.update(blocks.outside)
        outcome.damage.extend(machine.unfinished())
    outcome.damage.extend(memory.damage())
    outcome.results.extend(memory.results())
    return outcome
