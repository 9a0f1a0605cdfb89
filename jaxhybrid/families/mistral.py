"""Mistral, Nemo, Mistral Small: Llama without biases. 0.1 has a sliding window in every layer.

Ministral 8B as transformers has it since 5.0 (`ministral`) says of each layer whether it slides.
"""

from typing import Any

from jaxhybrid.families.base import Family, given_kinds, kind_keys, one_kind, window_key

# What transformers takes where a config is silent.
DEFAULTS = {"max_position_embeddings": 131_072, "sliding_window": 4096}


def _ministral_kinds(hf: dict[str, Any]) -> list[str]:
    return given_kinds(hf, lambda layer: hf.get("sliding_window") is not None)


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    flags=lambda hf: {},
    flag_keys=window_key,
    own_keys=("sliding_window",),
    defaults=DEFAULTS,
    kinds=one_kind,
)
MINISTRAL = Family(
    model_type="ministral",
    architecture="MinistralForCausalLM",
    flags=lambda hf: {},
    flag_keys=kind_keys,
    own_keys=("sliding_window",),
    defaults=DEFAULTS,
    kinds=_ministral_kinds,
)
