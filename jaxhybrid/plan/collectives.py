"""What devices send one another in a traced program: bytes that one device receives, all turns of all loops counted."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxhybrid.plan.operations import Operation

KINDS = ("gather", "scatter", "reduce", "exchange", "neighbour")


@dataclass(frozen=True)
class Exchange:
    """All collectives of one kind over the same mesh axes.

    Attributes:
        kind: `gather` of weights (or of tokens over `context`), `scatter` of gradients, `reduce` for sums that all
            keep, `exchange` for all-to-all and for what goes to one device farther away, `neighbour` for what is handed
            on to the next device.
        received: bytes that one device receives in a step.
        times: how many there are.
    """

    kind: str
    axes: tuple[str, ...]
    received: float
    times: float


def exchanges(operations: Iterable[Operation], sizes: Mapping[str, int]) -> list[Exchange]:
    """Of a program whose collectives are written in it, as inside `jax.shard_map`, on a mesh of these sizes."""
    found: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = {}
    for operation in operations:
        equation, given = operation.equation, operation.equation.params
        named = given.get("axes", given.get("axis_name"))
        axes = tuple(x for x in (named if isinstance(named, tuple) else (named,)) if sizes.get(x, 1) > 1)
        part = _received(equation, math.prod(sizes[axis] for axis in axes))
        if part:
            kind, amount = part
            before = found.get((kind, axes), (0.0, 0.0))
            found[kind, axes] = before[0] + operation.times * amount, before[1] + operation.times
    return [Exchange(kind, axes, *numbers) for (kind, axes), numbers in sorted(found.items())]


def _received(equation: object, devices: int) -> tuple[str, float] | None:
    """(kind, bytes that a device receives) of one collective between so many devices."""
    name, results = equation.primitive.name, equation.outvars  # type: ignore[attr-defined]
    if devices == 1 or not results:
        return None
    size = sum(x.aval.size * x.aval.dtype.itemsize for x in results)
    away = (devices - 1) / devices
    if name.startswith("all_gather"):
        return "gather", size * away
    if name.startswith("reduce_scatter"):
        return "scatter", size * (devices - 1)
    if name.startswith(("psum", "pmax", "pmin")):
        return "reduce", 2 * size * away
    if name == "all_to_all":
        return "exchange", size * away
    if name == "ppermute":
        pairs = equation.params["perm"]  # type: ignore[attr-defined]
        is_near = all((to - by) % devices in (0, 1, devices - 1) for by, to in pairs)
        return "neighbour" if is_near else "exchange", size
    return None
