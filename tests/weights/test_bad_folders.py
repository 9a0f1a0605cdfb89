"""What is wrong with a folder is said by name, and how to put it right."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_load_file
from safetensors.torch import save_file as torch_save_file

from jaxhybrid.errors import ConfigError, WeightsError
from jaxhybrid.weights.huggingface import load_student, load_teacher
from tests.weights.conftest import make_torch_model

UP = "model.layers.1.mlp.up_proj.weight"


def edit(folder, change):
    """Rewrites the tensors of a single-file folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, *parts):
    with pytest.raises(WeightsError) as error:
        load_teacher(folder)
    for part in parts:
        assert part in str(error.value), str(error.value)
    return str(error.value)


def test_missing_tensor(llama_folder):
    edit(llama_folder, lambda tensors: tensors.pop(UP))
    refused(llama_folder, UP, "lacks")


def test_missing_head(llama_folder):
    edit(llama_folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(llama_folder, "lm_head.weight", "tie_word_embeddings")


def test_unexpected_tensor(llama_folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(llama_folder, lambda tensors: tensors.update({name: np.zeros(64, np.float32)}))
    refused(llama_folder, name, "dropped")


def test_too_many_layers(llama_folder):
    edit_config(llama_folder, num_hidden_layers=2)
    refused(llama_folder, "model.layers.2.input_layernorm.weight", "more")


def test_wrong_shape(llama_folder):
    edit(llama_folder, lambda tensors: tensors.update({UP: tensors[UP][:80]}))
    refused(llama_folder, UP, "[80, 64]", "[88, 64]")


def test_transposed_tensor(llama_folder):
    edit(llama_folder, lambda tensors: tensors.update({UP: np.ascontiguousarray(tensors[UP].T)}))
    refused(llama_folder, UP, "[64, 88]", "[88, 64]")


def test_wrong_vocabulary(llama_folder):
    edit_config(llama_folder, vocab_size=100)
    refused(llama_folder, "model.embed_tokens.weight", "[101, 64]", "[100, 64]")


def test_rotary_buffers_are_no_weights(llama_folder):
    before = load_teacher(llama_folder)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(3)}
    edit(llama_folder, lambda tensors: tensors.update(buffers))
    assert load_teacher(llama_folder).config == before.config


def test_tied_head_must_be_the_embedding(saved):
    folder = saved(make_torch_model(tie_word_embeddings=True))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert "head" not in load_teacher(folder).params
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    refused(folder, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize("kept", [-5, 100, 4, 0])
def test_truncated_file(llama_folder, kept):
    file = llama_folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    refused(llama_folder, str(file), "truncated")


def sharded(saved):
    return saved(make_torch_model(), max_shard_size="60KB")


def test_missing_shard(saved):
    folder = sharded(saved)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    refused(folder, gone.name, "shard")


def test_truncated_shard(saved):
    folder = sharded(saved)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, file.name, "truncated")


def test_index_that_lies(saved):
    folder = sharded(saved)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, shard in index["weight_map"].items() if shard == shards[0])
    index["weight_map"][name] = shards[1]
    path.write_text(json.dumps(index))
    refused(folder, name, shards[1])
    index["weight_map"][name] = "../" + shards[0]
    path.write_text(json.dumps(index))
    refused(folder, "../" + shards[0])
    path.write_text("{}")
    refused(folder, "weight_map")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickle_is_refused(llama_folder, name):
    (llama_folder / "model.safetensors").unlink()
    torch.save({}, llama_folder / name)
    refused(llama_folder, name, "Pickle", "save_pretrained")


def test_no_weights_no_config_no_folder(llama_folder, tmp_path):
    (llama_folder / "model.safetensors").unlink()
    refused(llama_folder, "model.safetensors")
    (llama_folder / "config.json").write_text("{")
    refused(llama_folder, "config.json", "JSON")
    (llama_folder / "config.json").write_text("[]")
    refused(llama_folder, "config.json", "table")
    (llama_folder / "config.json").unlink()
    refused(llama_folder, "config.json")
    refused(tmp_path / "absent", "absent")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    refused(tmp_path / "weights.safetensors", "folder")


def test_hub_id_that_cannot_be_fetched():
    refused("nobody/no-such-model", "nobody/no-such-model", "hub")


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("added", "parts"),
    [
        ({UP: torch.ones(88, 64, dtype=FP8), f"{UP}_scale_inv": torch.ones(1, 1)}, (f"{UP} (F8_E4M3)",)),
        ({UP: torch.ones(88, 64, dtype=FP8)}, (f"{UP} (F8_E4M3)",)),
        ({UP: torch.ones(88, 64, dtype=torch.int8)}, (f"{UP} (I8)",)),
        ({f"{UP}_scale": torch.ones(88, 1)}, (f"{UP}_scale (F32)",)),
        ({UP.replace("weight", "qweight"): torch.ones(8, 88, dtype=torch.int32)}, ("qweight (I32)",)),
        ({f"{UP}.absmax": torch.ones(88)}, (f"{UP}.absmax (F32)",)),
    ],
)
def test_quantised_weights_are_told_from_a_wrong_config(added, parts, llama_folder):
    """Also where config.json says nothing of it."""
    file = llama_folder / "model.safetensors"
    torch_save_file(torch_load_file(file) | added, file)
    message = refused(llama_folder, "quantised", "fetch the unquantised model", *parts)
    assert "config.json" not in message


def test_unknown_demo():
    with pytest.raises(ConfigError, match=re.escape("demo:gpt5")):
        load_teacher("demo:gpt5")


# --- tokenizer against embedding


def tokenizer_json(folder, size, added=None):
    vocabulary = {f"t{i}": i for i in range(size)}
    tokens = [{"id": id, "content": content} for id, content in (added or {}).items()]
    content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": tokens}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_embedding_padded_beyond_the_tokenizer(llama_folder):
    tokenizer_json(llama_folder, 90, added={90: "<a>", 100: "<b>"})
    assert load_teacher(llama_folder).config.vocab_size == 101


@pytest.mark.parametrize(("size", "added"), [(102, {}), (90, {101: "<a>"})])
def test_tokenizer_beyond_the_embedding(llama_folder, size, added):
    tokenizer_json(llama_folder, size, added)
    refused(llama_folder, "ids up to 101", "vocab_size=101")


ROLES = ("tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize("file", ROLES)
@pytest.mark.parametrize("named", ["<pad>", {"content": "<pad>", "lstrip": False}])
def test_a_padding_token_beyond_the_embedding_does_no_harm(file, named, llama_folder):
    tokenizer_json(llama_folder, 101, added={101: "<pad>"})
    refused(llama_folder, "ids up to 101")  # so far it may be any token
    (llama_folder / file).write_text(json.dumps({"pad_token": named, "eos_token": "t2"}))
    assert load_teacher(llama_folder).config.vocab_size == 101
    (llama_folder / file).write_text(json.dumps({"pad_token": named, "unk_token": named}))
    refused(llama_folder, "ids up to 101")
    (llama_folder / file).write_text(json.dumps({"pad_token": named}))
    tokenizer_json(llama_folder, 101, added={101: "<pad>", 102: "<tool>"})
    refused(llama_folder, "ids up to 102")


def test_older_tokenizer_files(llama_folder):
    (llama_folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 100}))
    load_teacher(llama_folder)
    (llama_folder / "added_tokens.json").write_text(json.dumps({"<c>": 101}))
    refused(llama_folder, "ids up to 101")
    (llama_folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<c>"}))
    load_teacher(llama_folder)


# --- which loader


def test_teacher_and_student_are_told_apart(llama_folder):
    with pytest.raises(ConfigError, match="load_teacher"):
        load_student(llama_folder)
    edit_config(llama_folder, model_type="jaxhybrid")
    with pytest.raises(ConfigError, match="load_student"):
        load_teacher(llama_folder)
