"""Llama 2, 3, 3.1, 3.2, SmolLM2, Yi and everything else of model_type `llama`."""

from typing import Any

from jaxhybrid.families.base import Family, read_flag
from jaxhybrid.model.config import ModelConfig


def biases(hf: dict[str, Any]) -> dict[str, Any]:
    bias = read_flag(hf, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": read_flag(hf, "mlp_bias")}


def bias_keys(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    flags=biases,
    flag_keys=bias_keys,
    own_keys=("attention_bias", "mlp_bias"),
    defaults={"max_position_embeddings": 2048, "num_key_value_heads": None},
)
