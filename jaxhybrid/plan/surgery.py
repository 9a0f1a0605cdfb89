"""What becomes of each layer of the teacher, and how many parameters that makes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid.model.blueprint import Params, count_active, count_parameters, is_variable, shapes_by_name, variables
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.mixers import MIXERS, STUDENT_MIXERS
from jaxhybrid.model.transformer import model_variables
from jaxhybrid.plan.planned import Planned

OPEN = "open until selection"


@dataclass(frozen=True)
class Surgery:
    """Of the whole model.

    Attributes:
        layers: what each becomes: `full_attention`, the linear mixer's name, or `OPEN`.
        taken: parts of a linear mixer that start from the teacher's attention, and how often each of their heads is
            copied.
        new: parts of it that the teacher has no values for.
        left: parts of the teacher's attention that a linear layer does not take.
        parameters: of the teacher, the student, and parts of a layer.
    """

    layers: tuple[str, ...]
    taken: dict[str, int]
    new: tuple[str, ...]
    left: tuple[str, ...]
    parameters: dict[str, int]


def surgery(planned: Planned) -> Surgery:
    """By the mixers' own rules; nothing is computed."""
    linear, teacher = planned.linear, planned.teacher
    assert linear.mixer is not None
    mixer = STUDENT_MIXERS[linear.mixer.kind]
    attention, own = variables(MIXERS[FULL_ATTENTION], teacher), variables(mixer, linear)
    there = shapes_by_name(attention)
    started = shapes_by_name(jax.eval_shape(lambda a: mixer.from_attention(a, linear), _abstract(attention)))
    count = {
        "teacher": count_parameters(model_variables(teacher)),
        "teacher, for a token": count_active(model_variables(teacher), teacher),
        "student": count_parameters(model_variables(planned.hybrid)),
        "linear mixer": count_parameters(own),
        "attention": count_parameters(attention),
        "rest of a layer": count_parameters(model_variables(teacher)["blocks"]) // teacher.num_layers,
        "trained in align": count_parameters(model_variables(linear)["mixers"]),
    }
    if planned.layers_are_known:
        layers = planned.hybrid.layer_types
    else:
        layers = (OPEN,) * teacher.num_layers
    return Surgery(
        layers=layers,
        taken={name: _copies(shape, there.get(name)) for name, shape in started.items()},
        new=tuple(name for name in shapes_by_name(own) if name not in started),
        left=tuple(name for name in there if name not in started),
        parameters=count,
    )


def _abstract(declared: Params) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), declared, is_leaf=is_variable)


def _copies(shape: tuple[int, ...], source: tuple[int, ...] | None) -> int:
    """How often a head is there; a part of another name (a gate that starts as v_proj) counts as one."""
    if source is None or len(shape) < 2:
        return 1
    return shape[-2] // source[-2]


def as_json(planned: Planned) -> dict[str, Any]:
    """For programs."""
    found = surgery(planned)
    return {
        "layers": list(found.layers),
        "softmax_layers": len(planned.softmax_layers),
        "taken": found.taken,
        "new": list(found.new),
        "left": list(found.left),
        "parameters": found.parameters,
    }
