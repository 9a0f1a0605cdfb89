"""SmolLM3: Llama in which every fourth layer has no rotary embedding."""

from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.base import (
    WINDOW_KEYS,
    Family,
    given_kinds,
    kinds_by_switch,
    read_flag,
    read_integer,
    switch_keys,
)
from jaxhybrid.families.llama import bias_keys, biases
from jaxhybrid.model.config import ModelConfig


def _flags(hf: dict[str, Any]) -> dict[str, Any]:
    return biases(hf) | {"unrotated_layers": _unrotated(hf)}


def _unrotated(hf: dict[str, Any]) -> tuple[int, ...]:
    layers, rotated = read_integer(hf, "num_hidden_layers"), hf.get("no_rope_layers")
    if rotated is None:
        interval = read_integer(hf, "no_rope_layer_interval")
        return tuple(range(interval - 1, layers, interval))
    if len(rotated) < layers or set(rotated) - {0, 1}:
        raise ConfigError(f"no_rope_layers={rotated!r}: it has 1 (rotated) or 0 for each of {layers} layers.")
    return tuple(layer for layer in range(layers) if not rotated[layer])


def _kinds(hf: dict[str, Any]) -> list[str]:
    if hf.get("layer_types") is not None:
        return kinds_by_switch(hf)
    slides = read_flag(hf, "use_sliding_window") and hf.get("sliding_window") is not None
    return given_kinds(hf, lambda layer: slides and layer in _unrotated(hf))


def _flag_keys(config: ModelConfig) -> dict[str, Any]:
    rotated = [int(layer not in config.unrotated_layers) for layer in range(config.num_layers)]
    return bias_keys(config) | switch_keys(config) | {"no_rope_layers": rotated}


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    flags=_flags,
    flag_keys=_flag_keys,
    own_keys=("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *WINDOW_KEYS),
    defaults={
        "max_position_embeddings": 32768, "rope_theta": 2_000_000.0, "tie_word_embeddings": True,
        "num_key_value_heads": 4, "no_rope_layer_interval": 4, "max_window_layers": 0,
    },
    kinds=_kinds,
)  # fmt: skip
