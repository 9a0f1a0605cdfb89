"""The typed tree of a run: every setting with its type, default and meaning. `read.py` reads it from YAML."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxhybrid.errors import ConfigError
from jaxhybrid.files import bucket_trouble
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.settings.budget import check_layers, layers_in_budget
from jaxhybrid.settings.evaluate import EvaluateConfig
from jaxhybrid.settings.export_format import NOT_WRITTEN, ExportFormat
from jaxhybrid.settings.mixer import MixerSettings
from jaxhybrid.settings.select import Select, select_config
from jaxhybrid.settings.softmax import SoftmaxSection
from jaxhybrid.settings.stages import STAGES, AlignConfig, DistillConfig, FinetuneConfig, ScoreConfig, StageConfig
from jaxhybrid.settings.types import Count, Dtype, Names, Section, Sources, about, free


class DataConfig(Section):
    """Text. A source is `pydoc`, `hub:ID[:CONFIG[:SPLIT]]`, or a path or glob of parquet, arrow, jsonl, json, txt."""

    train: Sources = Field(description="training text: one source or a list of them; must be given")
    heldout: Sources | None = about(None, "text of held-out figures; null: taken out of train, by hash of the document")
    heldout_tokens: Count = about(2_000_000, "tokens taken out of train when there is no data.heldout")
    text_column: str = about("text", "column or field that holds the text")
    tokenizer: str | None = about(None, "folder or hub id of the tokenizer; null: the teacher's")
    document_end_token: str | None = about(
        "end_of_text",
        "token put after every document; end_of_text: the one that ends a text in pretraining (<|endoftext|>, "
        "<|end_of_text|>) where a chat model's tokenizer has it beside its EOS, else EOS; null: EOS",
    )
    prepend_bos: bool | None = about(
        None, "put the BOS token before every document and prompt; null: as the tokenizer does by itself"
    )
    max_document_tokens: Annotated[int, Field(ge=2)] | None = about(None, "longest document; null: any length")
    min_document_tokens: Count | None = about(
        None, "documents shorter than this are passed over, held-out ones too; null: none. A split one counts by piece"
    )
    long_documents: Literal["split", "cut"] = about(
        "split", "over max_document_tokens: split into several, or cut the rest off"
    )
    separate_documents: bool = about(
        True, "documents in a row do not see each other; false: a row is one text, as in KL-guided selection's code"
    )
    streaming: bool = about(
        False, "read train in passing, without a token cache: slower to resume, shuffled in a buffer only"
    )
    shuffle_buffer: Count = about(10_000, "documents in the shuffle buffer of a streaming source")
    cache_dir: str = free("~/.cache/jaxhybrid/tokens", "folder of tokenised text, shared by runs")

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.heldout and (shared := set(self.heldout) & set(self.train)):
            raise ValueError(f"train and heldout both name {sorted(shared)}; held-out text must be other text")
        self.check_least(self.min_document_tokens)
        return self

    def check_least(self, tokens: int | None) -> None:
        """Refuses a shortest document that is longer than the longest."""
        longest = self.max_document_tokens
        if tokens is not None and longest is not None and tokens > longest:
            raise ValueError(
                f"min_document_tokens {tokens} is above max_document_tokens {longest}; no text would be left"
            )


class MeshConfig(Section):
    """Devices along each mesh axis; -1 takes the rest."""

    data: int = free(1, "replicas of the parameters; batches divide over data x fsdp")
    fsdp: int = free(-1, "devices that share the parameters between them")
    tensor: int = free(1, "devices that share heads, MLP width and vocabulary")
    context: int = free(1, "devices that share the tokens of a row")
    sums: Dtype = free("float32", "type in which devices add up gradients; bfloat16 halves these exchanges, and rounds")

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis."""
        return self.model_dump(include={"data", "fsdp", "tensor", "context"})

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        for name, size in self.sizes.items():
            if size < 1 and not (size == -1 and name in ("data", "fsdp")):
                rest = ", or -1 for the rest of the devices" if name in ("data", "fsdp") else ""
                raise ValueError(f"{name} is {size}; give a positive number{rest}")
        if self.data == self.fsdp == -1:
            raise ValueError("data and fsdp are both -1; only one axis can take the rest of the devices")
        return self


class ExportConfig(Section):
    """The Hugging Face folder."""

    folder: str | None = about(None, "where to write; null: RUN_DIR/export")
    dtype: Dtype = about("bfloat16", "type of the weights in the files")
    format: ExportFormat = about(
        "auto", "native: an architecture of transformers itself; remote-code: its own code; auto: native where exact"
    )
    max_shard: str = about("5GB", "largest weights file, as 5GB or 500MB")

    @field_validator("format", mode="before")
    @classmethod
    def _check_format(cls, value: Any) -> Any:
        if why := NOT_WRITTEN.get(str(value)):
            raise ValueError(f"{value!r} is not written. {why}")
        return value

    @field_validator("max_shard")
    @classmethod
    def _check_shard(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d*(MB|GB)", value):
            raise ValueError(f"{value!r} is no size such as 5GB or 500MB")
        return value

    @property
    def max_shard_bytes(self) -> int:
        """In powers of ten."""
        return int(self.max_shard[:-2]) * {"MB": 10**6, "GB": 10**9}[self.max_shard[-2:]]


class RunConfig(Section):
    """One conversion, from teacher to exported hybrid."""

    name: str = Field(
        description="name of the run: letters, digits, dot, dash, underscore",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        json_schema_extra={"free": True},
    )
    run_dir: str = free("", "folder of everything the run writes; default runs/NAME")
    teacher: str = Field(
        description="the teacher: folder, hub id, GGUF file or a pattern of its parts, or demo:smollm2-135m",
        min_length=1,
    )
    ignore_config_keys: Names = about((), "keys of the teacher's config.json that are unknown here and do not matter")
    seed: int = about(0, "seed of initial values and of the order of the text")
    dtype: Dtype = about("bfloat16", "type of the matrix products; masters, gates and states are float32")
    mixer: MixerSettings = about(MixerSettings(), "the linear mixer")
    softmax: SoftmaxSection = about(SoftmaxSection(), "the softmax layers that are kept")
    data: DataConfig = Field(description="text")
    mesh: MeshConfig = free(MeshConfig(), "devices")
    align: AlignConfig = about(AlignConfig(), "stage 1")
    score: ScoreConfig = about(ScoreConfig(), "layer importance, for select.method=kl_guided")
    select: Select = Field(default_factory=select_config, description="choice of the softmax layers")
    distill: DistillConfig = about(DistillConfig(), "stage 2")
    finetune: FinetuneConfig = about(FinetuneConfig(), "stage 3")
    evaluate: EvaluateConfig = free(EvaluateConfig(), "figures")
    export: ExportConfig = free(ExportConfig(), "Hugging Face folder")

    def batches(self, devices: int) -> Iterator[tuple[str, int, int, int]]:
        """Section, rows, parts that a step is run in and tokens of a row, of everything that a run runs on its mesh."""
        for name in STAGES:
            stage: StageConfig = getattr(self, name)
            if name != "score" or "scores" in self.select.needs:
                yield name, stage.batch_size, stage.gradient_accumulation, stage.sequence_length
        yield "evaluate", self.evaluate.batch_size, 1, self.evaluate.sequence_length
        for length in self.evaluate.lengths:
            yield "evaluate.lengths", devices, 1, length  # the number of rows is made to fit
        for name, text in self.select.texts.items():
            yield f"select.{name}", text.batch_size, 1, text.sequence_length

    @model_validator(mode="before")
    @classmethod
    def _default_folder(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("run_dir"):
            return {**data, "run_dir": f"runs/{data.get('name')}"}
        return data

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        for stage in STAGES:
            try:
                self.data.check_least(getattr(self, stage).min_document_tokens)
            except ValueError as error:
                raise ValueError(f"{stage}.{error}") from error
        self._check_calibration()
        for key, path in (
            ("run_dir", self.run_dir),
            ("data.cache_dir", self.data.cache_dir),
            ("export.folder", self.export.folder),
        ):
            if trouble := bucket_trouble(path or ""):
                raise ValueError(f"{key}: {trouble}")
        if self.export.format == "native" and self.softmax.length_scale is not None:
            raise ValueError(
                "export.format native: no architecture of transformers itself has what softmax.length_scale does; take "
                "remote-code, or leave it out"
            )
        heldout = {f"{name}.heldout_tokens": getattr(self, name).heldout_tokens for name in ("score", "evaluate")}
        if "measure" not in self.select.idle and self.select.measure.source == "heldout":
            heldout["select.measure.tokens"] = self.select.measure.tokens
        for key, wanted in heldout.items():
            if self.data.heldout is None and wanted > self.data.heldout_tokens:
                raise ValueError(
                    f"{key} {wanted:,} are more than the {self.data.heldout_tokens:,} that "
                    "data.heldout_tokens takes out of train; raise that, or give data.heldout"
                )
        return self

    def _check_calibration(self) -> None:
        if self.align.calibrate is None:
            return
        if self.mixer.kind not in LINEAR_MIXERS:
            raise ValueError(f"align.calibrate: mixer.kind {self.mixer.kind} begins as the teacher; leave it out")
        takes = LINEAR_MIXERS[self.mixer.kind].takes(self.mixer.to_model())
        if refused := [part for part in self.calibrated_parts if part not in takes]:
            raise ValueError(
                f"align.calibrate.parts: {self.mixer.kind} with its settings takes {', '.join(takes)}; leave out "
                f"{', '.join(refused)}"
            )

    @property
    def calibrated_parts(self) -> tuple[str, ...]:
        """What of the mixer begins at measured values."""
        if self.align.calibrate is None:
            return ()
        return self.align.calibrate.parts or LINEAR_MIXERS[self.mixer.kind].takes(self.mixer.to_model())


def validate_against(config: RunConfig, model: ModelConfig) -> None:
    """What can be checked only when the teacher is known. Raises ConfigError naming the key and both numbers."""
    depth = model.num_layers
    layers_in_budget(config.select.budget, depth, "select.budget")
    for budget in config.score.budgets:
        layers_in_budget(budget, depth, "score.budgets")
    if config.softmax.length_scale is not None and model.window is not None:
        raise ConfigError(
            f"softmax.length_scale {config.softmax.length_scale:g} is for layers that see all earlier tokens; some of "
            f"this teacher's see {model.window.size} at most. Leave it out."
        )
    for stage, settings in (("align", config.align), ("distill", config.distill)):
        if settings.float8_teacher and model.experts is not None:
            raise ConfigError(
                f"{stage}.float8_teacher: this teacher's MLPs are mixtures of experts, which have no form in float8 "
                "here. Leave it out."
            )
    if config.select.layers:
        check_layers(config.select.layers, depth)
    # Fine-tuning may go beyond the teacher's context; the stages that read the teacher's output may not.
    lengths = {name: getattr(config, name).sequence_length for name in ("align", "score", "distill", "evaluate")}
    lengths |= {f"select.{name}": text.sequence_length for name, text in config.select.texts.items()}
    if config.align.calibrate:
        lengths["align.calibrate"] = config.align.calibrate.sequence_length
    given = [(f"{section}.sequence_length", length) for section, length in lengths.items()]
    given += [("evaluate.lengths", length) for length in config.evaluate.lengths]
    if config.evaluate.ruler.tasks:
        given += [("evaluate.ruler.lengths", length) for length in config.evaluate.ruler.lengths]
    for key, length in given:
        if length > model.max_position_embeddings:
            raise ConfigError(
                f"{key} {length} is beyond the {model.max_position_embeddings} tokens of context that the teacher has."
            )
