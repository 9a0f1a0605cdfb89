"""A folder of safetensors files read as memory maps: only the bytes that are used are read."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxhybrid.errors import WeightsError
from jaxhybrid.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64": np.float64, "F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}  # as a file orders them
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: where its bytes are and what they mean."""

    file: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def rows(self, first: int, count: int) -> "StoredTensor":
        """Some rows of it, as a tensor of its own."""
        size = np.dtype(DTYPES[self.dtype]).itemsize * math.prod(self.shape[1:])
        return StoredTensor(self.file, self.dtype, (count, *self.shape[1:]), self.offset + first * size)

    def view(self) -> np.ndarray:
        """The tensor as a read-only memory map; its pages are given back when the last view of it goes.

        Raises:
            WeightsError: the values are of a quantised or integer type.
        """
        if self.dtype not in DTYPES:
            raise WeightsError(
                f"{self.file} holds {self.dtype} values; read are {', '.join(DTYPES)}. Use the unquantised model."
            )
        if not all(self.shape):  # a map of no bytes is refused by the system
            return np.empty(self.shape, DTYPES[self.dtype])
        return np.memmap(self.file, DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by name.

    Raises:
        WeightsError: no safetensors, only pickle files, a shard is missing or truncated, or the index is wrong.
    """
    if (folder / SINGLE_FILE).is_file():
        return dict(_read_header(folder / SINGLE_FILE))
    if not (folder / INDEX_FILE).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise WeightsError(
                f"{folder} has pickle files only ({', '.join(pickles[:3])}). Pickle runs code when it is read and is "
                "refused; save the model again with transformers' save_pretrained, which writes safetensors."
            )
        raise WeightsError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}.")
    index = read_table(folder / INDEX_FILE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{folder / INDEX_FILE} has no weight_map; fetch it again.")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise WeightsError(f"{folder / INDEX_FILE} names {shard!r}, which is not a file name inside the folder.")
        if not (folder / shard).is_file():
            raise WeightsError(f"{folder} lacks the shard {shard} that its index names; fetch it again.")
        shards[shard] = dict(_read_header(folder / shard))
    tensors = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise WeightsError(f"{folder / shard} lacks the tensor {name} that the index places there; fetch it again.")
        tensors[name] = shards[shard][name]
    return tensors


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of one file: 8 bytes of header length, a JSON header, then the values."""
    try:
        with safe_open(file, framework="numpy"):  # checks that header and values cover the file exactly
            pass
    except SafetensorError as error:
        raise WeightsError(f"{file} is truncated or not a safetensors file ({error}); fetch it again.") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])


def file_order(types: Mapping[str, np.dtype]) -> list[str]:
    """The order in which a file holds its tensors: by type, then by name, as the safetensors library has it."""
    return sorted(types, key=lambda name: ([*NAMES].index(types[name]), name))


def stream_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, np.dtype],
    rows: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Writes one file, byte for byte the library's, of tensors that need not be in memory together.

    rows: gives the values of one tensor in order, in pieces; asked in `file_order`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers expects it
    end = 0
    order = file_order(types)
    for name in order:
        start, end = end, end + types[name].itemsize * math.prod(shapes[name])
        header[name] = {"dtype": NAMES[types[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            before = stream.tell()
            for piece in rows(name):
                stream.write(np.ascontiguousarray(piece, types[name]).reshape(-1).view(np.uint8).data)
            assert stream.tell() - before == types[name].itemsize * math.prod(shapes[name]), name
        stream.flush()
        os.fsync(stream.fileno())


def read_table(path: Path) -> dict[str, Any]:
    """A JSON table.

    Raises:
        WeightsError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise WeightsError(f"{path.parent} has no {path.name}; it is not a Hugging Face model folder.")
    value = read_json(path, WeightsError, "Fetch it again.")
    if not isinstance(value, dict):
        raise WeightsError(f"{path} is not a table of settings.")
    return value
