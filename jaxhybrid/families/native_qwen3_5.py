"""`qwen3_5_text`: softmax attention with query and key norms beside Gated DeltaNet.

It differs from ours in what a weight means, not in what is computed: see `weights/native_qwen3_5.py`.
"""

from collections.abc import Mapping
from typing import Any

from jaxhybrid.families.feature import (
    KNOWN_PARTS,
    KNOWN_SETTINGS,
    NO_CONVOLUTION_TAPS,
    Feature,
    flag,
    length_scale,
    linear_kind,
    linear_layers,
    no_linear_biases,
    others,
    rope_kind,
    softmax_layers,
    words,
)
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig

QWEN3_5 = "qwen3_5_text"
ARCHITECTURE = "Qwen3_5ForCausalLM"
OWN_KEYS = (
    "attn_output_gate",
    "full_attention_interval",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "partial_rotary_factor",
)


def features(config: ModelConfig) -> list[Feature]:
    """What `qwen3_5_text` must be able to express, in the order of a layer."""
    mixer = config.mixer
    found = [
        softmax_layers(config),
        flag("query and key norms", config.qk_norm, True),
        flag("biases on q, k, v", config.qkv_bias, False),
        flag("bias on o", config.o_bias, False),
        flag("biases in the MLP", config.mlp_bias, False),
        flag("mixture of experts", config.experts is not None, False),
        flag("rotary embedding of softmax layers", config.softmax.rope, True, "softmax.rope=true"),
        length_scale(config),
        rope_kind(config),
        Feature("rotated share of a head", "all", "any", True),
        Feature("tied embeddings", words(config.tie_embeddings), "any", True),
        *others(config, KNOWN_PARTS),
        linear_kind(config, GatedDeltaNetConfig.kind),
    ]
    if not isinstance(mixer, GatedDeltaNetConfig):
        return found
    return [
        *found,
        *linear_layers(config, mixer, no_linear_biases(mixer)),
        Feature("taps of the convolution", str(mixer.conv_size), "any; 0 as identity taps", True),
        *others(mixer, (*KNOWN_SETTINGS, "conv_size"), "mixer."),
    ]


def keys(config: ModelConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that only this architecture has, or reads otherwise."""
    mixer, pairs = config.mixer, config.head_dim // 2
    assert isinstance(mixer, GatedDeltaNetConfig)
    hf = {
        # For scaled rotary embeddings transformers 5.16 reads this key where later versions read the one inside.
        "partial_rotary_factor": 1.0,
        "attn_output_gate": True,
        "linear_conv_kernel_dim": mixer.conv_size or NO_CONVOLUTION_TAPS,
        "linear_key_head_dim": config.head_dim,
        "linear_value_head_dim": config.head_dim,
        "linear_num_key_heads": config.num_states,
        "linear_num_value_heads": config.num_states,
        # Sections are for images; a text has the same position in all three.
        "rope_parameters": {
            **rope,
            "partial_rotary_factor": 1.0,
            "mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3],
            "mrope_interleaved": True,
        },
    }
    interval = attention_interval(config)
    return hf if interval is None else hf | {"full_attention_interval": interval}


def attention_interval(config: ModelConfig) -> int | None:
    """n where exactly every n-th layer is softmax, the first one layer n - 1: what some servers read alone."""
    softmax, depth = config.softmax_layers, config.num_layers
    interval = softmax[0] + 1 if softmax else depth + 1
    return interval if softmax == tuple(range(interval - 1, depth, interval)) else None
