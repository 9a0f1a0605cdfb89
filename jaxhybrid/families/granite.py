"""Granite 3: Llama with four multipliers, of embeddings, residuals, attention scores and logits."""

from typing import Any

from jaxhybrid.families.base import Family, read_integer, read_positive
from jaxhybrid.families.llama import bias_keys, biases
from jaxhybrid.model.config import ModelConfig


def _flags(hf: dict[str, Any]) -> dict[str, Any]:
    width = hf.get("head_dim") or read_integer(hf, "hidden_size") // read_integer(hf, "num_attention_heads")
    scale = read_positive(hf, "attention_multiplier", 1.0)
    return biases(hf) | {
        "embedding_scale": read_positive(hf, "embedding_multiplier", 1.0),
        "residual_scale": read_positive(hf, "residual_multiplier", 1.0),
        "attention_scale": None if scale == width**-0.5 else scale,
        "logit_scale": 1 / read_positive(hf, "logits_scaling", 1.0),
    }


def _flag_keys(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention_scale
    return bias_keys(config) | {
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.head_dim**-0.5 if scale is None else scale,
        "logits_scaling": 1 / config.logit_scale,
    }


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    flags=_flags,
    flag_keys=_flag_keys,
    own_keys=(
        "attention_bias", "mlp_bias", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
        "logits_scaling",
    ),
    defaults={"max_position_embeddings": 2048, "num_key_value_heads": None},
)  # fmt: skip
