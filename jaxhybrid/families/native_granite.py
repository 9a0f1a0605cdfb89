"""`granitemoehybrid` without experts (Granite 4): Llama's attention, or Granite's, beside Mamba-2.

It computes what ours do, by tensors that are joined: see `weights/native_granite.py`. From transformers 5.23 on: before
that its Mamba-2 layers normalised all heads together, whatever the number of groups.
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
    others,
    rope_kind,
    softmax_layers,
    words,
)
from jaxhybrid.families.student import LINEAR_ATTENTION
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.mixers.mamba2 import Mamba2Config

GRANITE_HYBRID = "granitemoehybrid"
ARCHITECTURE = "GraniteMoeHybridForCausalLM"
# Of the hub's Granites: llama.cpp's converter knows no others. transformers reads both, and saves its own.
LAYER_NAMES = {FULL_ATTENTION: "attention", LINEAR_ATTENTION: "mamba"}
SCALES = ("embedding_scale", "residual_scale", "attention_scale", "logit_scale")
OWN_KEYS = (
    *("attention_bias", "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    *("position_embedding_type", "shared_intermediate_size", "num_local_experts", "num_experts_per_tok"),
    *("output_router_logits", "router_aux_loss_coef", "mamba_n_heads", "mamba_n_groups", "mamba_d_state"),
    *("mamba_d_head", "mamba_d_conv", "mamba_expand", "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias"),
)


def features(config: ModelConfig) -> list[Feature]:
    """What `granitemoehybrid` must be able to express, in the order of a layer."""
    mixer, rope, width = config.mixer, config.rope, config.hidden_size / config.num_heads
    whole = rope.partial == 1 or not config.softmax.rope
    found = [
        softmax_layers(config),
        flag("query and key norms", config.qk_norm, False),
        Feature("biases on q, k, v", words(config.qkv_bias), "any, with zeros on o", True),
        flag("bias on o alone", config.o_bias and not config.qkv_bias, False),
        flag("biases in the MLP", config.mlp_bias, False),
        flag("mixture of experts", config.experts is not None, False),
        Feature(
            "width of a head", str(config.head_dim), f"{width:g}, hidden_size / num_heads", config.head_dim == width
        ),
        Feature("rotary embedding of softmax layers", words(config.softmax.rope), "any", True),
        length_scale(config),
        rope_kind(config),
        Feature("rotated share of a head", "all" if whole else f"{rope.partial:g}", "all", whole),
        Feature("tied embeddings", words(config.tie_embeddings), "any", True),
        Feature("scales of embeddings, residuals, scores, logits", "any", "any", True),
        *others(config, (*KNOWN_PARTS, *SCALES)),
        linear_kind(config, Mamba2Config.kind),
    ]
    if not isinstance(mixer, Mamba2Config):
        return found
    # Zeros before a text are zeros to our convolution; there they would be biases where a batch is padded.
    before = bool(mixer.qkv_bias and mixer.ssm_conv_size)
    biases = flag("biases before a convolution", before, False, "mixer.ssm_conv_size=0 or mixer.qkv_bias=false")
    return [
        *found,
        *linear_layers(config, mixer, biases),
        flag("norm of each head by itself", mixer.head_norm, True, "mixer.head_norm=true"),
        Feature("taps of the convolution", str(mixer.ssm_conv_size), "any; 0 as identity taps", True),
        *others(mixer, (*KNOWN_SETTINGS, "ssm_conv_size", "head_norm"), "mixer."),
    ]


def keys(config: ModelConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that only this architecture has, or reads otherwise."""
    mixer, scale = config.mixer, config.attention_scale
    assert isinstance(mixer, Mamba2Config)
    return {
        "attention_bias": config.qkv_bias,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.head_dim**-0.5 if scale is None else scale,
        "logits_scaling": 1 / config.logit_scale,
        "position_embedding_type": "rope" if config.softmax.rope else None,
        "shared_intermediate_size": config.intermediate_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": config.num_states,
        "mamba_n_groups": config.num_states,
        "mamba_d_state": config.head_dim,
        "mamba_d_head": config.head_dim,
        "mamba_expand": 1,
        "mamba_d_conv": mixer.ssm_conv_size or NO_CONVOLUTION_TAPS,
        "mamba_conv_bias": True,
        "mamba_proj_bias": config.o_bias,
    }
