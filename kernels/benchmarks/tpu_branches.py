"""How often each branch of a compiled TPU program is met and taken, by running the scalar part of its listing.

Loops end, and the bodies of `pl.when` are skipped, on conditions that mostly hang on loop counters alone. Those are
computed here, instruction by instruction. What comes from anything else (data, addresses, vector units) is unknown. A
branch ahead with an unknown condition counts as not taken: what it may skip counts as run.
"""

import operator
import re
from dataclasses import dataclass, field
from typing import NamedTuple

REGION = re.compile(r"^\s*\$region(\d+):")
INSTRUCTION = re.compile(r"^\s*%(\w+) = (\w+)((?:\.\w+)*)(?: (.*))?$")
COMMENT = re.compile(r"/\*.*?\*/|/\*.*$")
CONDITION = re.compile(r"^\((!?)%(\w+)(?:, ([^)]+))?\),?\s*")  # of the instruction; with a value for where it fails
SLOT = re.compile(r"^\[smem:\[#allocation(\d+)_spill\]\]\s*")  # of a spilled scalar
TARGET = re.compile(r"target = \$region(\d+)")

BITS = 2**32 - 1
OPERATIONS = {
    "sadd": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": operator.lshift,
    "sshra": operator.rshift,
    "sshrl": lambda a, b: (a & BITS) >> b,
}
MOST_STEPS = 20_000_000  # blocks; more is taken for a loop whose end was misread


@dataclass
class Branch:
    target: str  # a region
    met: int = 0
    taken: int = 0
    known: bool = True  # whether its condition was, every time


class _Instruction(NamedTuple):
    result: str
    name: str
    comparison: str  # eq, ne, ... of scmp
    unsigned: bool
    condition: tuple[bool, str, str | None] | None  # (negated, predicate, value where it does not hold)
    operands: tuple[str, ...]
    slot: str | None


@dataclass
class _Block:
    """Instructions up to a branch or to the start of a region."""

    region: str | None
    instructions: list[_Instruction] = field(default_factory=list)
    branch: _Instruction | None = None


def count_branches(code: str) -> dict[str, Branch]:
    """By the name of the branch instruction, from the text of one program."""
    blocks, branches = _parse(code)
    place = {block.region: at for at, block in enumerate(blocks) if block.region is not None}
    sources = {(place[branches[b.branch.result].target], at) for at, b in enumerate(blocks) if b.branch}
    merging = {to for to, at in sources if to > at}
    values: dict[str, int | None] = {}  # of predicates, scalars and spilled scalars ("slot 7")
    uncertain: list[tuple[int, set[str]]] = []  # what an unknown condition may skip: where it ends, slots written
    at, entry = 0, 0  # entry: which operand of a phi is meant, the second when a loop goes round
    for _ in range(MOST_STEPS):
        while uncertain and uncertain[-1][0] <= at:
            values.update(dict.fromkeys(uncertain.pop()[1]))
        if at == len(blocks):
            return branches
        block = blocks[at]
        for instruction in block.instructions:
            if instruction.name == "sphi":
                value = None if at in merging else _read(instruction.operands[entry], values)
            else:
                value = _value(instruction, values)
            values[instruction.result] = value
            if instruction.name == "sst":
                for _, slots in uncertain:
                    slots.add(instruction.result)
        at, entry = at + 1, 0
        if block.branch is None:
            continue
        branch, holds = branches[block.branch.result], _holds(block.branch, values)
        to = place[branch.target]
        branch.met += 1
        if holds is None:
            branch.known = False
            if to >= at:
                uncertain.append((to, set()))
            else:
                _forget(blocks[to:at], branches, values)
        if holds:
            branch.taken += 1
            entry = int(to < at)
            at = to
    for branch in branches.values():
        branch.known = False
    return branches


def _forget(loop: list[_Block], branches: dict[str, Branch], values: dict[str, int | None]) -> None:
    """Drops what came of a loop's first trip, where it is not known how many there are."""
    for block in loop:
        values.update(dict.fromkeys(instruction.result for instruction in block.instructions))
        if block.branch is not None:
            branch = branches[block.branch.result]
            branch.met, branch.taken, branch.known = max(branch.met, 1), 0, False


def _parse(code: str) -> tuple[list[_Block], dict[str, Branch]]:
    blocks, branches = [_Block(None)], {}
    for line in code.splitlines():
        if region := REGION.match(line):
            blocks.append(_Block(region.group(1)))
            continue
        match = INSTRUCTION.match(COMMENT.sub("", line).rstrip())
        if match is None or not (match.group(1)[0] in "sp" or match.group(2) in ("sbr", "sst")):
            continue
        instruction = _instruction(*match.groups())
        if instruction.name == "sbr":
            branches[instruction.result] = Branch(TARGET.search(line).group(1))
            blocks[-1].branch = instruction
            blocks.append(_Block(None))
        elif instruction.name != "sst" or instruction.slot:
            blocks[-1].instructions.append(instruction)
    return blocks, branches


def _instruction(result: str, name: str, kind: str, rest: str | None) -> _Instruction:
    rest, slot, condition = rest or "", None, None
    if name in ("sld", "sst") and (match := SLOT.match(rest)):
        slot, rest = f"slot {match.group(1)}", rest[match.end() :]
    if match := CONDITION.match(rest):
        condition, rest = (bool(match.group(1)), match.group(2), match.group(3)), rest[match.end() :]
    comparison = kind.split(".")[1] if name == "scmp" else ""
    operands = tuple(operand.strip() for operand in rest.split(","))
    return _Instruction(
        slot if name == "sst" and slot else result, name, comparison, ".u32" in kind, condition, operands, slot
    )


def _holds(instruction: _Instruction, values: dict[str, int | None]) -> bool | None:
    """Whether the instruction is executed."""
    if instruction.condition is None:
        return True
    negated, predicate, _ = instruction.condition
    value = values.get(predicate)
    return None if value is None else bool(value) != negated


def _read(operand: str, values: dict[str, int | None]) -> int | None:
    if operand.startswith("%"):
        return values.get(operand[1:])
    try:
        return _signed(int(operand, 0))
    except ValueError:
        return None


def _signed(value: int) -> int:
    value &= BITS
    return value - (BITS + 1) if value >> 31 else value


def _value(instruction: _Instruction, values: dict[str, int | None]) -> int | None:
    """What it gives; None where that is unknown."""
    holds = _holds(instruction, values)
    if holds is None:
        return None
    if not holds:
        otherwise = instruction.condition[2] if instruction.condition else None
        if instruction.name == "sst":
            return values.get(instruction.result)
        return None if otherwise is None else _read(otherwise, values)
    name = instruction.name
    if name == "sld":
        return values.get(instruction.slot) if instruction.slot else None
    read = [_read(operand, values) for operand in instruction.operands]
    if name in ("smov", "pmov", "sst"):
        return read[0]
    if name == "scalar_select":
        return None if read[0] is None else read[1 if read[0] else 2]
    if name == "pneg":
        return None if read[0] is None else not read[0]
    if name in ("por", "pand", "pnand"):
        decides = name == "por"
        result = decides if decides in read else None if None in read else not decides
        return not result if name == "pnand" and result is not None else result
    if None in read:
        return None
    if name == "scmp":
        pair = [value & BITS for value in read] if instruction.unsigned else read
        return getattr(operator, instruction.comparison)(*pair)
    if name in OPERATIONS:
        return _signed(OPERATIONS[name](*read))
    return None
