"""The models of a run: its teacher, and the students that its stages start from and leave."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxhybrid.errors import RunError
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.partition import param_shardings
from jaxhybrid.model.transformer import Model, model_variables
from jaxhybrid.run_folder import RunFolder
from jaxhybrid.selection.methods import layer_types
from jaxhybrid.settings.run import RunConfig, validate_against
from jaxhybrid.stages.align import linear_mixers
from jaxhybrid.weights.convert import convert, with_softmax_layers
from jaxhybrid.weights.huggingface import load_teacher

TRAINED = ("distill", "finetune")  # the stages that leave a whole student


class RunModels:
    """Made from a run's config and what its finished stages left in `folder`; all on `mesh`."""

    def __init__(self, config: RunConfig, folder: RunFolder, mesh: Mesh):
        self.config, self.folder, self.mesh = config, folder, mesh

    @cached_property
    def teacher(self) -> Model:
        """The teacher in float32, checked against the config."""
        ignored = self.config.ignore_config_keys
        teacher = load_teacher(self.config.teacher, ignore_config_keys=ignored, mesh=self.mesh)
        validate_against(self.config, teacher.config)
        return teacher

    @cached_property
    def frozen_teacher(self) -> Model:
        """The teacher in the compute dtype: what stages run it in."""
        dtype = jnp.dtype(self.config.dtype)
        if dtype == jnp.float32:
            return self.teacher
        return jax.jit(lambda teacher: teacher.cast(dtype))(self.teacher)

    @property
    def depth(self) -> int:
        return self.teacher.config.num_layers

    @property
    def linear_types(self) -> tuple[str, ...]:
        return (self.config.mixer.kind,) * self.depth

    def student_config(self, types: Sequence[str]) -> ModelConfig:
        mixer = self.config.mixer.to_model().resolve(self.teacher.config)
        return replace(self.teacher.config, layer_types=tuple(types), mixer=mixer)

    def converted(self) -> Model:
        """The all-linear student before any training. All but its mixers are the teacher's own arrays."""
        types, mixer = self.linear_types, self.config.mixer.to_model()
        config = self.student_config(types)
        shardings = param_shardings(model_variables(config), self.mesh)["mixers"]
        make = jax.jit(
            lambda teacher, key: convert(teacher, types, mixer, key).params["mixers"], out_shardings=shardings
        )
        mixers = make(self.teacher, jax.random.key(self.config.seed))
        return Model({**self.teacher.params, "mixers": mixers}, config, self.teacher.folder)

    def aligned(self) -> Model:
        """The all-linear student with its trained mixers."""
        student = self.converted()
        trained = self.folder.load_params("align", linear_mixers(student.params))
        return Model({**student.params, "mixers": trained}, student.config, student.folder)

    def hybrid(self) -> Model:
        """The student to distill: the teacher, with aligned mixers wherever a layer is not kept softmax."""
        kept = self.folder.read("layers.json", "select")["softmax_layers"]
        types = layer_types(self.depth, kept, self.config.mixer.kind)
        return with_softmax_layers(self.aligned(), self.teacher, types)

    def trained(self, stage: str | None = None) -> Model:
        """The hybrid that the given stage, or the last one done, has left.

        Raises:
            RunError: it is not done.
        """
        stage = stage or next(filter(self.folder.is_done, reversed(TRAINED)), None)
        if stage is None:
            raise RunError(f"{self.folder.path} has no trained student yet. Run `jaxhybrid distill CONFIG` first.")
        hybrid = self.hybrid()
        return Model(self.folder.load_params(stage, hybrid.params), hybrid.config, hybrid.folder)
