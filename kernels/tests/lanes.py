"""Code of single lanes on numpy: what `inline_mgpu` runs on a GPU, for all 128 lanes of a warpgroup at once.

Stands in for the dialects that gpu/channel_runs.py emits. A value is an array [128] or, for vectors, [128,n]; memory is
bytes in one address space.
"""

import contextlib
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

LANES = 128


class Machine:
    """One run: memory, and which lanes are active."""

    def __init__(self):
        self.memory = np.zeros(2**18, np.uint8)
        self.free = 1024
        self.active = np.ones(LANES, bool)

    def put(self, array, shape=None):
        """Array -> a reference to a copy of it in memory."""
        data = np.ascontiguousarray(array).view(np.uint8).ravel()
        address, self.free = self.free, self.free + -(-data.size // 1024) * 1024
        self.memory[address : address + data.size] = data
        return SimpleNamespace(address=address, type=SimpleNamespace(shape=shape or array.shape))

    def get(self, ref, like):
        address, size = ref.address, like.size * like.dtype.itemsize
        return self.memory[address : address + size].view(like.dtype).reshape(like.shape)

    def load(self, kind, pointer):
        count, dtype = kind
        size = np.dtype(dtype).itemsize * (count or 1)
        pointer = np.broadcast_to(pointer, LANES)
        assert (pointer[self.active] % size == 0).all()
        raw = self.memory[np.where(self.active, pointer, 0)[:, None] + np.arange(size)]
        values = np.ascontiguousarray(raw).view(dtype)
        return (values if count else values[:, 0]).view(Vector)

    def store(self, value, pointer):
        value = np.broadcast_to(value, (LANES, *np.shape(value)[1:]))
        raw = np.ascontiguousarray(value).view(np.uint8).reshape(LANES, -1)
        pointer = np.broadcast_to(pointer, LANES)
        assert (pointer[self.active] % raw.shape[1] == 0).all()
        at = (pointer[self.active][:, None] + np.arange(raw.shape[1])).ravel()
        self.memory[at] = raw[self.active].ravel()

    @contextlib.contextmanager
    def when(self, condition):
        before, self.active = self.active, self.active & condition
        yield
        self.active = before


def _select(condition, yes, no):
    shape = np.broadcast_shapes(np.shape(yes), np.shape(no))
    condition = np.broadcast_to(condition, LANES)
    return np.where(condition[:, None] if len(shape) == 2 else condition, yes, no).view(Vector)


class Vector(np.ndarray):
    """With the type that code of lanes asks for: its length and that of its elements."""

    @property
    def type(self):
        return Kind(self.shape[1] if self.ndim > 1 else 0, self.dtype)


class Kind(tuple):
    def __new__(cls, *kind):
        return super().__new__(cls, kind)

    @property
    def shape(self):
        return (self[0],)


def _bitcast(x, kind):
    if kind[1] == np.int64:  # stands for 32 bits
        return np.ascontiguousarray(x).view(np.int32)[:, 0].astype(np.int64).view(Vector)
    return np.ascontiguousarray(x.astype(np.int32))[:, None].view(kind[1]).view(Vector)


def dialects(machine):
    """Replacements for the names ir, arith, llvm and mgpu of a module that emits code of lanes."""
    i32, bfloat16 = np.int64, jnp.bfloat16
    scalar = {"F32Type": np.float32, "F16Type": np.float16, "BF16Type": bfloat16}
    ir = SimpleNamespace(
        **{name: SimpleNamespace(get=lambda kind=kind: Kind(0, kind)) for name, kind in scalar.items()},
        IntegerType=SimpleNamespace(get_signless=lambda bits: Kind(0, np.bool_ if bits == 1 else i32)),
        VectorType=SimpleNamespace(get=lambda shape, kind: Kind(shape[0], kind[1])),
        DenseI64ArrayAttr=SimpleNamespace(get=lambda x: x),
        Type=object,
        Value=object,
    )
    predicate = SimpleNamespace(eq=np.equal, ne=np.not_equal, ult=np.less)
    arith = SimpleNamespace(
        muli=np.multiply,
        addi=np.add,
        andi=lambda x, y: x & y,
        xori=lambda x, y: x ^ y,
        shrui=lambda x, y: x >> y,
        remui=lambda x, y: x % y,
        mulf=lambda x, y: (x * y).astype(x.dtype),
        truncf=lambda kind, x: x.astype(kind[1]),
        extf=lambda kind, x: x.astype(kind[1]),
        select=_select,
        CmpIPredicate=predicate,
        cmpi=lambda compare, x, y: compare(x, y),
    )
    llvm = SimpleNamespace(load=machine.load, store=machine.store)
    vector = SimpleNamespace(
        from_elements=lambda kind, xs: np.stack([np.broadcast_to(x, LANES) for x in xs], 1).view(Vector),
        extract=lambda x, dynamic_position, static_position: x[:, static_position[0]],
    )

    def constant(value, kind):
        return np.full((LANES, kind[0]) if kind[0] else LANES, value, kind[1]).view(Vector)

    utils = SimpleNamespace(
        thread_idx=lambda: np.arange(LANES),
        warp_idx=lambda: np.arange(LANES) // 32,
        warpgroup_barrier=lambda: None,
        warp_barrier=lambda: None,
        bitcast=_bitcast,
        memref_ptr=lambda ref: ref.address,
        getelementptr=lambda pointer, offset, kind: pointer + offset[0],
        when=machine.when,
        vector=vector,
    )

    def fragments(*, _registers, _layout, _is_signed):
        return SimpleNamespace(registers=_registers, layout=_layout)

    math = SimpleNamespace(cttz=lambda x: np.log2(x & -x).astype(int))
    return {
        "ir": ir,
        "arith": arith,
        "math": math,
        "llvm": llvm,
        "mgpu": SimpleNamespace(c=constant, utils=utils, FragmentedArray=fragments),
    }
