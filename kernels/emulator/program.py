"""A kernel's PTX, parsed: instructions with their operands, registers, and the lines of source they come from."""

import copy
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from errors import Refused

# What a register holds, or half of one where there are two numbers in it, as numpy sees it.
KINDS: dict[str, np.dtype] = {
    "pred": np.dtype(bool),
    **{f"{letter}{bits}": np.dtype(f"uint{bits}") for letter in "bu" for bits in (16, 32, 64)},
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (16, 32, 64)},
    "f32": np.dtype(np.float32),
    **{name: np.dtype(np.float16) for name in ("f16", "f16x2")},
    **{name: np.dtype(ml_dtypes.bfloat16) for name in ("bf16", "bf16x2")},
}

STATEMENT = re.compile(
    r"""\s*(?:
    (?P<open>\{) | (?P<close>\})
    | (?P<label>[$\w]+):(?!:)
    | \.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*
    | (?P<statement>[^;]+);
    )""",
    re.VERBOSE,
)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
ADDRESS = re.compile(r"\[\s*(?P<base>[%$\w]+)(?:\+(?P<offset>-?\d+))?\s*(?:,\s*\{(?P<coordinates>[^}]*)\}\s*)?\]")
PARAMETER = re.compile(r"\.param\b[^,()]*?([$\w]+)(?:\[\d+\])?\s*(?=[,)])")
DYNAMIC = re.compile(r"\.shared\s[^;]*?([$\w]+)(?:\[\])?\s*;")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([%\w]+)(?:<\d+>)?$")
FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]+)"')


@dataclass(frozen=True)
class Address:
    """[base+offset], or a place in the array that a descriptor at base describes."""

    base: str
    offset: int
    coordinates: tuple[str, ...]


Operand = str | tuple[str, ...] | Address


@dataclass(frozen=True)
class Instruction:
    name: str  # with all that is said after points
    operands: tuple[Operand, ...]
    guard: str | None  # the predicate under which it is carried out
    negated: bool
    targets: tuple[int, ...]  # of a branch
    place: str  # file:line of the kernel's source
    used: bool  # whether any other instruction names a register of the first operand

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.place} {self.name}"

    @property
    def brief(self) -> str:
        return f"{self.place} {'.'.join(self.name.split('.')[:3])}"

    def register(self, position: int) -> str:
        operand = self.operands[position]
        if not isinstance(operand, str):
            raise Refused(f"{self}: operand {position} is {operand}, and a register or a number was expected")
        return operand

    def several(self, position: int) -> tuple[str, ...]:
        operand = self.operands[position]
        if isinstance(operand, Address):
            raise Refused(f"{self}: operand {position} is an address, and registers were expected")
        return operand if isinstance(operand, tuple) else (operand,)

    def address(self, position: int) -> Address:
        operand = self.operands[position]
        if not isinstance(operand, Address):
            raise Refused(f"{self}: operand {position} is {operand}, and an address was expected")
        return operand


class Statement(NamedTuple):
    scope: tuple[int, ...]  # the braces around it
    text: str
    place: str


class Program:
    """The only entry of a module. Names in inner braces (inline assembly) hide those outside."""

    def __init__(self, ptx: str):
        ptx = re.sub(r"//[^\n]*", "", ptx)
        files = {number: Path(file).name for number, file in FILE.findall(ptx)}
        dynamic = DYNAMIC.findall(ptx)
        if len(dynamic) > 1:
            raise Refused(f"shared variables beside the dynamic one: {dynamic}")
        self.dynamic = dynamic[0] if dynamic else None
        entry = ptx[ptx.index(".entry") :]
        begin = entry.index("{")
        self.parameters: list[str] = PARAMETER.findall(entry[:begin])
        self._registers: dict[str, np.dtype] = {}
        self._labels: dict[tuple[tuple[int, ...], str], int] = {}
        self._tables: dict[str, list[str]] = {}
        statements = self._statements(entry[begin:], files)
        named = Counter(name for statement in statements for name in set(re.findall(r"%\w+", statement.text)))
        self.instructions = [self._instruction(statement, named) for statement in statements]

    def replaced(self, instructions: dict[int, Instruction]) -> "Program":
        """With others at some places."""
        other = copy.copy(self)
        other.instructions = [instructions.get(i, one) for i, one in enumerate(self.instructions)]
        return other

    def width(self, register: str) -> np.dtype:
        """Of a register's bits, as it was declared."""
        if register in self._registers:
            return self._registers[register]
        family = register.rstrip("0123456789")
        if family not in self._registers:
            raise Refused(f"register {register} is not declared")
        self._registers[register] = self._registers[family]
        return self._registers[register]

    def _statements(self, body: str, files: dict[str, str]) -> list[Statement]:
        """Those that are instructions, up to the brace that closes the first; notes labels and declarations."""
        statements: list[Statement] = []
        scope: tuple[int, ...] = ()
        scopes, place, label, position = 0, "?", "", 0
        while True:
            found = STATEMENT.match(body, position)
            if found is None:
                raise Refused(f"PTX that is not understood: {body[position : position + 80]!r}")
            position = found.end()
            if found["open"]:
                scopes += 1
                scope = (*scope, scopes)
            elif found["close"]:
                scope = scope[:-1]
                if not scope:
                    return statements
            elif found["label"]:
                label = found["label"]
                self._labels[scope, label] = len(statements)
            elif found["file"]:
                place = f"{files.get(found['file'], '?')}:{found['line']}"
            elif found["statement"].startswith("."):
                self._declaration(found["statement"].strip(), label)
            else:
                statements.append(Statement(scope, found["statement"].strip(), place))

    def _declaration(self, text: str, label: str) -> None:
        kind = text.split()[0]
        if kind == ".reg":
            found = REGISTERS.match(text)
            if found is None or found[1] not in KINDS:
                raise Refused(f"declaration {text!r}")
            self._registers[found[2]] = KINDS[found[1]]
        elif kind == ".branchtargets":
            self._tables[label] = OPERAND.findall(text)[1:]
        elif kind not in (".shared", ".pragma"):
            raise Refused(f"declaration {text!r}")

    def _instruction(self, statement: Statement, named: Counter[str]) -> Instruction:
        text, guard = statement.text, None
        if text.startswith("@"):
            guard, text = text[1:].split(None, 1)
        name, _, rest = text.replace("\t", " ").partition(" ")
        operands = tuple(_operand(operand) for operand in OPERAND.findall(rest))
        targets: tuple[int, ...] = ()
        if name in ("bra", "bra.uni"):
            targets = (self._target(statement, str(operands[0])),)
        elif name == "brx.idx":
            targets = tuple(self._target(statement, label) for label in self._tables[str(operands[1])])
        first = re.findall(r"%\w+", str(operands[0])) if operands else []
        return Instruction(
            name=name,
            operands=operands,
            guard=None if guard is None else guard.removeprefix("!"),
            negated=guard is not None and guard.startswith("!"),
            targets=targets,
            place=statement.place,
            used=any(named[register] > 1 for register in first),
        )

    def _target(self, statement: Statement, label: str) -> int:
        for depth in range(len(statement.scope), -1, -1):
            if (place := self._labels.get((statement.scope[:depth], label))) is not None:
                return place
        raise Refused(f"{statement.place}: no label {label}")


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(OPERAND.findall(text[1:-1]))
    if text.startswith("["):
        found = ADDRESS.fullmatch(text)
        if found is None:
            raise Refused(f"address {text}")
        return Address(found["base"], int(found["offset"] or 0), tuple(OPERAND.findall(found["coordinates"] or "")))
    return tuple(text.split("|")) if "|" in text else text
