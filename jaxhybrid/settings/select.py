"""Settings of the choice of the softmax layers.

A method of selection is one file of `selection/methods`, its settings are a class in that file, and its section of the
config is named as it is. Those files stand above the settings: they are imported by name once a config is read.
"""

import math
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)

from jaxhybrid.errors import ConfigError
from jaxhybrid.settings.budget import Budget
from jaxhybrid.settings.stages import AlignConfig
from jaxhybrid.settings.types import Count, Ints, Positive, RankBy, Section, UniformBy, about, free


class MeasureConfig(Section):
    """The text on which methods that measure the aligned student do so; docs/selection.md says which do."""

    source: Literal["heldout", "train"] = about(
        "heldout", "held-out text, or training text in an order that no stage sees"
    )
    tokens: Count = about(32_768, "tokens, padding included; whole batches that hold them are taken")
    sequence_length: Annotated[int, Field(ge=2)] = about(512, "tokens of a row")
    batch_size: Count = about(16, "rows run at once")
    recall: Annotated[float, Field(ge=0, le=1)] = about(
        0.0, "share of the KL or loss at answers of the recall probe's prompts; the rest is the text's"
    )
    recall_pairs: Annotated[int, Field(ge=2)] = about(16, "pairs listed in such a prompt")
    kl_chunk: Count = free(2048, "tokens whose logits are held at once")

    @property
    def batches(self) -> int:
        return self.batches_of(self.tokens)

    def batches_of(self, tokens: int) -> int:
        """Whole batches that hold so many tokens."""
        return math.ceil(math.ceil(tokens / self.sequence_length) / self.batch_size)


class MethodConfig(Section):
    """Settings of one method."""

    @property
    def asks(self) -> tuple[str, ...]:
        """Other methods that this one asks."""
        return ()

    def trouble(self, measure: MeasureConfig) -> str | None:
        """What of these settings does not go with `select.measure`, in words."""
        return None


class TrainingConfig(MethodConfig):
    """Training text of a method that trains."""

    tokens: Count = about(2_097_152, "training tokens, padding included; whole steps that fit in it are taken")
    sequence_length: Annotated[int, Field(ge=2)] = about(512, "tokens of a row")
    batch_size: Count = about(32, "rows of a step")

    @property
    def steps(self) -> int:
        return self.tokens // (self.sequence_length * self.batch_size)

    def trouble(self, measure: MeasureConfig) -> str | None:
        step = self.sequence_length * self.batch_size
        return None if self.steps else f"tokens {self.tokens:,} are less than one step, {step:,}"


class MixerTrainingConfig(TrainingConfig):
    """Of a method that trains the linear mixers."""

    learning_rate: Positive = about(1e-4, "peak learning rate of the mixers; it ends at a tenth, by half a cosine")

    @property
    def training(self) -> AlignConfig:
        return AlignConfig(
            tokens=self.tokens,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            final_learning_rate=self.learning_rate / 10,
            warmup_steps=min(20, self.steps // 10),
        )


class SelectConfig(Section):
    """Which layers keep softmax attention."""

    method: str = about("greedy_kl", "how the softmax layers are chosen: docs/selection.md")
    budget: Budget = about(0.25, "softmax layers: how many (4), or a share of the depth, rounded half up (0.25)")
    layers: Ints | None = about(None, "the softmax layers of method explicit, from 0")
    seed: int = about(0, "seed of method random")
    uniform: UniformBy = about(
        "last", "layer that method uniform keeps of each group; papers: last for Llama-3.2, first for Qwen2.5"
    )
    rank_by: RankBy = about(
        "heldout", "KL that ranks layers for kl_guided and stop_when_stable: on held-out text or at the last steps"
    )
    measure: MeasureConfig = about(MeasureConfig(), "the text of methods that measure")

    @classmethod
    def whole(cls) -> type[Self]:
        """With the names of all methods and a section for each that has settings."""
        return _with_methods(cls)

    @property
    def own(self) -> MethodConfig | None:
        """The section of the method, if it has one."""
        return getattr(self, self.method, None) if methods()[self.method].settings else None

    @property
    def asked(self) -> tuple[str, ...]:
        """The method, and those that it asks."""
        return (self.method, *(self.own.asks if self.own else ()))

    @property
    def needs(self) -> frozenset[str]:
        """What they need: see `Method.needs`."""
        return frozenset(methods()[name].needs for name in self.asked)

    @property
    def reads(self) -> tuple[str, ...]:
        """The sections that they read; the others are not part of what the method gives."""
        sections = tuple(name for name in self.asked if methods()[name].settings is not None)
        return ("measure",) * any(methods()[name].measures_text for name in self.asked) + sections

    @property
    def texts(self) -> "dict[str, MeasureConfig | TrainingConfig]":
        """Of these sections, those that say what rows of text are run."""
        read = {name: getattr(self, name) for name in self.reads}
        return {name: text for name, text in read.items() if isinstance(text, MeasureConfig | TrainingConfig)}

    @property
    def idle(self) -> frozenset[str]:
        """Sections that neither the method nor those that it asks read."""
        sections = {name for name, method in methods().items() if method.settings is not None}
        return frozenset((sections | {"measure"}) - set(self.reads))

    @model_validator(mode="before")
    @classmethod
    def _budget_of_layers(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("method") == "explicit" and isinstance(data.get("layers"), list | tuple):
            return {"budget": len(data["layers"]), **data}
        return data

    @model_validator(mode="before")
    @classmethod
    def _recall_of_earlier_versions(cls, data: Any) -> Any:
        """There it was greedy_kl's alone."""
        greedy = data.get("greedy_kl") if isinstance(data, dict) else None
        if not isinstance(greedy, dict) or not (named := greedy.keys() & {"recall", "recall_pairs"}):
            return data
        measure = {**(data.get("measure") or {})}
        for key in named if data.get("method") == "greedy_kl" else ():
            if measure.setdefault(key, greedy[key]) != greedy[key]:
                raise ValueError(f"measure.{key} is {measure[key]} and greedy_kl.{key} {greedy[key]}; give the first")
        kept = {key: value for key, value in greedy.items() if key not in named}
        return {**data, "greedy_kl": kept, "measure": measure}

    @model_validator(mode="after")
    def _check(self) -> "SelectConfig":
        if (self.method == "explicit") != (self.layers is not None):
            raise ValueError(
                f"layers is {self.layers} with method {self.method!r}; layers belongs to method 'explicit' alone"
            )
        if self.layers is not None and (len(set(self.layers)) != len(self.layers) or self.budget != len(self.layers)):
            raise ValueError(f"layers {list(self.layers)} must be different ones and as many as budget {self.budget}")
        for name in self.asked:
            method = methods()[name]
            section = getattr(self, name, None) if method.settings else None
            if trouble := section and section.trouble(self.measure):
                raise ValueError(f"{name}.{trouble}")
            if self.measure.recall and method.measures_text and not method.answers:
                raise ValueError(f"measure.recall is {self.measure.recall}, but method {name!r} counts no answers")
        return self


def methods() -> Mapping[str, Any]:
    """Every method of selection by its name, as the files of `selection/methods` declare them."""
    return import_module("jaxhybrid.selection.methods").METHODS


@cache
def _with_methods(base: type[SelectConfig]) -> Any:
    found = methods()
    sections = {
        name: (method.settings, about(method.settings(), f"method {name}"))
        for name, method in found.items()
        if method.settings is not None
    }
    name = Literal[tuple(found)]  # type: ignore[valid-type]
    fields = {"method": (name, base.model_fields["method"]), **sections}
    return create_model(base.__name__, __base__=base, __doc__=base.__doc__, **fields)  # type: ignore[call-overload]


def _read(value: Any, _: ValidatorFunctionWrapHandler) -> SelectConfig:
    return SelectConfig.whole().model_validate(value)


# A section of a config: `SelectConfig` as it is when all methods are known; written with their sections, too.
Select = Annotated[SerializeAsAny[SelectConfig], WrapValidator(_read)]


def select_config(**settings: Any) -> SelectConfig:
    """Settings of a choice outside a run, checked as those of a run are. Raises ConfigError."""
    try:
        return SelectConfig.whole()(**settings)
    except ValidationError as error:
        found = (f"{'.'.join(map(str, ('select', *one['loc'])))}: {one['msg']}" for one in error.errors())
        raise ConfigError("\n".join(found)) from error
