"""What the config of every family has in common, and the refusal of everything that is not understood."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.rope import CONFIG_KEYS as ROPE_KEYS
from jaxhybrid.families.rope import rope_to_hf, ropes_from_hf
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig, WindowConfig

# Read by every family.
COMMON_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "layer_types",
    "quantization_config",
    *ROPE_KEYS,
)
# No effect on what the model computes in transformers: bookkeeping, training-time dropout, defaults of generation, and
# what other engines read (Qwen2.5-1M's dual chunk attention, the context length of early Llama conversions).
HARMLESS_KEYS = frozenset(
    (
        "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path",
        "_commit_hash", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
        "_attn_implementation_internal", "attention_dropout", "initializer_range", "pretraining_tp", "use_cache",
        "tokenizer_class", "prefix",
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
        "decoder_start_token_id", "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states",
        "output_scores", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
        "task_specific_params", "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward",
        "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
        "begin_suppress_tokens", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id",
        "remove_invalid_values", "exponential_decay_length_penalty",
        "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version", "internal_version",
        "gradient_checkpointing", "dual_chunk_attention_config", "max_sequence_length", "cache_implementation",
    )
)  # fmt: skip
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
}
SLIDING_ATTENTION = "sliding_attention"
WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # transformers' names and ours


def all_full(hf: dict[str, Any]) -> list[str]:
    """The kinds of layers of a family without sliding windows."""
    return [FULL_ATTENTION] * read_integer(hf, "num_hidden_layers")


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        flags: the parts of ModelConfig that this family's own keys decide (biases, norms), from a config.
        flag_keys: those keys, from a ModelConfig.
        own_keys: config keys read beside the common ones.
        defaults: values transformers takes where a config is silent.
        own_names: parts of the model that this family's weights files call otherwise than Llama's do.
        fused: tensors of a layer in the files that are several of ours, one below the other, or one of another name;
            `{expert}` stands for the number of each expert.
        kinds: the kind of each layer, full_attention or sliding_attention, from a config.
        sliding_theta: families with it have rotary settings by kind of layer; this is the base of sliding layers where
            a config is silent.
        partial_rotary: whether partial_rotary_factor is heeded.
        activation_key: what the config calls the MLP's activation.
    """

    model_type: str
    architecture: str
    flags: Callable[[dict[str, Any]], dict[str, Any]]
    flag_keys: Callable[[ModelConfig], dict[str, Any]]
    own_keys: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    own_names: dict[str, str] = field(default_factory=dict)
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: Callable[[dict[str, Any]], list[str]] = all_full
    sliding_theta: float | None = None
    partial_rotary: bool = False
    activation_key: str = "hidden_act"

    @property
    def names(self) -> dict[str, str]:
        """What weights files call a part of the model where they do not call it as we do."""
        return LLAMA_NAMES | self.own_names

    def read_config(self, hf: dict[str, Any], ignore_config_keys: Iterable[str] = ()) -> ModelConfig:
        """A Hugging Face config as a ModelConfig.

        Args:
            ignore_config_keys: keys this package does not know that may be ignored all the same; `rope_scaling.name`
                is one inside another.

        Raises:
            ConfigError: a key is missing, unknown, or has a value that is not supported.
        """
        ignored, hf = tuple(ignore_config_keys), self.defaults | hf
        self._refuse_unknown(hf, ignored)
        self._refuse_unsupported(hf)
        heads = read_integer(hf, "num_attention_heads")
        width, layers = read_integer(hf, "hidden_size"), read_integer(hf, "num_hidden_layers")
        head_dim = hf.get("head_dim")
        if head_dim is None and width % heads:
            raise ConfigError(f"hidden_size={width} does not divide by num_attention_heads={heads}; set head_dim.")
        max_positions = read_integer(hf, "max_position_embeddings")
        rope, sliding_rope = ropes_from_hf(hf, max_positions, ignored, self.sliding_theta, self.partial_rotary)
        activation = hf.get(self.activation_key) or "silu"
        if activation not in ACTIVATIONS:
            raise ConfigError(f"{self.activation_key}={activation!r}: supported are {', '.join(ACTIVATIONS)}.")
        return ModelConfig(
            family=self.model_type,
            vocab_size=read_integer(hf, "vocab_size"),
            hidden_size=width,
            intermediate_size=read_integer(hf, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=self._kv_heads(hf, heads),
            head_dim=width // heads if head_dim is None else read_integer({"head_dim": head_dim}, "head_dim"),
            norm_eps=read_positive(hf, "rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            rope=rope,
            tie_embeddings=read_flag(hf, "tie_word_embeddings"),
            window=self._window(hf, layers, max_positions, None if sliding_rope == rope else sliding_rope),
            **{"activation": ACTIVATIONS[activation], **self.flags(hf)},
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The Hugging Face keys of a softmax model of this config: the reverse of `read_config`.

        Raises:
            ConfigError: the family has no way to say what `config` has.
        """
        ropes: dict[str, Any] = rope_to_hf(config.rope)
        if self.sliding_theta is not None:
            sliding = config.window.rope if config.window is not None and config.window.rope is not None else None
            ropes = {FULL_ATTENTION: ropes, SLIDING_ATTENTION: rope_to_hf(sliding or config.rope)}
        hf = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            self.activation_key: {ours: name for name, ours in ACTIVATIONS.items()}[config.activation],
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": ropes,
            "tie_word_embeddings": config.tie_embeddings,
            **self.flag_keys(config),
        }
        wanted, said = replace(config, layer_types=(), mixer=None), self.read_config(hf)
        for name, _, can_say in differences(wanted, said):
            raise ConfigError(
                f"A {self.model_type} model cannot have {name}={getattr(config, name)}: its Hugging Face "
                f"config can say {can_say} here."
            )
        return hf

    def _window(self, hf: dict[str, Any], layers: int, max_positions: int, rope: Any) -> WindowConfig | None:
        """The sliding window, unless it cannot act: one as long as the context, with the rotary settings of all."""
        kinds = self.kinds(hf)
        others = sorted({str(kind) for kind in kinds if kind not in (FULL_ATTENTION, SLIDING_ATTENTION)})
        if others:
            raise ConfigError(
                f"layer_types has {', '.join(others)}; a teacher's layers are {FULL_ATTENTION} or {SLIDING_ATTENTION}."
            )
        if len(kinds) != layers:
            raise ConfigError(f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}.")
        given = hf.get("layer_types")
        if given is not None and list(given) != kinds:
            raise ConfigError(
                f"layer_types is {', '.join(map(str, given))}; a {self.model_type} model of this config has "
                f"{', '.join(kinds)} in transformers, which does not read the key. Correct or remove it."
            )
        sliding = tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING_ATTENTION)
        if not sliding:
            return None
        size = read_integer(hf, "sliding_window")
        return None if size >= max_positions and rope is None else WindowConfig(size, sliding, rope)

    def _kv_heads(self, hf: dict[str, Any], heads: int) -> int:
        if "num_key_value_heads" not in hf:
            raise ConfigError(f"The config lacks num_key_value_heads, which {self.model_type} models state.")
        return heads if hf.get("num_key_value_heads") is None else read_integer(hf, "num_key_value_heads")

    def _refuse_unknown(self, hf: dict[str, Any], ignored: tuple[str, ...]) -> None:
        known = {*COMMON_KEYS, *self.own_keys}
        for key in ignored:
            if key in known:
                raise ConfigError(
                    f"ignore_config_keys has {key!r}, which {self.model_type} models depend on; it stays."
                )
        for key, value in hf.items():
            says_nothing = value is None or value is False or value in ({}, [])
            if key in known or key in HARMLESS_KEYS or key in ignored or says_nothing:
                continue
            raise ConfigError(
                f"config.json has {key}={value!r}, which is not known for {self.model_type} and may change what the "
                f"model computes. If it does not, pass ignore_config_keys=({key!r},)."
            )

    def _refuse_unsupported(self, hf: dict[str, Any]) -> None:
        if hf.get("quantization_config") is not None:
            method = hf["quantization_config"]
            raise ConfigError(
                f"quantization_config={method!r}: quantised weights are not read; use the unquantised model."
            )


def read_flag(hf: dict[str, Any], key: str) -> bool:
    value = hf.get(key)
    if value not in (None, True, False):
        raise ConfigError(f"{key}={value!r} is neither true nor false.")
    return bool(value)


def read_integer(hf: dict[str, Any], key: str) -> int:
    value = hf.get(key)
    if value is None:
        raise ConfigError(f"The config lacks {key}.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key}={value!r} is not a positive integer.")
    return value


def read_positive(hf: dict[str, Any], key: str, default: float | None = None) -> float:
    value = hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{key}={value!r} is not a positive number.")
    return float(value)


def window_key(config: ModelConfig) -> dict[str, Any]:
    """The key of families in which all layers slide, or none."""
    return {"sliding_window": None if config.window is None else config.window.size}


def kind_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of families that say of each layer whether it slides."""
    sliding = () if config.window is None else config.window.layers
    kinds = [SLIDING_ATTENTION if layer in sliding else FULL_ATTENTION for layer in range(config.num_layers)]
    return window_key(config) | {"layer_types": kinds}


def given_kinds(hf: dict[str, Any], otherwise: Callable[[int], bool]) -> list[str]:
    """`layer_types`; where it is absent a layer slides if `otherwise` says so of its number."""
    kinds = [
        SLIDING_ATTENTION if otherwise(layer) else FULL_ATTENTION
        for layer in range(read_integer(hf, "num_hidden_layers"))
    ]
    return kinds if hf.get("layer_types") is None else list(hf["layer_types"])


def kinds_by_switch(hf: dict[str, Any]) -> list[str]:
    """Of Qwen's: with `use_sliding_window` the layers from `max_window_layers` on slide, or those of `layer_types`."""
    slides = read_flag(hf, "use_sliding_window") and hf.get("sliding_window") is not None
    kinds = given_kinds(hf, lambda layer: slides and layer >= hf["max_window_layers"])
    if SLIDING_ATTENTION in kinds and not slides:
        raise ConfigError(
            f"layer_types has {SLIDING_ATTENTION}, but use_sliding_window={hf.get('use_sliding_window')!r} and "
            f"sliding_window={hf.get('sliding_window')!r}."
        )
    return kinds


def switch_keys(config: ModelConfig) -> dict[str, Any]:
    """The reverse of `kinds_by_switch`."""
    return {"use_sliding_window": config.window is not None, **kind_keys(config)}


def one_kind(hf: dict[str, Any]) -> list[str]:
    """Of Mistral's: all layers slide if the config has a window."""
    kind = FULL_ATTENTION if hf.get("sliding_window") is None else SLIDING_ATTENTION
    return [kind] * read_integer(hf, "num_hidden_layers")


def differences(one: ModelConfig, other: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """The fields in which they differ, with the value of each."""
    for item in fields(ModelConfig):
        values = getattr(one, item.name), getattr(other, item.name)
        if values[0] != values[1]:
            yield item.name, *values
