"""Host arrays onto the mesh, and back."""

import jax
import numpy as np
from jax.sharding import Mesh

from jaxhybrid.errors import TopologyError
from jaxhybrid.model.partition import batch_sharding, rows_sharding


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """This process's rows of a global batch, split over the mesh; with several microbatches as [A,B,...].

    Raises:
        TopologyError: the rows do not divide over microbatches and devices, or the tokens of a row over devices.
    """
    rows = next(iter(batch.values())).shape[0] * jax.process_count()
    devices, context = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    if rows % (microbatches * devices):
        raise TopologyError(
            f"batch_size={rows} does not divide over {microbatches} microbatches x {devices} devices of data x fsdp; "
            f"use a multiple of {microbatches * devices}, or give some of the devices to mesh.context."
        )

    def place(x: np.ndarray) -> jax.Array:
        if x.ndim > 1 and x.shape[1] % context:
            raise TopologyError(f"Rows of {x.shape[1]} tokens do not divide over mesh.context={context}.")
        if microbatches == 1:
            return jax.make_array_from_process_local_data(batch_sharding(mesh), x)
        x = x.reshape(microbatches, -1, *x.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, leading=1), x)

    return {name: place(x) for name, x in batch.items()}


def place_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays [B,...] that every process has whole, their rows split over all devices but those of `tensor`."""

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, rows_sharding(mesh), lambda index: x[index])

    return {name: place(x) for name, x in batch.items()}


def local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a batch [B,T,...] that this process holds, in order."""
    rows: dict[int, dict[int, np.ndarray]] = {}
    for shard in array.addressable_shards:
        row, token = (index.start or 0 for index in shard.index[:2])
        rows.setdefault(row, {})[token] = np.asarray(shard.data)
    return np.concatenate([np.concatenate([rows[r][t] for t in sorted(rows[r])], axis=1) for r in sorted(rows)])
