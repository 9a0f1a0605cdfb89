"""GGUF files as teachers: logits of the model they were made from, weights as transformers reads them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jaxhybrid.complete import complete
from jaxhybrid.export.folder import export
from jaxhybrid.families import hf_to_config
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.transformer import forward
from jaxhybrid.pipeline import Pipeline
from jaxhybrid.settings.read import load_config
from jaxhybrid.weights.convert import convert
from jaxhybrid.weights.gguf.head import TENSOR_TYPES
from jaxhybrid.weights.gguf.model import open_gguf
from jaxhybrid.weights.huggingface import load_student, load_teacher
from tests.families.teachers import make_teacher
from tests.tiny import write_config
from tests.weights.conftest import make_torch_model
from tests.weights.gguf.make import SHAPE, byte_level_vocabulary, draft, transformers_model

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 24))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "llama": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama 3": {"rope_parameters": LLAMA3},
    "qwen2": {"rms_norm_eps": 1e-6, "rope_theta": 1e6},
    "qwen2 linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    "qwen2 yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_the_file_was_made_from(name, tmp_path):
    """Written by the converter's rules, with none of transformers' reader in between."""
    model = make_torch_model(name.split()[0], **SHAPE | MODELS[name])
    file = draft(model, byte_level_vocabulary("qwen2")).write(tmp_path / "model.gguf")
    teacher = load_teacher(file)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    found = np.asarray(forward(teacher, jnp.asarray(TOKENS)))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
    assert teacher.config.norm_eps == model.config.rms_norm_eps
    assert teacher.config.tie_embeddings == bool(model.config.tie_word_embeddings)


def test_gemma_3(tmp_path):
    """Norms less 1, sliding layers and their rotary base, neither of which is in the file."""
    settings = {"num_hidden_layers": 7, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 8}
    model = make_teacher("gemma3_text", **SHAPE | settings)
    teacher = load_teacher(draft(model, byte_level_vocabulary("qwen2")).write(tmp_path / "model.gguf"))
    assert teacher.config == hf_to_config(model.config.to_dict())
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    found = np.asarray(forward(teacher, jnp.asarray(TOKENS)))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("family", "head_dim"), [("llama", 64), ("qwen2", 64), ("qwen3", 128)])
def test_quantised_weights_equal_transformers(family, head_dim, tmp_path):
    """Every type in turn, each in several places. Qwen3 has the one width of head that transformers' reader knows."""
    model = make_torch_model(family, **SHAPE | {"head_dim": head_dim, "num_hidden_layers": 3})
    written = draft(model, byte_level_vocabulary("qwen2"), kinds=TENSOR_TYPES)
    file = written.write(tmp_path / "model.gguf")
    assert {entry.type for entry, _ in open_gguf(str(file)).tensors.values()} == {*TENSOR_TYPES}
    theirs = transformers_model(str(file))
    teacher = load_teacher(file)
    ours = AutoModelForCausalLM.from_pretrained(teacher.folder, dtype=torch.float32)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert not ours.config.tie_word_embeddings
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    found = np.asarray(forward(teacher, jnp.asarray(TOKENS)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_a_head_beside_the_embedding_is_kept(small, tmp_path):
    """Whatever it holds: a quantised head differs from the embedding even in a model that was tied."""
    small.tensors["output.weight"] = small.tensors["token_embd.weight"]
    assert not load_teacher(small.write(tmp_path / "both.gguf")).config.tie_embeddings
    del small.tensors["output.weight"]
    teacher = load_teacher(small.write(tmp_path / "one.gguf"))
    assert teacher.config.tie_embeddings
    assert "head" not in teacher.params


def test_the_folder_is_as_transformers_writes_one(small, tmp_path):
    small.metadata |= {"tokenizer.ggml.eot_token_id": 492, "general.name": "A/B: c"}
    folder = load_teacher(small.write(tmp_path / "model.gguf")).folder
    config = json.loads((tmp_path / "cache" / "jaxhybrid" / folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5
    generation = json.loads((tmp_path / folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 490, "eos_token_id": [491, 492], "pad_token_id": 491}
    with safe_open(f"{folder}/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(value.dtype == np.float32 for value in load_file(f"{folder}/model.safetensors").values())


def test_what_takes_a_teacher_takes_a_gguf_file(small, tmp_path):
    """A config's `teacher`, generation by the chat template, and the export of a hybrid made from it."""
    file = small.write(tmp_path / "model.gguf")
    (answer,) = complete(str(file), ["anna has"], 5, chat=True)
    assert isinstance(answer, str)
    with Pipeline(load_config(write_config(tmp_path / "config.yaml", file))) as pipeline:
        teacher = pipeline.models.frozen_teacher
    assert teacher.config.family == "qwen2"
    student = convert(teacher, ("full_attention", "gated_deltanet"), GatedDeltaNetConfig(), jax.random.key(0))
    exported = export(student, tmp_path / "export")
    assert load_student(exported).config.layer_types == ("full_attention", "gated_deltanet")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (exported / name).read_text() == (Path(teacher.folder) / name).read_text()
