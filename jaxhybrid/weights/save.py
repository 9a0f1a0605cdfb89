"""Parameters -> safetensors with Hugging Face names, one file's worth of tensors in memory at a time."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxhybrid import hosts
from jaxhybrid.errors import WeightsError
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.names import FileTensor, file_tensors
from jaxhybrid.weights.safetensors import INDEX_FILE, SINGLE_FILE, write_safetensors


def save_weights(
    params: Params,
    config: ModelConfig,
    folder: str | os.PathLike[str],
    dtype: Any = np.float32,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `model.safetensors`, or shards and their index when it would exceed `max_shard_bytes`.

    Files get their names only when all of them are whole; weights already in the folder are replaced. With several
    processes all must call it, and the first one writes. Parameters declared float32 are written in float32.

    Raises:
        WeightsError: a parameter has another shape than `config` says.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = file_tensors(config)
    shards = _plan(entries, np.dtype(dtype), max_shard_bytes)
    names = [_shard_name(i, len(shards)) for i in range(len(shards))]
    writer = hosts.is_first()
    try:
        for name, shard in zip(names, shards):
            tensors = {entry.name: _to_file(params, entry, np.dtype(dtype)) for entry in shard}
            if writer:
                write_safetensors(_draft(folder, name), tensors)
        if writer:
            _put_in_place(folder, names, shards, np.dtype(dtype))
    finally:
        if writer:
            for name in (*names, INDEX_FILE):
                _draft(folder, name).unlink(missing_ok=True)
    hosts.barrier("weights written")  # then every process may read them


def _plan(entries: list[FileTensor], dtype: np.dtype, max_shard_bytes: int) -> list[list[FileTensor]]:
    """Tensors in file order, cut wherever a file would grow past the limit; a larger tensor gets a file of its own."""
    shards: list[list[FileTensor]] = [[]]
    used = 0
    for entry in entries:
        size = _bytes(entry, dtype)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size
    return shards


def _bytes(entry: FileTensor, dtype: np.dtype) -> int:
    return int(np.prod(entry.file_shape)) * (4 if entry.float32 else dtype.itemsize)


def _to_file(params: Params, entry: FileTensor, dtype: np.dtype) -> np.ndarray:
    """One tensor on the host as it lies in the file."""
    leaf: Any = params
    for key in entry.path:
        leaf = leaf[key]
    value = leaf if entry.row is None else _row(leaf, entry.row)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    if tuple(value.shape) != entry.shape:
        raise WeightsError(
            f"{'.'.join(entry.path)} holds {list(value.shape)} per layer, its config says {list(entry.shape)}."
        )
    return np.ascontiguousarray(entry.layout.to_file(np.asarray(value)).astype(np.float32 if entry.float32 else dtype))


@jax.jit
def _traced_row(leaf: jax.Array, row: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, row, 0, keepdims=False)


def _row(leaf: Any, row: int) -> Any:
    """One layer of a stacked leaf. The index is traced, so one small program serves every layer."""
    return _traced_row(leaf, row) if isinstance(leaf, jax.Array) else leaf[row]


def _shard_name(index: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _draft(folder: Path, name: str) -> Path:
    return folder / f".{name}.{os.getpid()}.tmp"


def _put_in_place(folder: Path, names: list[str], shards: list[list[FileTensor]], dtype: np.dtype) -> None:
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
