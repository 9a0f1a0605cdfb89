"""Llama 2, 3, 3.1, 3.2, SmolLM2 and everything else of model_type `llama`."""

from typing import Any

from jaxhybrid.families.base import Family, read_flag, require
from jaxhybrid.model.config import ModelConfig


def _flags(hf: dict[str, Any]) -> dict[str, Any]:
    bias = read_flag(hf, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": read_flag(hf, "mlp_bias")}


def _flag_keys(config: ModelConfig) -> dict[str, Any]:
    require(config, o_bias=config.qkv_bias, qk_norm=False)
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    flags=_flags,
    flag_keys=_flag_keys,
    own_keys=("attention_bias", "mlp_bias"),
    defaults={"max_position_embeddings": 2048},
)
