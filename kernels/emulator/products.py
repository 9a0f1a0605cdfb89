"""Products on the tensor cores (`wgmma`), and the matrices that warps bring to and from their registers' layout.

A product is carried out at once. That results are in registers only after a wait is not modelled: a wait too few shows
where shared memory is written too early, not where a result is read too early.
"""

import re

import numpy as np
from blocks import LANES
from errors import Refused
from program import KINDS, Instruction
from races import UNIT
from warp import Warp

ROWS, DEPTH = 64, 16  # of a product's left operand
TILE_ROWS, ROW_BYTES = 8, 128  # of a matrix in shared memory, in tiles of a row's width
WARPS = 4  # of a warpgroup, each with a quarter of the rows
SWIZZLED_128 = 1  # the layout in bits 62 and 63 of a matrix descriptor
PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")
LANE = np.arange(LANES)
ROW, COLUMN = LANE // 4, LANE % 4 * 2  # of a lane's first number in a tile of 8 rows


def swizzle(addresses: np.ndarray) -> np.ndarray:
    """Rows of 128 bytes: the 16 bytes' number within a row is mixed with the row's."""
    return addresses ^ ((addresses >> 7 & 7) << 4)


def multiply(warp: Warp, by: Instruction, active: np.ndarray | None) -> None:
    warp.together(by, active)
    found = PRODUCT.fullmatch(by.name)
    assert found is not None
    columns, kind = int(found[1]), found[2]
    in_registers = isinstance(by.operands[1], tuple)
    accumulate, left_sign, right_sign, *transposed = (by.register(i) for i in range(3, len(by.operands)))
    if (left_sign, right_sign) != ("1", "1") or len(transposed) != 2 - in_registers:
        raise Refused(f"{by}: {by.operands[3:]}")
    if in_registers:
        left = _fragment(warp, by.several(1), kind)
    else:
        own_rows = slice(DEPTH * (warp.number % WARPS), DEPTH * (warp.number % WARPS + 1))
        left = _matrix(warp, by, 1, kind, transposed[0] == "1", ROWS, own_rows)
    right = _matrix(warp, by, 2, kind, transposed[-1] == "1", columns, slice(None))
    product = np.matmul(left, right.swapaxes(1, 2))
    kept = warp.read(accumulate, "pred")
    for i, register in enumerate(by.several(0)):
        tile, number = divmod(i, 4)
        values = product[:, ROW + 8 * (number // 2), 8 * tile + COLUMN + number % 2]
        warp.write(register, np.where(kept, warp.read(register, "f32"), np.float32(0)) + values, None)


def _fragment(warp: Warp, registers: tuple[str, ...], kind: str) -> np.ndarray:
    """A warp's rows of the left operand, [blocks,16,16], from pairs in registers."""
    matrix = np.empty((warp.blocks.shape[0], DEPTH, DEPTH), np.float32)
    for i, register in enumerate(registers):
        pairs = warp.read(register, f"{kind}x2").astype(np.float32)
        row, column = ROW + 8 * (i % 2), COLUMN + 8 * (i // 2)
        matrix[:, row, column], matrix[:, row, column + 1] = pairs[:, ::2], pairs[:, 1::2]
    return matrix


def _matrix(
    warp: Warp, by: Instruction, position: int, kind: str, transposed: bool, rows: int, own: slice
) -> np.ndarray:
    """[blocks, own rows, 16] from shared memory; transposed: a column's numbers are side by side there."""
    descriptor = warp.same(by.register(position), "b64", by)
    start, leading, stride = (16 * (descriptor >> shift & 0x3FFF) for shift in (0, 16, 32))
    if descriptor >> 62 != SWIZZLED_128:
        raise Refused(f"{by}: a matrix in another layout than swizzled by 128 bytes")
    row, column = np.arange(rows)[:, None], np.arange(DEPTH)
    if transposed:
        in_tile = row * UNIT % ROW_BYTES + column % TILE_ROWS * ROW_BYTES
        offsets = in_tile + row * UNIT // ROW_BYTES * leading + column // TILE_ROWS * stride
    else:
        offsets = row % TILE_ROWS * ROW_BYTES + column * UNIT + row // TILE_ROWS * stride
    units = swizzle(start + offsets)[own] // UNIT
    warp.products.open.append(units)
    bits = warp.blocks.shared.read_asynchronously(warp.number, units, by)
    return bits.view(KINDS[kind]).astype(np.float32)


def commit(warp: Warp, by: Instruction, active: np.ndarray | None) -> None:
    warp.together(by, active)
    warp.products.commit()


def wait(warp: Warp, by: Instruction, active: np.ndarray | None) -> None:
    warp.together(by, active)
    for units in warp.products.wait(int(by.register(0))):
        warp.blocks.shared.finish_read(warp.number, units)


def load_matrices(warp: Warp, by: Instruction, active: np.ndarray | None) -> None:
    """Four of 8 x 8: lane 8 m + r has the address of row r of matrix m, and gets a pair of each."""
    warp.together(by, active)
    bits = warp.load(by, warp.addresses(by.address(1)), 16, None).reshape(-1, 4, 8, 8)
    if ".trans" in by.name:
        bits = bits.swapaxes(2, 3)
    pairs = np.ascontiguousarray(bits).view(np.uint32).reshape(-1, 4, LANES)
    for i, register in enumerate(by.several(0)):
        warp.write(register, pairs[:, i], None)


def store_matrices(warp: Warp, by: Instruction, active: np.ndarray | None) -> None:
    warp.together(by, active)
    pairs = np.stack([warp.read(register, "b32") for register in by.several(1)], 1)
    bits = pairs.view(np.uint16).reshape(-1, 4, 8, 8)
    if ".trans" in by.name:
        bits = np.ascontiguousarray(bits.swapaxes(2, 3))
    warp.store(by, warp.addresses(by.address(0)), bits.reshape(-1, LANES, 8), None)
