"""GGUF tensors -> one safetensors file in float32 with Hugging Face names, a few rows in memory at a time."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxhybrid.errors import WeightsError
from jaxhybrid.families import hf_to_config
from jaxhybrid.weights.gguf.config import ROPE_FACTORS
from jaxhybrid.weights.gguf.model import OTHER_FILE, GgufModel
from jaxhybrid.weights.names import file_tensors
from jaxhybrid.weights.safetensors import stream_safetensors

NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
MODEL_PARTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OWN_PARTS = {  # where an architecture has more norms, and other names for them
    "gemma3_text": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
}


def write_weights(model: GgufModel, config: dict[str, Any], path: Path) -> None:
    """Writes every tensor of the model. Rotary factors are left out: they are in `config`.

    Raises:
        WeightsError: a tensor that the config does not ask for, lacks, or has another shape for.
    """
    sources = _sources(model, config)

    def rows(name: str) -> Iterator[np.ndarray]:
        heads = _paired_heads(name, config)
        if name.endswith("norm.weight") and config["model_type"] == "gemma3_text":
            yield model.values(sources[name]) - 1  # llama.cpp keeps what the norm multiplies by, transformers less 1
        elif heads is None:
            yield from model.rows(sources[name])
        else:
            yield split_halves(model.values(sources[name]), heads)

    shapes = {name: model.shape(tensor) for name, tensor in sources.items()}
    stream_safetensors(path, shapes, dict.fromkeys(shapes, np.dtype(np.float32)), rows)


def _sources(model: GgufModel, config: dict[str, Any]) -> dict[str, str]:
    """Hugging Face name -> GGUF name, of exactly the tensors that the config asks for."""
    expected = {entry.name: entry.file_shape for entry in file_tensors(hf_to_config(config))}
    sources = {}
    for tensor in model.tensors:
        if tensor == ROPE_FACTORS:
            continue
        name = _hugging_face_name(tensor, LAYER_PARTS | OWN_PARTS.get(config["model_type"], {}))
        if name not in expected:
            raise WeightsError(
                f"{model.name} has the tensor {tensor}, which a {config['model_type']} model of its metadata does not "
                f"use; it would be dropped. {OTHER_FILE}"
            )
        if model.shape(tensor) != expected[name]:
            raise WeightsError(
                f"{model.name} has {tensor} of shape {list(model.shape(tensor))}; its metadata asks for "
                f"{list(expected[name])}. {OTHER_FILE}"
            )
        sources[name] = tensor
    missing = [name for name in expected if name not in sources]
    if missing:
        raise WeightsError(f"{model.name} has no tensor for {', '.join(missing[:5])}. {OTHER_FILE}")
    return sources


def _hugging_face_name(tensor: str, layer_parts: dict[str, str]) -> str | None:
    found = NAME.fullmatch(tensor)
    if found is None:
        return None
    layer, part, kind = found.groups()
    name = (MODEL_PARTS if layer is None else layer_parts).get(part)
    if name is None:
        return None
    return f"{name}.{kind}" if layer is None else f"model.layers.{int(layer)}.{name}.{kind}"


def _paired_heads(name: str, config: dict[str, Any]) -> int | None:
    """The heads of a projection whose rows llama.cpp reorders: q and k of llama, and of no other architecture."""
    if config["model_type"] != "llama":
        return None
    part = name.split(".")[-2]
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(part)


def split_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, transformers row i with row i + K/2: rows 0 2 4 .. 1 3 5 .."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
