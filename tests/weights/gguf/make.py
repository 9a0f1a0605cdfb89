"""GGUF files of tiny random models, written as llama.cpp's converter writes them."""

import itertools
import json
import math

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.tiny import TEXT

# Rows are whole blocks of every type: K-quants have 256 values in a block.
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
# Where the float16 scales of a block are, in bytes from its start.
SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2),
          "Q6_K": (208,)}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


# Text in which the rules for words differ: what stands next to digits, signs, spaces and line ends.
MIXED = "it's WE'VE a1 b22 c333 d4444 55555 1,234.5 x = {'k': [1, 22]}\n\n\treturn  (a != b);\r\n   end... \"so\"!\n "


def random_blocks(kind, rows, width, rng):
    """Bytes [rows, n] of any bits, with scales of a size that models have."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * width // block, size), np.uint8)
    for place in SCALES[kind]:
        scale = rng.uniform(-0.004, 0.004, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, width // block * size)


def permute(weight, heads):
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py, as published."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(
        weight.shape
    )  # fmt: skip


def llama3_factors(config):
    """rope_freqs.weight as llama.cpp's converter computes it."""
    rope, width = config.rope_parameters, config.head_dim
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            factors.append(1)
        elif wavelength > length / low:
            factors.append(rope["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def transformers_model(file):
    """transformers' reading of a GGUF file, with its own names, dequantisation and row order."""
    settings = load_gguf_checkpoint(file)["config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    result = model.load_state_dict(tensors, strict=False)
    assert result.missing_keys == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    assert result.unexpected_keys == []
    model.tie_weights()
    return model


def gguf_name(name, names):
    name, _, kind = name.rpartition(".")
    if name in names:
        return f"{names[name]}.{kind}"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{names[part]}.{kind}"


GEMMA3_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


class Draft:
    """What a file will hold: metadata and tensors, to be changed before it is written.

    Tensors are (values, type) with the bytes of blocks for quantised types.
    """

    def __init__(self, architecture, metadata, tensors):
        self.architecture, self.metadata, self.tensors = architecture, metadata, tensors

    def write(self, path, **options):
        writer = GGUFWriter(path, self.architecture, **options)
        for key, value in self.metadata.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for name, (values, kind) in self.tensors.items():
            writer.add_tensor(name, values, raw_dtype=None if kind is None else GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def draft(model, vocabulary, kinds=("F32",)):
    """The draft of a transformers model. Matrices get the types of `kinds` in turn, quantised ones random blocks."""
    config, rng, turns = model.config, np.random.default_rng(0), itertools.cycle(kinds)
    architecture = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    names = NAMES | (GEMMA3_NAMES if architecture == "gemma3" else {})
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        kind = "F32" if value.ndim == 1 else next(turns)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + 1  # what the norm multiplies by
        if architecture == "llama" and "q_proj" in name:
            value = permute(value, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            value = permute(value, config.num_key_value_heads)
        if kind == "F32":
            tensors[gguf_name(name, names)] = np.ascontiguousarray(value), None
        elif kind == "F16":
            tensors[gguf_name(name, names)] = value.astype(np.float16), None
        elif kind == "BF16":
            bits = parameter.detach().bfloat16().view(torch.int16).numpy()
            tensors[gguf_name(name, names)] = np.ascontiguousarray(bits).view(np.uint8), "BF16"
        else:
            tensors[gguf_name(name, names)] = random_blocks(kind, *value.shape, rng), kind
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    settings = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if architecture == "llama":
        settings |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    if architecture == "gemma3":
        settings["attention.sliding_window"] = config.sliding_window
    if architecture in ("qwen3", "gemma3"):
        settings |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if rope["rope_type"] in ("linear", "yarn"):
        settings |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        settings["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(config), None
    metadata = {f"{architecture}.{key}": value for key, value in settings.items()}
    return Draft(architecture, {"general.name": "Tiny Model"} | metadata | vocabulary, tensors)


def byte_level_vocabulary(pre, size=SHAPE["vocab_size"], **changes):
    """A small BPE vocabulary, filled up to `size` as llama.cpp does, under the name of a rule for words.

    Its merges were learned on whole texts, across words, so that what splits a text decides what it becomes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT, MIXED, MIXED], trainers.BpeTrainer(vocab_size=490, initial_alphabet=alphabet))
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [" ".join(pair) for pair in merges_of(tokenizer)]
    special, plain = ["<|begin|>", "<|end|>", "<|turn|>", "<｜bar｜>"], ["<tool>"]
    fill = [f"[PAD{i}]" for i in range(len(tokens) + len(special) + len(plain), size)]
    ids = {token: len(tokens) + i for i, token in enumerate(special)}
    types = [1] * len(tokens) + [3] * len(special) + [4] * len(plain) + [5] * len(fill)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *special, *plain, *fill],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": ids["<|begin|>"],
        "tokenizer.ggml.eos_token_id": ids["<|end|>"],
        "tokenizer.ggml.padding_token_id": ids["<|end|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
    } | changes


def merges_of(tokenizer):
    return json.loads(tokenizer.to_str())["model"]["merges"]
