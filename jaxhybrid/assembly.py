"""The models of a run: its teacher, and the students that its stages start from and leave."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxhybrid.errors import RunError
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.partition import HOST_MEMORY, in_memory, param_shardings
from jaxhybrid.model.transformer import Model, abstract_params, model_variables
from jaxhybrid.run_folder import RunFolder
from jaxhybrid.selection.methods import layer_types
from jaxhybrid.settings.run import RunConfig, validate_against
from jaxhybrid.settings.stages import StageConfig
from jaxhybrid.stages.align import linear_mixers
from jaxhybrid.stages.batch import Batch
from jaxhybrid.stages.calibrate import Calibration, calibration, with_calibration
from jaxhybrid.weights.convert import convert, with_softmax_layers
from jaxhybrid.weights.huggingface import ModelFiles, open_teacher

TRAINED = ("distill", "finetune")  # the stages that leave a whole student


class RunModels:
    """Made from a run's config and what its finished stages left in `folder`; all on `mesh`.

    Nothing is kept here but the frozen teacher, until `drop_teacher`.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, mesh: Mesh):
        self.config, self.folder, self.mesh, self.dtype = config, folder, mesh, jnp.dtype(config.dtype)

    @cached_property
    def teacher_files(self) -> ModelFiles:
        """The teacher's folder, checked against the config; no weights are read."""
        files = open_teacher(self.config.teacher, self.config.ignore_config_keys)
        validate_against(self.config, files.config)
        return files

    @property
    def teacher_config(self) -> ModelConfig:
        return self.teacher_files.config

    @cached_property
    def frozen_teacher(self) -> Model:
        """The teacher in the compute dtype: what stages run it in."""
        if "_offloaded_teacher" in self.__dict__:
            return in_memory("device", self._offloaded_teacher)
        return Model(self._read_teacher(self.dtype), self.teacher_config, str(self.teacher_files.folder))

    @cached_property
    def _offloaded_teacher(self) -> Model:
        return in_memory(HOST_MEMORY, self.frozen_teacher)

    def teacher_of(self, settings: StageConfig) -> Model:
        """The frozen teacher in the memory where a stage wants it; on the devices it stays only if that is there."""
        if "teacher" not in settings.offload:
            return self.frozen_teacher
        offloaded = self._offloaded_teacher
        self.__dict__.pop("frozen_teacher", None)
        return offloaded

    def drop_teacher(self) -> None:
        """Frees its parameters; the next use reads them again."""
        for name in ("frozen_teacher", "_offloaded_teacher"):
            self.__dict__.pop(name, None)

    def _read_teacher(self, dtype: Any, parts: Iterable[str] = ()) -> Params:
        return self.teacher_files.read(dtype, param_shardings(self.teacher_variables, self.mesh), parts)

    @property
    def teacher_variables(self) -> Params:
        return model_variables(self.teacher_config)

    @cached_property
    def _shares_values(self) -> bool:
        """Whether the frozen teacher has the very values of the files."""
        return self.dtype == jnp.float32 or self.teacher_files.types == {"BF16"}

    def _file_values(self, parts: Iterable[str]) -> Params:
        """Parts of the teacher as the files have them: the frozen teacher's own arrays, or float32 read for this."""
        if self._shares_values:
            return {part: self.frozen_teacher.params[part] for part in parts}
        return self._read_teacher(jnp.float32, parts)

    @property
    def depth(self) -> int:
        return self.teacher_config.num_layers

    @property
    def linear_types(self) -> tuple[str, ...]:
        return (self.config.mixer.kind,) * self.depth

    @property
    def linear_config(self) -> ModelConfig:
        """Of the all-linear student."""
        return student_config(self.config, self.teacher_config, ())

    @property
    def hybrid_config(self) -> ModelConfig:
        """Of the student with the selected layers softmax."""
        kept = self.folder.read("layers.json", "select")["softmax_layers"]
        return student_config(self.config, self.teacher_config, kept)

    def initial_mixers(self, measured: Calibration | None = None) -> Params:
        """The linear mixers of every layer before any training, with what `calibration` measured, if it did."""
        types, mixer, source = self.linear_types, self.config.mixer.to_model(), self.teacher_config
        shardings = param_shardings(model_variables(self.linear_config), self.mesh)["mixers"]

        def make(values: Params, key: jax.Array, measured: Calibration | None) -> Params:
            mixers = convert(Model(_masters(values), source), types, mixer, key).params["mixers"]
            if measured is None:
                return mixers
            return with_calibration(mixers, measured, self.linear_config, self.config.calibrated_parts)

        key = jax.random.key(self.config.seed)
        return jax.jit(make, out_shardings=shardings)(self._file_values(["mixers"]), key, measured)

    def calibration(self, batch: Batch) -> Calibration:
        """What `align.calibrate` asks for, measured on a batch."""
        settings = self.config.align.calibrate
        assert settings is not None
        measure = partial(
            calibration,
            config=self.linear_config,
            parts=self.config.calibrated_parts,
            fits_decay=settings.half_lives == "fitted",
            dtype=self.dtype,
        )
        return jax.jit(measure)(self.initial_mixers(), self.frozen_teacher, batch)

    def aligned_mixers(self) -> Params:
        """The linear mixers of every layer as alignment left them."""
        return self.folder.load_params("align", linear_mixers(abstract_params(self.linear_config, self.mesh)))

    def candidates(self) -> Model:
        """The all-linear student that candidates start from, with the teacher's attention of every layer beside it.

        All but the linear mixers may be the frozen teacher's own arrays, in its dtype.
        """
        values = self._file_values(self.teacher_variables)
        mixers = values["mixers"] | self.aligned_mixers()
        return Model({**values, "mixers": mixers}, self.linear_config, str(self.teacher_files.folder))

    def hybrid(self) -> Params:
        """Float32 masters to distill: the teacher's, with aligned mixers wherever a layer is not kept softmax."""
        config = self.hybrid_config
        linear = Model({"mixers": self.aligned_mixers()}, self.linear_config)
        attention = Model(self._file_values(["mixers"]), self.teacher_config)
        mixers = with_softmax_layers(linear, attention, config.layer_types).params["mixers"]
        params = self._file_values(part for part in self.teacher_variables if part != "mixers") | {"mixers": mixers}
        return _masters(params) if self._shares_values else params

    def trained(self, stage: str | None = None, dtype: Any = jnp.float32) -> Model:
        """The hybrid that the given stage, or the last one done, has left; in `dtype`, but for what is `Exact`.

        Raises:
            RunError: it is not done.
        """
        stage = stage or next(filter(self.folder.is_done, reversed(TRAINED)), None)
        if stage is None:
            raise RunError(f"{self.folder.path} has no trained student yet. Run `jaxhybrid distill CONFIG` first.")
        config = self.hybrid_config
        params = self.folder.load_params(stage, abstract_params(config, self.mesh, dtype))
        return Model(params, config, str(self.teacher_files.folder))


def student_config(config: RunConfig, teacher: ModelConfig, softmax_layers: Sequence[int]) -> ModelConfig:
    """Of the teacher's student in which these layers are softmax.

    Without any it is the student that stages before the hybrid work on: layers that they make softmax, to score or to
    choose, are untrained and have the teacher's attention as it is.
    """
    mixer = config.mixer.to_model().resolve(teacher)
    types = layer_types(teacher.num_layers, softmax_layers, mixer.kind)
    softmax = config.softmax.to_model() if softmax_layers else teacher.softmax
    return replace(teacher, layer_types=types, mixer=mixer, softmax=softmax)


@jax.jit
def _masters(params: Params) -> Params:
    """Float32 copies, which may be donated."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)
