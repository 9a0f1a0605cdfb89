"""The update of every stage as settings have it, and what it is given: a run calls it, a plan compiles it elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.partition import HOST_MEMORY, AnyMesh, in_memory
from jaxhybrid.model.transformer import Model, abstract_params
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.stages import AlignConfig, DistillConfig, KlStageConfig, StageConfig
from jaxhybrid.stages.align import align_step, linear_mixers
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.stages.finetune import finetune_step
from jaxhybrid.stages.score import candidate_params, score_step
from jaxhybrid.train.optimizer import TrainState, make_optimizer, start
from jaxhybrid.train.placement import abstract_batch

STEPS: dict[str, Callable[..., Any]] = {
    "align": align_step, "score": score_step, "distill": distill_step, "finetune": finetune_step,
}  # fmt: skip


def stage_step(stage: str, config: RunConfig, student: ModelConfig, optimizer: optax.GradientTransformation) -> Any:
    """The jitted update, whose state is donated. It takes what `abstract_arguments` has."""
    settings: StageConfig = getattr(config, stage)
    given: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "sums": jnp.dtype(config.mesh.sums)}
    if stage != "align":
        given["remat"] = settings.remat
    if stage != "score":
        given["unroll"] = settings.unroll
    if isinstance(settings, KlStageConfig):
        given["chunk_tokens"] = settings.kl_chunk
    if isinstance(settings, AlignConfig | DistillConfig):
        given["float8_teacher"] = settings.float8_teacher
    return jax.jit(partial(STEPS[stage], config=student, optimizer=optimizer, **given), donate_argnums=0)


def trained_params(stage: str, student: ModelConfig, teacher: ModelConfig, mesh: AnyMesh) -> Params:
    """Shapes, types and places of what a stage trains.

    Args:
        student: all-linear for `align` and `score`, the hybrid for the others.
    """
    params = abstract_params(student, mesh)
    if stage == "align":
        return linear_mixers(params)
    if stage == "score":
        beside = Model(abstract_params(teacher, mesh), teacher)
        layer = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.eval_shape(candidate_params, Model(params, student), beside, layer)
    return params


def abstract_state(
    optimizer: optax.GradientTransformation, params: Params, mesh: AnyMesh, offload: Sequence[str]
) -> TrainState:
    """What `start` gives, as shapes, types and places on the mesh; `params` may be abstract, too."""
    traced = jax.jit(partial(start, optimizer=optimizer, offload=offload)).trace(params)
    kinds = {jax.memory.Space.Host: HOST_MEMORY, jax.memory.Space.Device: "device"}
    leaves = [
        jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec, memory_kind=kinds[x.memory_space])
        )
        for x in traced.jaxpr.out_avals
    ]
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), leaves)


def stage_program(
    stage: str, config: RunConfig, student: ModelConfig, teacher: ModelConfig, mesh: AnyMesh
) -> tuple[Any, tuple[Any, ...]]:
    """(the jitted update of a stage, its arguments as shapes, types and places); with `mesh` active.

    Raises:
        TopologyError: something does not divide over the mesh.
    """
    settings: StageConfig = getattr(config, stage)
    dtype, params = jnp.dtype(config.dtype), trained_params(stage, student, teacher, mesh)
    optimizer = make_optimizer(settings, params)
    step = stage_step(stage, config, student, optimizer)
    state = abstract_state(optimizer, params, mesh, settings.offload)
    batch = abstract_batch(settings, mesh)
    if stage == "finetune":
        return step, (state, batch)
    frozen = Model(abstract_params(teacher, mesh, dtype), teacher)
    if "teacher" in settings.offload:
        frozen = in_memory(HOST_MEMORY, frozen)
    if stage != "score":
        return step, (state, frozen, batch)
    tokens = batch["tokens"]
    hidden = jax.ShapeDtypeStruct((*tokens.shape, teacher.hidden_size), dtype, sharding=tokens.sharding)
    stored = jax.eval_shape(lambda frozen: frozen.head, frozen)
    sharding = NamedSharding(mesh, stored.kernel.sharding.spec)
    head = replace(stored, kernel=jax.ShapeDtypeStruct(stored.shape, dtype, sharding=sharding))
    return step, (state, jax.ShapeDtypeStruct((), jnp.int32), batch | {"teacher_hidden": hidden}, head)
