"""What a compiled program's text says of its instructions: where each was traced, the bytes it moves, its products.

The text is XLA's, after its last pass: `jax.jit(f).lower(...).compile().as_text()`. An instruction there is a kernel,
or a call of one in a library.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "f8e5m2": 8}  # others are named by their bits
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d",]*)')


@dataclass(frozen=True)
class Instruction:
    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (type, sizes) of its results
    operation: str
    operands: tuple[str, ...]
    path: str  # where it was traced: jit(step)/jvp()/while/body/mlp/dot_general
    calls: str  # the computation that a fusion is made of
    target: str  # the library that a custom call is for
    contracted: tuple[int, ...]  # axes of the first operand that a product sums over
    is_root: bool

    @property
    def size(self) -> int:
        return sum(_size(*shape) for shape in self.shapes)

    def scope(self, scopes: tuple[str, ...]) -> str:
        """The innermost of `scopes` in which it was traced."""
        return next((part for part in reversed(re.split(r"[/()]", self.path)) if part in scopes), "no scope")

    @property
    def turn(self) -> str:
        """forward, again (a second time, for the backward pass) or backward."""
        _, *rest = self.path.split("transpose(")
        if not rest:
            return "forward"
        is_again = len(rest) == 1 and ("rematted_computation" in rest[0] or "jvp(" in rest[0].removeprefix("jvp("))
        return "again" if is_again else "backward"


class Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        inside: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and (head := re.match(r"^(?:ENTRY )?%?([\w.-]+) ", line)):
                inside = self.computations[head[1]] = {}
            elif found := _LINE.match(line):
                instruction = _instruction(found)
                inside[instruction.name] = instruction

    @cached_property
    def instructions(self) -> dict[str, tuple[Instruction, dict[str, Instruction]]]:
        """By name: an instruction, and those of its computation."""
        return {name: (one, inside) for inside in self.computations.values() for name, one in inside.items()}

    def bytes_of(self, name: str) -> int:
        """Read and written, each array once. Of a stack from which a fusion takes a row, or into which it puts one, the
        row."""
        one, inside = self.instructions[name]
        fused = self.computations.get(one.calls, {})
        if not fused:
            return one.size + sum(inside[x].size for x in one.operands if x in inside)
        parameters = [x for x in fused.values() if x.operation == "parameter"]
        moved = sum(_read(parameter, fused) for parameter in parameters)
        root = next(x for x in fused.values() if x.is_root)
        results = [fused[x] for x in root.operands] if root.operation == "tuple" else [root]
        return moved + sum(_written(result, fused) for result in results)

    def operations_of(self, name: str) -> int:
        """Of matrix products, a multiplication and an addition as two."""
        one, inside = self.instructions[name]
        total = 0
        for part, among in [(one, inside), *((x, fused) for fused in self._called(one) for x in fused.values())]:
            if part.contracted and "fmha" not in part.target and part.operands[0] in among:
                ((_, sizes), *_) = among[part.operands[0]].shapes
                total += 2 * math.prod(part.shapes[0][1]) * math.prod(sizes[axis] for axis in part.contracted)
        return total

    def _called(self, one: Instruction) -> list[dict[str, Instruction]]:
        return [self.computations[one.calls]] if one.calls in self.computations else []


def _instruction(found: re.Match[str]) -> Instruction:
    root, name, shape, operation, rest = found.groups()
    inside, after = _closed(rest)
    path = re.search(r'op_name="([^"]*)"', after)
    calls = re.search(r"calls=%?([\w.-]+)", after)
    target = re.search(r'custom_call_target="([^"]*)"', after)
    contracted = _CONTRACTED.search(after)
    return Instruction(
        name,
        tuple((kind, tuple(map(int, filter(None, sizes.split(","))))) for kind, sizes in _SHAPE.findall(shape)),
        operation,
        tuple(re.findall(r"%([\w.-]+)", inside)),
        path[1] if path else "",
        calls[1] if calls else "",
        target[1] if target else "",
        tuple(map(int, re.findall(r"\d+", contracted[1]))) if contracted else (),
        bool(root),
    )


def _closed(text: str) -> tuple[str, str]:
    """What stands before the bracket that closes, and behind it."""
    depths = accumulate({"(": 1, ")": -1}.get(letter, 0) for letter in text)
    end = next((place for place, depth in enumerate(depths) if depth < 0), len(text))
    return text[:end], text[end:]


def _size(kind: str, sizes: tuple[int, ...]) -> int:
    bits = BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
    return bits * math.prod(sizes) // 8


def _read(parameter: Instruction, fused: dict[str, Instruction]) -> int:
    parts = [_part(parameter.size, name, user) for name, user in _uses(parameter, fused)]
    return min(parameter.size, sum(parts))


def _part(whole: int, name: str, user: Instruction) -> int:
    """What `user` reads of its operand `name`."""
    if user.operation in ("dynamic-slice", "slice", "gather"):
        return user.size
    return 0 if user.operation == "dynamic-update-slice" and user.operands[0] == name else whole


def _uses(one: Instruction, fused: dict[str, Instruction]) -> list[tuple[str, Instruction]]:
    """(operand, user), through what costs nothing."""
    direct = [x for x in fused.values() if one.name in x.operands]
    return [use for x in direct for use in (_uses(x, fused) if x.operation == "bitcast" else [(one.name, x)])]


def _source(name: str, fused: dict[str, Instruction]) -> Instruction:
    one = fused[name]
    return _source(one.operands[0], fused) if one.operation == "bitcast" else one


def _written(result: Instruction, fused: dict[str, Instruction]) -> int:
    if result.operation == "bitcast":
        return _written(_source(result.name, fused), fused)
    if result.operation == "dynamic-update-slice":
        return fused[result.operands[1]].size
    return result.size
