"""InternLM3: Llama with other keys for its biases, and a head width of its own."""

from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.base import Family, read_flag
from jaxhybrid.model.config import ModelConfig


def _flags(hf: dict[str, Any]) -> dict[str, Any]:
    # Its own files call them qkv_bias and bias; transformers writes Llama's names.
    qkv = read_flag(hf, "attention_bias") or read_flag(hf, "qkv_bias")
    others = read_flag(hf, "mlp_bias") or read_flag(hf, "bias")
    if qkv != others:
        raise ConfigError(f"qkv_bias={qkv} and bias={others}: transformers has InternLM3 with both or with none.")
    return {"qkv_bias": qkv, "o_bias": qkv, "mlp_bias": others}


def _flag_keys(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


# auto_map in its files names code that transformers' own replaces.
INTERNLM3 = Family(
    model_type="internlm3",
    architecture="InternLM3ForCausalLM",
    flags=_flags,
    flag_keys=_flag_keys,
    own_keys=(
        "attention_bias",
        "mlp_bias",
        "qkv_bias",
        "bias",
        "auto_map",
    ),
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5},
)
