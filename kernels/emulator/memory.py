"""Global memory, of the kernel's arrays alone, and the shared memory of all blocks."""

from collections.abc import Sequence

import numpy as np
from errors import Fault
from program import Instruction
from races import UNIT, Detector

SHARED = 1024  # where dynamic shared memory begins
SHARED_END = 1 << 24
GLOBAL = 1 << 32
UNWRITTEN = 0xFF  # NaN in every format
PAGE = 4096


def units_of(addresses: np.ndarray, size: int) -> np.ndarray:
    """[..., size in units]"""
    return (addresses[..., None] // UNIT) + np.arange(size // UNIT)


def shared_units(size: int) -> int:
    """With those before dynamic shared memory."""
    return -(-(SHARED + size) // UNIT)


class GlobalMemory:
    """Operands and results, each followed by a page that belongs to nobody."""

    def __init__(self, operands: Sequence[np.ndarray], results: Sequence[np.ndarray]):
        starts, end = [], PAGE
        for array in [*operands, *results]:
            starts.append(end)
            end += -(-array.nbytes // PAGE) * PAGE + PAGE
        self.addresses = [GLOBAL + start for start in starts]
        self._bytes = np.full(end, UNWRITTEN, np.uint8)
        self._units = self._bytes.view(np.uint16)
        self._operands = list(zip(starts, operands, strict=False))
        self._results = list(zip(starts[len(operands) :], results, strict=True))
        for start, array in self._operands:
            self._bytes[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)

    def load(self, units: np.ndarray, by: Instruction) -> np.ndarray:
        return self._units[self._inside(units, by)]

    def store(self, units: np.ndarray, values: np.ndarray, by: Instruction) -> None:
        self._units[self._inside(units, by)] = values

    def results(self) -> list[np.ndarray]:
        return [self._read(start, array) for start, array in self._results]

    def damage(self) -> list[str]:
        """What was written where nothing should be."""
        outside = np.ones(self._bytes.size, bool)
        for start, array in self._operands + self._results:
            outside[start : start + array.nbytes] = False
        found = int((self._bytes[outside] != UNWRITTEN).sum())
        damage = [f"{found} bytes written outside of arrays"] if found else []
        written = [i for i, (start, x) in enumerate(self._operands) if self._read(start, x).tobytes() != x.tobytes()]
        return damage + [f"operand {number} written" for number in written]

    def _read(self, start: int, array: np.ndarray) -> np.ndarray:
        return np.frombuffer(self._bytes[start : start + array.nbytes].tobytes(), array.dtype).reshape(array.shape)

    def _inside(self, units: np.ndarray, by: Instruction) -> np.ndarray:
        places = units - GLOBAL // UNIT
        if (places < 0).any() or (places >= self._units.size).any():
            raise Fault(f"{by}: global memory out of bounds")
        return places


class SharedMemory:
    """As warps see it, and as copies and products do: they see a warp's writes after its fence alone."""

    def __init__(self, blocks: int, size: int, fill: int, detector: Detector):
        self._end = shared_units(size)
        self._generic = np.full((blocks, self._end * UNIT), fill, np.uint8).view(np.uint16)
        self._asynchronous = self._generic.copy()
        self._first = (np.arange(blocks) * self._end)[:, None, None]
        self._detector = detector
        self._dirty: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def load(self, warp: int, units: np.ndarray, active: np.ndarray, by: Instruction) -> np.ndarray:
        """units, values [blocks,32,n]; of threads that are not active anything."""
        self._check(units, by)
        self._detector.read(warp, np.unique(units[0][active[0]]), by)
        return self._generic.reshape(-1)[units + self._first]

    def store(self, warp: int, units: np.ndarray, values: np.ndarray, active: np.ndarray, by: Instruction) -> None:
        self._check(units[active], by)
        everywhere = (units + self._first)[active].ravel()
        self._generic.reshape(-1)[everywhere] = values[active].ravel()
        first_block = np.unique(units[0][active[0]])
        self._detector.write(warp, first_block, by)
        self._dirty.setdefault(warp, []).append((everywhere, first_block))

    def fence(self, warp: int) -> None:
        for everywhere, first_block in self._dirty.pop(warp, []):
            self._asynchronous.reshape(-1)[everywhere] = self._generic.reshape(-1)[everywhere]
            self._detector.fence(warp, first_block)

    def read_asynchronously(self, warp: int, units: np.ndarray, by: Instruction) -> np.ndarray:
        """[blocks, as units], the same of every block, by a copy or a product; lasts until `finish_read`."""
        self._check(units, by)
        self._detector.read(warp, units.ravel(), by, lasting=True)
        return self._asynchronous[:, units]

    def finish_read(self, warp: int, units: np.ndarray) -> None:
        self._detector.finish_read(warp, units.ravel())

    def copied(self, units: np.ndarray, values: np.ndarray, by: Instruction) -> None:
        self._check(units, by)
        self._generic[:, units] = self._asynchronous[:, units] = values

    def _check(self, units: np.ndarray, by: Instruction) -> None:
        if (units < SHARED // UNIT).any() or (units >= self._end).any():
            raise Fault(f"{by}: shared memory out of bounds")
