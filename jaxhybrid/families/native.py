"""Students in an architecture that transformers has itself: what it can express, feature by feature, and the config.

One is written and read: `qwen3_5_text`, softmax attention with query and key norms beside Gated DeltaNet. It differs
from ours in what a weight means, not in what is computed: see `weights/native.py`.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.base import Family
from jaxhybrid.families.student import STUDENT_TYPE, read_student, write_student
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig

QWEN3_5 = "qwen3_5_text"
ARCHITECTURE = "Qwen3_5ForCausalLM"
NO_CONVOLUTION_TAPS = 4  # where a student has no convolution: taps that pass the current token through
ROPE_KINDS = ("default", "linear", "llama3", "yarn")  # of "dynamic" transformers remembers the longest text it has seen
ROPE_KEYS = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
OWN_KEYS = (
    "attn_output_gate",
    "full_attention_interval",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
# Parts of our configs that the features below speak of, or that decide how a layer starts; all others must be unused.
KNOWN_PARTS = (
    *("family", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
    *("head_dim", "norm_eps", "max_position_embeddings", "rope", "tie_embeddings", "qkv_bias", "o_bias", "mlp_bias"),
    *("qk_norm", "layer_types", "mixer", "softmax"),
)
KNOWN_SETTINGS = (
    *("expand_kv", "output_gate", "rope", "qkv_bias", "qk_norm", "conv_size"),
    *("gate_init", "decay_init"),
)


@dataclass(frozen=True)
class Feature:
    """One thing a model has, and whether an architecture can say it.

    Attributes:
        here: the student's.
        there: the architecture's.
        remedy: the setting that would make them agree, for a new run.
    """

    name: str
    here: str
    there: str
    fits: bool
    remedy: str = ""


def features(config: ModelConfig) -> list[Feature]:
    """What `qwen3_5_text` must be able to express, in the order of a layer."""
    mixer, softmax = config.mixer, len(config.softmax_layers)
    found = [
        Feature("softmax layers", str(softmax), "at least 1, for generate", softmax > 0, "select.budget"),
        _flag("query and key norms", config.qk_norm, True),
        _flag("biases on q, k, v", config.qkv_bias, False),
        _flag("bias on o", config.o_bias, False),
        _flag("biases in the MLP", config.mlp_bias, False),
        _flag("rotary embedding of softmax layers", config.softmax.rope, True, "softmax.rope=true"),
        _flag("queries scaled by length", config.softmax.length_scale is not None, False, "softmax.length_scale=null"),
        Feature("rotary scaling", config.rope.kind, " or ".join(ROPE_KINDS), config.rope.kind in ROPE_KINDS),
        Feature("rotated share of a head", "all", "any", True),
        Feature("tied embeddings", _words(config.tie_embeddings), "any", True),
        *_others(config, KNOWN_PARTS, ""),
    ]
    kind = "none" if mixer is None or softmax == config.num_layers else mixer.kind
    delta = GatedDeltaNetConfig.kind
    found.append(Feature("linear layers", kind, delta, kind == delta, f"mixer.kind={delta}"))
    if not isinstance(mixer, GatedDeltaNetConfig):
        return found
    states = "one per query head"
    here = states if config.num_states == config.num_heads else "one per K/V head"
    return [
        *found,
        _flag("query and key norms of linear layers", bool(mixer.qk_norm), False, "mixer.qk_norm=false"),
        _flag("biases on q, k, v of linear layers", bool(mixer.qkv_bias), False, "mixer.qkv_bias=false"),
        _flag("rotary embedding of linear layers", mixer.rope, False, "mixer.rope=false"),
        _flag("output gate of linear layers", mixer.output_gate, True, "mixer.output_gate=true"),
        Feature("states of linear layers", here, states, here == states, "mixer.expand_kv=true"),
        Feature("taps of the convolution", str(mixer.conv_size), "any; 0 as identity taps", True),
        *_others(mixer, KNOWN_SETTINGS, "mixer."),
    ]  # fmt: skip


def write_native(family: Family, config: ModelConfig, teacher_hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a student that `features` has no objection to. Our own keys stay in it, to be read back."""
    hf = write_student(family, config, teacher_hf_config)
    del hf["traits"]  # for our own code
    for key in ("use_sliding_window", "sliding_window"):
        hf.pop(key, None)
    # For scaled rotary embeddings transformers 5.16 reads this key where later versions read the one inside.
    hf |= {"model_type": QWEN3_5, "architectures": [ARCHITECTURE], "partial_rotary_factor": 1.0}
    return hf | _native_keys(config, hf["rope_parameters"])


def read_native(families: Mapping[str, Family], hf: Mapping[str, Any]) -> ModelConfig:
    """The reverse of `write_native`.

    Raises:
        ConfigError: not a config that `write_native` wrote, or one that was changed since.
    """
    if hf.get("model_type") != QWEN3_5 or "base_model_type" not in hf:
        raise ConfigError(
            f"model_type={hf.get('model_type')!r} without base_model_type: a model of {QWEN3_5} is read if jaxhybrid "
            "exported it; its softmax layers may have gates of their own else."
        )
    rope = {name: value for name, value in (hf.get("rope_parameters") or {}).items() if name not in ROPE_KEYS}
    plain = {name: value for name, value in hf.items() if name not in (*OWN_KEYS, *ROPE_KEYS)}
    config = read_student(families, plain | {"model_type": STUDENT_TYPE, "rope_parameters": rope})
    for name, value in _native_keys(config, rope).items():
        given = hf.get(name)
        if given != value and name != "full_attention_interval":  # transformers leaves this one out when it saves
            raise ConfigError(f"config.json has {name}={given!r}; the other keys say {value!r}. Export it again.")
    return config


def _native_keys(config: ModelConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that only this architecture has, or reads otherwise."""
    mixer, pairs = config.mixer, config.head_dim // 2
    assert isinstance(mixer, GatedDeltaNetConfig)
    hf = {
        "attn_output_gate": True,
        "linear_conv_kernel_dim": mixer.conv_size or NO_CONVOLUTION_TAPS,
        "linear_key_head_dim": config.head_dim,
        "linear_value_head_dim": config.head_dim,
        "linear_num_key_heads": config.num_states,
        "linear_num_value_heads": config.num_states,
        # Sections are for images; a text has the same position in all three.
        "rope_parameters": {
            **rope,
            "partial_rotary_factor": 1.0,
            "mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3],
            "mrope_interleaved": True,
        },
    }
    interval = attention_interval(config)
    return hf if interval is None else hf | {"full_attention_interval": interval}


def attention_interval(config: ModelConfig) -> int | None:
    """n where exactly every n-th layer is softmax, the first one layer n - 1: what some servers read alone."""
    softmax, depth = config.softmax_layers, config.num_layers
    interval = softmax[0] + 1 if softmax else depth + 1
    return interval if softmax == tuple(range(interval - 1, depth, interval)) else None


def _flag(name: str, here: bool, there: bool, remedy: str = "") -> Feature:
    return Feature(name, _words(here), _words(there), here == there, remedy)


def _words(flag: bool) -> str:
    return "yes" if flag else "no"


def _others(config: Any, known: tuple[str, ...], prefix: str) -> list[Feature]:
    """What a config has beside the known parts: expressed by nothing here unless it is as if absent."""
    found = []
    for item in fields(config):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if item.name not in known and getattr(config, item.name) != default:
            found.append(Feature(f"{prefix}{item.name}", str(getattr(config, item.name)), str(default), False))
    return found
