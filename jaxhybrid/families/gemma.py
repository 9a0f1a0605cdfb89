"""Gemma 1, 2 and 3 (text only): norms that scale by 1 + their weight, GeGLU, embeddings times sqrt(width).

2 and 3 have norms before and after each mixer and MLP, a scale of attention of their own, and sliding windows; 3 has
query and key norms, and another rotary base where a layer slides. 2 caps attention scores and logits by tanh.
"""

from collections.abc import Callable
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.base import Family, given_kinds, kind_keys, read_flag, read_integer, read_positive
from jaxhybrid.model.config import ModelConfig

GELU = "gelu_pytorch_tanh"
COMMON_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256}
SANDWICH_NAMES = {
    "post_norm": "pre_feedforward_layernorm",
    "mixed_norm": "post_attention_layernorm",
    "mlp_norm": "post_feedforward_layernorm",
}


def _flags(hf: dict[str, Any]) -> dict[str, Any]:
    bias = read_flag(hf, "attention_bias")
    scale = read_integer(hf, "hidden_size") ** 0.5
    return {"qkv_bias": bias, "o_bias": bias, "norm_offset": True, "embedding_scale": scale}


def _gemma_flags(hf: dict[str, Any]) -> dict[str, Any]:
    # Early configs say gelu and mean its approximation; transformers knows.
    return _flags(hf) | ({"activation": "gelu_tanh"} if hf.get("hidden_act") == "gelu" else {})


def _sandwich_flags(hf: dict[str, Any]) -> dict[str, Any]:
    scalar, width = read_positive(hf, "query_pre_attn_scalar"), read_integer(hf, "head_dim")
    return _flags(hf) | {
        "norms": "around",
        "attention_scale": None if scalar == width else scalar**-0.5,
        "attention_cap": _cap(hf, "attn_logit_softcapping"),
        "logit_cap": _cap(hf, "final_logit_softcapping"),
    }


def _cap(hf: dict[str, Any], key: str) -> float | None:
    return None if hf.get(key) is None else read_positive(hf, key)


def _gemma3_flags(hf: dict[str, Any]) -> dict[str, Any]:
    key = "attn_logit_softcapping"
    if hf.get(key) is not None:
        raise ConfigError(f"{key}={hf[key]!r}: transformers' Gemma 3 does not heed it; remove it, or set it to null.")
    return _sandwich_flags(hf) | {"qk_norm": True}


def _bias_key(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias}


def _sandwich_keys(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention_scale
    scalar = config.head_dim if scale is None else scale**-2
    if scale is not None and round(scalar) ** -0.5 == scale:  # a whole number, as it was read
        scalar = round(scalar)
    caps = {"attn_logit_softcapping": config.attention_cap, "final_logit_softcapping": config.logit_cap}
    return _bias_key(config) | kind_keys(config) | caps | {"query_pre_attn_scalar": scalar}


def _every(pattern: Callable[[dict[str, Any]], int]) -> Callable[[dict[str, Any]], list[str]]:
    """All layers slide but every so-manieth."""
    return lambda hf: given_kinds(hf, lambda layer: bool((layer + 1) % pattern(hf)))


def _gemma3_pattern(hf: dict[str, Any]) -> int:
    return read_integer({"sliding_window_pattern": 6} | hf, "sliding_window_pattern")


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    flags=_gemma_flags,
    flag_keys=_bias_key,
    own_keys=("attention_bias", "hidden_activation"),
    defaults=COMMON_DEFAULTS | {"max_position_embeddings": 8192, "hidden_act": GELU},
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    flags=_sandwich_flags,
    flag_keys=_sandwich_keys,
    own_keys=(
        "attention_bias", "hidden_activation", "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping",
        "final_logit_softcapping",
        "sliding_window_size",  # beside `sliding_window` in published configs; transformers has no such key
    ),
    defaults=COMMON_DEFAULTS | {
        "max_position_embeddings": 8192, "hidden_activation": GELU, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    own_names=SANDWICH_NAMES,
    kinds=_every(lambda hf: 2),
    activation_key="hidden_activation",
)  # fmt: skip
GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    flags=_gemma3_flags,
    flag_keys=_sandwich_keys,
    own_keys=(
        "attention_bias", "hidden_activation", "query_pre_attn_scalar", "sliding_window", "sliding_window_pattern",
        "_sliding_window_pattern", "rope_local_base_freq", "attn_logit_softcapping", "final_logit_softcapping",
    ),
    defaults=COMMON_DEFAULTS | {
        "max_position_embeddings": 131_072, "hidden_activation": GELU, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "rope_theta": 1_000_000.0,
    },
    own_names=SANDWICH_NAMES,
    kinds=_every(_gemma3_pattern),
    sliding_theta=10_000.0,
    activation_key="hidden_activation",
)  # fmt: skip
