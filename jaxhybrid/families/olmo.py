"""OLMo 2 and 3: norms after a mixer and an MLP, query and key norms over all heads; 3 has sliding windows."""

from typing import Any

from jaxhybrid.families.base import Family, given_kinds, kind_keys, read_flag
from jaxhybrid.model.config import ModelConfig

AFTER_NAMES = {"mixed_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
DEFAULTS = {"max_position_embeddings": 2048, "num_key_value_heads": None, "rms_norm_eps": 1e-5}


def _flags(hf: dict[str, Any]) -> dict[str, Any]:
    bias = read_flag(hf, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "norms": "after", "qk_norm": True, "wide_qk_norm": True}


def _bias_key(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias}


def _olmo3_keys(config: ModelConfig) -> dict[str, Any]:
    return _bias_key(config) | kind_keys(config)


def _olmo3_kinds(hf: dict[str, Any]) -> list[str]:
    return given_kinds(hf, lambda layer: bool((layer + 1) % 4))


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    flags=_flags,
    flag_keys=_bias_key,
    own_keys=("attention_bias",),
    defaults=DEFAULTS,
    own_names=AFTER_NAMES,
)
OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    flags=_flags,
    flag_keys=_olmo3_keys,
    own_keys=("attention_bias", "sliding_window"),
    defaults=DEFAULTS | {"sliding_window": 4096, "rope_theta": 500_000.0},
    own_names=AFTER_NAMES,
    kinds=_olmo3_kinds,
    sliding_theta=500_000.0,  # whatever rope_theta says: transformers gives that to full layers only
)
