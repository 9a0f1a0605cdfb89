"""Qwen3: query and key norms per head, a head width of its own, no biases unless asked for."""

from typing import Any

from jaxhybrid.families.base import WINDOW_KEYS, Family, kinds_by_switch, read_flag, switch_keys
from jaxhybrid.model.config import ModelConfig


def _flags(hf: dict[str, Any]) -> dict[str, Any]:
    bias = read_flag(hf, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}


def _flag_keys(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, **switch_keys(config)}


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    flags=_flags,
    flag_keys=_flag_keys,
    own_keys=("attention_bias", *WINDOW_KEYS),
    defaults={"max_position_embeddings": 32768, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    kinds=kinds_by_switch,
)
