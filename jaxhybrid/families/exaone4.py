"""EXAONE 4: norms after mixers and MLPs, and of queries and keys; beside sliding layers full ones are not rotated."""

from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.base import Family, given_kinds, kind_keys, read_integer
from jaxhybrid.families.olmo import AFTER_NAMES
from jaxhybrid.model.config import FULL_ATTENTION


def _flags(hf: dict[str, Any]) -> dict[str, Any]:
    unrotated = [layer for layer, kind in enumerate(_kinds(hf)) if kind == FULL_ATTENTION]
    own = {"norms": "after", "qk_norm": True}
    return own | ({} if hf.get("sliding_window") is None else {"unrotated_layers": tuple(unrotated)})


def _kinds(hf: dict[str, Any]) -> list[str]:
    pattern, slides = hf.get("sliding_window_pattern"), hf.get("sliding_window") is not None
    if slides and hf.get("layer_types") is None and isinstance(pattern, str):
        raise ConfigError(f"sliding_window_pattern={pattern!r} without layer_types, which transformers cannot read.")
    return given_kinds(hf, lambda layer: slides and bool((layer + 1) % read_integer(hf, "sliding_window_pattern")))


EXAONE4 = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    flags=_flags,
    flag_keys=kind_keys,
    own_keys=("sliding_window", "sliding_window_pattern"),
    defaults={
        "max_position_embeddings": 2048, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    own_names=AFTER_NAMES,
    kinds=_kinds,
)  # fmt: skip
