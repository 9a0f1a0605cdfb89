"""The static description of a model: everything the mathematics needs and nothing about weights, devices or training.

Axis letters used throughout: B batch, T tokens, D model width, H query heads, G key/value heads, K key head width,
V value head width, N states (value heads of a linear mixer), F MLP width, L layers, S vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Literal

from jaxhybrid.errors import ConfigError

FULL_ATTENTION = "full_attention"
GATED_DELTANET = "gated_deltanet"
MIXER_KINDS = (FULL_ATTENTION, GATED_DELTANET)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, with the scaling rules of transformers' `rope_parameters`."""

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None  # llama3, yarn, dynamic: the length before extension
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scale of cos and sin; None takes the rule of the YaRN paper
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """A Gated DeltaNet layer (arXiv 2412.06464) in the form that Qwen3.5's linear layer can express.

    The defaults are those of KL-guided layer selection (arXiv 2512.20569, layer `gdn_v4`): heads expanded, output gate,
    no convolution, no rotary embedding. `None` means "as the teacher has it" and is filled in by `convert`.
    """

    expand_kv: bool = (
        True  # clone each K/V head for its group of query heads; False keeps G states, read by grouped queries
    )
    output_gate: bool = True  # multiply the normalised output by silu(g_proj x)
    conv_size: int = 0  # taps of the causal short convolution on q, k and v; 0 has none
    rope: bool = False  # rotate q and k as the teacher's softmax layers do
    qkv_bias: bool | None = None  # carry the teacher's projection biases
    qk_norm: bool | None = None  # carry the teacher's query and key norms (before the SiLU)
    gate_init: Literal["random", "zero", "value"] = (
        "random"  # g_proj: paper's normal(0.02), zeros, or a scaled copy of v_proj
    )
    decay_init: Literal["fla", "slow"] = (
        "fla"  # A_log, dt_bias: fla's random ranges, or half-lives of 64 to 4096 tokens
    )


@dataclass(frozen=True)
class ModelConfig:
    """One causal language model: pre-norm blocks of a token mixer and a SwiGLU MLP."""

    family: str  # the Hugging Face model_type whose weight names and config keys apply: llama, qwen2, qwen3
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
    layer_types: tuple[str, ...] = ()  # one mixer name per layer; empty means softmax everywhere
    gated_deltanet: GatedDeltaNetConfig | None = None

    def __post_init__(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", (FULL_ATTENTION,) * self.num_layers)
        if len(self.layer_types) != self.num_layers:
            raise ConfigError(f"layer_types names {len(self.layer_types)} layers, the model has {self.num_layers}.")
        for kind in self.layer_types:
            if kind not in MIXER_KINDS:
                raise ConfigError(f"layer_types has {kind!r}; known mixers: {', '.join(MIXER_KINDS)}.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}.")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs.")
        if GATED_DELTANET in self.layer_types and self.gated_deltanet is None:
            raise ConfigError("layer_types has gated_deltanet layers but the gated_deltanet settings are missing.")

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep softmax attention."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION)

    def with_layers(self, layer_types: tuple[str, ...]) -> "ModelConfig":
        return replace(self, layer_types=tuple(layer_types))


def layers_of_kind(layer_types: tuple[str, ...], kind: str) -> tuple[int, ...]:
    """Layer indices that use mixer `kind`, in order: row j of the stacked mixer parameters is layer `result[j]`."""
    return tuple(i for i, name in enumerate(layer_types) if name == kind)
