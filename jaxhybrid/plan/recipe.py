"""The whole recipe: tokens, steps, hours and disk of every stage, scoring included."""

import math
from dataclasses import dataclass

from jaxhybrid.disk import DiskPlan, total
from jaxhybrid.model.blueprint import count_active
from jaxhybrid.model.transformer import model_variables
from jaxhybrid.plan.planned import Planned
from jaxhybrid.selection.kl_guided import rounds_of
from jaxhybrid.settings.stages import STAGES, StageConfig


@dataclass(frozen=True)
class StageCost:
    """Of one stage, all its steps.

    Attributes:
        steps: at most, of all candidates where it is scoring.
        fewest_steps: where scoring may end early.
        tokens_per_step: padding included.
        teacher_passes: of scoring, batches that the teacher reads.
        disk: bytes at most while it runs.
    """

    steps: int
    fewest_steps: int
    tokens_per_step: int
    teacher_passes: int
    disk: int

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


def recipe(planned: Planned) -> dict[str, StageCost]:
    """Of the stages that a run of the config has; evaluation and selection by measuring are not in it."""
    config, depth = planned.config, planned.teacher.num_layers
    disk = DiskPlan(config, planned.linear)
    found = {}
    for stage in STAGES:
        settings: StageConfig = getattr(config, stage)
        most = fewest = settings.steps
        teacher_passes = 0
        if stage == "score":
            if "scores" not in config.select.needs:
                continue
            heldout = math.ceil(config.score.heldout_tokens / settings.tokens_per_step)
            teacher_passes = heldout + settings.steps * (1 if config.score.keep_teacher_states else depth)
            most, fewest = depth * most, depth * rounds_of(config.score)[0]
        found[stage] = StageCost(most, fewest, settings.tokens_per_step, teacher_passes, total(disk.needs(stage)))
    return found


def teacher_pass_flops(planned: Planned) -> float:
    """Of one token through the teacher's layers, its attention itself left out."""
    declared = model_variables(planned.teacher)
    return 2.0 * sum(count_active(declared[part], planned.teacher) for part in ("blocks", "mixers"))
