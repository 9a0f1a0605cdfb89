"""The head of a GGUF file: its metadata and the table of its tensors, checked against the size of the file.

The layout is ggml's docs/gguf.md: magic, version, two counts, keys with typed values, then name, shape, type and offset
of each tensor; the tensors' bytes follow, each at a multiple of the alignment. Everything is little-endian.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from jaxhybrid.errors import WeightsError
from jaxhybrid.weights.gguf.source import MAGIC

VERSIONS = (2, 3)  # version 1 counts in 32 bits; 3 differs from 2 in allowing big-endian files only
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32
# The types that tests hold against the format as ggml defines it.
TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
FETCH_AGAIN = (
    "Fetch it again; if it is one of several parts, name them all by a pattern, as in 'folder/model.gguf.part*'."
)


@dataclass(frozen=True)
class TensorEntry:
    """One line of the table."""

    name: str
    type: str  # as ggml calls it, such as Q4_K
    shape: tuple[int, ...]  # as numpy has it: the blocks of a quantised type run along the last axis
    offset: int  # of its bytes, from the start of the file
    size: int  # bytes


@dataclass(frozen=True)
class Head:
    metadata: dict[str, Any]
    tensors: list[TensorEntry]


def read_head(stream: BinaryIO, name: str, size: int) -> Head:
    """Reads the head of a file of `size` bytes that messages call `name`.

    Raises:
        WeightsError: not a GGUF file, of a version or tensor type that is not known, damaged, or longer or shorter than
            its table says.
    """
    reader = _Reader(stream, name, size)
    if reader.take(len(MAGIC)) != MAGIC:
        raise WeightsError(f"{name} does not begin as a GGUF file does. {FETCH_AGAIN}")
    (version,) = reader.numbers("I")
    if version not in VERSIONS:
        kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise WeightsError(
            f"{name} is a GGUF file of a kind that is not read ({kind}); read are little-endian ones, versions 2 and 3."
        )
    tensor_count, key_count = reader.numbers("QQ")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.string()
        (kind,) = reader.numbers("I")
        if key in metadata:
            raise WeightsError(f"{name} has the key {key} twice. {FETCH_AGAIN}")
        metadata[key] = reader.value(key, kind)
    table = [reader.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise WeightsError(f"{name} has general.alignment={alignment!r}, which is not a power of two. {FETCH_AGAIN}")
    start = _align(reader.position, alignment)
    tensors = [TensorEntry(tensor, kind, shape, start + offset, count) for tensor, kind, shape, offset, count in table]
    _check(name, size, tensors, start, alignment)
    return Head(metadata, tensors)


class _Reader:
    """Values one after the other, none of them beyond the end of the file."""

    def __init__(self, stream: BinaryIO, name: str, size: int):
        self.stream, self.name, self.size, self.position = stream, name, size, 0

    def take(self, count: int) -> bytes:
        self.position += count
        if self.position > self.size:
            raise WeightsError(f"{self.name} ends within its head, after {self.size} bytes. {FETCH_AGAIN}")
        return self.stream.read(count)

    def numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

    def string(self) -> str:
        (count,) = self.numbers("Q")
        try:
            return self.take(count).decode("utf-8")
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self.name} has text that is not UTF-8 ({error}). {FETCH_AGAIN}") from error

    def value(self, key: str, kind: int) -> Any:
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise WeightsError(f"{self.name} has {key} of an unknown type, {kind}. {FETCH_AGAIN}")
        element, count = self.numbers("IQ")
        if element in NUMBERS:
            dtype = np.dtype(f"<{NUMBERS[element]}")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return [self.value(key, element) for _ in range(count)]

    def tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        name = self.string()
        (axes,) = self.numbers("I")
        *dimensions, type_number, offset = self.numbers(f"{axes}QIQ")
        kind, block, block_bytes = _tensor_type(self.name, name, type_number)
        if 0 in (dimensions or [0]) or dimensions[0] % block:
            raise WeightsError(
                f"{self.name} has {name} of shape {dimensions[::-1]}, not rows of whole {kind} blocks. {FETCH_AGAIN}"
            )
        return name, kind, tuple(reversed(dimensions)), offset, math.prod(dimensions) // block * block_bytes


def _tensor_type(file: str, tensor: str, number: int) -> tuple[str, int, int]:
    """(name, values of a block, bytes of a block) of a tensor type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {kind.value: kind for kind in GGMLQuantizationType}
    name = known[number].name if number in known else f"type {number}"
    if name not in TENSOR_TYPES:
        raise WeightsError(
            f"{file} has {tensor} as {name}; read are {', '.join(TENSOR_TYPES)}. Take a file of the model in one of "
            "these, such as Q4_K_M or Q8_0."
        )
    return name, *GGML_QUANT_SIZES[known[number]]


def refuse_repeated(file: str, tensors: Iterable[TensorEntry]) -> None:
    names = Counter(tensor.name for tensor in tensors)
    if names and max(names.values()) > 1:
        raise WeightsError(f"{file} has the tensor {max(names, key=names.__getitem__)} twice. {FETCH_AGAIN}")


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _check(name: str, size: int, tensors: list[TensorEntry], start: int, alignment: int) -> None:
    refuse_repeated(name, tensors)
    end = max((tensor.offset + tensor.size for tensor in tensors), default=start)
    if size < end:
        raise WeightsError(f"{name} has {size} bytes, its table of tensors asks for {end}. {FETCH_AGAIN}")
    if size > _align(end, alignment):
        raise WeightsError(
            f"{name} has {size} bytes, its table of tensors accounts for {end}. The rest is something else: fetch it "
            "again, or correct the pattern if it matches another file."
        )
