"""Tokens a second of the steps of training, by implementation of the linear layers.

    python benchmarks/step_speed.py                                  # the sizes of configs/smollm2-135m.yaml, on a GPU
    python benchmarks/step_speed.py --implementations pallas_gpu xla --rows 64
    python benchmarks/step_speed.py --shape qwen2.5-1.5b-instruct --rows 8 --length 4096 --implementations pallas_gpu

The step is the one that a run compiles, on a mesh of the devices that are here, for a model of that shape with random
weights and a quarter of its layers softmax, on random tokens in documents of 100 to 400 tokens; neither changes what a
step costs. Median of the steps after the first two. `score` has the teacher's states, as all candidates but the first.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxhybrid_kernels import linear_attention
from shapes import SHAPES, quarter, shape_of

from jaxhybrid.measure import peak_memory_bytes
from jaxhybrid.model.config import Remat
from jaxhybrid.model.mixers import LINEAR_MIXERS, linear
from jaxhybrid.model.partition import batch_sharding, make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, hidden_states, model_variables, random_params
from jaxhybrid.selection.methods import layer_types
from jaxhybrid.settings.stages import DistillConfig
from jaxhybrid.stages.align import align_step, linear_mixers
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.stages.score import candidate_params, score_step
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert

SOFTMAX_LAYERS = (0, 2, 5, 8, 17, 18, 20, 23)  # what KL-guided selection keeps of SmolLM2-135M


def packed_batch(rows: int, length: int, vocab_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = np.zeros((rows, length), np.int32)
    for row in ids:
        ends = np.cumsum(rng.integers(100, 400, size=length // 100 + 1))
        row[:] = np.searchsorted(ends, np.arange(length), side="right") + 1
    tokens = rng.integers(0, vocab_size, size=(rows, length), dtype=np.int32)
    return {"tokens": tokens, "segment_ids": ids}


def score_middle(state: Any, frozen: Any, batch: dict[str, jax.Array], **static: Any) -> Any:
    """The step of the candidate in the middle, on a batch that has the teacher's states."""
    return score_step(state, frozen.config.num_layers // 2, batch, frozen.head, **static)


UPDATES = {"align": align_step, "score": score_middle, "distill": distill_step}


class Steps:
    """The steps of stages for a model of a published shape, on the mesh that is set."""

    def __init__(self, shape: str, mesh: Mesh, mixer: str):
        self.shape, self.mixer = shape_of(shape), mixer
        self.kept = SOFTMAX_LAYERS if shape == "smollm2-135m-instruct" else quarter(self.shape.num_layers)
        shardings = param_shardings(model_variables(self.shape), mesh)
        made = jax.jit(lambda key: Model(random_params(self.shape, key), self.shape).cast(jnp.bfloat16).params)
        self.frozen = Model(jax.device_put(made(jax.random.key(0)), shardings), self.shape)

    def step(
        self, stage: str, remat: Remat, chunk: int, *, unroll: bool = False, float8_teacher: bool = False
    ) -> tuple[Any, Any]:
        """(the jitted update, of (state, frozen teacher, batch); the state that it begins with)."""
        mixer = LINEAR_MIXERS[self.mixer].Config()
        types = layer_types(self.shape.num_layers, self.kept if stage == "distill" else (), self.mixer)

        def student(frozen: Model) -> Model:
            return convert(frozen, types, mixer, jax.random.key(1))

        def trained(frozen: Model) -> Any:
            if stage == "score":
                return candidate_params(student(frozen), frozen, jnp.int32(self.shape.num_layers // 2))
            params = student(frozen).params
            return jax.tree.map(lambda x: x.astype(jnp.float32), linear_mixers(params) if stage == "align" else params)

        optimizer = make_optimizer(DistillConfig(mixer_learning_rate=1e-3), jax.eval_shape(trained, self.frozen))
        given = {"config": jax.eval_shape(student, self.frozen).config, "optimizer": optimizer}
        if stage != "align":
            given |= {"chunk_tokens": chunk, "remat": remat}
        if stage != "score":
            given["unroll"] = unroll
        if stage in ("align", "distill"):
            given["float8_teacher"] = float8_teacher
        state = jax.jit(lambda frozen: start(trained(frozen), optimizer))(self.frozen)
        return jax.jit(partial(UPDATES[stage], **given), donate_argnums=0), state


def seconds_per_step(step: Any, state: Any, frozen: Any, batch: dict[str, jax.Array], steps: int) -> float:
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))


def batch_of(steps: Steps, mesh: Mesh, rows: int, length: int, stages: Sequence[str]) -> dict[str, jax.Array]:
    """Placed on the mesh, with the teacher's states if a stage takes them from a file."""
    batch = jax.device_put(packed_batch(rows, length, steps.shape.vocab_size), batch_sharding(mesh))
    if "score" in stages:
        states = jax.jit(partial(hidden_states, dtype=jnp.bfloat16))
        batch["teacher_hidden"] = states(steps.frozen, batch["tokens"], batch["segment_ids"])
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="+", default=["xla", "pallas_gpu"])
    parser.add_argument("--stages", nargs="+", default=["align", "distill"], choices=list(UPDATES))
    parser.add_argument("--mixer", default="gated_deltanet", choices=list(LINEAR_MIXERS))
    parser.add_argument("--shape", default="smollm2-135m-instruct", choices=SHAPES)
    parser.add_argument("--remat", default="block", choices=get_args(Remat))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens whose logits are held at once")
    parser.add_argument("--unroll", action="store_true", help="each layer by itself in place of a loop; not score")
    parser.add_argument("--float8-teacher", action="store_true", help="as align.float8_teacher and distill's")
    parser.add_argument("--steps", type=int, default=10)
    for axis in ("fsdp", "tensor", "context"):
        parser.add_argument(f"--{axis}", type=int, default=-1 if axis == "fsdp" else 1)
    arguments = parser.parse_args()

    mesh = make_mesh(1, arguments.fsdp, arguments.tensor, arguments.context)
    tokens = arguments.rows * arguments.length
    print(
        f"{mesh.devices.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.shape}, "
        f"{arguments.rows} rows of {arguments.length} tokens"
    )
    with jax.set_mesh(mesh):
        steps = Steps(arguments.shape, mesh, arguments.mixer)
        batch = batch_of(steps, mesh, arguments.rows, arguments.length, arguments.stages)
        for stage in arguments.stages:
            for implementation in arguments.implementations:
                linear.linear_attention = partial(linear_attention, implementation=implementation)
                flags = {"unroll": arguments.unroll, "float8_teacher": arguments.float8_teacher}
                made = steps.step(stage, arguments.remat, arguments.chunk, **flags)
                seconds = seconds_per_step(*made, steps.frozen, batch, arguments.steps)
                print(
                    f"{stage:8} {implementation:11} {1e3 * seconds:7.1f} ms a step, {tokens / seconds:9,.0f} tokens/s, "
                    f"peak so far {peak_memory_bytes() / 2**30:.1f} GiB",
                    flush=True,
                )
                del made


if __name__ == "__main__":
    main()
