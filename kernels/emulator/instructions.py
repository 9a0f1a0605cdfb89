"""The instructions that are known, by their whole names; what is not in the table is refused by name.

Products of float32 in `fma` are rounded once by way of float64, and `ex2.approx` is exact to float32 and keeps
subnormal numbers: both differ from a GPU in last bits.
"""

import operator
from collections.abc import Callable, Iterable

import copies
import numpy as np
import products
from barriers import ArrivalBarrier, WarpBarrier
from blocks import LANES
from errors import Fault, Parted, Refused
from program import KINDS, Instruction
from warp import Warp

Active = np.ndarray | None  # the threads that carry an instruction out, None for all
Paths = dict[int, np.ndarray]  # where which threads go on; None for the next instruction
Carried = Callable[[Warp, Instruction, Active], Paths | None]
TABLE: dict[str, Carried] = {}

INTEGERS = [f"{letter}{bits}" for letter in "us" for bits in (16, 32, 64)]
BITS = ["b16", "b32", "b64"]
FLOATS = ["f32", "bf16", "f16", "bf16x2", "f16x2"]
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
FLOAT_COMPARISONS = {name: COMPARISONS[name] for name in ("eq", "lt", "le", "gt", "ge")} | {"neu": np.not_equal}


def known(*names: str) -> Callable[[Carried], Carried]:
    def keep(carried: Carried) -> Carried:
        TABLE.update(dict.fromkeys(names, carried))
        return carried

    return keep


def carried_by(instruction: Instruction) -> Carried:
    if products.PRODUCT.fullmatch(instruction.name):
        return products.multiply
    if instruction.name not in TABLE:
        raise Refused(f"{instruction}: an instruction that is not known")
    return TABLE[instruction.name]


def elementwise(names: Iterable[str], function: Callable[..., np.ndarray], wide: bool = False) -> None:
    """Operands and result of the kind that ends the name; wide: computed in float64 where they are float32."""

    def carried(warp: Warp, by: Instruction, active: Active) -> None:
        operands = [warp.read(by.register(i), by.kind) for i in range(1, len(by.operands))]
        dtype = operands[0].dtype
        if by.kind in FLOATS:
            computed = np.float64 if wide and by.kind == "f32" else np.float32
            result = function(*(operand.astype(computed) for operand in operands)).astype(dtype)
        else:
            result = function(*operands)
        warp.write(by.register(0), result, active)

    known(*names)(carried)


def each(names: str, kinds: Iterable[str]) -> list[str]:
    return [f"{name}.{kind}" for name in names.split() for kind in kinds]


elementwise(each("add", INTEGERS) + each("add add.rn", FLOATS), operator.add)
elementwise(each("sub", INTEGERS) + each("sub sub.rn", FLOATS), operator.sub)
elementwise(each("mul.lo", INTEGERS) + each("mul mul.rn", FLOATS), operator.mul)
elementwise(each("mad.lo", INTEGERS), lambda a, b, c: a * b + c)
elementwise(each("fma.rn", FLOATS), lambda a, b, c: a * b + c, wide=True)
elementwise(each("min", INTEGERS), np.minimum)
elementwise(each("max", INTEGERS), np.maximum)
elementwise(each("neg", FLOATS) + each("neg", ["s32", "s64"]), operator.neg)
elementwise(each("and", [*BITS, "pred"]), operator.and_)
elementwise(each("or", [*BITS, "pred"]), operator.or_)
elementwise(each("xor", [*BITS, "pred"]), operator.xor)
elementwise(each("not", [*BITS, "pred"]), operator.invert)
elementwise(["ex2.approx.ftz.f32"], np.exp2)


@known(*each("mul.wide", ["u32", "s32"]))
def multiply_wide(warp: Warp, by: Instruction, active: Active) -> None:
    wide = KINDS[by.kind.replace("32", "64")]
    a, b = (warp.read(by.register(i), by.kind).astype(wide) for i in (1, 2))
    warp.write(by.register(0), a * b, active)


@known(*each("shl", BITS), *each("shr", [*INTEGERS, *BITS]))
def shift(warp: Warp, by: Instruction, active: Active) -> None:
    """By as many bits as there are or more: zeros, or the sign."""
    values, by_bits = warp.read(by.register(1), by.kind), warp.read(by.register(2), "u32")
    most = 8 * values.dtype.itemsize - 1
    bits = np.minimum(by_bits, most).astype(values.dtype)
    shifted = values << bits if by.name.startswith("shl") else values >> bits
    signed = by.kind.startswith("s")
    warp.write(by.register(0), shifted if signed else np.where(by_bits > most, 0, shifted).astype(values.dtype), active)


@known(*each("bfe", ["u32", "u64", "s32", "s64"]))
def extract_bits(warp: Warp, by: Instruction, active: Active) -> None:
    values = warp.read(by.register(1), by.kind)
    first, count = (warp.same(by.register(i), "u32", by) for i in (2, 3))
    width = 8 * values.dtype.itemsize
    if count == 0 or first + count > width:
        raise Refused(f"{by}: {count} bits from bit {first}")
    above, below = (values.dtype.type(n) for n in (width - first - count, width - count))
    warp.write(by.register(0), values << above >> below, active)


@known("popc.b32")
def count_bits(warp: Warp, by: Instruction, active: Active) -> None:
    warp.write(by.register(0), np.bitwise_count(warp.read(by.register(1), "b32")).astype(np.uint32), active)


@known(*each("mov", [*BITS, "u32", "u64", "s32", "f32", "pred"]), "cvta.param.u64")
def move(warp: Warp, by: Instruction, active: Active) -> None:
    """Also several registers to one, first in the lowest bits, and one to several."""
    to, source = by.several(0), by.several(1)
    if len(to) == len(source) == 1:
        warp.write(to[0], warp.read(source[0], by.kind), active)
        return
    part = f"b{8 * KINDS[by.kind].itemsize // max(len(to), len(source))}"
    if len(to) == 1:
        parts = np.stack([warp.read(name, part) for name in source], -1)
        warp.write(to[0], parts.view(KINDS[by.kind])[..., 0], active)
        return
    parts = warp.read(source[0], by.kind)[..., None].view(KINDS[part])
    for i, name in enumerate(to):
        warp.write(name, parts[..., i], active)


@known(*each("selp", [*BITS, "f32"]))
def select(warp: Warp, by: Instruction, active: Active) -> None:
    a, b = (warp.read(by.register(i), by.kind) for i in (1, 2))
    warp.write(by.register(0), np.where(warp.read(by.register(3), "pred"), a, b), active)


@known(
    *(name for comparison in COMPARISONS for name in each(f"setp.{comparison}", INTEGERS)),
    *each("setp.eq setp.ne", BITS),
    *(f"setp.{comparison}.f32" for comparison in FLOAT_COMPARISONS),
)
def compare(warp: Warp, by: Instruction, active: Active) -> None:
    comparison = (FLOAT_COMPARISONS if by.kind == "f32" else COMPARISONS)[by.name.split(".")[1]]
    warp.write(by.register(0), comparison(*(warp.read(by.register(i), by.kind) for i in (1, 2))), active)


@known(
    *each("cvt.f32", ["f16", "bf16"]),
    *each("cvt.rn.f16 cvt.rn.bf16", ["f32"]),
    *(name for kind in INTEGERS for name in each(f"cvt.{kind}", INTEGERS)),
)
def convert(warp: Warp, by: Instruction, active: Active) -> None:
    to = by.name.split(".")[-2]
    warp.write(by.register(0), warp.read(by.register(1), by.kind).astype(KINDS[to]), active)


@known("cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32")
def convert_pair(warp: Warp, by: Instruction, active: Active) -> None:
    """The first operand goes to the upper half."""
    upper, lower = (warp.read(by.register(i), "f32") for i in (1, 2))
    pairs = np.stack([lower, upper], -1).astype(KINDS[by.name.split(".")[2]])
    warp.write(by.register(0), pairs.reshape(len(pairs), -1), active)


@known("elect.sync")
def elect(warp: Warp, by: Instruction, active: Active) -> None:
    warp.together(by, active)
    lane, elected = by.several(0)
    warp.write(lane, np.zeros(warp.blocks.shape, np.uint32), None)
    warp.write(elected, warp.everyone & (np.arange(LANES) == 0), None)


@known("shfl.sync.idx.b32", "shfl.sync.bfly.b32")
def shuffle(warp: Warp, by: Instruction, active: Active) -> None:
    """Within segments of lanes; a lane whose source is beyond its segment keeps its own."""
    warp.together(by, active)
    if int(by.register(4)) != -1:
        raise Refused(f"{by}: among some lanes alone")
    values, given = warp.read(by.register(1), "b32"), warp.read(by.register(2), "u32").astype(np.int64)
    bounds = warp.same(by.register(3), "u32", by)
    segment, last = bounds >> 8 & 31, bounds & 31
    lanes = np.arange(LANES)
    source = lanes ^ given if ".bfly" in by.name else lanes & segment | given & ~segment & 31
    source = np.where(source <= (lanes & segment | last & ~segment), source, lanes)
    warp.write(by.several(0)[0], np.take_along_axis(values, source, 1), None)


@known("prefetch.tensormap", "fence.mbarrier_init.release.cluster", "wgmma.fence.sync.aligned", "bar.warp.sync")
@known("setmaxnreg.inc.sync.aligned.u32", "setmaxnreg.dec.sync.aligned.u32")
def pass_over(warp: Warp, by: Instruction, active: Active) -> None:
    """Nothing of what it does is modelled: caches, the number of registers, the order of a warp's own accesses."""


@known("bra", "bra.uni")
def branch(warp: Warp, by: Instruction, active: Active) -> Paths:
    taken = warp.threads if active is None else active
    (target,), following = by.targets, warp.at + 1
    stay = warp.threads & ~taken
    return {target: taken} | ({following: stay} if stay.any() else {})


@known("brx.idx")
def branch_by_table(warp: Warp, by: Instruction, active: Active) -> Paths:
    return {by.targets[warp.same(by.register(0), "u32", by, active)]: warp.threads}


@known("ret")
def leave(warp: Warp, by: Instruction, active: Active) -> Paths:
    warp.together(by, active)
    if warp.stores.pending or warp.products.pending:
        raise Fault(f"{by}: warp {warp.number} ends and has not waited for its copies or products")
    return {}


@known("ld.param::entry.b64", "ld.param.b64", "ld.param.u64")
def load_parameter(warp: Warp, by: Instruction, active: Active) -> None:
    warp.write(by.register(0), warp.read(by.address(1).base, "b64"), active)


@known(*each("ld ld.shared ld.v2 ld.v4 ld.shared.v2 ld.shared.v4", BITS), *each("ld.global", BITS))
def load(warp: Warp, by: Instruction, active: Active) -> None:
    """Without a space in its name an address is of shared or of global memory by its value."""
    registers, dtype = by.several(0), KINDS[by.kind]
    addresses = warp.addresses(by.address(1), active)
    values = np.ascontiguousarray(warp.load(by, addresses, len(registers) * dtype.itemsize, active)).view(dtype)
    for i, register in enumerate(registers):
        warp.write(register, values[..., i], active)


@known(*each("st st.shared st.v2 st.v4 st.shared.v2 st.shared.v4", BITS), *each("st.global", BITS))
def store(warp: Warp, by: Instruction, active: Active) -> None:
    values = np.stack([warp.read(name, by.kind) for name in by.several(1)], -1)
    warp.store(by, warp.addresses(by.address(0), active), values.view(np.uint16), active)


@known("fence.proxy.async.shared::cta")
def fence(warp: Warp, by: Instruction, active: Active) -> None:
    warp.blocks.shared.fence(warp.number)


@known("bar.sync")
def synchronize(warp: Warp, by: Instruction, active: Active) -> None:
    warp.together(by, active)
    number = warp.same(by.register(0), "u32", by)
    warps = int(by.register(1)) // LANES if len(by.operands) > 1 else warp.blocks.warps
    barrier = warp.blocks.warp_barriers.setdefault(number, WarpBarrier(warps, warp.blocks.detector))
    if barrier.warps != warps:
        raise Refused(f"{by}: barrier {number} with {warps} warps, before with {barrier.warps}")
    warp.wait(barrier.arrive(warp.number))


@known("mbarrier.init.shared.b64")
def make_barrier(warp: Warp, by: Instruction, active: Active) -> None:
    address, count = warp.same_address(by.address(0), by, active), warp.same(by.register(1), "u32", by, active)
    warp.blocks.arrival_barriers[address] = ArrivalBarrier(count, warp.blocks.detector, warp.number, by)


@known("mbarrier.arrive.release.cta.shared::cta.b64", "mbarrier.arrive.expect_tx.shared.b64")
def arrive(warp: Warp, by: Instruction, active: Active) -> None:
    """Each active thread; `expect_tx` has it expect so many bytes more."""
    threads = warp.everyone if active is None else active
    if (threads != threads[0]).any():
        raise Parted(f"{by}: blocks differ in which threads arrive")
    arrivals, given = int(threads[0].sum()), warp.same(by.register(2), "u32", by, active)
    expecting = ".expect_tx" in by.name
    if not expecting and given != 1:
        raise Refused(f"{by}: {given} arrivals a thread")
    barrier = warp.arrival_barrier(by.address(1), by, active)
    barrier.arrive(warp.number, by, arrivals, arrivals * given if expecting else 0)


@known("mbarrier.try_wait.parity.shared.b64")
def wait(warp: Warp, by: Instruction, active: Active) -> None:
    """Until the phase is over: the loop around it is gone through once."""
    warp.together(by, active)
    barrier = warp.arrival_barrier(by.address(1), by)
    warp.wait(barrier.wait(warp.number, warp.same(by.register(2), "u32", by)))
    warp.write(by.register(0), warp.everyone, None)


known("wgmma.commit_group.sync.aligned")(products.commit)
known("wgmma.wait_group.sync.aligned")(products.wait)
known(*(f"ldmatrix.sync.aligned.m8n8.x4{form}.shared.b16" for form in ("", ".trans")))(products.load_matrices)
known(*(f"stmatrix.sync.aligned.m8n8.x4{form}.shared.b16" for form in ("", ".trans")))(products.store_matrices)
TO_SHARED = "shared::cluster.global.mbarrier::complete_tx::bytes"
known(*(f"cp.async.bulk.tensor.{axes}d.{TO_SHARED}" for axes in range(1, 6)))(copies.load)
known(*(f"cp.async.bulk.tensor.{axes}d.global.shared::cta.bulk_group" for axes in range(1, 6)))(copies.store)
known("cp.async.bulk.commit_group")(copies.commit)
known("cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read")(copies.wait)
