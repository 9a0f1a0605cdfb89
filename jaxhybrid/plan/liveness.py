"""How much memory a traced program takes at its peak, estimated without a compiler.

The estimate walks the program in its order and holds what products, kernels, loops, reductions and collectives give
until it is last used. All else counts as fused into what uses it: it holds what it was made of.
"""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

from jax.extend.core import Literal

from jaxhybrid.plan.work import GROUPED, local_bytes

# What runs inside its caller.
INLINE = {
    "jit",
    "pjit",
    "closed_call",
    "shard_map",
    "custom_vjp_call",
    "custom_jvp_call",
    "checkpoint",
    "remat2",
    "run_state",
}
KEPT = {
    "dot_general", "pallas_call", "scan", "while", "cond", "gather", "scatter", "scatter-add", "sort", "concatenate",
    "dynamic_update_slice", "ppermute", "cumsum", "argmax", "conv_general_dilated", GROUPED,
}  # fmt: skip
BUFFERS = count()  # their names
WANTS_ARRAYS = {"pallas_call", "scan", "while", "cond"}  # their operands are not fused into them


def peak_bytes(jaxpr: Any) -> float:
    """What one device holds at most beside the program's arguments; its results take the arguments' place."""
    return _peak(jaxpr, keep_results=False)


class _Step:
    """An operation on buffers: `reads` are held while it runs, `makes` (id, bytes) from then on, `inside` beside."""

    def __init__(self, reads: Iterable[int], makes: Sequence[tuple[int, float]], inside: float):
        self.reads, self.makes, self.inside = set(reads), makes, inside


def _peak(jaxpr: Any, keep_results: bool = True) -> float:
    """The peak of `jaxpr` beside its arguments, with its results if they are kept."""
    steps: list[_Step] = []
    roots: dict[Any, frozenset[int]] = {}  # of a variable: the buffers that it is, or is made of
    _flatten(jaxpr, roots, steps)
    last = {buffer: number for number, step in enumerate(steps) for buffer in step.reads}
    if keep_results:
        last |= {buffer: len(steps) for variable in jaxpr.outvars for buffer in _roots(variable, roots)}
    sizes: dict[int, float] = {}
    held = peak = 0.0
    for number, step in enumerate(steps):
        sizes |= dict(step.makes)
        held += sum(size for _, size in step.makes)
        peak = max(peak, held + step.inside)
        for buffer in [one for one in sizes if last.get(one, number) <= number]:
            held -= sizes.pop(buffer)
    return peak


def _roots(variable: Any, roots: dict[Any, frozenset[int]]) -> frozenset[int]:
    return frozenset() if isinstance(variable, Literal) else roots.get(variable, frozenset())


def _flatten(jaxpr: Any, roots: dict[Any, frozenset[int]], steps: list[_Step]) -> None:
    """Adds the steps of `jaxpr`."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        body = _body(equation) if name in INLINE else None
        if body is not None:
            given = equation.invars[len(equation.invars) - len(body.invars) :]
            roots |= {inner: _roots(outer, roots) for inner, outer in zip(body.invars, given)}
            _flatten(body, roots, steps)
            roots |= {outer: _roots(inner, roots) for inner, outer in zip(body.outvars, equation.outvars)}
            continue
        reads = frozenset[int]().union(*(_roots(x, roots) for x in equation.invars))
        if name not in KEPT and not name.startswith(("reduce_", "psum", "all_")):
            roots |= dict.fromkeys(equation.outvars, reads)
            steps.append(_Step(reads, [], 0.0))
            continue
        kept = list(equation.outvars)
        if name in WANTS_ARRAYS:  # what was fused so far is needed whole
            kept += [x for x in equation.invars if len(_roots(x, roots)) > 1]
        own = {x: next(BUFFERS) for x in kept}  # a function that is called twice makes others each time
        roots |= {x: frozenset({buffer}) for x, buffer in own.items()}
        makes = [(buffer, float(local_bytes(x.aval))) for x, buffer in own.items()]
        steps.append(_Step(reads | set(own.values()), makes, _inside(equation)))


def _inside(equation: Any) -> float:
    """The peak within a loop's body, or the dearest branch's."""
    name, given = equation.primitive.name, equation.params
    if name == "scan":
        return _peak(given["jaxpr"].jaxpr)
    if name == "while":
        return _peak(given["body_jaxpr"].jaxpr)
    if name == "cond":
        return max(_peak(branch.jaxpr) for branch in given["branches"])
    return 0.0


def _body(equation: Any) -> Any:
    given = equation.params
    body = given.get("jaxpr", given.get("call_jaxpr"))
    return None if body is None else getattr(body, "jaxpr", body)
