"""Host arrays onto the mesh, and back."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhybrid.model.partition import ROWS, AnyMesh, batch_sharding, check_batch, own_share, rows_sharding
from jaxhybrid.settings.stages import StageConfig


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """This process's rows of a global batch, split over the mesh; with several microbatches as [A,B,...].

    Where a process holds a part of the tokens of its rows, an array may have those alone, as `local_part` gives them.

    Raises:
        TopologyError: the rows do not divide over microbatches and devices, or the tokens of a row over devices.
    """
    (part, parts), (slot, slots) = own_share(mesh, *ROWS), own_share(mesh, "context")
    own_rows, length = batch["tokens"].shape
    rows = own_rows * parts
    check_batch(rows, length, mesh.shape, microbatches)
    rows, own_rows = rows // microbatches, own_rows // microbatches

    def place(x: np.ndarray) -> jax.Array:
        x = x.reshape(microbatches, own_rows, *x.shape[1:])
        first_token = 0 if x.shape[2] == length else slot * (length // slots)

        def own(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            micro, row, token, *rest = index if microbatches > 1 else (slice(None), *index)
            values = x[(micro, _from(row, part * own_rows), _from(token, first_token), *rest)]
            return values if microbatches > 1 else values[0]

        shape = (microbatches, rows, length, *x.shape[3:])[0 if microbatches > 1 else 1 :]
        return jax.make_array_from_callback(shape, batch_sharding(mesh, leading=int(microbatches > 1)), own)

    return {name: place(x) for name, x in batch.items()}


def abstract_batch(settings: StageConfig, mesh: AnyMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and places of a stage's batch as `place_batch` gives it; errors as there."""
    parts = settings.gradient_accumulation
    check_batch(settings.batch_size, settings.sequence_length, mesh.shape, parts)
    leading = (parts,) if parts > 1 else ()
    shape = (*leading, settings.batch_size // parts, settings.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, leading=len(leading)))
    return {"tokens": tokens, "segment_ids": tokens}


def _from(wanted: slice, first: int) -> slice:
    """A slice of the whole, in what begins at `first` of it."""
    start = wanted.start or 0
    return slice(start - first, None if wanted.stop is None else wanted.stop - first)


def place_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays [B,...] that every process has whole, their rows split over all devices but those of `tensor`."""

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, rows_sharding(mesh), lambda index: x[index])

    return {name: place(x) for name, x in batch.items()}


def local_part(array: jax.Array) -> np.ndarray:
    """The rows of a batch [B,T,...], and of them the tokens, that this process holds."""
    rows: dict[int, dict[int, np.ndarray]] = {}
    for shard in array.addressable_shards:
        row, token = (index.start or 0 for index in shard.index[:2])
        rows.setdefault(row, {})[token] = np.asarray(shard.data)
    return np.concatenate([np.concatenate([rows[r][t] for t in sorted(rows[r])], axis=1) for r in sorted(rows)])
