"""What devices send one another in a traced program, all turns of all loops counted: bytes that one device receives."""

import math
from collections.abc import Mapping
from typing import Any

Received = dict[tuple[str, tuple[str, ...]], float]  # (kind, mesh axes) -> bytes


def received(jaxpr: Any, sizes: Mapping[str, int], times: float = 1) -> Received:
    """By kind of collective and by mesh axes.

    `gather` and `scatter` are of weights and gradients, `reduce` are sums, `exchange` is all-to-all and neighbour to
    neighbour. Of branches the dearest counts.

    Args:
        jaxpr: a jaxpr whose collectives are written in it, as inside `jax.shard_map`.
        sizes: of the mesh axes.
    """
    found: Received = {}

    def add(kind: str, axes: tuple[str, ...], amount: float) -> None:
        found[kind, axes] = found.get((kind, axes), 0) + amount

    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        named = given.get("axes", given.get("axis_name"))
        axes = tuple(x for x in (named if isinstance(named, tuple) else (named,)) if sizes.get(x, 1) > 1)
        devices = math.prod(sizes[axis] for axis in axes)
        if devices > 1 and equation.outvars:
            size = times * sum(x.aval.size * x.aval.dtype.itemsize for x in equation.outvars)
            away = (devices - 1) / devices
            if name.startswith("all_gather"):
                add("gather", axes, size * away)
            elif name.startswith("reduce_scatter"):
                add("scatter", axes, size * (devices - 1))
            elif name.startswith(("psum", "pmax", "pmin")):
                add("reduce", axes, 2 * size * away)
            elif name == "all_to_all":
                add("exchange", axes, size * away)
            elif name == "ppermute":
                add("exchange", axes, size)
        for (kind, axes), amount in _inside(equation, sizes, times).items():
            add(kind, axes, amount)
    return found


def _inside(equation: Any, sizes: Mapping[str, int], times: float) -> Received:
    given = equation.params
    turns = times * given["length"] if equation.primitive.name == "scan" else times
    branches = given.get("branches")
    parts = branches if branches else [x for x in given.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
    each = [received(getattr(part, "jaxpr", part), sizes, turns) for part in parts]
    if branches:
        return max(each, key=lambda kinds: sum(kinds.values()))
    total: Received = {}
    for kinds in each:
        for key, amount in kinds.items():
            total[key] = total.get(key, 0) + amount
    return total
