"""What is wrong with a GGUF file is said by name, before anything is left in the cache."""

import importlib.util
import struct

import numpy as np
import pytest

from jaxhybrid.errors import JaxHybridError, WeightsError
from jaxhybrid.weights.gguf.folder import gguf_folder
from jaxhybrid.weights.huggingface import load_teacher
from tests.weights.conftest import make_torch_model
from tests.weights.gguf.make import SHAPE, Draft, byte_level_vocabulary, draft


@pytest.fixture
def refused(tmp_path, cache):
    """Says whether a file is refused with all of these words."""

    def check(file, *parts):
        if isinstance(file, Draft):
            file = file.write(tmp_path / "model.gguf")
        with pytest.raises(WeightsError) as error:
            gguf_folder(str(file))
        for part in parts:
            assert part in str(error.value), str(error.value)
        assert not cache.exists() or list(cache.iterdir()) == []

    return check


METADATA = [
    ({"general.architecture": "mamba"}, ["'mamba'", "llama, qwen2, qwen3, gemma3"]),
    ({"general.type": "adapter"}, ["adapter", "qwen2"]),
    ({"general.quantization_version": 1}, ["general.quantization_version=1"]),
    ({"qwen2.block_count": None}, ["lacks qwen2.block_count"]),
    ({"qwen2.block_count": 3}, ["model.layers.2.self_attn.q_proj.weight"]),
    ({"qwen2.block_count": 1}, ["blk.1.attn_q.weight", "dropped"]),
    ({"qwen2.feed_forward_length": [256, 256]}, ["qwen2.feed_forward_length=[256, 256]", "an integer"]),
    ({"qwen2.attention.head_count": 0}, ["qwen2.attention.head_count=0", "positive"]),
    ({"qwen2.attention.sliding_window": 4096}, ["qwen2.attention.sliding_window=4096", "gemma3 only"]),
    ({"qwen2.attention.key_length": 64, "qwen2.attention.value_length": 32}, ["key_length=64", "value_length=32"]),
    ({"qwen2.rope.dimension_count": 32, "qwen2.attention.key_length": 64}, ["rope.dimension_count=32", "whole"]),
    ({"qwen2.embedding_length": 512}, ["token_embd.weight", "[512, 256]", "[512, 512]"]),
    ({"qwen2.rope.scaling.type": "longrope", "qwen2.rope.scaling.factor": 2.0}, ["longrope", "linear, yarn"]),
    ({"qwen2.rope.scaling.type": "yarn"}, ["lacks qwen2.rope.scaling.original_context_length"]),
    ({"qwen2.rope.scaling.yarn_beta_fast": 16.0}, ["yarn_beta_fast=16"]),
    ({"tokenizer.ggml.model": "bert"}, ["tokenizer.ggml.model='bert'", "gpt2, llama"]),
    ({"tokenizer.ggml.pre": "tekken"}, ["tokenizer.ggml.pre='tekken'", "qwen2"]),
    ({"tokenizer.ggml.pre": None}, ["lacks tokenizer.ggml.pre"]),
    ({"tokenizer.ggml.tokens": None}, ["lacks tokenizer.ggml.tokens"]),
    ({"tokenizer.ggml.merges": ["a nowhere"]}, ["'a nowhere'"]),
    ({"tokenizer.ggml.eos_token_id": 512}, ["eos_token_id=512", "512 tokens"]),
    ({"tokenizer.ggml.token_type": [1, 1]}, ["512 tokens", "2 types"]),
    ({"tokenizer.ggml.add_bos_token": 1}, ["add_bos_token=1", "true or false"]),
]


@pytest.mark.parametrize(("changes", "parts"), METADATA, ids=lambda value: next(iter(value)))
def test_metadata(changes, parts, small, refused):
    small.architecture = changes.pop("general.architecture", small.architecture)
    small.metadata = {key: value for key, value in (small.metadata | changes).items() if value is not None}
    refused(small, "model.gguf", *parts)


def test_repeated_tokens(small, refused):
    small.metadata["tokenizer.ggml.tokens"][7] = "!"
    refused(small, "'!' twice", "7", "0")


def test_tensors(small, refused):
    whole = dict(small.tensors)
    del small.tensors["blk.1.ffn_up.weight"]
    refused(small, "model.layers.1.mlp.up_proj.weight")
    for name in ("blk.0.ssm_a.weight", "blk.0.attn_output.bias", "mystery", "output.bias"):
        small.tensors = whole | {name: (np.zeros(256, np.float32), None)}
        refused(small, name, "dropped")
    small.tensors = whole | {"blk.0.attn_norm.weight": (np.ones(128, np.float32), None)}
    refused(small, "blk.0.attn_norm.weight", "[128]", "[256]")
    small.tensors = whole | {"blk.0.ffn_up.weight": (np.zeros((256, 84), np.uint8), "Q2_K")}
    refused(small, "blk.0.ffn_up.weight", "Q2_K", "Q4_K")
    small.tensors = whole | {"blk.0.ffn_up.weight": (np.full((256, 256), np.nan, np.float32), None)}
    refused(small, "blk.0.ffn_up.weight", "not finite")


def test_rotary_factors_that_are_not_llama_3s(refused):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make_torch_model("llama", **SHAPE, rope_parameters=rope | {"original_max_position_embeddings": 4096})
    written = draft(model, byte_level_vocabulary("llama-bpe"))
    refused(written, "rope_freqs.weight", "factor=8", "original_max_position_embeddings=8192")
    written.tensors["rope_freqs.weight"] = np.ones(16, np.float32), None
    refused(written, "rope_freqs.weight")
    written.tensors["rope_freqs.weight"] = np.ones(32, np.float32), None
    written.metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    refused(written, "rope_freqs.weight", "rope.scaling.factor=2.0")


def test_files_that_are_not_whole(small, refused, tmp_path):
    file = small.write(tmp_path / "whole.gguf")
    data, bad = file.read_bytes(), tmp_path / "bad.gguf"
    for count in (len(data) - 64, len(data) // 2):
        bad.write_bytes(data[:count])
        refused(bad, str(bad), f"{count} bytes", str(len(data)), "one of several parts")
    for count in (0, 3, 4, 20, 24, 100, 5000):
        bad.write_bytes(data[:count])
        refused(bad, str(bad), "Fetch it again")
    bad.write_bytes(data + b"\0" * 32)
    refused(bad, f"{len(data) + 32} bytes", "something else")
    bad.write_bytes(b"PK" + data[2:])
    refused(bad, "does not begin as a GGUF file")
    for version, word in ((1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")):
        bad.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
        refused(bad, word)
    refused(tmp_path / "absent.gguf", "absent.gguf", "not there")


def test_tensors_of_no_size_or_of_half_a_block(small, refused, tmp_path):
    file = small.write(tmp_path / "whole.gguf")
    data, name = file.read_bytes(), b"blk.0.attn_norm.weight"
    place = data.index(name) + len(name) + 4  # of its one dimension
    for size, kind in ((0, 0), (16, 2)):  # F32, Q4_0
        bad = data[:place] + struct.pack("<QI", size, kind) + data[place + 12 :]
        (tmp_path / "bad.gguf").write_bytes(bad)
        refused(tmp_path / "bad.gguf", name.decode(), f"shape [{size}]", "whole")


def test_a_damaged_head_is_an_error_of_the_input(small, tmp_path, cache):
    """Bytes changed at random places: refused, or without effect; never another exception."""
    for name in list(small.tensors):  # a smaller file, whose head is all that matters
        if name not in ("token_embd.weight", "output_norm.weight", "output.weight"):
            del small.tensors[name]
    data = bytearray(small.write(tmp_path / "whole.gguf").read_bytes())
    end = data.index(b"output_norm.weight")
    rng, bad, refusals = np.random.default_rng(0), tmp_path / "bad.gguf", 0
    for _ in range(150):
        place, value = int(rng.integers(end)), int(rng.integers(256))
        spoilt = bytearray(data)
        spoilt[place] = value
        bad.write_bytes(spoilt)
        with pytest.raises(JaxHybridError):  # at the latest for the tensors that are missing
            gguf_folder(str(bad))
        refusals += 1
    assert refusals == 150
    assert not cache.exists() or list(cache.iterdir()) == []


def test_other_names(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match=r"folder of GGUF files.*model\.gguf"):
        load_teacher(tmp_path)
    with pytest.raises(WeightsError, match="matches no file"):
        load_teacher(tmp_path / "part*")
    (tmp_path / "model.bin").write_bytes(b"????")
    with pytest.raises(WeightsError, match="is a file; name the folder"):
        load_teacher(tmp_path / "model.bin")


def test_the_package_gguf_is_named(small, tmp_path, monkeypatch):
    file, find = small.write(tmp_path / "model.gguf"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(WeightsError, match=r"package gguf: pip install 'jaxhybrid\[gguf\]'"):
        gguf_folder(str(file))
