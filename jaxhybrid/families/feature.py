"""One thing that a model has, and whether an architecture of transformers can say it."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from jaxhybrid.model.config import LinearConfig, ModelConfig

ROPE_KINDS = ("default", "linear", "llama3", "yarn")  # of "dynamic" transformers remembers the longest text it has seen
# Parts of our configs that the features of every architecture speak of, or that decide how a layer starts.
KNOWN_PARTS = (
    *("family", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
    *("head_dim", "norm_eps", "max_position_embeddings", "rope", "tie_embeddings", "qkv_bias", "o_bias", "mlp_bias"),
    *("qk_norm", "layer_types", "mixer", "softmax", "experts"),
)
NO_CONVOLUTION_TAPS = 4  # where a student has no convolution: taps that pass the current token through
KNOWN_SETTINGS = ("expand_kv", "output_gate", "rope", "qkv_bias", "qk_norm", "gate_init", "decay_init")


@dataclass(frozen=True)
class Feature:
    """One thing a model has, and whether an architecture can say it.

    Attributes:
        here: the student's.
        there: the architecture's.
        remedy: the setting that would make them agree, for a new run.
    """

    name: str
    here: str
    there: str
    fits: bool
    remedy: str = ""


def flag(name: str, here: bool, there: bool, remedy: str = "") -> Feature:
    return Feature(name, words(here), words(there), here == there, remedy)


def words(flag: bool) -> str:
    return "yes" if flag else "no"


def softmax_layers(config: ModelConfig) -> Feature:
    """A model without any has no cache by whose length transformers' `generate` counts."""
    count = len(config.softmax_layers)
    return Feature("softmax layers", str(count), "at least 1, for generate", count > 0, "select.budget")


def length_scale(config: ModelConfig) -> Feature:
    return flag("queries scaled by length", config.softmax.length_scale is not None, False, "softmax.length_scale=null")


def rope_kind(config: ModelConfig) -> Feature:
    """Of what is rotated: softmax layers."""
    fits = config.rope.kind in ROPE_KINDS or not config.softmax.rope
    return Feature("rotary scaling", config.rope.kind, " or ".join(ROPE_KINDS), fits)


def linear_kind(config: ModelConfig, there: str) -> Feature:
    all_softmax = config.mixer is None or len(config.softmax_layers) == config.num_layers
    kind = "none" if all_softmax or config.mixer is None else config.mixer.kind
    return Feature("linear layers", kind, there, kind == there, f"mixer.kind={there}")


def linear_layers(config: ModelConfig, mixer: LinearConfig, biases: Feature) -> list[Feature]:
    """What all architectures want alike of a linear layer, but for its `biases`."""
    there = "one per query head"
    here = there if config.num_states == config.num_heads else "one per K/V head"
    return [
        flag("query and key norms of linear layers", bool(mixer.qk_norm), False, "mixer.qk_norm=false"),
        biases,
        flag("rotary embedding of linear layers", mixer.rope, False, "mixer.rope=false"),
        flag("output gate of linear layers", mixer.output_gate, True, "mixer.output_gate=true"),
        Feature("states of linear layers", here, there, here == there, "mixer.expand_kv=true"),
    ]


def no_linear_biases(mixer: LinearConfig) -> Feature:
    return flag("biases on q, k, v of linear layers", bool(mixer.qkv_bias), False, "mixer.qkv_bias=false")


def others(config: Any, known: tuple[str, ...], prefix: str = "") -> Iterator[Feature]:
    """What a config has beside the known parts: expressed by nothing unless it is as if absent."""
    for item in fields(config):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if item.name not in known and getattr(config, item.name) != default:
            yield Feature(f"{prefix}{item.name}", str(getattr(config, item.name)), str(default), False)
