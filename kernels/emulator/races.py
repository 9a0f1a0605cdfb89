"""Accesses to shared memory that nothing puts in order, by vector clocks."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from program import Instruction

UNIT = 2  # bytes
NEVER = 1 << 40  # a clock that no warp reaches
NOBODY = -1
EMPTY = "read of what nobody wrote"


class Race(NamedTuple):
    what: str
    place: Instruction
    other: Instruction | None


class Detector:
    """Of one block's shared memory; of each unit it knows the last write, and each warp's last read.

    Warps and the copy engine have a clock each, and know of one another's what barriers told them. An access is in
    order if the warp knows of the one before. A read by a copy or a product lasts until the warp has waited for it,
    and what warps wrote is visible to one only after the writer's own fence: that of a reader is not counted, though
    one after a barrier would do.
    """

    def __init__(self, warps: int, units: int):
        self.engine = warps
        self.clocks = np.zeros((warps, warps + 1), np.int64)
        np.fill_diagonal(self.clocks, 1)
        self.races: Counter[Race] = Counter()
        self._copies = 0
        self._writer, self._write_clock = np.full(units, NOBODY), np.zeros(units, np.int64)
        self._read_clocks = np.zeros((warps, units), np.int64)
        self._visible = np.ones(units, bool)
        # Where in `_seen` the instructions are, 0 for none.
        self._write_place, self._read_places = np.zeros(units, np.int64), np.zeros((warps, units), np.int64)
        self._seen: list[Instruction | None] = [None]
        self._numbers: dict[int, int] = {}

    def tick(self, warp: int) -> None:
        self.clocks[warp, warp] += 1

    def learn(self, warp: int, clock: np.ndarray) -> None:
        self.clocks[warp] = np.maximum(self.clocks[warp], clock)
        self.tick(warp)

    def read(self, warp: int, units: np.ndarray, by: Instruction, lasting: bool = False) -> None:
        """Lasting: by a copy or a product, which see only what a fence has shown them."""
        self._in_order("read after write", warp, units, by)
        empty = self._writer[units] == NOBODY
        if by.used or lasting:
            self._report(EMPTY, by, self._write_place[units], empty)
        if lasting:
            self._report("no fence before a read", by, self._write_place[units], ~self._visible[units])
        self._read_clocks[warp, units] = NEVER if lasting else self.clocks[warp, warp]
        self._read_places[warp, units] = self._number(by)

    def finish_read(self, warp: int, units: np.ndarray) -> None:
        clocks = self._read_clocks[warp, units]
        self._read_clocks[warp, units] = np.where(clocks == NEVER, self.clocks[warp, warp], clocks)

    def write(self, warp: int, units: np.ndarray, by: Instruction) -> None:
        self._before_write(warp, units, by)
        self._writer[units], self._write_clock[units] = warp, self.clocks[warp, warp]
        self._visible[units] = False

    def write_by_copy(self, warp: int, units: np.ndarray, by: Instruction) -> int:
        """The copy engine's clock when it will be done."""
        self._copies += 1
        self._before_write(warp, units, by)
        self._writer[units], self._write_clock[units] = self.engine, self._copies
        self._visible[units] = True
        return self._copies

    def use_barrier(self, warp: int, maker: int, clock: int, by: Instruction, made: Instruction) -> None:
        if warp != maker and clock > self.clocks[warp, maker]:
            self.races[Race("use of a barrier that may not be there yet", by, made)] += 1

    def fence(self, warp: int, units: np.ndarray) -> None:
        self._visible[units[self._writer[units] == warp]] = True

    def _before_write(self, warp: int, units: np.ndarray, by: Instruction) -> None:
        self._in_order("write after write", warp, units, by)
        for reader, clocks in enumerate(self._read_clocks[:, units]):
            known = NEVER - 1 if reader == warp else self.clocks[warp, reader]
            self._report("write after read", by, self._read_places[reader, units], clocks > known)
        self._write_place[units] = self._number(by)

    def _in_order(self, what: str, warp: int, units: np.ndarray, by: Instruction) -> None:
        writer = self._writer[units]
        unknown = self._write_clock[units] > self.clocks[warp, np.maximum(writer, 0)]
        self._report(what, by, self._write_place[units], (writer != NOBODY) & (writer != warp) & unknown)

    def _report(self, what: str, by: Instruction, others: np.ndarray, wrong: np.ndarray) -> None:
        if wrong.any():
            other = self._seen[int(others[wrong][0])]
            self.races[Race(what, by, other)] += int(wrong.sum())

    def _number(self, instruction: Instruction) -> int:
        if id(instruction) not in self._numbers:
            self._numbers[id(instruction)] = len(self._seen)
            self._seen.append(instruction)
        return self._numbers[id(instruction)]
