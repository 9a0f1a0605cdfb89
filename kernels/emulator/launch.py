"""How the host starts a kernel: read off its function in MLIR, the last that Mosaic wrote down before the assembler.

Values are followed from line to line: constants, addresses of stack arrays and of what is stored there, arrays by their
places among the arguments, and the calls that make descriptors.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from errors import Refused

BEGIN, END = "IR Dump Before GpuAssemblyToBinaryPass", "gpu.binary"
ITEM_SIZES = {"f32": 4, "bf16": 2, "f16": 2, "i32": 4}


@dataclass(frozen=True)
class Descriptor:
    """An array in global memory as a copy sees it, outermost axis first; strides in elements."""

    argument: int  # which of the kernel's arrays
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


@dataclass(frozen=True)
class Launch:
    """How the host starts a kernel."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[int | None, ...]  # by parameter the array's number, None for the descriptors
    descriptors: dict[int, Descriptor]  # by their offsets in bytes


class Argument(NamedTuple):
    """An array of the kernel, with its element type once that is known."""

    number: int
    element: str = ""


class Pointer(NamedTuple):
    """Into a stack array, into the table of arguments or into the descriptors."""

    array: str
    offset: int


ARGUMENTS, DESCRIPTORS = "arguments", "descriptors"
Follow = Callable[["Host", re.Match[str]], None]
LINES: list[tuple[re.Pattern[str], Follow]] = []


def line(pattern: str) -> Callable[[Follow], Follow]:
    """Of MLIR, with V for a value's name."""

    def keep(follow: Follow) -> Follow:
        LINES.append((re.compile(pattern.replace("V", r"(%\w+(?:#\d+)?)")), follow))
        return follow

    return keep


@dataclass
class Host:
    values: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, dict[int, Any]] = field(default_factory=dict)  # by stack array and place
    descriptors: dict[int, Descriptor] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)

    def pointer(self, name: str) -> Pointer:
        """What is not followed is the function's table of arguments."""
        return self.values.get(name, Pointer(ARGUMENTS, 0))

    def numbers(self, name: str, count: int) -> tuple[int, ...]:
        return tuple(self.stored[self.pointer(name).array][i] for i in range(count))


def read_launch(log: str) -> Launch:
    text = log[log.rindex(BEGIN) :]
    host = Host()
    for given in text[: text.index(END)].splitlines():
        statement = given.split(" loc(")[0].strip()
        for pattern, follow in LINES:
            if found := pattern.match(statement):
                follow(host, found)
                break
    if len(host.launches) != 1:
        raise Refused(f"{len(host.launches)} launches in one kernel's function")
    return host.launches[0]


@line(r"V = llvm\.mlir\.constant\((-?\d+) : i(?:64|32)\)")
def constant(host: Host, found: re.Match[str]) -> None:
    host.values[found[1]] = int(found[2])


@line(r"V = llvm\.getelementptr V\[(\d+)\] : ")
def element(host: Host, found: re.Match[str]) -> None:
    base = host.pointer(found[2])
    host.values[found[1]] = Pointer(base.array, base.offset + int(found[3]))


@line(r"V = llvm\.load V : !llvm\.ptr -> !llvm\.ptr")
def argument(host: Host, found: re.Match[str]) -> None:
    host.values[found[1]] = Argument(host.pointer(found[2]).offset)


@line(r"V = llvm\.load V : !llvm\.ptr -> !llvm\.array")
@line(r"V = llvm\.alloca .*mosaic_gpu_smem_alloc")
def descriptors(host: Host, found: re.Match[str]) -> None:
    host.values[found[1]] = Pointer(DESCRIPTORS, 0)


@line(r"V = llvm\.alloca ")
def stack_array(host: Host, found: re.Match[str]) -> None:
    host.values[found[1]] = Pointer(found[1], 0)
    host.stored[found[1]] = {}


@line(r"llvm\.store V, V :")
def store(host: Host, found: re.Match[str]) -> None:
    array, offset = host.pointer(found[2])
    host.stored[array][offset] = host.values[found[1]]


@line(r"V = llvm\.insertvalue V, V\[(\d)(?:, \d+)?\]")
def insert(host: Host, found: re.Match[str]) -> None:
    """Of an array's description the place of the array is all that is needed: fields 0 and 1, the pointers."""
    host.values[found[1]] = host.values.get(found[2] if found[4] in "01" else found[3])


@line(r"V = builtin\.unrealized_conversion_cast V : .* to memref<(\S+?)[>,]")
def typed(host: Host, found: re.Match[str]) -> None:
    number = host.values[found[2]].number
    host.values[found[1]] = Argument(number, found[3].split("x")[-1])


@line(r"V = memref\.transpose V ")
@line(r"V = memref\.reinterpret_cast V to offset: \[0\]")
@line(r"V = memref\.extract_aligned_pointer_as_index V ")
@line(r"V = builtin\.unrealized_conversion_cast V : index to i64")
@line(r"V = llvm\.inttoptr V :")
def same(host: Host, found: re.Match[str]) -> None:
    host.values[found[1]] = host.values[found[2]]


@line(r"call @mosaic_gpu_init_tma_desc\((.*?)\)")
def descriptor(host: Host, found: re.Match[str]) -> None:
    at, base, _, rank, sizes, strides, swizzle, box = (name.strip() for name in found[1].split(","))
    array, axes = host.values[base], host.values[rank]
    host.descriptors[host.pointer(at).offset] = Descriptor(
        argument=array.number,
        itemsize=ITEM_SIZES[array.element],
        sizes=host.numbers(sizes, axes),
        strides=host.numbers(strides, axes),
        box=host.numbers(box, axes),
        swizzle=host.values[swizzle],
    )


@line(r"gpu\.launch_func .* blocks in \((.*?)\) threads in \((.*?)\) .*dynamic_shared_memory_size (%\S+) args\((.*)\)")
def launch(host: Host, found: re.Match[str]) -> None:
    grid, threads = ([host.values[name.strip()] for name in found[i].split(",")] for i in (1, 2))
    arguments = [host.values[given.split(":")[0].strip()] for given in found[4].split(", ")]
    host.launches.append(
        Launch(
            grid=(grid[0], grid[1], grid[2]),
            threads=threads[0],
            shared_bytes=host.values[found[3]],
            arguments=tuple(given.number if isinstance(given, Argument) else None for given in arguments),
            descriptors=host.descriptors,
        )
    )
