"""What the config of every family has in common, and the refusal of everything that is not understood."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.rope import CONFIG_KEYS as ROPE_KEYS
from jaxhybrid.families.rope import rope_from_hf, rope_to_hf
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig

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
        "gradient_checkpointing", "dual_chunk_attention_config", "max_sequence_length",
    )
)  # fmt: skip
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
}
WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers")


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        flags: the parts of ModelConfig that this family's own keys decide (biases, norms), from a config.
        flag_keys: those keys, from a ModelConfig; raises ConfigError for a shape the family cannot express.
        own_keys: config keys read beside the common ones.
        defaults: values transformers takes where a config is silent.
        own_names: parts of the model that this family's weights files call otherwise than Llama's do.
    """

    model_type: str
    architecture: str
    flags: Callable[[dict[str, Any]], dict[str, Any]]
    flag_keys: Callable[[ModelConfig], dict[str, Any]]
    own_keys: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    own_names: dict[str, str] = field(default_factory=dict)

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
        config = ModelConfig(
            family=self.model_type,
            vocab_size=read_integer(hf, "vocab_size"),
            hidden_size=width,
            intermediate_size=read_integer(hf, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=self._kv_heads(hf, heads),
            head_dim=width // heads if head_dim is None else read_integer({"head_dim": head_dim}, "head_dim"),
            norm_eps=_positive(hf, "rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            rope=rope_from_hf(hf, max_positions, ignored),
            tie_embeddings=read_flag(hf, "tie_word_embeddings"),
            **self.flags(hf),
        )
        kinds = hf.get("layer_types")
        if kinds is not None and len(kinds) != layers:
            raise ConfigError(f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}.")
        return config

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The Hugging Face keys of a softmax model of this config: the reverse of `read_config`.

        Raises:
            ConfigError: the family has no way to say what `config` has.
        """
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": rope_to_hf(config.rope),
            "tie_word_embeddings": config.tie_embeddings,
            **self.flag_keys(config),
        }

    def _kv_heads(self, hf: dict[str, Any], heads: int) -> int:
        if "num_key_value_heads" not in hf and self.model_type != "llama":
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
        if hf.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act={hf['hidden_act']!r}: only silu (SwiGLU) is supported.")
        if "use_sliding_window" in self.own_keys and hf.get("use_sliding_window"):
            raise ConfigError(
                f"use_sliding_window={hf['use_sliding_window']!r}: sliding-window attention is not supported "
                f"(sliding_window={hf.get('sliding_window')!r})."
            )
        others = sorted({str(kind) for kind in hf.get("layer_types") or () if kind != FULL_ATTENTION})
        if others:
            raise ConfigError(f"layer_types has {', '.join(others)}; a teacher's layers must all be {FULL_ATTENTION}.")


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


def require(config: ModelConfig, **expected: bool) -> None:
    """Raises ConfigError unless `config` has these flags, because the family's configs cannot say otherwise."""
    for name, value in expected.items():
        if getattr(config, name) is not value:
            raise ConfigError(
                f"A {config.family} model cannot have {name}={getattr(config, name)} "
                f"(with qkv_bias={config.qkv_bias}): its Hugging Face config has no key for it."
            )


def _positive(hf: dict[str, Any], key: str, default: float) -> float:
    value = hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{key}={value!r} is not a positive number.")
    return float(value)
