"""What an assembler makes of a kernel's PTX: are the registers of a product left alone while it is under way?

A product of the tensor cores reads its left operand from registers and adds to others, and is done with them only when
a wait for it ends. What becomes of that is the assembler's work, and PTX does not show it: before CUDA 13.3 ptxas moves
constants of a left operand behind the product that reads them (docs/upstream/constants-of-products.md).
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from errors import Refused

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?\w+\s+)?(?P<name>[\w.]+)\s*(?P<operands>[^;]*);")
PREDICATE = re.compile(r"!?U?P(?:\d|T)$")
OPERAND = re.compile(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*|(?:\[[^\]]*\][^,\[]*)+")
REGISTER = re.compile(r"\bR(\d+)(\.64)?(?!\w)")
SIZE = re.compile(r"64x(\d+)x\d+")
VERSION = re.compile(r"^\.version \d+\.\d+", re.MULTILINE)
NEWEST_PTX = re.compile(r"Unsupported \.version [\d.]+; current version is '([\d.]+)'")
# Whose first operand is no register that is written.
WRITE_NOTHING = (
    "ST", "RED", "BAR", "BRA", "BRX", "EXIT", "UTMA", "SYNCS", "FENCE", "MEMBAR", "WARPGROUP", "WARPSYNC", "R2UR",
    "R2P", "ISETP", "FSETP", "HSETP2", "PLOP3", "DEPBAR", "CCTL", "ERRBAR", "BSSY", "BSYNC", "NOP", "USETMAXREG",
    "VOTEU", "UBLKCP", "RET", "CALL",
)  # fmt: skip
LEFT_REGISTERS = 4  # of a product: 16 by 16 numbers of 16 bits in a warp


class Product(NamedTuple):
    """One that is under way."""

    place: int  # among the instructions
    left: frozenset[int]  # registers
    sums: frozenset[int]
    group: int  # that is waited for


@dataclass(frozen=True)
class Assembler:
    ptxas: Path
    nvdisasm: Path
    version: str

    @classmethod
    def of(cls, ptxas: Path) -> "Assembler":
        """Raises Refused where there is no such program, or no nvdisasm."""
        said = _run(ptxas, "--version")
        release = re.search(r"release ([\d.]+)", said)
        return cls(ptxas, _disassembler(), release[1] if release else said)

    def instructions(self, ptx: str) -> list[str]:
        with tempfile.TemporaryDirectory(prefix="assembled-") as folder:
            source, program = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            command = self.ptxas, "-arch=sm_90a", "-O3", source, "-o", program
            source.write_text(ptx)
            try:
                _run(*command)
            except Refused as refused:  # older than the PTX says: what the kernels need it knows
                if not (newest := NEWEST_PTX.search(str(refused))):
                    raise
                source.write_text(VERSION.sub(f".version {newest[1]}", ptx))
                _run(*command)
            return [line for line in _run(self.nvdisasm, "-c", str(program)).splitlines() if INSTRUCTION.search(line)]


def _disassembler() -> Path:
    if found := shutil.which("nvdisasm"):
        return Path(found)
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        beside = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"
        if beside.exists():
            return beside
    raise Refused("there is no nvdisasm: put CUDA's, or that of nvidia-cuda-nvdisasm, on PATH, or install triton")


def _run(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Refused(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise Refused(f"{command[0]}: {done.stderr.strip()[:400]}")
    return done.stdout


def touched(instructions: list[str]) -> Iterator[str]:
    """Every instruction that writes what a product under way reads or adds to, or reads its sums; in one pass through
    the program, as if no branch were taken."""
    under_way: list[Product] = []
    group = 0
    for place, line in enumerate(instructions):
        guard, name, operands = _parsed(line)
        if name.startswith("WARPGROUP.DEPBAR") and not guard:
            still = int(operands[1], 16)  # groups that may go on
            under_way = [product for product in under_way if product.group >= group - still]
            continue
        if "GMMA" in name:
            own = _product(place, name, operands, group)
            for other in under_way:
                if own.sums & other.left or (own.sums & other.sums and own.sums != other.sums):
                    yield f"sums of another product: {_brief(line)}"
                if own.left & other.sums:
                    yield f"sums that are not there yet: {_brief(line)}"
            under_way.append(own)
            group += any("gsb0" in operand for operand in operands)
            continue
        if under_way:
            written, read = _registers(name, operands)
            for product in under_way:
                if written & product.left:
                    yield f"a left operand, {place - product.place} instructions late: {_brief(line)}"
                if (written | read) & product.sums:
                    yield f"sums of a product that is under way: {_brief(line)}"


def _parsed(line: str) -> tuple[str | None, str, list[str]]:
    """(the predicate under which it is carried out, name, operands)."""
    found = INSTRUCTION.search(line)
    if found is None:
        raise Refused(f"no instruction: {line}")
    return found["guard"], found["name"], [operand.strip() for operand in OPERAND.findall(found["operands"])]


def _product(place: int, name: str, operands: list[str], group: int) -> Product:
    size = SIZE.search(name)
    if size is None or not name.startswith("HGMMA") or ".F32" not in name:
        raise Refused(f"a product of a kind that is not known here: {name}")
    sums, left = REGISTER.match(operands[0]), REGISTER.match(operands[1])
    of_sums = range(int(sums[1]), int(sums[1]) + int(size[1]) // 2) if sums else ()
    of_left = range(int(left[1]), int(left[1]) + LEFT_REGISTERS) if left else ()
    return Product(place, frozenset(of_left), frozenset(of_sums), group)


def _registers(name: str, operands: list[str]) -> tuple[set[int], set[int]]:
    """(written, read) by an instruction other than a product."""
    written: set[int] = set()
    while operands and PREDICATE.match(operands[0]):  # that it writes besides
        operands = operands[1:]
    if operands and not name.startswith(WRITE_NOTHING) and (first := REGISTER.match(operands[0])):
        wide = 4 if ".128" in name or name.startswith("LDSM") else 2 if ".64" in name or ".WIDE" in name else 1
        written = set(range(int(first[1]), int(first[1]) + wide))
    read = set()
    for operand in operands[1:] if written else operands:
        for found in REGISTER.finditer(operand):
            read |= {int(found[1]), int(found[1]) + bool(found[2])}
    return written, read


def _brief(line: str) -> str:
    return re.sub(r"\s+", " ", line).strip()
