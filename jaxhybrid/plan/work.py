"""What a device does in a step, counted in the traced program: floating-point operations and bytes of its memory."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType

from jaxhybrid.plan.operations import Operation

GROUPED = "ragged_dot_general"  # a product of sorted rows, each with the matrix of its group: experts
PRODUCTS, ATTENTION, LINEAR = "products", "attention", "linear attention"


@dataclass(frozen=True)
class Work:
    """Of one device in one step.

    Attributes:
        flops: of matrix products by where they are: `products` outside of kernels, those in the kernels of softmax
            `attention` and in those of `linear attention`. Other arithmetic is not counted.
        moved: bytes that products and kernels read and write, as if all else were fused into them; of experts all.
    """

    flops: dict[str, float]
    moved: float

    @property
    def all_flops(self) -> float:
        return sum(self.flops.values())


def work(operations: Iterable[Operation]) -> Work:
    """Rows count as one document each: shorter ones leave softmax attention less to do."""
    flops = dict.fromkeys((PRODUCTS, ATTENTION, LINEAR), 0.0)
    moved = 0.0
    for operation in operations:
        equation = operation.equation
        name = equation.primitive.name
        if name in ("dot_general", GROUPED):
            flops[_place(operation.kernel)] += operation.times * _product_flops(equation)
        if (name in ("dot_general", GROUPED) and not operation.kernel) or name == "pallas_call":
            moved += operation.times * sum(local_bytes(x.aval) for x in (*equation.invars, *equation.outvars))
    return Work(flops, moved)


def _place(kernel: str) -> str:
    if not kernel:
        return PRODUCTS
    return ATTENTION if kernel.startswith("splash") else LINEAR


def _product_flops(equation: Any) -> float:
    """Twice all pairs of numbers that are multiplied. Of groups a row meets its own alone, however many there are."""
    grouped = equation.params.get("ragged_dot_dimension_numbers")
    numbers = equation.params["dimension_numbers"] if grouped is None else grouped.dot_dimension_numbers
    (_, contracted), (_, batch) = numbers
    shared = (*contracted, *batch, *(() if grouped is None else grouped.rhs_group_dimensions))
    left, right = (x.aval for x in equation.invars[:2])
    return 2.0 * _size(left) * math.prod(size for axis, size in enumerate(_shape(right)) if axis not in shared)


def _shape(aval: Any) -> tuple[int, ...]:
    """Of a device's part; inside `jax.shard_map` a type is that of the part."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty or AxisType.Manual in sharding.mesh.axis_types:
        return tuple(aval.shape)
    shape: tuple[int, ...] = sharding.shard_shape(aval.shape)
    return shape


def _size(aval: Any) -> int:
    return math.prod(_shape(aval))


def local_bytes(aval: Any) -> int:
    """In a device's own memory."""
    if getattr(aval, "memory_space", None) == jax.memory.Space.Host:
        return 0
    return _size(aval) * aval.dtype.itemsize if hasattr(aval, "dtype") and hasattr(aval.dtype, "itemsize") else 0
