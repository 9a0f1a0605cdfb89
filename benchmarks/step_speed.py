"""Tokens a second of the alignment and distillation steps, by implementation of the linear layers.

    python benchmarks/step_speed.py                                  # the sizes of configs/smollm2-135m.yaml, on a GPU
    python benchmarks/step_speed.py --implementations pallas_gpu xla --rows 64

The step is the one that a run compiles, for a model of SmolLM2-135M's shape with random weights, on random tokens in
documents of 100 to 400 tokens; neither changes what a step costs. Median of the steps after the first two.
"""

import argparse
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxhybrid_kernels import linear_attention

from jaxhybrid.measure import peak_memory_bytes
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers import LINEAR_MIXERS, linear
from jaxhybrid.model.transformer import Model, random_params
from jaxhybrid.selection.methods import layer_types
from jaxhybrid.settings.stages import DistillConfig
from jaxhybrid.stages.align import align_step, linear_mixers
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert

SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    norm_eps=1e-5,
    max_position_embeddings=8192,
    tie_embeddings=True,
)
SOFTMAX_LAYERS = (0, 2, 5, 8, 17, 18, 20, 23)  # what KL-guided selection keeps of the real model


def packed_batch(rows: int, length: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    ids = np.zeros((rows, length), np.int32)
    for row in ids:
        ends = np.cumsum(rng.integers(100, 400, size=length // 100 + 1))
        row[:] = np.searchsorted(ends, np.arange(length), side="right") + 1
    tokens = rng.integers(0, SMOLLM2.vocab_size, size=(rows, length), dtype=np.int32)
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(ids)}


def seconds_per_step(step: Any, state: Any, frozen: Any, batch: dict[str, jax.Array], steps: int) -> float:
    compiled = jax.jit(step, donate_argnums=0)
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="+", default=["xla", "pallas_gpu"])
    parser.add_argument("--stages", nargs="+", default=["align", "distill"], choices=["align", "distill"])
    parser.add_argument("--mixer", default="gated_deltanet", choices=list(LINEAR_MIXERS))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()

    params = jax.jit(lambda key: random_params(SMOLLM2, key))(jax.random.key(0))
    teacher = Model(params, SMOLLM2)
    frozen = teacher.cast(jnp.bfloat16)
    batch = packed_batch(arguments.rows, arguments.length)
    tokens = arguments.rows * arguments.length
    stages: dict[str, tuple[Any, tuple[int, ...], dict[str, int]]] = {
        "align": (align_step, (), {}),
        "distill": (distill_step, SOFTMAX_LAYERS, {"chunk_tokens": 8192}),
    }
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.rows} rows of {arguments.length} tokens")
    for name in arguments.stages:
        stage, softmax, given = stages[name]
        types = layer_types(SMOLLM2.num_layers, softmax, arguments.mixer)
        student = convert(teacher, types, LINEAR_MIXERS[arguments.mixer].Config(), jax.random.key(1))
        for implementation in arguments.implementations:
            linear.linear_attention = partial(linear_attention, implementation=implementation)
            trained = linear_mixers(student.params) if name == "align" else student.params
            trained = jax.tree.map(jnp.copy, trained)
            optimizer = make_optimizer(DistillConfig(mixer_learning_rate=1e-3), trained)
            step = partial(stage, config=student.config, optimizer=optimizer, **given)
            seconds = seconds_per_step(step, start(trained, optimizer), frozen, batch, arguments.steps)
            print(
                f"{name:8} {implementation:11} {1e3 * seconds:7.1f} ms a step, {tokens / seconds:9,.0f} tokens/s, "
                f"peak so far {peak_memory_bytes() / 2**30:.1f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
