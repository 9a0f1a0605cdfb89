"""Tiny random models in folders as transformers writes them."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def make_torch_model(family="llama", **settings):
    """A random model in which every parameter matters: biases and norms are away from zeros and ones."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 if parameter.ndim > 1 else 0.3) * torch.randn_like(parameter)
    return model


@pytest.fixture
def saved(tmp_path):
    """Saves a torch model and returns its folder."""

    def save(model, **options):
        folder = tmp_path / "teacher"
        model.save_pretrained(folder, **options)
        return folder

    return save


@pytest.fixture
def llama_folder(saved):
    return saved(make_torch_model())
