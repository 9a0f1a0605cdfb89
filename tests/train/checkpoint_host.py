"""One of two processes with four devices each, for test_checkpoint_hosts: PORT INDEX FOLDER."""

import json
import sys
import warnings
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices

from jaxhybrid.model.partition import make_mesh
from jaxhybrid.train.checkpoint import Checkpoints
from jaxhybrid.weights.huggingface import load_teacher
from jaxhybrid.weights.save import save_weights
from tests.train.test_checkpoint_hosts import sharded_state


def main(port, index, folder):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh = make_mesh(fsdp=8)
    with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, sharded_state(step, mesh), {"document": 10 * step})
    sync_global_devices("written")
    if index == 0:
        damaged = max((folder / "checkpoints" / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    sync_global_devices("damaged")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, position = Checkpoints(folder / "checkpoints").restore(sharded_state(0, mesh))
    expected = sharded_state(1, mesh)
    same = [
        np.array_equal(a.data, b.data)
        for name in expected
        for a, b in zip(state[name].addressable_shards, expected[name].addressable_shards)
    ]

    teacher = load_teacher(folder / "teacher", mesh=mesh)
    save_weights(teacher.params, teacher.config, folder / "written", max_shard_bytes=20_000)
    warned = sum("set aside" in str(one.message) for one in caught)
    print("RESULT" + json.dumps({"position": position, "same": all(same), "shards": len(same), "warned": warned}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
