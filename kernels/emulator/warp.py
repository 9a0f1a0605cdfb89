"""A warp in every thread block at once: its registers, its threads' places in the program, and what it waits for."""

from collections.abc import Callable

import numpy as np
from barriers import ArrivalBarrier
from blocks import LANES, Blocks
from errors import Fault, Parted, Refused
from memory import SHARED_END, units_of
from program import KINDS, Address, Instruction
from races import UNIT


class Groups[Member]:
    """What was started, by the groups that a warp has committed."""

    def __init__(self) -> None:
        self.open: list[Member] = []
        self.committed: list[list[Member]] = []

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def wait(self, most: int) -> list[Member]:
        """All but as many groups, which are then over."""
        over = self.committed[: max(len(self.committed) - most, 0)]
        del self.committed[: len(over)]
        return [member for group in over for member in group]

    @property
    def pending(self) -> bool:
        return bool(self.open) or any(self.committed)


class Warp:
    def __init__(self, number: int, blocks: Blocks):
        self.number, self.blocks = number, blocks
        self.everyone = np.ones(blocks.shape, bool)
        self.paths = {0: self.everyone}  # where in the program which threads are
        self.threads = self.everyone  # of the path that goes on
        self.at = 0
        self.blocked: Callable[[], bool] | None = None
        self.stores: Groups[np.ndarray] = Groups()
        self.products: Groups[np.ndarray] = Groups()
        index = LANES * number + np.arange(LANES, dtype=np.uint32)
        self._registers = {"%tid.x": np.repeat(index[None], blocks.shape[0], 0)}

    @property
    def done(self) -> bool:
        return not self.paths

    def ready(self) -> bool:
        if self.blocked is not None and self.blocked():
            self.blocked = None
        return self.blocked is None

    def wait(self, over: Callable[[], bool]) -> None:
        self.blocked = None if over() else over

    def together(self, by: Instruction, active: np.ndarray | None) -> None:
        """All threads of all blocks have to be here."""
        if active is not None:
            raise Parted(f"{by}: threads have parted here")

    def read(self, name: str, kind: str) -> np.ndarray:
        """[blocks,32], of pairs [blocks,64]"""
        dtype = KINDS[kind]
        if name in self._registers:
            return self._registers[name].view(dtype)
        if name.startswith("%") and not name.startswith("%ctaid."):
            raise Fault(f"{self.blocks.program.instructions[self.at]}: {name} is read before it is written")
        return self.blocks.constant(name, dtype)

    def write(self, name: str, values: np.ndarray, active: np.ndarray | None) -> None:
        """Of the active threads (None: all)."""
        bits = np.ascontiguousarray(values).view(self.blocks.program.width(name))
        if active is not None and name in self._registers:
            bits = np.where(active, bits, self._registers[name])
        self._registers[name] = bits

    def same(self, name: str, kind: str, by: Instruction, active: np.ndarray | None = None) -> int:
        """A number that all active threads of all blocks have alike."""
        values = self.read(name, kind)
        values = values if active is None else values[active]
        if (values != values.flat[0]).any():
            raise Parted(f"{by}: {name} differs between threads")
        return int(values.flat[0])

    def addresses(self, address: Address, active: np.ndarray | None = None) -> np.ndarray:
        """[blocks,32]; of threads that are not active that of one that is."""
        in_register = address.base.startswith("%")
        bits = 8 * self.blocks.program.width(address.base).itemsize if in_register else 64
        values = self.read(address.base, f"u{bits}").astype(np.int64) + address.offset
        return values if active is None else np.where(active, values, values[active].flat[0])

    def same_address(self, address: Address, by: Instruction, active: np.ndarray | None = None) -> int:
        addresses = self.addresses(address, active)
        if (addresses != addresses.flat[0]).any():
            raise Parted(f"{by}: {address.base} differs between threads")
        return int(addresses.flat[0])

    def arrival_barrier(self, address: Address, by: Instruction, active: np.ndarray | None = None) -> ArrivalBarrier:
        at = self.same_address(address, by, active)
        if at not in self.blocks.arrival_barriers:
            raise Fault(f"{by}: no barrier was made at {at:#x}")
        barrier = self.blocks.arrival_barriers[at]
        barrier.used(self.number, by)
        return barrier

    def load(self, by: Instruction, addresses: np.ndarray, size: int, active: np.ndarray | None) -> np.ndarray:
        """[blocks,32,size in units]"""
        units = self._aligned(by, addresses, size)
        if self._in_shared(by, addresses):
            return self.blocks.shared.load(self.number, units, self.everyone if active is None else active, by)
        return self.blocks.memory.load(units, by)

    def store(self, by: Instruction, addresses: np.ndarray, values: np.ndarray, active: np.ndarray | None) -> None:
        """values [blocks,32,units]"""
        units = self._aligned(by, addresses, values.shape[-1] * UNIT)
        threads = self.everyone if active is None else active
        if self._in_shared(by, addresses):
            self.blocks.shared.store(self.number, units, values, threads, by)
        else:
            self.blocks.memory.store(units[threads], values[threads], by)

    def _aligned(self, by: Instruction, addresses: np.ndarray, size: int) -> np.ndarray:
        if (addresses % size).any():
            raise Fault(f"{by}: an address is no multiple of {size}")
        return units_of(addresses, size)

    def _in_shared(self, by: Instruction, addresses: np.ndarray) -> bool:
        shared = addresses < SHARED_END
        if shared.any() != shared.all():
            raise Refused(f"{by}: some threads' addresses are of shared memory, others of global")
        if ".shared" in by.name and not shared.all():
            raise Fault(f"{by}: no address of shared memory")
        return bool(shared.all())
