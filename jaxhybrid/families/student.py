"""The config of an exported student: its family's own keys, which layers are linear, and what a linear layer is."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.base import HARMLESS_KEYS, Family
from jaxhybrid.model.config import FULL_ATTENTION, GATED_DELTANET, GatedDeltaNetConfig, ModelConfig

STUDENT_TYPE = "jaxhybrid"
LINEAR_ATTENTION = "linear_attention"  # transformers' name of a layer with a state of fixed size
STUDENT_KEYS = ("base_model_type", "base_model", "gated_deltanet", "auto_map")
NOT_CARRIED = ("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path")


def write_student(family: Family, config: ModelConfig, teacher_hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a student's config.json: those of `config`, over the teacher's bookkeeping (token ids, ...)."""
    carried = {
        key: value for key, value in teacher_hf_config.items() if key in HARMLESS_KEYS and key not in NOT_CARRIED
    }
    if (carried.get("pad_token_id") or 0) >= config.vocab_size:  # transformers makes no embedding with such a one
        del carried["pad_token_id"]
    hf = carried | family.write_config(config)
    del hf["architectures"]
    hf |= {
        "model_type": STUDENT_TYPE,
        "base_model_type": family.model_type,
        "layer_types": [FULL_ATTENTION if kind == FULL_ATTENTION else LINEAR_ATTENTION for kind in config.layer_types],
    }
    if config.gated_deltanet is not None:
        hf["gated_deltanet"] = asdict(config.gated_deltanet)
    return hf


def read_student(families: Mapping[str, Family], hf: dict[str, Any]) -> ModelConfig:
    """The reverse of `write_student`.

    Raises:
        ConfigError: not a student's config, or one with keys or values that are not known.
    """
    if hf.get("model_type") != STUDENT_TYPE:
        raise ConfigError(
            f"model_type={hf.get('model_type')!r} is not a student ({STUDENT_TYPE}); read a teacher with load_teacher."
        )
    base = str(hf.get("base_model_type"))
    if base not in families:
        raise ConfigError(f"base_model_type={base!r}; known: {', '.join(families)}.")
    kinds = hf.get("layer_types") or ()
    for kind in kinds:
        if kind not in (FULL_ATTENTION, LINEAR_ATTENTION):
            raise ConfigError(
                f"layer_types has {kind!r}; a student's layers are {FULL_ATTENTION} or {LINEAR_ATTENTION}."
            )
    plain = {key: value for key, value in hf.items() if key not in (*STUDENT_KEYS, "layer_types")}
    config = families[base].read_config(plain)
    mixer = _read_mixer(hf.get("gated_deltanet"))
    types = tuple(FULL_ATTENTION if kind == FULL_ATTENTION else GATED_DELTANET for kind in kinds)
    if not types:
        raise ConfigError("The student's config lacks layer_types.")
    return replace(config, layer_types=types, gated_deltanet=mixer)


def _read_mixer(settings: dict[str, Any] | None) -> GatedDeltaNetConfig | None:
    if not settings:
        return None
    unknown = set(settings) - {item.name for item in fields(GatedDeltaNetConfig)}
    if unknown:
        raise ConfigError(f"gated_deltanet has {', '.join(sorted(unknown))}, which this version does not know.")
    return GatedDeltaNetConfig(**settings)
