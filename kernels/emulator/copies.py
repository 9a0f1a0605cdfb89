"""Copies of boxes between arrays in global memory and shared memory (`cp.async.bulk.tensor`), by the TMA unit.

A copy to shared memory is done at once, or, where copies are to be late, when no warp can go on without it. One from
shared memory takes what is there when it is issued; that it still reads then is what the race detector knows.
"""

import numpy as np
from errors import Fault, Parted, Refused
from launch import Descriptor
from products import swizzle
from program import Address, Instruction
from races import UNIT
from warp import Warp

ALIGNMENT, SWIZZLED_ALIGNMENT = 128, 1024


class Box:
    """What a copy moves: units of shared memory [n], the same of every block, and of global memory [blocks,n]."""

    def __init__(self, warp: Warp, by: Instruction, active: np.ndarray | None, array: Address, shared: Address):
        if active is None or (active.sum(1) != 1).any() or (active != active[0]).any():
            raise Parted(f"{by}: a copy by other than one thread, the same of every block")
        descriptor = _descriptor(warp, by, active, array)
        lane = int(active[0].argmax())
        coordinates = np.stack([warp.read(name, "s32")[:, lane] for name in reversed(array.coordinates)], 1)
        within = np.indices(descriptor.box).reshape(len(descriptor.box), -1)
        places = coordinates[:, :, None].astype(np.int64) + within
        inside = ((places >= 0) & (places < np.array(descriptor.sizes)[:, None])).all(1)
        elements = (np.where(inside[:, None], places, 0) * np.array(descriptor.strides)[:, None]).sum(1)
        per_element = np.arange(descriptor.itemsize // UNIT)
        start = warp.blocks.memory.addresses[descriptor.argument] + elements * descriptor.itemsize
        self.array = (start[..., None] // UNIT + per_element).reshape(len(start), -1)
        self.inside = np.repeat(inside, len(per_element), 1)
        if not inside.all():
            warp.blocks.outside[by] += int((~inside).sum())
        address = warp.same_address(shared, by, active)
        swizzled = descriptor.swizzle == 128
        if address % (SWIZZLED_ALIGNMENT if swizzled else ALIGNMENT):
            raise Fault(f"{by}: a copy to or from {address}, which is not aligned")
        addresses = address + np.arange(within.shape[1]) * descriptor.itemsize
        addresses = swizzle(addresses) if swizzled else addresses
        self.shared = (addresses[:, None] // UNIT + per_element).ravel()


def _descriptor(warp: Warp, by: Instruction, active: np.ndarray, array: Address) -> Descriptor:
    descriptor = warp.blocks.descriptors.get(warp.same_address(array, by, active))
    if descriptor is None:
        raise Fault(f"{by}: no descriptor of an array at {array.base}")
    if descriptor.swizzle not in (16, 128):
        raise Refused(f"{by}: swizzled by {descriptor.swizzle} bytes")
    if len(array.coordinates) != len(descriptor.box):
        raise Fault(f"{by}: {len(array.coordinates)} coordinates for {len(descriptor.box)} axes")
    return descriptor


def load(warp: Warp, by: Instruction, active: np.ndarray | None) -> None:
    """Zeros from out of bounds."""
    blocks = warp.blocks
    box = Box(warp, by, active, by.address(1), by.address(0))
    barrier = warp.arrival_barrier(by.address(2), by, active)
    values = np.where(box.inside, blocks.memory.load(box.array, by), np.uint16(0))
    clock = blocks.detector.clocks[warp.number].copy()
    clock[blocks.detector.engine] = blocks.detector.write_by_copy(warp.number, box.shared, by)

    def finish() -> None:
        blocks.shared.copied(box.shared, values, by)
        barrier.copied(box.shared.size * UNIT, clock)

    if blocks.late is None:
        finish()
    else:
        blocks.late.append(finish)


def store(warp: Warp, by: Instruction, active: np.ndarray | None) -> None:
    """Nothing out of bounds."""
    box = Box(warp, by, active, by.address(0), by.address(1))
    values = warp.blocks.shared.read_asynchronously(warp.number, box.shared, by)
    warp.blocks.memory.store(box.array[box.inside], values[box.inside], by)
    warp.stores.open.append(box.shared)


def commit(warp: Warp, by: Instruction, active: np.ndarray | None) -> None:
    warp.stores.commit()


def wait(warp: Warp, by: Instruction, active: np.ndarray | None) -> None:
    """For the reads alone or for the writes too, which is the same here."""
    for units in warp.stores.wait(int(by.register(0))):
        warp.blocks.shared.finish_read(warp.number, units)
