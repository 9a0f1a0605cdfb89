"""A stage's step, traced for chips that are not here: what it is given, what its devices exchange, and its key."""

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxhybrid_kernels.numerics import target_platform

from jaxhybrid.assembly import student_config
from jaxhybrid.families import hf_to_config
from jaxhybrid.model.partition import HOST_MEMORY, SHARDS, AnyMesh
from jaxhybrid.model.transformer import Model, abstract_params
from jaxhybrid.plan.collectives import Exchange, exchanges
from jaxhybrid.plan.liveness import peak_bytes
from jaxhybrid.plan.operations import Branches, Operation, operations
from jaxhybrid.plan.work import Work, work
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.stages.align import linear_mixers
from jaxhybrid.stages.programs import stage_program

# Numbers such as learning rates and the course of a schedule: they change no size and no time.
_FLOAT = re.compile(r"dense<(?!0\.0+e\+00>|1\.0+e\+00>)[-+.\de]+> : tensor<f32>")

# By how much more than the estimate compilers and GPUs took at most: docs/plan.md.
SLACK = {"gpu": 1.10, "tpu": 1.18}


@dataclass(frozen=True)
class Request:
    """One stage of one config.

    Attributes:
        teacher: the keys of its config.json.
        softmax_layers: of the hybrid; `align` and `score` have none.
    """

    stage: str
    config: RunConfig
    teacher: dict[str, Any]
    softmax_layers: tuple[int, ...]


class Program:
    """The step that a run compiles for `request`, traced with `mesh` active."""

    def __init__(self, request: Request, mesh: AnyMesh):
        self.request, self.mesh, self.platform = request, mesh, target_platform()
        config, stage = request.config, request.stage
        teacher = hf_to_config(request.teacher, config.ignore_config_keys)
        kept = () if stage in ("align", "score") else request.softmax_layers
        self.teacher, self.student = teacher, student_config(config, teacher, kept)
        step, self.arguments = stage_program(stage, config, self.student, teacher, mesh)
        self.traced = step.trace(*self.arguments)

    @cached_property
    def lowered(self) -> Any:
        return self.traced.lower(lowering_platforms=(self.platform,))

    @property
    def key(self) -> str:
        """Of the lowered program: programs of one key take the same time and memory."""
        text = _FLOAT.sub("dense<number> : tensor<f32>", self.lowered.as_text())
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def given_bytes(self) -> dict[str, int]:
        """What lies on one device when the step is called, by kind."""
        state, *rest = self.arguments
        frozen = [x.params if isinstance(x, Model) else x for x in rest if not isinstance(x, dict)]
        batches = [x for x in rest if isinstance(x, dict)]
        kinds = {"parameters": state.params, "optimizer": state.optimizer, "teacher": frozen, "batch": batches}
        return {kind: bytes_of_a_device(tree) for kind, tree in kinds.items()}

    @property
    def held_bytes(self) -> int:
        """What lies on one device while the stage runs and is not given to the step: scoring's teacher, which makes the
        states, and the mixers that candidates start from. A teacher whose files are in float32 is held once more so."""
        if self.request.stage != "score":
            return 0
        teacher = abstract_params(self.teacher, self.mesh, self.request.config.dtype)
        mixers = linear_mixers(abstract_params(self.student, self.mesh))
        return bytes_of_a_device([teacher, mixers])

    @cached_property
    def operations(self) -> list[Operation]:
        types, depth = self.student.layer_types, self.student.num_layers
        shares = [types.count(kind) / depth for kind in dict.fromkeys(types)]
        if self.request.stage == "score":  # linear, and the candidate's one softmax layer
            shares = [1 - 1 / depth, 1 / depth]
        branches = Branches(self.platform, depth, shares)
        return list(operations(self.traced.jaxpr.jaxpr, branches))

    @property
    def exchanges(self) -> list[Exchange]:
        return exchanges(self.operations, dict(self.mesh.shape))

    @property
    def estimated_bytes(self) -> float:
        """What one device takes at the peak of a step, by `liveness`; for a compiled step the compiler tells."""
        return SLACK[self.platform] * (sum(self.given_bytes.values()) + peak_bytes(self.traced.jaxpr.jaxpr))

    @property
    def least_received(self) -> float:
        """Bytes that no such split of the weights avoids: each model gathered once for a pass over it in the compute
        dtype, and gradients scattered once in `mesh.sums`."""
        shards = math.prod(self.mesh.shape[axis] for axis in SHARDS)
        split = shards * self.mesh.shape["tensor"]
        frozen = [x.params for x in self.arguments if isinstance(x, Model)]
        trained, teacher = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (self.arguments[0].params, frozen))
        config, passes = self.request.config, 1 if self.request.stage == "align" else 2
        compute, sums = jnp.dtype(config.dtype).itemsize, jnp.dtype(config.mesh.sums).itemsize
        return (shards - 1) / split * ((passes * compute + sums) * trained + compute * teacher)

    @property
    def work(self) -> Work:
        """With the update, which reads and writes what is trained and its optimizer's state, and reads gradients."""
        given, counted = self.given_bytes, work(self.operations)
        update = 2 * (given["parameters"] + given["optimizer"]) + given["parameters"]
        return Work(counted.flops, counted.moved + update)


def bytes_of_a_device(tree: Any) -> int:
    """Of abstract arrays, what lies in a device's own memory."""
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(
        math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in leaves
        if x.sharding is None or x.sharding.memory_kind != HOST_MEMORY
    )
