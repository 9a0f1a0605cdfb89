"""What the warps of a thread block have in common, of all blocks that are emulated side by side."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from barriers import ArrivalBarrier, WarpBarrier
from errors import Refused
from launch import Descriptor
from memory import SHARED, GlobalMemory, SharedMemory
from program import Instruction, Program
from races import Detector

LANES = 32


@dataclass
class Blocks:
    program: Program
    grid: tuple[int, int, int]
    numbers: np.ndarray  # of the blocks in the grid
    warps: int
    parameters: dict[str, int]  # their values; the address of the descriptors
    descriptors: dict[int, Descriptor]  # by address
    memory: GlobalMemory
    shared: SharedMemory
    detector: Detector
    late: list[Callable[[], None]] | None = None  # copies not yet done, if they are to be late
    warp_barriers: dict[int, WarpBarrier] = field(default_factory=dict)
    arrival_barriers: dict[int, ArrivalBarrier] = field(default_factory=dict)
    outside: Counter[Instruction] = field(default_factory=Counter)  # elements that copies read out of bounds
    _constants: dict[tuple[str, np.dtype], np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.numbers), LANES

    def constant(self, text: str, dtype: np.dtype) -> np.ndarray:
        """A number, an address or a place in the grid."""
        if (text, dtype) not in self._constants:
            self._constants[text, dtype] = self._constant(text, dtype)
        return self._constants[text, dtype]

    def _constant(self, text: str, dtype: np.dtype) -> np.ndarray:
        if text.startswith("%ctaid."):
            index = np.unravel_index(self.numbers, self.grid[::-1])["zyx".index(text[-1])]
            return np.repeat(index[:, None], LANES, 1).astype(dtype)
        if text == self.program.dynamic:
            return np.full(self.shape, SHARED, dtype)
        if text in self.parameters:
            return np.full(self.shape, self.parameters[text], dtype)
        try:
            bits = int(text[2:], 16) if text.startswith("0f") else int(text, 0)
        except ValueError:
            raise Refused(f"an operand {text}") from None
        if dtype.kind == "b":
            return np.full(self.shape, bool(bits))
        unsigned = np.dtype(f"uint{8 * dtype.itemsize}")
        return np.full(self.shape, bits % (1 << 8 * dtype.itemsize), unsigned).view(dtype)
