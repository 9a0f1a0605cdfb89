"""GGUF metadata -> the config.json that transformers would have had."""

from typing import Any

import numpy as np

from jaxhybrid.errors import WeightsError
from jaxhybrid.families import family
from jaxhybrid.weights.gguf.model import OTHER_FILE, GgufModel

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}  # GGUF's name: ours
QUANTIZATION_VERSION = 2  # of ggml's block layouts; files of version 1 hold other ones under the same names
# The keys below an architecture that are read here, or say nothing about what the model computes.
KEYS = frozenset(
    (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
        "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
        "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
        "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
        "attention.sliding_window",
    )
)  # fmt: skip
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name -> GGUF's
ROPE_FACTORS = "rope_freqs.weight"
# What every Llama 3.1, 3.2 and 3.3 has; the factor differs.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
DEFAULT_THETA = 10_000.0  # llama.cpp's, for files that do not state it
# Of Gemma 3, in llama.cpp's code and not in its files: one layer in so many is full, the others slide and have this
# base; the model of 27B, known by its depth, scales attention by its width per head.
GEMMA3_PATTERN, GEMMA3_SLIDING_THETA, GEMMA3_27B_LAYERS = 6, 10_000.0, 62


def hugging_face_config(model: GgufModel) -> dict[str, Any]:
    """The config.json of `model`.

    Raises:
        WeightsError: another architecture, a key that is missing or not known, or a setting that has no counterpart.
    """
    architecture = model.setting("general.architecture", str)
    kind = model.setting("general.type", str, "model")
    if architecture not in ARCHITECTURES or kind != "model":
        raise WeightsError(
            f"{model.name} is a {kind} of the architecture {architecture!r}; read are models of "
            f"{', '.join(ARCHITECTURES)}."
        )
    version = model.setting("general.quantization_version", int, QUANTIZATION_VERSION)
    if version != QUANTIZATION_VERSION:
        raise WeightsError(
            f"{model.name} has general.quantization_version={version}, read is {QUANTIZATION_VERSION}. {OTHER_FILE}"
        )
    settings = _Settings(model, architecture)
    heads, width = settings.integer("attention.head_count"), settings.integer("embedding_length")
    head_dim = _head_width(settings, width // heads)
    theta = decimal(settings.number("rope.freq_base", DEFAULT_THETA))
    biases = {"attention_bias": "blk.0.attn_q.bias" in model.tensors, "mlp_bias": "blk.0.ffn_up.bias" in model.tensors}
    stated = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",)}.get(architecture, ())
    if settings.has("attention.sliding_window") and architecture != "gemma3":
        window = settings.integer("attention.sliding_window")
        raise WeightsError(
            f"{model.name} has {settings.prefix}attention.sliding_window={window}, read of gemma3 only. {OTHER_FILE}"
        )
    return {
        "architectures": [family(ARCHITECTURES[architecture]).architecture],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": settings.integer("vocab_size", len(model.settings("tokenizer.ggml.tokens", str))),
        "hidden_size": width,
        "intermediate_size": settings.integer("feed_forward_length"),
        "num_hidden_layers": settings.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        **(_gemma3(settings, width // heads, head_dim) if architecture == "gemma3" else {"hidden_act": "silu"}),
        "max_position_embeddings": settings.integer("context_length"),
        "rms_norm_eps": decimal(settings.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        **_rope_scaling(settings, head_dim, theta),
        **{name: biases[name] for name in stated},
        # llama.cpp writes no head where it is the embedding. One that is there may be quantised otherwise than the
        # embedding, even in a model that was tied; it is what the file computes with, so it is kept.
        "tie_word_embeddings": "output.weight" not in model.tensors,
        **{f"{role}_token_id": token for role, token in role_ids(model).items() if role != "unk"},
        "dtype": "float32",
    }


def _gemma3(settings: "_Settings", width_per_head: int, head_dim: int) -> dict[str, Any]:
    layers = settings.integer("block_count")
    full = [(layer + 1) % GEMMA3_PATTERN == 0 for layer in range(layers)]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width_per_head if layers == GEMMA3_27B_LAYERS else head_dim,
        "sliding_window": settings.integer("attention.sliding_window"),
        "layer_types": ["full_attention" if own else "sliding_attention" for own in full],
        "rope_local_base_freq": GEMMA3_SLIDING_THETA,
    }


def role_ids(model: GgufModel) -> dict[str, int]:
    """The ids of the tokens that begin, end and pad a text, and of the unknown token, as far as the file names them.

    Raises:
        WeightsError: an id beyond the vocabulary.
    """
    ids = {role: token_id(model, name) for role, name in ROLES.items()}
    return {role: token for role, token in ids.items() if token is not None}


def token_id(model: GgufModel, name: str) -> int | None:
    """The id of the token that GGUF calls `name`; None where the file does not say. Raises as `role_ids` does."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in model.metadata:
        return None
    token, count = model.setting(key, int), len(model.settings("tokenizer.ggml.tokens", str))
    if not 0 <= token < count:
        raise WeightsError(f"{model.name} has {key}={token} and {count} tokens. {OTHER_FILE}")
    return token


def decimal(value: float) -> float:
    """The short decimal that was rounded to the float32 in the file: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Settings:
    """The metadata of one architecture, without its prefix; nothing in it is passed over."""

    def __init__(self, model: GgufModel, architecture: str):
        self.model, self.prefix = model, f"{architecture}."
        for key, value in model.metadata.items():
            if key.startswith(self.prefix) and key.removeprefix(self.prefix) not in KEYS:
                raise WeightsError(
                    f"{model.name} has {key}={value!r}, which is not known and may change what the model computes. "
                    f"{OTHER_FILE}"
                )

    def has(self, key: str) -> bool:
        return self.prefix + key in self.model.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        return self._positive(key, self.model.setting(self.prefix + key, int, default))

    def number(self, key: str, default: float | None = None) -> float:
        return self._positive(key, self.model.setting(self.prefix + key, float, default))

    def text(self, key: str, default: str) -> str:
        return self.model.setting(self.prefix + key, str, default)

    def _positive[Number: (int, float)](self, key: str, value: Number) -> Number:
        if not value > 0:
            raise WeightsError(f"{self.model.name} has {self.prefix}{key}={value}; it must be positive. {OTHER_FILE}")
        return value


def _head_width(settings: _Settings, default: int) -> int:
    """The width of a head, which all that is said of it must agree on."""
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    widths = {key: settings.integer(key) for key in keys if settings.has(key)}
    if len(set(widths.values())) > 1:
        told = ", ".join(f"{settings.prefix}{key}={width}" for key, width in widths.items())
        raise WeightsError(f"{settings.model.name} has {told}; heads of one width, rotated whole, are supported.")
    return next(iter(widths.values()), default)


def _rope_scaling(settings: _Settings, head_dim: int, theta: float) -> dict[str, Any]:
    """`rope_scaling`, from the metadata or from the factors that Llama 3 files keep as a tensor; none where plain."""
    model = settings.model
    kind = settings.text("rope.scaling.type", "linear")  # llama.cpp's default, beside a factor of 1
    factor = decimal(settings.number("rope.scaling.factor", 1.0))
    if ROPE_FACTORS in model.tensors:
        if kind != "none" and factor != 1:
            raise WeightsError(f"{model.name} has {ROPE_FACTORS} and rope.scaling.factor={factor} both. {OTHER_FILE}")
        return _llama3_scaling(model, head_dim, theta)
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn":
        length = settings.integer("rope.scaling.original_context_length")
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        return {"rope_scaling": scaling}
    raise WeightsError(f"{model.name} has {settings.prefix}rope.scaling.type={kind!r}; read are none, linear, yarn.")


def _llama3_scaling(model: GgufModel, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3's rule, if the factors by which the file divides the frequencies are that rule's.

    The largest one is the rule's factor; the other settings are the same in all models that have it, which is verified.
    """
    factors = model.values(ROPE_FACTORS)
    factor = float(factors.max())
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    turns = LLAMA3_ROPE["original_max_position_embeddings"] * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((turns / (2 * np.pi) - low) / (high - low), 0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        others = ", ".join(f"{name}={value:g}" for name, value in LLAMA3_ROPE.items())
        raise WeightsError(
            f"{model.name} has rotary factors in {ROPE_FACTORS} that are not those of Llama 3's rule with "
            f"factor={factor:g}, {others}. {OTHER_FILE}"
        )
    return {"rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}}
