"""What tracing and compiling the distillation step costs, by the pattern of softmax layers.

    python benchmarks/compile_time.py                         # for this machine
    python benchmarks/compile_time.py --topology v5p:2x2x1    # for TPUs, ahead of time, after `make tpu-compiler`

Processor seconds and megabytes of StableHLO. The width is small, since a program's size does not depend on it.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import batch_sharding, make_mesh
from jaxhybrid.model.transformer import Model, abstract_params
from jaxhybrid.selection.methods import layer_types
from jaxhybrid.settings.stages import DistillConfig
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.train.optimizer import make_optimizer, start

LIBTPU = Path(__file__).parents[1] / ".venv" / "tpu-compiler" / "libtpu" / "libtpu.so"
CASES = {  # layers, those that stay softmax
    "6 layers, 2 softmax": (6, (2, 5)),
    "36 layers, the first 9 softmax": (36, tuple(range(9))),
    "36 layers, 9 scattered softmax": (36, (2, 5, 9, 14, 17, 21, 26, 30, 33)),
}


def measure(layers: int, softmax: tuple[int, ...], mesh: Any) -> tuple[float, float, float]:
    """(seconds of tracing and lowering, megabytes of StableHLO, seconds of compiling), in processor time."""
    teacher = ModelConfig(
        family="llama", vocab_size=1024, hidden_size=512, intermediate_size=1024, num_layers=layers, num_heads=4,
        num_kv_heads=2, head_dim=128, norm_eps=1e-5, max_position_embeddings=2048,
    )  # fmt: skip
    mixer = GatedDeltaNetConfig().resolve(teacher)
    student = ModelConfig(**{**vars(teacher), "layer_types": layer_types(layers, softmax, mixer.kind), "mixer": mixer})

    with jax.set_mesh(mesh):
        params = abstract_params(student, mesh)
        optimizer = make_optimizer(DistillConfig(), params)
        state = jax.eval_shape(lambda params: start(params, optimizer), params)
        tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=batch_sharding(mesh))
        batch = {"tokens": tokens, "segment_ids": tokens}
        step = jax.jit(partial(distill_step, config=student, optimizer=optimizer), donate_argnums=0)
        began = time.process_time()
        lowered = step.lower(state, Model(abstract_params(teacher, mesh), teacher), batch)
        traced = time.process_time()
        size = len(lowered.as_text()) / 1e6
        compiling = time.process_time()
        lowered.compile()
        return traced - began, size, time.process_time() - compiling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="a TPU slice, as v5p:2x2x1; default: the devices that are here")
    arguments = parser.parse_args()
    devices = None
    if arguments.topology:
        os.environ |= {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_LIBRARY_PATH": str(LIBTPU),
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5p-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
        }
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    mesh = make_mesh(data=1, fsdp=-1, devices=devices)
    print(f"jax {jax.__version__}, for {mesh.devices.size} x {mesh.devices.flat[0].device_kind}")
    for name, (layers, softmax) in CASES.items():
        traced, size, compiled = measure(layers, softmax, mesh)
        print(f"{name:32} lower {traced:6.1f} s, {size:5.2f} MB of StableHLO, compile {compiled:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
