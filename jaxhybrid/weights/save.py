"""Parameters -> safetensors with Hugging Face names, one tensor on the host at a time."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhybrid import hosts
from jaxhybrid.errors import WeightsError
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.names import FileTensor, file_tensors
from jaxhybrid.weights.safetensors import INDEX_FILE, SINGLE_FILE, file_order, stream_safetensors

PIECE_BYTES = 1 << 26  # put into the file's layout at once


class Written(Protocol):
    """A tensor of the files: a `FileTensor`, or one made of several."""

    @property
    def name(self) -> str: ...
    @property
    def file_shape(self) -> tuple[int, ...]: ...
    @property
    def float32(self) -> bool: ...
    @property
    def parts(self) -> tuple[FileTensor, ...]: ...
    def to_file(self, values: Sequence[np.ndarray]) -> np.ndarray: ...


class Source(NamedTuple):
    """Parameters, and by what some tensors are multiplied before they are written, along the last axis of the file."""

    params: Params
    factors: Mapping[str, np.ndarray]


def save_weights(
    params: Params,
    config: ModelConfig,
    folder: str | os.PathLike[str],
    dtype: Any = np.float32,
    max_shard_bytes: int = 5_000_000_000,
    *,
    tensors: Sequence[Written] | None = None,
    factors: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes `model.safetensors`, or shards and their index when it would exceed `max_shard_bytes`.

    Files get their names only when all of them are whole; weights already in the folder are replaced. With several
    processes all must call it, and the first one writes. Parameters declared float32 are written in float32.

    Args:
        tensors: of the files; None: those of `file_tensors`.
        factors: of the parts of tensors, by the names in `file_tensors`, along the last axis of the file's layout.

    Raises:
        WeightsError: a parameter has another shape than `config` says.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = file_tensors(config) if tensors is None else tensors
    source = Source(params, factors or {})
    shards = _plan(entries, np.dtype(dtype), max_shard_bytes)
    names = [_shard_name(i, len(shards)) for i in range(len(shards))]
    writer = hosts.is_first()
    try:
        for name, shard in zip(names, shards):
            _write(_draft(folder, name), source, shard, np.dtype(dtype))
        if writer:
            _put_in_place(folder, names, shards, np.dtype(dtype))
    finally:
        if writer:
            for name in (*names, INDEX_FILE):
                _draft(folder, name).unlink(missing_ok=True)
    hosts.barrier("weights written")  # then every process may read them


def read_scales(params: Params, config: ModelConfig, dtype: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Small tensors by their names in `file_tensors`, in the type of the files. All processes must call it."""
    entries = {entry.name: entry for entry in file_tensors(config)}
    return {name: np.asarray(_whole(params, entries[name], np.dtype(dtype))) for name in names}


def _plan(entries: Sequence[Written], dtype: np.dtype, max_shard_bytes: int) -> list[list[Written]]:
    """Tensors in file order, cut wherever a file would grow past the limit; a larger tensor gets a file of its own."""
    shards: list[list[Written]] = [[]]
    used = 0
    for entry in entries:
        size = _bytes(entry, dtype)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size
    return shards


def _dtype(entry: Written, dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if entry.float32 else dtype


def _bytes(entry: Written, dtype: np.dtype) -> int:
    return math.prod(entry.file_shape) * _dtype(entry, dtype).itemsize


def _write(path: Path, source: Source, shard: list[Written], dtype: np.dtype) -> None:
    """One file, by the first process; the others give it their parts."""
    entries = {entry.name: entry for entry in shard}
    types = {entry.name: _dtype(entry, dtype) for entry in shard}
    if hosts.is_first():
        shapes = {entry.name: entry.file_shape for entry in shard}
        stream_safetensors(path, shapes, types, lambda name: _to_file(source, entries[name], types[name]))
    else:
        for name in file_order(types):
            for part in entries[name].parts:
                _whole(source.params, part, types[name])


def _to_file(source: Source, entry: Written, dtype: np.dtype) -> Iterator[np.ndarray]:
    """One tensor as it lies in the file, in pieces along its first axis."""
    value = entry.to_file([_part(source, part, dtype) for part in entry.parts])
    step = max(PIECE_BYTES * len(value) // max(value.nbytes, 1), 1)
    for start in range(0, len(value), step):
        yield value[start : start + step]


def _part(source: Source, entry: FileTensor, dtype: np.dtype) -> np.ndarray:
    """In the file's layout."""
    value = entry.layout.to_file(np.asarray(_whole(source.params, entry, dtype)))
    return value * source.factors[entry.name].astype(dtype) if entry.name in source.factors else value


def _whole(params: Params, entry: FileTensor, dtype: np.dtype) -> Any:
    """One tensor in the type of the file, in an array of its own that this process can read.

    Of its own, for a jax.Array keeps what has been read of it on the host. All processes make it together.
    """
    leaf: Any = params
    for key in entry.path:
        leaf = leaf[key]
    shape = leaf.shape[len(entry.rows) :]
    if tuple(shape) != entry.shape:
        raise WeightsError(
            f"{'.'.join(entry.path)} holds {list(shape)} per layer, its config says {list(entry.shape)}."
        )
    if not isinstance(leaf, jax.Array):
        return leaf[entry.rows].astype(dtype)
    value = _copy(leaf, entry.rows, dtype)
    if value.is_fully_addressable:
        return value
    return _replicate(value.sharding.mesh)(value).addressable_data(0)


@partial(jax.jit, static_argnums=2)
def _copy(leaf: jax.Array, rows: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """A leaf, or one layer (and expert) of a stacked one. The rows are traced: one small program serves them all."""
    rest = leaf.shape[len(rows) :]
    value = jax.lax.dynamic_slice(leaf, (*rows, *(0 for _ in rest)), (*(1 for _ in rows), *rest))
    value = jax.lax.squeeze(value, range(len(rows)))
    return jnp.copy(value) if value.dtype == dtype else value.astype(dtype)


@cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def _shard_name(index: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _draft(folder: Path, name: str) -> Path:
    return folder / f".{name}.{os.getpid()}.tmp"


def _put_in_place(folder: Path, names: list[str], shards: list[list[Written]], dtype: np.dtype) -> None:
    index = folder / INDEX_FILE
    if len(names) > 1:
        total = sum(_bytes(entry, dtype) for shard in shards for entry in shard)
        weight_map = {entry.name: name for name, shard in zip(names, shards) for entry in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        _draft(folder, INDEX_FILE).write_text(text + "\n")
    earlier = [path for path in folder.glob("model*.safetensors") if path.name not in names]
    for name in names:
        _draft(folder, name).replace(folder / name)
    if len(names) > 1:
        _draft(folder, INDEX_FILE).replace(index)
    else:
        index.unlink(missing_ok=True)
    for path in earlier:
        path.unlink()
