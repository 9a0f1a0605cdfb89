"""What every stage's step takes on a TPU slice, compiled ahead of time without a TPU: memory a chip, collectives.

    python benchmarks/pod_programs.py --shape qwen2.5-7b --topology v6e:8x8 --fsdp 64
    python benchmarks/pod_programs.py --shape qwen2.5-72b --topology v5p:4x8x8 --fsdp 32 --tensor 8 --stages distill

Prints a line for each stage, as in docs/pods.md. GiB are of one chip: what the step is given (trained parameters and
their optimizer, teacher) and what it takes beside that, from the compiler. Collectives are counted in the program
before it is compiled, loops included: bytes that a chip receives, by kind. "least" is what no sharding of these weights
avoids: each model gathered once for each pass over it in bfloat16, its gradients scattered once in `--sums`.
"""

import argparse
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LIBRARY_PATH": str(Path(__file__).parents[1] / ".venv" / "tpu-compiler" / "libtpu" / "libtpu.so"),
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from shapes import SHAPES, quarter

from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import SHARDS, batch_sharding, make_mesh
from jaxhybrid.model.transformer import Model, abstract_params
from jaxhybrid.selection.methods import layer_types
from jaxhybrid.settings.stages import AlignConfig, DistillConfig, FinetuneConfig, ScoreConfig, StageConfig
from jaxhybrid.stages.align import align_step, linear_mixers
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.stages.finetune import finetune_step
from jaxhybrid.stages.score import candidate_params, score_step
from jaxhybrid.train.optimizer import make_optimizer, start

USABLE_GIB = {"v5p": 95.73, "v6e": 31.24, "v5e": 15.75, "v4": 30.75, "tpu7x": 94.74}
STAGES: dict[str, StageConfig] = {
    "align": AlignConfig(batch_size=96, sequence_length=512),
    "score": ScoreConfig(batch_size=32, sequence_length=4096),
    "distill": DistillConfig(batch_size=32, sequence_length=4096),
    "finetune": FinetuneConfig(batch_size=96, sequence_length=16384),
}
GIB = 2**30


def devices_of(topology: str) -> list[Any]:
    """The chips of a slice. A torus wraps round where the hardware does; the compiler must be told."""
    name, _, shape = topology.partition(":")
    sides = [int(side) for side in shape.split("x")]
    if name in ("v4", "v5p", "tpu7x"):
        wrap = (all(side % 4 == 0 for side in sides),) * len(sides)
    else:
        wrap = (*(side == 16 for side in sides), False)
    more = {"chip_config_name": "megacore"} if name == "v4" else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, wrap=wrap, **more).devices


def arguments_of(stage: str, teacher: ModelConfig, mesh: Any, given: argparse.Namespace) -> tuple[Any, tuple[Any, ...]]:
    """(the step as a run has it, its abstract arguments: state, teacher and batch, in some order)."""
    settings = STAGES[stage]
    mixer = GatedDeltaNetConfig().resolve(teacher)
    depth = teacher.num_layers
    kept = () if stage in ("align", "score") else quarter(depth)
    config = ModelConfig(
        **{**vars(teacher), "layer_types": layer_types(depth, kept, mixer.kind), "mixer": mixer}
    )  # fmt: skip
    student, frozen = abstract_params(config, mesh), abstract_params(teacher, mesh, jnp.bfloat16)
    if stage == "align":
        student = linear_mixers(student)
    if stage == "score":
        make = lambda s, t: candidate_params(Model(s, config), Model(t, teacher), jnp.int32(0))  # noqa: E731
        student = jax.eval_shape(make, student, abstract_params(teacher, mesh))
    optimizer = make_optimizer(settings, student)
    state = jax.eval_shape(lambda params: start(params, optimizer), student)
    parts = settings.gradient_accumulation * given.accumulate
    rows = (given.rows or settings.batch_size) // parts
    shape = (rows, settings.sequence_length) if parts == 1 else (parts, rows, settings.sequence_length)
    sharding = batch_sharding(mesh, leading=len(shape) - 2)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    batch: dict[str, Any] = {"tokens": tokens, "segment_ids": tokens}
    common: dict[str, Any] = {"config": config, "optimizer": optimizer, "sums": jnp.dtype(given.sums)}
    if stage == "align":
        return partial(align_step, **common), (state, Model(frozen, teacher), batch)
    common["remat"] = given.remat
    if stage == "distill":
        return partial(distill_step, **common), (state, Model(frozen, teacher), batch)
    if stage == "finetune":
        return partial(finetune_step, **common), (state, batch)
    width = teacher.hidden_size
    batch["teacher_hidden"] = jax.ShapeDtypeStruct((*shape, width), jnp.bfloat16, sharding=sharding)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    return partial(score_step, **common), (
        state,
        layer,
        batch,
        jax.eval_shape(lambda p: Model(p, teacher).head, frozen),
    )


def on_a_chip(tree: Any) -> int:
    """Bytes."""
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    local = lambda x: x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape  # noqa: E731
    return sum(math.prod(local(x)) * x.dtype.itemsize for x in leaves)


# --- collectives


def received(jaxpr: Any, sizes: dict[str, int], times: int = 1) -> dict[str, float]:
    """Bytes that a chip receives, by kind of collective, in all turns of all loops."""
    found: dict[str, float] = {}

    def add(kind: str, amount: float) -> None:
        found[kind] = found.get(kind, 0) + times * amount

    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        axes = given.get("axes", given.get("axis_name"))
        axes = axes if isinstance(axes, tuple) else (axes,)
        devices = math.prod(sizes.get(axis, 1) for axis in axes)
        if devices > 1 and equation.outvars:
            size = sum(x.aval.size * x.aval.dtype.itemsize for x in equation.outvars)
            away = (devices - 1) / devices
            if name.startswith("all_gather"):
                add("gather", size * away)
            elif name.startswith("reduce_scatter"):
                add("scatter", size * (devices - 1))
            elif name.startswith(("psum", "pmax", "pmin")):
                add("reduce", 2 * size * away)
            elif name == "all_to_all":
                add("exchange", size * away)
            elif name == "ppermute":
                add("exchange", size)
        turns = times * given["length"] if name == "scan" else times
        branches = given.get("branches")
        inner = branches if branches else [x for x in given.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        each = [received(getattr(part, "jaxpr", part), sizes, turns) for part in inner]
        if branches:  # one of them runs: the dearest
            each = [max(each, key=lambda kinds: sum(kinds.values()))]
        for kinds in each:
            for kind, amount in kinds.items():
                found[kind] = found.get(kind, 0) + amount
    return found


def least(stage: str, state: Any, teacher: Any, mesh: Any, sums: Any) -> float:
    shards = math.prod(mesh.shape[axis] for axis in SHARDS)
    away, split = (shards - 1), shards * mesh.shape["tensor"]
    trained = sum(x.size for x in jax.tree.leaves(state.params)) / split
    frozen = sum(x.size for x in jax.tree.leaves(teacher)) / split
    passes = {"align": 1, "score": 2, "distill": 2, "finetune": 2}[stage]
    return away * (2 * passes * trained + jnp.dtype(sums).itemsize * trained + 2 * frozen)


def measure(stage: str, teacher: ModelConfig, mesh: Any, given: argparse.Namespace) -> str:
    step, arguments = arguments_of(stage, teacher, mesh, given)
    began = time.process_time()
    traced = jax.jit(step, donate_argnums=0).trace(*arguments)
    state, rest = arguments[0], arguments[1:]
    frozen = rest[0].params if isinstance(rest[0], Model) else {}
    kinds = received(traced.jaxpr.jaxpr, dict(mesh.shape))
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds = time.process_time() - began
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    )  # fmt: skip
    parts = [on_a_chip(x) / GIB for x in (state.params, state.optimizer, frozen)]
    padded = memory.argument_size_in_bytes / max(on_a_chip(arguments), 1)
    moved, floor = sum(kinds.values()) / GIB, least(stage, state, frozen, mesh, given.sums) / GIB
    told = ", ".join(f"{kind} {amount / GIB:.2f}" for kind, amount in sorted(kinds.items()))
    return (
        f"| {stage} | {parts[0]:.2f} | {parts[1]:.2f} | {parts[2]:.2f} | {memory.temp_size_in_bytes / GIB:.2f} | "
        f"{peak / GIB:.2f} | {padded:.2f} | {told} | {moved / floor if floor else 0:.2f} | {seconds:.0f} |"
    )


HEAD = """| stage | params | optimizer | teacher | beside | all | padding | received, GiB | / least | compile, CPU s |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=list(SHAPES))
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--fsdp", type=int, default=-1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--rows", type=int, help="of a step; default: the recipe's")
    parser.add_argument("--accumulate", type=int, default=1, help="parts that a step's rows are run in")
    parser.add_argument("--remat", default="block")
    parser.add_argument("--sums", default="float32")
    given = parser.parse_args()
    mesh = make_mesh(given.data, given.fsdp, given.tensor, given.context, devices=devices_of(given.topology))
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    usable = USABLE_GIB[given.topology.partition(":")[0]]
    print(
        f"**{given.shape}** on {given.topology} ({sizes}), {usable} GiB a chip, parts {given.accumulate}, "
        f"remat {given.remat}, sums {given.sums}, jax {jax.__version__}\n\n{HEAD}"
    )
    with jax.set_mesh(mesh):
        for stage in given.stages:
            try:
                print(measure(stage, SHAPES[given.shape], mesh, given), flush=True)
            except jax.errors.JaxRuntimeError as error:
                if "hbm" not in str(error).lower():
                    raise
                print(f"| {stage} | does not fit: {str(error).splitlines()[0][:200]} |", flush=True)


if __name__ == "__main__":
    main()
