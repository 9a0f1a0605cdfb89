"""The operations of a traced program with how often each is done: loops by their lengths, branches by their shares."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


def causal_share(kernel: str, grid: tuple[int, ...]) -> float:
    """Of the turns of a kernel's grid, those in which it works.

    Splash attention skips blocks whose keys all come later than their queries. Where rows are split, devices take
    pieces of the queries that together skip as many as those of a whole row (model/balanced.py).
    """
    if not kernel.startswith("splash"):
        return 1.0
    keys = grid[0] if "dkv" in kernel else grid[2]
    return (keys + 1) / (2 * keys)


@dataclass(frozen=True)
class Branches:
    """What a program does not say of itself.

    Attributes:
        platform: which form runs where code has one for each platform: `tpu`, `cuda`, `cpu`.
        layers: turns of a loop over layers.
        shares: of the layers, by kind, in the order of a switch between kinds.
    """

    platform: str
    layers: int = 0
    shares: Sequence[float] = ()


@dataclass(frozen=True)
class Operation:
    """An equation of a jaxpr, how often it is done, and the name of the kernel that it is in."""

    equation: Any
    times: float
    kernel: str = ""


def operations(
    jaxpr: Any, branches: Branches, times: float = 1, turns: int = 0, kernel: str = ""
) -> Iterator[Operation]:
    """Every operation, those inside of others too, kernels opened.

    Of branches that are no choice between kinds of layers or platforms, as `pl.when` makes them, all are taken: what
    one of them does not do is nothing in these programs.

    Args:
        turns: of the loop that `jaxpr` is the body of.
    """
    made_by = {id(variable): equation for equation in jaxpr.eqns for variable in equation.outvars}
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        yield Operation(equation, times, kernel)
        if name == "cond":
            for share, branch in _taken(equation, made_by, branches, turns):
                yield from operations(branch.jaxpr, branches, times * share, turns, kernel)
            continue
        inner, inner_turns, inner_kernel = times, turns, kernel
        if name == "scan":
            inner, inner_turns = times * given["length"], given["length"]
        elif name == "pallas_call":
            grid, inner_kernel = given["grid_mapping"].grid, given["name"] or "kernel"
            inner = times * math.prod(grid) * causal_share(inner_kernel, grid)
        for value in given.values():
            for part in value if isinstance(value, tuple) else (value,):
                body = getattr(part, "jaxpr", part)
                if hasattr(body, "eqns"):
                    yield from operations(body, branches, inner, inner_turns, inner_kernel)


def _taken(equation: Any, made_by: dict[int, Any], branches: Branches, turns: int) -> list[tuple[float, Any]]:
    """(how often, branch) of a choice."""
    options = equation.params["branches"]
    index = made_by.get(id(equation.invars[0]))
    if index is not None and index.primitive.name == "platform_index":
        platforms = index.params["platforms"]
        own = [i for i, names in enumerate(platforms) if names is None or branches.platform in names]
        return [(1.0, options[own[0]])]
    if turns == branches.layers and len(options) == len(branches.shares) and not _is_small(options):
        return list(zip(branches.shares, options))
    return [(1.0, option) for option in options]


def _is_small(options: Sequence[Any]) -> bool:
    """Whether a branch does nothing: no choice between kinds of layers."""
    return any(not option.jaxpr.eqns for option in options)
