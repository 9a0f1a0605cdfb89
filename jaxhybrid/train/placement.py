"""Host arrays onto the mesh, and back."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhybrid.errors import TopologyError
from jaxhybrid.model.partition import BATCH_AXES


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """This process's rows of a global batch, split over the mesh; with several microbatches as [A,B,...].

    Raises:
        TopologyError: the rows do not divide over microbatches and devices.
    """
    rows = next(iter(batch.values())).shape[0] * jax.process_count()
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (microbatches * devices):
        raise TopologyError(
            f"batch_size={rows} does not divide over {microbatches} microbatches x {devices} devices; "
            f"use a multiple of {microbatches * devices}."
        )

    def place(x: np.ndarray) -> jax.Array:
        if microbatches == 1:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, P(BATCH_AXES)), x)
        x = x.reshape(microbatches, -1, *x.shape[1:])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, BATCH_AXES)), x)

    return {name: place(x) for name, x in batch.items()}


def local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a batch-sharded array that this process holds, in order."""
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])
