"""Qwen2 and Qwen2.5: biases on q, k and v, always; none on o."""

from typing import Any

from jaxhybrid.families.base import WINDOW_KEYS, Family, require
from jaxhybrid.model.config import ModelConfig


def _flag_keys(config: ModelConfig) -> dict[str, Any]:
    require(config, qkv_bias=True, o_bias=False, mlp_bias=False, qk_norm=False)
    return {"use_sliding_window": False}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    flags=lambda hf: {"qkv_bias": True},
    flag_keys=_flag_keys,
    own_keys=WINDOW_KEYS,
    defaults={"max_position_embeddings": 32768},
)
