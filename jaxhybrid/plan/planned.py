"""What plans are made of: a config, and its teacher's config.json. No text and no weights are opened."""

from functools import cached_property

from jaxhybrid.assembly import student_config
from jaxhybrid.families import hf_to_config
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.selection.methods import select_layers
from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.run import RunConfig, validate_against
from jaxhybrid.weights.huggingface import teacher_keys


class Planned:
    """A config beside its teacher's sizes.

    Attributes:
        keys: of the teacher's config.json.
        softmax_layers: of the hybrid. Where only a run can tell, as many as it will keep, evenly spaced.
        layers_are_known: whether they are those that the run will keep.
    """

    def __init__(self, config: RunConfig):
        """Raises ConfigError, or WeightsError where the teacher's config.json is not there."""
        self.config, self.keys = config, teacher_keys(config.teacher)
        self.teacher: ModelConfig = hf_to_config(self.keys, config.ignore_config_keys)
        validate_against(config, self.teacher)
        select, depth = config.select, self.teacher.num_layers
        self.layers_are_known = select.needs <= {"nothing"}
        if self.layers_are_known:
            self.softmax_layers = select_layers(
                select.method,
                depth,
                select.budget,
                layers=select.layers or (),
                seed=select.seed,
                uniform_by=select.uniform,
            )
        else:
            self.softmax_layers = select_layers("uniform", depth, layers_in_budget(select.budget, depth))

    @cached_property
    def linear(self) -> ModelConfig:
        """The student with no softmax layer."""
        return student_config(self.config, self.teacher, ())

    @cached_property
    def hybrid(self) -> ModelConfig:
        return student_config(self.config, self.teacher, self.softmax_layers)
