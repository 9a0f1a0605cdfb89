"""A GGUF model opened: metadata, and tensors widened to float32 a few rows at a time."""

import hashlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxhybrid.errors import WeightsError
from jaxhybrid.weights.gguf.head import FETCH_AGAIN, Head, TensorEntry, read_head, refuse_repeated
from jaxhybrid.weights.gguf.source import Joined, begins_as_gguf, find_files

OTHER_FILE = "Take another file of the model, or its safetensors."
NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", list: "a list"}
INSTALL = "pip install 'jaxhybrid[gguf]'"
CHUNK_VALUES = 2**24  # widened at once: 64 MiB of float32


@dataclass(frozen=True)
class GgufModel:
    """One model, in whatever files it came.

    Attributes:
        name: what messages call it.
        tensors: each with the files that hold it.
    """

    name: str
    files: list[Path]
    metadata: dict[str, Any]
    tensors: dict[str, tuple[TensorEntry, list[Path]]]

    def digest(self) -> str:
        """SHA-256 of the content, the same whether it came whole or in plain parts."""
        with Joined(self.files) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def setting(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata; `default` where it is absent.

        Raises:
            WeightsError: it is of another type, or absent without a default.
        """
        value = self.metadata.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if value is None:
            raise WeightsError(f"{self.name} lacks {key}. {OTHER_FILE}")
        if type(value) is not kind:
            raise WeightsError(f"{self.name} has {key}={value!r}; it must be {NAMES[kind]}. {OTHER_FILE}")
        return value

    def settings(self, key: str, kind: type) -> list[Any]:
        """A list of the metadata, of values of one type. Raises WeightsError as `setting` does."""
        values = self.setting(key, list)
        wrong = next((value for value in values if type(value) is not kind), None)
        if wrong is not None:
            raise WeightsError(f"{self.name} has {wrong!r} in {key}; all must be {NAMES[kind]}. {OTHER_FILE}")
        return values

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.tensors[tensor][0].shape

    def rows(self, tensor: str) -> Iterator[np.ndarray]:
        """The tensor in float32 as ggml defines its type, in chunks of whole rows along the first axis.

        Raises:
            WeightsError: a value is not finite.
        """
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        entry, files = self.tensors[tensor]
        kind = GGMLQuantizationType[entry.type]
        count = int(np.prod(entry.shape[:-1]))  # a vector is one row
        row_bytes, step = entry.size // count, max(1, CHUNK_VALUES // entry.shape[-1])
        with io.BufferedReader(Joined(files)) as stream:
            stream.seek(entry.offset)
            for start in range(0, count, step):
                part = min(step, count - start)
                stored = np.frombuffer(stream.read(part * row_bytes), np.uint8).reshape(part, row_bytes)
                values = dequantize(stored, kind).astype(np.float32, copy=False)
                if not np.isfinite(values).all():
                    raise WeightsError(
                        f"{self.name} has values in {tensor} that are not finite: it is damaged, or its parts are "
                        f"not in the order of their names. {FETCH_AGAIN}"
                    )
                yield values.reshape(entry.shape if count == 1 else (part, *entry.shape[1:]))

    def values(self, tensor: str) -> np.ndarray:
        """The whole tensor in float32."""
        return np.concatenate(list(self.rows(tensor)))


def open_gguf(name: str) -> GgufModel:
    """Opens the model that a file, the first file of llama.cpp's split, or a pattern of parts names.

    Raises:
        WeightsError: it is not a whole GGUF model, or has something that is not known.
    """
    files = find_files(name)
    if importlib.util.find_spec("gguf") is None:
        raise WeightsError(f"{name} is a GGUF file; reading one needs the package gguf: {INSTALL}.")
    begins = [begins_as_gguf(file) for file in files]
    if len(files) > 1 and all(begins):
        return _open_split(name, files)
    if any(begins[1:]):
        second = files[begins.index(True, 1)]
        raise WeightsError(
            f"{name} matches {second}, which begins a GGUF file but is not the first by name. Correct the pattern."
        )
    head = _head(files, name)
    if head.metadata.get("split.count", 1) != 1:
        raise WeightsError(
            f"{name} is one of the {head.metadata['split.count']} files of a split model; name them all by a pattern."
        )
    return GgufModel(name, files, head.metadata, {entry.name: (entry, files) for entry in head.tensors})


def _head(files: list[Path], name: str) -> Head:
    joined = Joined(files)
    with io.BufferedReader(joined, 2**20) as stream:
        return read_head(stream, name, joined.size)


def _open_split(name: str, files: list[Path]) -> GgufModel:
    """llama.cpp's split: each file is a GGUF file with some of the tensors, the first has the metadata as well."""
    heads = {file: _head([file], str(file)) for file in files}
    stated = {file: (head.metadata.get("split.no"), head.metadata.get("split.count")) for file, head in heads.items()}
    by_number = [file for i in range(len(files)) for file, (number, _) in stated.items() if number == i]
    if [stated[file] for file in by_number] != [(i, len(files)) for i in range(len(files))]:
        raise WeightsError(
            f"{name} means {len(files)} GGUF files, which are not the parts of one model: "
            f"{', '.join(file.name for file in files[:5])}. Name one model."
        )
    entries = [(entry, [file]) for file in by_number for entry in heads[file].tensors]
    refuse_repeated(name, (entry for entry, _ in entries))
    metadata = heads[by_number[0]].metadata
    if metadata.get("split.tensors.count", len(entries)) != len(entries):
        raise WeightsError(
            f"{name} has {len(entries)} tensors, its split.tensors.count is {metadata['split.tensors.count']}. "
            f"{FETCH_AGAIN}"
        )
    return GgufModel(name, by_number, metadata, {entry.name: (entry, where) for entry, where in entries})
