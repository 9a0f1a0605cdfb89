"""Phi-3, Phi-3.5 (not MoE), Phi-4: Llama with fused projections in its files; Phi-4-mini rotates part of a head."""

from typing import Any

from jaxhybrid.families.base import Family, one_kind
from jaxhybrid.model.config import ModelConfig


def _flag_keys(config: ModelConfig) -> dict[str, Any]:
    original = config.rope.original_max_position_embeddings
    return {
        "sliding_window": None if config.window is None else config.window.size,
        "original_max_position_embeddings": config.max_position_embeddings if original is None else original,
    }


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    flags=lambda hf: {},
    flag_keys=_flag_keys,
    # Beside the window: dropout, and what the files say and transformers' own Phi-3 does not read.
    own_keys=("sliding_window", "resid_pdrop", "embd_pdrop", "auto_map", "interpolate_factor", "full_attn_mod"),
    defaults={
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
    },
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    kinds=one_kind,
    partial_rotary=True,
)  # fmt: skip
