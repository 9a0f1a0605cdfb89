"""The config of an exported student: its family's own keys, which layers are linear, and what a linear layer is."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.base import HARMLESS_KEYS, SLIDING_ATTENTION, Family
from jaxhybrid.families.rope import rope_to_hf
from jaxhybrid.model.config import FULL_ATTENTION, MixerConfig, ModelConfig, SoftmaxConfig
from jaxhybrid.model.mixers import STUDENT_MIXERS

STUDENT_TYPE = "jaxhybrid"
LINEAR_ATTENTION = "linear_attention"  # transformers' name of a layer with a state of fixed size
STUDENT_KEYS = ("base_model_type", "base_model", "auto_map", "linear_mixer", "softmax", "traits", *STUDENT_MIXERS)
# What an export's code must know of the base model where it is not as Llama's.
TRAITS = (
    "qkv_bias", "o_bias", "qk_norm", "wide_qk_norm", "activation", "experts", "norms", "norm_offset",
    "embedding_scale", "residual_scale", "logit_scale", "logit_cap", "attention_scale", "attention_cap", "window",
    "unrotated_layers",
)  # fmt: skip
NOT_CARRIED = ("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path")


def write_student(family: Family, config: ModelConfig, teacher_hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a student's config.json: those of `config`, over the teacher's bookkeeping (token ids, ...)."""
    carried = {
        key: value for key, value in teacher_hf_config.items() if key in HARMLESS_KEYS and key not in NOT_CARRIED
    }
    if (carried.get("pad_token_id") or 0) >= config.vocab_size:  # transformers makes no embedding with such a one
        del carried["pad_token_id"]
    hf = carried | family.write_config(replace(config, softmax=SoftmaxConfig()))
    del hf["architectures"]
    hf |= {
        "model_type": STUDENT_TYPE,
        "base_model_type": family.model_type,
        "traits": _traits(config, hf),
        "rope_parameters": rope_to_hf(config.rope),  # those of sliding layers are a trait
        "layer_types": [FULL_ATTENTION if kind == FULL_ATTENTION else LINEAR_ATTENTION for kind in config.layer_types],
    }
    if config.softmax != SoftmaxConfig():
        hf["softmax"] = asdict(config.softmax)
    if config.mixer is not None:
        hf |= {"linear_mixer": config.mixer.kind, config.mixer.kind: asdict(config.mixer)}
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
    traits = hf.get("traits") or {}  # exports from before they were written have none
    plain |= {"layer_types": traits["layer_types"]} if traits.get("layer_types") else {}
    if families[base].sliding_theta is not None:
        rope = plain.get("rope_parameters")
        plain["rope_parameters"] = {
            FULL_ATTENTION: rope,
            SLIDING_ATTENTION: traits.get("window", {}).get("rope") or rope,
        }
    config = families[base].read_config(plain)
    if traits and (said := _traits(config, plain)) != traits:
        differing = sorted(name for name in {*said, *traits} if said.get(name) != traits.get(name))
        raise ConfigError(f"The student's traits and its other keys contradict each other in {', '.join(differing)}.")
    if not kinds:
        raise ConfigError("The student's config lacks layer_types.")
    mixer = _read_mixer(hf)
    if mixer is None and LINEAR_ATTENTION in kinds:
        raise ConfigError(
            f"The student's config lacks the settings of its linear layers ({', '.join(STUDENT_MIXERS)})."
        )
    types = tuple(mixer.kind if mixer and kind == LINEAR_ATTENTION else FULL_ATTENTION for kind in kinds)
    return replace(config, layer_types=types, mixer=mixer, softmax=_read_softmax(hf))


def _traits(config: ModelConfig, hf: Mapping[str, Any]) -> dict[str, Any]:
    """TRAITS that are not Llama's, as JSON has them, and the base model's own `layer_types`."""
    defaults = {item.name: item.default for item in fields(ModelConfig)}
    found = {name: getattr(config, name) for name in TRAITS if getattr(config, name) != defaults[name]}
    if config.experts is not None:
        found["experts"] = asdict(config.experts)
    if config.window is not None:
        rope = config.window.rope
        found["window"] = asdict(config.window) | {"rope": None if rope is None else rope_to_hf(rope)}
    if hf.get("layer_types"):
        found["layer_types"] = hf["layer_types"]
    return dict(json.loads(json.dumps(found)))


def _read_softmax(hf: Mapping[str, Any]) -> SoftmaxConfig:
    """What the softmax layers have otherwise than the teacher's; exports without the key have nothing."""
    given = hf.get("softmax") or {}
    if unknown := set(given) - {item.name for item in fields(SoftmaxConfig)}:
        raise ConfigError(f"softmax has {', '.join(sorted(unknown))}, which this version does not know.")
    return SoftmaxConfig(**given)


def _read_mixer(hf: Mapping[str, Any]) -> MixerConfig | None:
    """The settings of the linear layers, under the name of their kind."""
    present = [kind for kind in STUDENT_MIXERS if hf.get(kind)]
    if len(present) > 1:
        raise ConfigError(f"The student's config has {' and '.join(present)}; its linear layers are of one kind.")
    for kind in present:
        known = STUDENT_MIXERS[kind].Config
        unknown = set(hf[kind]) - {item.name for item in fields(known)}
        if unknown:
            raise ConfigError(f"{kind} has {', '.join(sorted(unknown))}, which this version does not know.")
        return known(**hf[kind])
    return None


def is_student_config(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is an exported student's: those in transformers' own architectures name their base, too."""
    return hf.get("model_type") == STUDENT_TYPE or "base_model_type" in hf


def is_student(folder: Path) -> bool:
    """Whether a folder holds an exported student."""
    try:
        return is_student_config(json.loads((folder / "config.json").read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return False
