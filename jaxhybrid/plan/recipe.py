"""The whole recipe: tokens, steps, hours and disk of every stage, scoring included."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxhybrid.disk import DiskPlan, total
from jaxhybrid.plan.planned import Planned
from jaxhybrid.selection.kl_guided import rounds_of
from jaxhybrid.selection.methods import METHODS
from jaxhybrid.settings.stages import STAGES, StageConfig


@dataclass(frozen=True)
class StageCost:
    """Of one stage, all its steps.

    Attributes:
        steps: most and fewest; they differ where scoring may end early.
        teacher_steps: of scoring, forward passes of the teacher over a batch.
        disk: bytes at most while it runs.
    """

    tokens: tuple[int, int]
    steps: tuple[int, int]
    teacher_steps: int
    disk: int


def recipe(planned: Planned) -> dict[str, StageCost]:
    """Of the stages that a run of the config has; evaluation and selection by measuring are not in it."""
    config, depth = planned.config, planned.teacher.num_layers
    disk = DiskPlan(config, planned.linear)
    found = {}
    for stage in STAGES:
        settings: StageConfig = getattr(config, stage)
        most = fewest = settings.steps
        teacher_steps = 0
        if stage == "score":
            if METHODS[config.select.method].needs != "scores":
                continue
            heldout = math.ceil(config.score.heldout_tokens / settings.tokens_per_step)
            teacher_steps = heldout + settings.steps * (1 if config.score.keep_teacher_states else depth)
            most, fewest = depth * most, depth * rounds_of(config.score)[0]
        found[stage] = StageCost(
            tokens=(most * settings.tokens_per_step, fewest * settings.tokens_per_step),
            steps=(most, fewest),
            teacher_steps=teacher_steps,
            disk=total(disk.needs(stage)),
        )
    return found


def hours(costs: Mapping[str, StageCost], seconds: Mapping[str, float]) -> dict[str, float]:
    """Of all steps of each stage at so many seconds a step."""
    return {stage: cost.steps[0] * seconds[stage] / 3600 for stage, cost in costs.items() if stage in seconds}
