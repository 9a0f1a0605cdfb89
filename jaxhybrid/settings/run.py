"""The typed tree of a run: every setting with its type, default and meaning. `read.py` reads it from YAML.

Defaults are those of KL-guided layer selection (arXiv 2512.20569) and RADLADS (arXiv 2505.03005). A field declared with
`free` changes speed, memory, logging or a report, never what is trained (beyond rounding), so a run folder may be
continued under another value of it.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from jaxhybrid.errors import TopologyError
from jaxhybrid.model.config import GatedDeltaNetConfig

Dtype = Literal["bfloat16", "float32"]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def _check_budget(value: int | float) -> int | float:
    if value < 0 if isinstance(value, int) else not 0 < value < 1:
        raise ValueError(f"{value} is neither a number of layers nor a share between 0 and 1")
    return value


Budget = Annotated[int | float, AfterValidator(_check_budget)]  # softmax layers: how many, or a share of the depth


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_sources(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


# Tuples, written as YAML lists.
Budgets = Annotated[tuple[Budget, ...], BeforeValidator(_as_tuple)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_as_tuple)]
Amounts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_tuple)]
Sources = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_sources), Field(min_length=1)]


def about(default: Any, description: str) -> Any:
    return Field(default, description=description)


def free(default: Any, description: str) -> Any:
    """A setting that does not affect trained numbers."""
    return Field(default, description=description, json_schema_extra={"free": True})


class Section(BaseModel):
    """Frozen, strict about types, and without room for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class MixerConfig(Section):
    """The linear mixer that replaces softmax attention; `null` settings follow the teacher."""

    kind: Literal["gated_deltanet"] = about("gated_deltanet", "which linear mixer")
    expand_kv: bool = about(
        True, "clone each K/V head for its group of query heads; false keeps one state per K/V head"
    )
    output_gate: bool = about(True, "multiply the normalised output by a gate of the input")
    conv_size: Annotated[int, Field(ge=0)] = about(0, "taps of the causal short convolution on q, k, v; 0 has none")
    rope: bool = about(False, "rotate q and k as the teacher does")
    qkv_bias: bool | None = about(None, "carry the teacher's projection biases; null: if it has them")
    qk_norm: bool | None = about(None, "carry the teacher's query and key norms; null: if it has them")
    gate_init: Literal["random", "zero", "value"] = about(
        "random", "output gate at the start: random, zero, copy of v_proj"
    )
    decay_init: Literal["fla", "slow"] = about(
        "fla", "decays at the start: fla's random ranges, or half-lives 64 to 4096"
    )

    def to_model(self) -> GatedDeltaNetConfig:
        return GatedDeltaNetConfig(**self.model_dump(exclude={"kind"}))


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
    tensor: int = free(1, "devices that share heads and MLP width; only 1 is built")
    context: int = free(1, "devices that share the tokens of a sequence; only 1 is built")

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        for name, size in dict(self).items():
            if size != -1 and size < 1:
                raise ValueError(f"{name} is {size}; give a positive number, or -1 for the rest of the devices")
        if self.data == self.fsdp == -1:
            raise ValueError("data and fsdp are both -1; only one axis can take the rest of the devices")
        for name in ("tensor", "context"):
            if (size := getattr(self, name)) != 1:
                raise TopologyError(
                    f"mesh.{name}={size}: this axis is not built yet; leave it at 1 and use data and fsdp."
                )
        return self


class StageConfig(Section):
    """Settings that every trained stage has."""

    tokens: Count = about(100_000_000, "training tokens, padding included; whole steps that fit in it are taken")
    sequence_length: Annotated[int, Field(ge=2)] = about(512, "tokens of a row")
    batch_size: Count = about(96, "rows of a step, over all devices and accumulation")
    min_document_tokens: Count | None = about(
        None, "in this stage's training, documents shorter than this are passed over, too; null: as data has it"
    )
    gradient_accumulation: Count = free(1, "parts a step's batch is run in, one after the other")
    learning_rate: Positive = about(1e-3, "peak learning rate")
    final_learning_rate: Annotated[float, Field(ge=0)] = about(0.0, "learning rate at the end of linear and cosine")
    schedule: Literal["constant", "cosine", "linear"] = about("constant", "course of the learning rate after warmup")
    warmup_steps: Annotated[int, Field(ge=0)] = about(50, "steps of linear warmup from 0")
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)] = about(
        (0.9, 0.95), "AdamW's moment decays"
    )
    eps: Positive = about(1e-8, "AdamW's epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = about(
        0.0, "AdamW's decoupled weight decay of matrices; norms, biases, A_log and dt_bias have none"
    )
    clip_norm: Positive | None = about(1.0, "largest global gradient norm; null does not clip")
    remat: bool = free(True, "recompute each block in the backward pass: less memory, about a third more time")
    checkpoint_every: Count = free(500, "steps between checkpoints")
    log_every: Count = free(10, "steps between lines of metrics.jsonl")

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.batch_size

    @property
    def steps(self) -> int:
        return self.tokens // self.tokens_per_step

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation {self.gradient_accumulation}"
            )
        if self.steps < 1:
            raise ValueError(
                f"tokens {self.tokens:,} are less than one step: batch_size {self.batch_size} x "
                f"sequence_length {self.sequence_length} = {self.tokens_per_step:,}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leave nothing of the {self.steps} steps in {self.tokens:,} tokens"
            )
        if self.schedule != "constant" and self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate {self.final_learning_rate} is above learning_rate {self.learning_rate}"
            )
        return self


class AlignConfig(StageConfig):
    """Hidden-state alignment: the linear mixers alone learn to give the teacher's mixer outputs."""

    schedule: Literal["constant", "cosine", "linear"] = about("cosine", "course of the learning rate after warmup")
    final_learning_rate: Annotated[float, Field(ge=0)] = about(1e-5, "learning rate at the end of linear and cosine")
    remat: bool = free(True, "without effect: alignment keeps no other layer's activations")


class GroupedStageConfig(StageConfig):
    """Everything trains, in two groups: the mixers (kept softmax layers among them) and the rest."""

    learning_rate: Positive = about(7e-6, "peak learning rate of everything but the mixers")
    mixer_learning_rate: Positive = about(1e-4, "peak learning rate of the mixers, kept softmax layers among them")
    final_mixer_learning_rate: Annotated[float, Field(ge=0)] = about(0.0, "the mixers' final_learning_rate")

    @model_validator(mode="after")
    def _check_mixers(self) -> "GroupedStageConfig":
        if self.schedule != "constant" and self.final_mixer_learning_rate > self.mixer_learning_rate:
            raise ValueError(
                f"final_mixer_learning_rate {self.final_mixer_learning_rate} is above "
                f"mixer_learning_rate {self.mixer_learning_rate}"
            )
        return self


class KlStageConfig(GroupedStageConfig):
    """The loss is the KL to the teacher over the full vocabulary."""

    sequence_length: Annotated[int, Field(ge=2)] = about(4096, "tokens of a row")
    batch_size: Count = about(32, "rows of a step, over all devices and accumulation")
    kl_chunk: Count = free(512, "tokens whose logits are held at once")


class StabilityConfig(Section):
    """Ends scoring early, once the layers that select.budget keeps no longer change. It saves tokens, and may take a
    plateau for the end: published sets settle after 150 to 250 million tokens."""

    window_tokens: Count | None = about(
        100_000_000, "tokens of each candidate over which the set must stay; holds two evaluations or more"
    )
    window: Annotated[int, Field(ge=2)] | None = about(
        None, "in place of window_tokens, which is then null: how many evaluations in a row must agree"
    )
    jaccard: Annotated[float, Field(gt=0, le=1)] = about(
        1.0, "least overlap of the chosen sets of neighbouring evaluations"
    )
    every: Count = about(
        1, "evaluations between two looks at the sets; at each look every candidate is written to disk and read again"
    )

    @model_validator(mode="before")
    @classmethod
    def _window_alone(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("window") is not None:
            return {"window_tokens": None, **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> "StabilityConfig":
        if (self.window_tokens is None) == (self.window is None):
            raise ValueError(f"window_tokens is {self.window_tokens} and window {self.window}; give one of them")
        return self


class ScoreConfig(KlStageConfig):
    """Layer importance: the KL reached when one layer alone is softmax."""

    tokens: Count = about(200_000_000, "training tokens of each candidate")
    heldout_tokens: Count = about(1_000_000, "held-out tokens of each evaluation")
    evaluate_every: Count = about(100, "steps between evaluations, the points of the importance curve")
    keep_teacher_states: bool = free(
        True,
        "keep the teacher's hidden states on disk for all layers (tokens x width x 2 bytes); false: run it for each",
    )
    budgets: Budgets = about((0.125, 0.25, 0.5), "budgets whose chosen sets are followed over tokens")
    stop_when_stable: StabilityConfig | None = about(None, "rule to stop before tokens are used up; null: never")
    kept_dtype: Dtype = about(
        "float32",
        "all candidates wait on disk between two looks of stop_when_stable, 12 bytes a parameter each in float32; "
        "bfloat16 keeps 6 (changes and moments rounded), which changes scores slightly",
    )

    @model_validator(mode="after")
    def _check_stability(self) -> "ScoreConfig":
        window = self.stop_when_stable.window_tokens if self.stop_when_stable else None
        between = self.evaluate_every * self.tokens_per_step
        if window is not None and not 2 * between <= window < self.tokens:
            raise ValueError(
                f"stop_when_stable.window_tokens {window:,} must hold two evaluations, {2 * between:,} tokens "
                f"(evaluate_every {self.evaluate_every} steps of {self.tokens_per_step:,}), and be fewer than the "
                f"{self.tokens:,} tokens of a candidate"
            )
        return self


class DistillConfig(KlStageConfig):
    """KL distillation of the hybrid; everything trains."""

    tokens: Count = about(600_000_000, "training tokens, padding included; whole steps that fit in it are taken")


class FinetuneConfig(GroupedStageConfig):
    """Cross entropy on longer rows; everything trains, without the teacher."""

    sequence_length: Annotated[int, Field(ge=2)] = about(16_384, "tokens of a row")
    learning_rate: Positive = about(1e-5, "peak learning rate of everything but the mixers")
    mixer_learning_rate: Positive = about(1e-5, "peak learning rate of the mixers, kept softmax layers among them")
    warmup_steps: Annotated[int, Field(ge=0)] = about(10, "steps of linear warmup from 0")


class SelectConfig(Section):
    """Which layers keep softmax attention."""

    method: Literal["kl_guided", "uniform", "random", "explicit"] = about(
        "kl_guided", "how the softmax layers are chosen"
    )
    budget: Budget = about(0.25, "softmax layers: how many (4), or a share of the depth, rounded half up (0.25)")
    layers: Layers | None = about(None, "the softmax layers of method explicit, from 0")
    seed: int = about(0, "seed of method random")
    uniform: Literal["last", "first"] = about(
        "last", "layer that method uniform keeps of each group; papers: last for Llama-3.2, first for Qwen2.5"
    )
    rank_by: Literal["heldout", "train"] = about(
        "heldout", "KL that ranks layers for kl_guided and stop_when_stable: on held-out text or at the last steps"
    )

    @model_validator(mode="before")
    @classmethod
    def _budget_of_layers(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("method") == "explicit" and isinstance(data.get("layers"), list | tuple):
            return {"budget": len(data["layers"]), **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> "SelectConfig":
        if (self.method == "explicit") != (self.layers is not None):
            raise ValueError(
                f"layers is {self.layers} with method {self.method!r}; layers belongs to method 'explicit' alone"
            )
        if self.layers is not None and (len(set(self.layers)) != len(self.layers) or self.budget != len(self.layers)):
            raise ValueError(f"layers {list(self.layers)} must be different ones and as many as budget {self.budget}")
        return self


class RecallConfig(Section):
    """Made-up associative recall: a list of names and numbers, then the same names again, each number asked for."""

    pairs: Counts = about((4, 16, 64), "lengths of the list, one set of figures each; [] leaves the probe out")
    filler: Amounts = about((0,), "tokens of made-up prose between list and questions; every length with each")
    samples: Count = about(500, "prompts for each length and filler; each asks for every number of its list")


class EvaluateConfig(Section):
    """Figures of teacher and student on held-out text and tasks."""

    heldout_tokens: Count = about(1_000_000, "held-out tokens of perplexity and KL")
    sequence_length: Annotated[int, Field(ge=2)] = about(4096, "tokens of a row")
    batch_size: Count = about(8, "rows of a step")
    recall: RecallConfig = about(RecallConfig(), "associative recall")


class ExportConfig(Section):
    """The Hugging Face folder."""

    folder: str | None = about(None, "where to write; null: RUN_DIR/export")
    dtype: Dtype = about("bfloat16", "type of the weights in the files")
    max_shard: str = about("5GB", "largest weights file, as 5GB or 500MB")

    @field_validator("max_shard")
    @classmethod
    def _check_shard(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d*(MB|GB)", value):
            raise ValueError(f"{value!r} is no size such as 5GB or 500MB")
        return value


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
    mixer: MixerConfig = about(MixerConfig(), "the linear mixer")
    data: DataConfig = Field(description="text")
    mesh: MeshConfig = free(MeshConfig(), "devices")
    align: AlignConfig = about(AlignConfig(), "stage 1")
    score: ScoreConfig = about(ScoreConfig(), "layer importance")
    select: SelectConfig = about(SelectConfig(), "choice of the softmax layers")
    distill: DistillConfig = about(DistillConfig(), "stage 2")
    finetune: FinetuneConfig = about(FinetuneConfig(), "stage 3")
    evaluate: EvaluateConfig = free(EvaluateConfig(), "figures")
    export: ExportConfig = free(ExportConfig(), "Hugging Face folder")

    @model_validator(mode="before")
    @classmethod
    def _default_folder(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("run_dir"):
            return {**data, "run_dir": f"runs/{data.get('name')}"}
        return data

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        for stage in ("align", "score", "distill", "finetune"):
            try:
                self.data.check_least(getattr(self, stage).min_document_tokens)
            except ValueError as error:
                raise ValueError(f"{stage}.{error}") from error
        for section in ("score", "evaluate"):
            wanted = getattr(self, section).heldout_tokens
            if self.data.heldout is None and wanted > self.data.heldout_tokens:
                raise ValueError(
                    f"{section}.heldout_tokens {wanted:,} are more than the {self.data.heldout_tokens:,} that "
                    "data.heldout_tokens takes out of train; raise that, or give data.heldout"
                )
        return self
