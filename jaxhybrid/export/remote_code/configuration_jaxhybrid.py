"""Config of a hybrid of softmax and linear attention layers. Part of an exported folder: only transformers."""

from dataclasses import field
from typing import Any, ClassVar

from transformers import PreTrainedConfig

TRAITS = {
    "qkv_bias", "o_bias", "qk_norm", "wide_qk_norm", "activation", "experts", "norms", "norm_offset",
    "embedding_scale", "residual_scale", "logit_scale", "logit_cap", "attention_scale", "attention_cap", "window",
    "unrotated_layers", "layer_types",
}  # fmt: skip


class JaxHybridConfig(PreTrainedConfig):
    """The base model's own keys, plus which layers are linear and what a linear layer is made of.

    `layer_types` holds "full_attention" or "linear_attention" per layer, the names transformers builds its caches from.
    `linear_mixer` is what the linear layers are (the file `NAME_jaxhybrid.py`), and the key of that name holds their
    settings: `expand_kv` (one state per query head; else one per key/value head), `output_gate`, `rope`, `qkv_bias`,
    `qk_norm`, and what the mixer has of its own, such as `conv_size` (taps of the convolution, 0 for none).
    `softmax` has what the softmax layers have otherwise than the base model's: `rope` (false: queries and keys are not
    rotated), `length_scale` (a; a query with t tokens of its document before it is multiplied by log(t + a) / log(a)).
    `base_model_type` names the base model's architecture, and `traits` holds what that has otherwise than Llama:
    `qkv_bias`, `o_bias`, `qk_norm`; `wide_qk_norm` (over all heads together), `activation` (gelu_tanh), `experts`
    (every MLP is a mixture: `count` of `width`, `active` of them for a token, the router's weights divided by their
    sum with `normalise`), `norms` ("after" or "around" a mixer and an MLP), `norm_offset` (norms scale by 1 + weight),
    `embedding_scale`, `residual_scale`, `logit_scale`, `attention_scale`, `attention_cap` and `logit_cap` (of scores
    and of logits, which come out of cap * tanh(x / cap)), `window` (size, layers and rope of softmax layers that see
    the last tokens only), `unrotated_layers`, and the base model's own `layer_types`.
    """

    model_type = "jaxhybrid"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    base_model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    layer_types: list[str] = field(default_factory=list)
    traits: dict[str, Any] = field(default_factory=dict)
    linear_mixer: str = "gated_deltanet"
    softmax: dict[str, Any] = field(default_factory=dict)
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.num_key_value_heads:
            self.num_key_value_heads = self.num_attention_heads
        if not self.head_dim:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not self.layer_types:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        unknown = set(self.traits) - TRAITS
        if unknown:
            raise ValueError(f"traits has {sorted(unknown)}, which this code does not know.")
        unknown = set(self.softmax) - {"rope", "length_scale"}
        if unknown:
            raise ValueError(f"softmax has {sorted(unknown)}, which this code does not know.")
        if self.hidden_act not in ("silu", "gelu_pytorch_tanh"):
            raise ValueError(f"hidden_act {self.hidden_act!r}: this model's MLP has silu or gelu_pytorch_tanh.")
        unknown = set(self.layer_types) - {"full_attention", "linear_attention"}
        if unknown:
            raise ValueError(f"layer_types has {sorted(unknown)}; known: full_attention, linear_attention.")
        super().__post_init__(**kwargs)

    def linear_settings(self, mixer: str, names: tuple[str, ...]) -> dict[str, Any]:
        """The settings of the linear layers; all of `names` must be there."""
        settings = getattr(self, mixer, None) or {}
        missing = [name for name in names if settings.get(name) is None]
        if missing:
            raise ValueError(f"{mixer} lacks {', '.join(missing)}, which the linear layers need.")
        return settings

    @property
    def number_of_conv_states(self) -> int:
        """transformers gives a linear layer so many in its caches: the convolution's, and one of where tokens are."""
        return 2

    @property
    def qkv_bias(self) -> bool:
        """Whether softmax layers have biases on q, k and v."""
        return self.trait("qkv_bias", self.attention_bias or self.base_model_type == "qwen2")

    @property
    def o_bias(self) -> bool:
        """Whether mixers, softmax or linear, have a bias on their output projection."""
        return self.trait("o_bias", self.attention_bias and self.base_model_type != "qwen2")

    @property
    def qk_norm(self) -> bool:
        """Whether softmax layers normalise queries and keys."""
        return self.trait("qk_norm", self.base_model_type == "qwen3")

    def trait(self, name: str, otherwise: Any) -> Any:
        """What the base model has otherwise than Llama; where it has not, `otherwise`."""
        return self.traits.get(name, otherwise)

    def window_of(self, layer: int) -> int | None:
        """How many tokens a softmax layer sees at most; None: all."""
        window = self.trait("window", None)
        return window["size"] if window is not None and layer in window["layers"] else None


__all__ = ["JaxHybridConfig"]
