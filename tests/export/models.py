"""Small exported models in this process, for the tests of their PyTorch code."""

import torch

from jaxhybrid.export.remote_code.configuration_jaxhybrid import JaxHybridConfig
from jaxhybrid.export.remote_code.modeling_jaxhybrid import JaxHybridForCausalLM

torch.set_num_threads(1)  # at these sizes more threads only burn processor time

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
PLAIN = {"expand_kv": True, "output_gate": True, "conv_size": 0, "rope": False, "qkv_bias": False, "qk_norm": False}
FULL = {"expand_kv": False, "output_gate": True, "conv_size": 4, "rope": True, "qkv_bias": True, "qk_norm": True}
GLA = {name: PLAIN[name] for name in PLAIN if name != "conv_size"} | {"decay_rank": 4}
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def make_model(linear=PLAIN, layer_types=HYBRID, attn="sdpa", **changes):
    mixer = "gla" if "decay_rank" in linear else "gated_deltanet"
    settings = SHAPE | {"rope_parameters": DEFAULT_ROPE, "layer_types": layer_types}
    settings |= {"linear_mixer": mixer, mixer: linear} | changes
    model = JaxHybridForCausalLM._from_config(JaxHybridConfig(**settings), attn_implementation=attn).eval()
    return shaken(model)


def shaken(model):
    """Biases, norms and taps away from their initial values, so that none of them is without effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name and "dt_bias" not in name and "a_up_proj.bias" not in name:
                parameter += (0.2 if parameter.ndim > 1 else 0.3) * torch.randn_like(parameter)
    return model


def tokens(rows, length, vocabulary=61):
    return torch.randint(1, vocabulary, (rows, length))
