"""Barriers of warps (`bar.sync`) and of arrivals and bytes (`mbarrier`), which carry clocks from warp to warp."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from errors import Fault
from program import Instruction
from races import Detector


@dataclass
class WarpBarrier:
    warps: int
    detector: Detector
    waiting: list[int] = field(default_factory=list)
    generation: int = 0

    def arrive(self, warp: int) -> Callable[[], bool]:
        """Whether the warp may go on."""
        self.waiting.append(warp)
        generation = self.generation
        if len(self.waiting) == self.warps:
            together = self.detector.clocks[self.waiting].max(0)
            for each in self.waiting:
                self.detector.learn(each, together)
            self.waiting = []
            self.generation += 1
        return lambda: self.generation != generation


class ArrivalBarrier:
    """Of the first block; all blocks do the same."""

    def __init__(self, count: int, detector: Detector, maker: int, made: Instruction):
        self.count = self.pending = count
        self._maker, self._made, self._made_clock = maker, made, int(detector.clocks[maker, maker])
        self.bytes = self.phase = 0
        self._detector = detector
        self._clock, self._next = (np.zeros(detector.engine + 1, np.int64) for _ in range(2))

    def used(self, warp: int, by: Instruction) -> None:
        self._detector.use_barrier(warp, self._maker, self._made_clock, by, self._made)

    @property
    def finished(self) -> bool:
        """Whether nothing more is to come in this phase."""
        return self.bytes == 0 and self.pending == self.count

    def arrive(self, warp: int, by: Instruction, arrivals: int, expected_bytes: int) -> None:
        self.bytes += expected_bytes
        self.pending -= arrivals
        if self.pending < 0:
            raise Fault(f"{by}: more arrivals than the barrier was made for")
        self._hear(self._detector.clocks[warp])
        self._detector.tick(warp)
        self._complete()

    def copied(self, size: int, clock: np.ndarray) -> None:
        self.bytes -= size
        self._hear(clock)
        self._complete()

    def wait(self, warp: int, parity: int) -> Callable[[], bool]:
        """Whether the phase of this parity is over."""

        def over() -> bool:
            if self.phase % 2 == parity:
                return False
            self._detector.learn(warp, self._clock)
            return True

        return over

    def _hear(self, clock: np.ndarray) -> None:
        self._next = np.maximum(self._next, clock)

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self._clock, self._next = self._next, np.zeros_like(self._next)
