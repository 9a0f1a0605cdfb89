"""Mistral 0.2 and 0.3, Nemo, Mistral Small: Llama without biases. The sliding window of 0.1 is refused."""

from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.base import Family, read_integer, require
from jaxhybrid.model.config import ModelConfig

# What transformers takes where a config is silent.
WINDOW = {"sliding_window": 4096}
DEFAULTS = {"max_position_embeddings": 131_072}


def _flags(hf: dict[str, Any]) -> dict[str, Any]:
    """None. A token sees `sliding_window` tokens, itself among them: a window as long as the context cannot act."""
    given = WINDOW | hf
    length = read_integer(DEFAULTS | hf, "max_position_embeddings")
    if given["sliding_window"] is not None and read_integer(given, "sliding_window") < length:
        silent = "" if "sliding_window" in hf else ", which transformers takes where config.json does not say"
        raise ConfigError(
            f"sliding_window={given['sliding_window']}{silent}: sliding-window attention is not supported. It acts on "
            f"texts longer than the window, and max_position_embeddings={length}. A model without it has null here."
        )
    return {}


def _flag_keys(config: ModelConfig) -> dict[str, Any]:
    require(config, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False)
    return {"sliding_window": None}


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    flags=_flags,
    flag_keys=_flag_keys,
    own_keys=("sliding_window",),
    defaults=DEFAULTS,
)
