"""The static description of a model: everything the mathematics needs and nothing about weights, devices or training.

Axis letters used throughout: B batch, T tokens, D model width, H query heads, G key/value heads, K key head width,
V value head width, N states (value heads of a linear mixer), F MLP width, L layers, S vocabulary.
"""

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from jaxhybrid.errors import ConfigError

FULL_ATTENTION = "full_attention"
# What the backward pass computes again: see `model.walk`.
Remat = Literal["none", "block", "mlp", "dots", "offload"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, with the scaling rules of transformers' `rope_parameters`."""

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None  # all but default, linear: the length before extension
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope: scale of cos and sin; None takes the paper's rule
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: each pair's stretch in texts up to the original length
    long_factor: tuple[float, ...] = ()  # longrope: and in longer ones
    partial: float = 1.0  # the share of a head's channels that is rotated, its first ones

    def width(self, head_dim: int) -> int:
        """Channels of a head that are rotated."""
        return int(head_dim * self.partial)


@dataclass(frozen=True)
class WindowConfig:
    """Softmax layers in which a token sees `size` tokens at most, itself among them."""

    size: int
    layers: tuple[int, ...]
    rope: RopeConfig | None = None  # of these layers; None: that of all


@dataclass(frozen=True)
class ExpertsConfig:
    """MLPs of which each token goes through a few, chosen by a router: a mixture of experts in every layer.

    Attributes:
        count: experts of a layer.
        active: of them, how many a token goes through.
        width: F of one expert.
        normalise: the router's weights of the chosen experts are divided by their sum.
    """

    count: int
    active: int
    width: int
    normalise: bool

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.count:
            raise ConfigError(f"A token cannot go through {self.active} of {self.count} experts (num_experts_per_tok).")


@dataclass(frozen=True)
class SoftmaxConfig:
    """What the softmax layers of a student have otherwise than the teacher's (HyPE, arXiv 2601.22156).

    Attributes:
        rope: false leaves queries and keys unrotated.
        length_scale: a; a query with t tokens of its document before it is multiplied by log(t + a) / log(a).
    """

    rope: bool = True
    length_scale: float | None = None

    def __post_init__(self) -> None:
        if self.length_scale is not None and self.length_scale <= 1:
            raise ConfigError(f"softmax.length_scale={self.length_scale}: must be above 1, or null for no scale.")

    def describe(self) -> list[str]:
        """In a few words each; none where nothing differs."""
        a = self.length_scale
        told = [] if self.rope else ["no rotary embedding"]
        return told if a is None else [*told, f"queries scaled by log(t + {a:g}) / log({a:g}) after t tokens"]


def option(default: Any, about: str) -> Any:
    """A field of a mixer's settings, with the words that `jaxhybrid settings` says of it."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class MixerConfig:
    """The settings of the mixer that converted layers have in the place of the teacher's attention."""

    kind: ClassVar[str]  # its name in `layer_types` and in config files

    def resolve(self, teacher: "ModelConfig") -> Self:
        """These settings with every "as the teacher has it" filled in; says what a choice leaves behind.

        Raises:
            ConfigError: they do not go with the teacher.
        """
        return self


@dataclass(frozen=True)
class LinearConfig(MixerConfig):
    """What linear mixers made from softmax attention have in common. `None` is "as the teacher has it": see `resolve`.

    The defaults are those of KL-guided layer selection (arXiv 2512.20569, layers `gdn_v4` and `gla_v1`): heads
    expanded, output gate, no rotary embedding.
    """

    expand_kv: bool = option(
        True, "clone each K/V head for its group of query heads; false keeps one state per K/V head"
    )
    output_gate: bool = option(True, "multiply the normalised output by silu(g_proj x)")
    rope: bool = option(False, "rotate q and k as the teacher does")
    qkv_bias: bool | None = option(None, "carry the teacher's projection biases; null: if it has them")
    qk_norm: bool | None = option(None, "carry the teacher's query and key norms; null: if it has them")
    gate_init: Literal["random", "zero", "value"] = option(
        "random", "output gate at the start: random, zero, copy of v_proj"
    )
    decay_init: Literal["fla", "slow"] = option(
        "fla", "decays at the start: as fla draws them, or half-lives 64 to 4096"
    )

    def resolve(self, teacher: "ModelConfig") -> Self:
        for name in ("qkv_bias", "qk_norm"):
            carried, present = getattr(self, name), getattr(teacher, name)
            if present and carried is False:
                warnings.warn(
                    f"mixer.{name}=False: the teacher's {name} is not carried into the linear layers.", stacklevel=3
                )
            if carried and not present:
                raise ConfigError(f"mixer.{name}=True, but the teacher has no {name} to carry; leave it unset.")
        return replace(
            self,
            qkv_bias=teacher.qkv_bias if self.qkv_bias is None else self.qkv_bias,
            qk_norm=teacher.qk_norm if self.qk_norm is None else self.qk_norm,
        )


@dataclass(frozen=True)
class ModelConfig:
    """One causal language model: blocks of a token mixer and a gated MLP. The defaults are Llama's."""

    family: str  # the Hugging Face model_type whose weight names and config keys apply: llama, gemma3_text, ...
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False  # query and key norms over all heads together, not over each (OLMo 2)
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the MLP's gate
    experts: ExpertsConfig | None = None  # in the place of each MLP (Mixtral, Qwen3-MoE)
    norms: Literal["before", "after", "around"] = "before"  # where a mixer and an MLP have norms (OLMo 2, Gemma 2)
    norm_offset: bool = False  # norms scale by 1 + their weight (Gemma)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a mixer or an MLP adds
    logit_scale: float = 1.0
    logit_cap: float | None = None  # logits z become cap * tanh(z / cap) (Gemma 2)
    attention_scale: float | None = None  # of queries with keys; None: 1 / sqrt(head_dim)
    attention_cap: float | None = None  # the same of the scaled products of queries with keys, in softmax layers
    window: WindowConfig | None = None
    unrotated_layers: tuple[int, ...] = ()  # without rotary embedding (SmolLM3)
    layer_types: tuple[str, ...] = ()  # one mixer name per layer; empty means softmax everywhere
    mixer: MixerConfig | None = None  # of the layers that are not softmax
    softmax: SoftmaxConfig = SoftmaxConfig()  # of those that are, in a student
    float8_mlp: bool = False  # MLPs multiply in float8: of a frozen model that is only run forward, in no file

    def __post_init__(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", (FULL_ATTENTION,) * self.num_layers)
        if len(self.layer_types) != self.num_layers:
            raise ConfigError(f"layer_types names {len(self.layer_types)} layers, the model has {self.num_layers}.")
        known = [FULL_ATTENTION] if self.mixer is None else [FULL_ATTENTION, self.mixer.kind]
        for kind in self.layer_types:
            if kind not in known:
                raise ConfigError(f"layer_types has {kind!r}; with the model's mixer it can be {' or '.join(known)}.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}.")
        if self.experts is not None and self.mlp_bias:
            raise ConfigError("mlp_bias=True, but experts have no biases here.")
        if self.experts is not None and self.float8_mlp:
            raise ConfigError("float8_mlp=True, but experts multiply in the compute dtype alone.")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs.")
        if self.rope.width(self.head_dim) % 2:
            rotated = self.rope.width(self.head_dim)
            raise ConfigError(f"partial_rotary_factor={self.rope.partial} of {self.head_dim} is {rotated}, not pairs.")
        stretched = len(self.rope.short_factor), len(self.rope.long_factor), self.rope.width(self.head_dim) // 2
        if self.rope.kind == "longrope" and len(set(stretched)) > 1:
            raise ConfigError("rope short_factor, long_factor have {} and {} numbers for {} pairs.".format(*stretched))
        for name, layers in (("window", self.window.layers if self.window else ()), ("rope", self.unrotated_layers)):
            if any(not 0 <= layer < self.num_layers for layer in layers):
                raise ConfigError(f"{name} names the layers {layers}, the model has {self.num_layers}.")

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep softmax attention."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION)

    @property
    def num_states(self) -> int:
        """States (and key and value heads) of a linear layer: one per query head, or one per K/V head."""
        assert isinstance(self.mixer, LinearConfig)
        return self.num_heads if self.mixer.expand_kv else self.num_kv_heads

    def with_layers(self, layer_types: tuple[str, ...]) -> "ModelConfig":
        return replace(self, layer_types=tuple(layer_types))


def layers_of_kind(layer_types: tuple[str, ...], kind: str) -> tuple[int, ...]:
    """Layer indices that use mixer `kind`, in order: row j of the stacked mixer parameters is layer `result[j]`."""
    return tuple(i for i, name in enumerate(layer_types) if name == kind)
