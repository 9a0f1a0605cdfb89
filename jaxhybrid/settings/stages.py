"""Settings of the stages that train. Defaults are those of KL-guided layer selection (arXiv 2512.20569) and RADLADS
(arXiv 2505.03005)."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from jaxhybrid.settings.budget import Budgets
from jaxhybrid.settings.types import (
    Count,
    Dtype,
    Fraction,
    Offload,
    Optimizer,
    Positive,
    RematPolicy,
    Schedule,
    Section,
    about,
    as_tuple,
    free,
)

Part = Literal["decay", "strength", "gate", "scale"]
STAGES = ("align", "score", "distill", "finetune")  # in their order


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
    schedule: Schedule = about("constant", "course of the learning rate after warmup")
    warmup_steps: Annotated[int, Field(ge=0)] = about(50, "steps of linear warmup from 0")
    optimizer: Optimizer = about(
        "adamw", "adafactor: second moments as rows and columns, no first ones, and betas and eps are not used"
    )
    moment_dtype: Dtype = about("float32", "type of AdamW's first moments, rounded at every step in bfloat16")
    offload: Offload = free(
        (),
        "a list of what lies in the host's memory: moments and masters, between updates, and teacher; weights come to "
        "the devices layer by layer",
    )
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(as_tuple)] = about((0.9, 0.95), "AdamW's moment decays")
    eps: Positive = about(1e-8, "AdamW's epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = about(
        0.0, "AdamW's decoupled weight decay of matrices; norms, biases, A_log and dt_bias have none"
    )
    clip_norm: Positive | None = about(1.0, "largest global gradient norm; null does not clip")
    remat: RematPolicy = free(
        "block",
        "what the backward pass computes again. none: nothing; dots: all but matrix products; mlp: mixers, and what "
        "is cheap of MLPs; block: each block from its input, a third more time; offload: so, with the inputs in the "
        "host's memory",
    )
    unroll: bool = free(
        False,
        "compile each layer by itself and not in a loop over all: on GPUs faster distillation, slower alignment; up to "
        "2.4 times as long to compile (docs/steps.md); weights are cast to the compute dtype once a step",
    )
    checkpoint_every: Count = free(500, "steps between checkpoints")
    keep_checkpoints: Count = free(2, "newest checkpoints that stay; one more is being written")
    log_every: Count = free(10, "steps between lines of metrics.jsonl")

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.batch_size

    @property
    def steps(self) -> int:
        return self.tokens // self.tokens_per_step

    @property
    def state_bytes(self) -> int:
        """Of one parameter in a checkpoint: its float32 master and its moments, at most."""
        if self.optimizer == "adafactor":
            return 5  # 4 and a little
        return 10 if self.moment_dtype == "bfloat16" else 12

    @property
    def rates(self) -> dict[str, tuple[float, float]]:
        """Peak and final learning rate of the mixers and of the rest."""
        return dict.fromkeys(("mixer", "rest"), (self.learning_rate, self.final_learning_rate))

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
        if self.unroll and (brought := {"masters", "teacher"} & set(self.offload)):
            raise ValueError(
                f"unroll reads all layers' weights at once, offload {sorted(brought)} layer by layer; drop one of them"
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


class CalibrateConfig(Section):
    """The linear mixers begin at values that are measured on the teacher, on one batch of training text in an order
    that no stage sees; docs/initial_values.md says what it is worth."""

    sequence_length: Annotated[int, Field(ge=2)] = about(2048, "tokens of a row; no half-life can be found beyond it")
    batch_size: Count = about(8, "rows, over all devices")
    half_lives: Literal["fitted", "distance"] = about(
        "fitted", "of decay: those that come nearest to the teacher, of 1 to 4096 tokens; or mean attention distances"
    )
    parts: Annotated[tuple[Part, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = about(
        None, "list of decay, strength, gate and scale; null: all that the mixer takes"
    )


class AlignConfig(StageConfig):
    """Hidden-state alignment: the linear mixers alone learn to give the teacher's mixer outputs."""

    calibrate: CalibrateConfig | None = about(None, "initial values measured on the teacher; null: drawn ones")

    schedule: Schedule = about("cosine", "course of the learning rate after warmup")
    final_learning_rate: Annotated[float, Field(ge=0)] = about(1e-5, "learning rate at the end of linear and cosine")
    remat: RematPolicy = free("block", "without effect: alignment keeps no other layer's activations")
    float8_teacher: bool = about(
        False,
        "the teacher's MLPs multiply in float8, as with distill.float8_teacher: on an H200 a step of the 1.5B shape is "
        "15 % faster (docs/steps.md); mixers learn from the rounded teacher, held-out losses are to the teacher as it "
        "is; not for mixtures of experts",
    )


class GroupedStageConfig(StageConfig):
    """Everything trains, in two groups: the mixers (kept softmax layers among them) and the rest."""

    learning_rate: Positive = about(7e-6, "peak learning rate of everything but the mixers")
    mixer_learning_rate: Positive = about(1e-4, "peak learning rate of the mixers, kept softmax layers among them")
    final_mixer_learning_rate: Annotated[float, Field(ge=0)] = about(0.0, "the mixers' final_learning_rate")

    @property
    def rates(self) -> dict[str, tuple[float, float]]:
        return super().rates | {"mixer": (self.mixer_learning_rate, self.final_mixer_learning_rate)}

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

    def evaluations(self, tokens_between: int) -> int:
        """How many evaluations must agree with the one before them, if these are so many tokens apart."""
        return self.window or math.ceil((self.window_tokens or 0) / tokens_between)


class ScoreConfig(KlStageConfig):
    """Layer importance: the KL reached when one layer alone is softmax."""

    tokens: Count = about(200_000_000, "training tokens of each candidate")
    heldout_tokens: Count = about(1_000_000, "held-out tokens of each evaluation")
    keep_checkpoints: Count = free(1, "newest checkpoints of a candidate that stay")
    recall: Annotated[float, Field(ge=0, le=1)] = about(
        0.0, "share of the held-out KL at answers of the recall probe's prompts; the rest is the text's"
    )
    recall_pairs: Annotated[int, Field(ge=2)] = about(16, "pairs listed in such a prompt")
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

    unroll: bool = free(False, "false: one program serves every candidate, so layers are a loop")

    @model_validator(mode="after")
    def _check_stability(self) -> "ScoreConfig":
        if self.unroll:
            raise ValueError("unroll true: one program serves every candidate, so layers are a loop; drop it")
        if self.offload and self.kept_dtype != "float32":
            raise ValueError(
                f"offload {list(self.offload)} does not go with kept_dtype {self.kept_dtype}; drop one of them"
            )
        if "teacher" in self.offload:
            raise ValueError("offload teacher: candidates are made of the teacher's own arrays; drop it here")
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
    float8_teacher: bool = about(
        False,
        "the teacher's MLPs multiply in float8, scaled by token and column: on an H200 a step of the 1.5B shape is 5 % "
        "faster (docs/steps.md), elsewhere it may gain nothing; the KL is then to a slightly other teacher; not for "
        "mixtures of experts",
    )


class FinetuneConfig(GroupedStageConfig):
    """Cross entropy on longer rows; everything trains, without the teacher."""

    sequence_length: Annotated[int, Field(ge=2)] = about(16_384, "tokens of a row")
    learning_rate: Positive = about(1e-5, "peak learning rate of everything but the mixers")
    mixer_learning_rate: Positive = about(1e-5, "peak learning rate of the mixers, kept softmax layers among them")
    warmup_steps: Annotated[int, Field(ge=0)] = about(10, "steps of linear warmup from 0")
