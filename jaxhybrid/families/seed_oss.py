"""Seed-OSS: Llama with biases on q, k and v, and a head width of its own."""

from typing import Any

from jaxhybrid.families.base import Family, read_flag
from jaxhybrid.model.config import ModelConfig

BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_out_bias", "mlp_bias": "mlp_bias"}  # ours: its key


def _flags(hf: dict[str, Any]) -> dict[str, Any]:
    return {flag: read_flag(hf, key) for flag, key in BIASES.items()}


def _flag_keys(config: ModelConfig) -> dict[str, Any]:
    return {key: getattr(config, flag) for flag, key in BIASES.items()}


SEED_OSS = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    flags=_flags,
    flag_keys=_flag_keys,
    own_keys=(*BIASES.values(), "residual_dropout"),
    defaults={"max_position_embeddings": 524_288, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
)
