"""Settings of the choice of the softmax layers: the methods, and a section for each that has settings of its own."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jaxhybrid.settings.budget import Budget
from jaxhybrid.settings.types import Count, Ints, RankBy, Section, UniformBy, about, free

SelectMethod = Literal[
    "kl_guided", "uniform", "random", "explicit", "first", "middle", "last", "alignment_loss", "greedy_kl", "removal",
    "single_kl", "perplexity", "activation_mse", "cosine",
]  # fmt: skip
# The sections that a method reads; the others are not part of what it gives.
SECTIONS: dict[str, tuple[str, ...]] = {
    "greedy_kl": ("measure", "greedy_kl"),
    "removal": ("measure", "removal"),
    **dict.fromkeys(("single_kl", "perplexity", "activation_mse", "cosine"), ("measure",)),
}


class MeasureConfig(Section):
    """The text on which methods that measure the aligned student do so: greedy_kl, removal, single_kl, perplexity,
    activation_mse, cosine."""

    source: Literal["heldout", "train"] = about("heldout", "held-out text, or the training text's first batches")
    tokens: Count = about(32_768, "tokens, padding included; whole batches that hold them are taken")
    sequence_length: Annotated[int, Field(ge=2)] = about(512, "tokens of a row")
    batch_size: Count = about(16, "rows run at once")
    kl_chunk: Count = free(2048, "tokens whose logits are held at once")

    @property
    def batches(self) -> int:
        return self.batches_of(self.tokens)

    def batches_of(self, tokens: int) -> int:
        """Whole batches that hold so many tokens."""
        return math.ceil(math.ceil(tokens / self.sequence_length) / self.batch_size)


class RemovalConfig(Section):
    """Greedy removal on true KL: from the all-softmax model, the layer whose loss costs least becomes linear."""

    first_tokens: Count | None = about(
        None, "tokens of select.measure that the first round compares sets on, growing to all in the last; null: all"
    )
    rescore: Count = about(3, "the closest sets of a round on fewer tokens, compared again on all")


class GreedyKlConfig(RemovalConfig):
    """Greedy addition on true KL: from the aligned all-linear student, the layer that lowers KL most stays softmax."""

    stop_kl: Annotated[float, Field(gt=0)] | None = about(
        None, "keep no further layer once the KL is at most this; the budget is then the most"
    )
    swaps: bool = about(False, "afterwards exchange single layers until no exchange lowers the KL")
    recall: Annotated[float, Field(ge=0, le=1)] = about(
        0.0, "share of the KL at answers of the recall probe's prompts; the rest is the text's"
    )
    recall_pairs: Annotated[int, Field(ge=2)] = about(16, "pairs listed in such a prompt")


class SelectConfig(Section):
    """Which layers keep softmax attention."""

    method: SelectMethod = about("kl_guided", "how the softmax layers are chosen: docs/selection.md")
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
    greedy_kl: GreedyKlConfig = about(GreedyKlConfig(), "method greedy_kl")
    removal: RemovalConfig = about(RemovalConfig(), "method removal")

    @property
    def idle(self) -> frozenset[str]:
        """Sections that the method does not read."""
        return frozenset({"measure", "greedy_kl", "removal"} - set(SECTIONS.get(self.method, ())))

    @property
    def greedy(self) -> RemovalConfig | None:
        """The section of a greedy method, if the method is one."""
        return getattr(self, self.method) if self.method in ("greedy_kl", "removal") else None

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
        first = self.greedy.first_tokens if self.greedy else None
        if first is not None and first > self.measure.tokens:
            raise ValueError(
                f"{self.method}.first_tokens {first:,} are more than the {self.measure.tokens:,} of measure.tokens"
            )
        return self
