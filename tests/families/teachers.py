"""Small random teachers of every family, as transformers makes them, with every flag their configs have.

A new family gets a line here; tests/families/test_every_family.py holds all of them against transformers.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
S, F = "sliding_attention", "full_attention"
SLIDES = {"sliding_window": 8}
SWITCHED = {"use_sliding_window": True, "max_window_layers": 2, **SLIDES}
BIASES = {"attention_bias": True, "mlp_bias": True}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1000.0, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5],
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 4.0,
}  # fmt: skip

TEACHERS = {
    "llama": [BIASES],
    "mistral": [{"head_dim": 24, **SLIDES}],
    "ministral": [{"head_dim": 16, "layer_types": [S, F, S, S, F], **SLIDES}],
    "qwen2": [SWITCHED],
    "qwen3": [{"head_dim": 32, "attention_bias": True, **SWITCHED}],
    "gemma": [{"head_dim": 24, "attention_bias": True}],
    "gemma2": [
        {"head_dim": 24, "query_pre_attn_scalar": 50, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
         **SLIDES},
        {"head_dim": 16, "query_pre_attn_scalar": 16, "attention_bias": True, "tie_word_embeddings": False,
         "attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": [F, S, S, F, F], **SLIDES},
    ],
    "gemma3_text": [
        {"head_dim": 24, "query_pre_attn_scalar": 50, "sliding_window_pattern": 3, **SLIDES},
        {"head_dim": 16, "query_pre_attn_scalar": 16, "attention_bias": True, "tie_word_embeddings": False,
         "final_logit_softcapping": 3.0, "sliding_window": 512, "layer_types": [S, F, S, S, F]},
    ],
    "olmo2": [{"attention_bias": True}],
    "olmo3": [
        SLIDES,
        {"rope_parameters": {F: YARN, S: {"rope_type": "default", "rope_theta": 1000.0}}, **SLIDES},
    ],
    "phi3": [
        SLIDES,
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ],
    "granite": [MULTIPLIERS | BIASES],
    "smollm3": [{"tie_word_embeddings": False}, {"use_sliding_window": True, "no_rope_layer_interval": 2, **SLIDES}],
    "exaone4": [SLIDES, {"sliding_window": None, "layer_types": [F] * 5}],
    "internlm3": [{"head_dim": 24, **BIASES}],
    "mixtral": [{"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 24, **SLIDES}],
    "qwen3_moe": [
        {"head_dim": 32, "attention_bias": True, "num_experts": 6, "num_experts_per_tok": 3,
         "moe_intermediate_size": 24, "norm_topk_prob": True},
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "use_sliding_window": True, **SLIDES},
    ],
    "seed_oss": [{"head_dim": 24, "attention_out_bias": True, "mlp_bias": True}],
}  # fmt: skip


def cases(*fast):
    """(family, number of its variant) for pytest: those of `fast` families always, the others among the slow tests."""
    return [
        pytest.param(family, number, marks=() if family in fast else pytest.mark.slow)
        for family, variants in TEACHERS.items()
        for number in range(len(variants))
    ]


def make_teacher(family, **settings):
    """A random model in which every parameter matters: biases and norms are away from zeros and ones."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 if parameter.ndim > 1 else 0.3) * torch.randn_like(parameter)
    return model


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()
