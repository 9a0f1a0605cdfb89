"""Hugging Face architectures: their config keys in both directions, and what they call their weights."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families import native, student
from jaxhybrid.families.base import Family
from jaxhybrid.families.exaone4 import EXAONE4
from jaxhybrid.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxhybrid.families.granite import GRANITE
from jaxhybrid.families.internlm3 import INTERNLM3
from jaxhybrid.families.llama import LLAMA
from jaxhybrid.families.mistral import MINISTRAL, MISTRAL
from jaxhybrid.families.mixtures import MIXTRAL, QWEN3_MOE
from jaxhybrid.families.olmo import OLMO2, OLMO3
from jaxhybrid.families.phi import PHI3
from jaxhybrid.families.qwen2 import QWEN2
from jaxhybrid.families.qwen3 import QWEN3
from jaxhybrid.families.seed_oss import SEED_OSS
from jaxhybrid.families.smollm3 import SMOLLM3
from jaxhybrid.families.student import STUDENT_TYPE, is_student_config
from jaxhybrid.model.config import ModelConfig

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OLMO2, OLMO3, PHI3, GRANITE, SMOLLM3, EXAONE4,
        INTERNLM3, SEED_OSS, MIXTRAL, QWEN3_MOE,
    )
}  # fmt: skip


def family(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type={model_type!r} is not known; known: {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]


def hf_to_config(hf: dict[str, Any], ignore_config_keys: Iterable[str] = ()) -> ModelConfig:
    """A teacher's config.json as a ModelConfig; ConfigError names every key or value that is not understood.

    ignore_config_keys: keys that may be ignored, those inside another as `rope_scaling.name`.
    """
    if is_student_config(hf):
        raise ConfigError(
            f"model_type={hf['model_type']!r} is an exported student, not a teacher; read it with load_student."
        )
    return family(hf.get("model_type", "")).read_config(hf, ignore_config_keys)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json keys of a softmax model."""
    return family(config.family).write_config(config)


def student_config_to_hf(config: ModelConfig, teacher_hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json keys of a student; bookkeeping keys (token ids, ...) come from the teacher's config."""
    return student.write_student(family(config.family), config, teacher_hf_config)


def native_student_config_to_hf(
    config: ModelConfig, teacher_hf_config: Mapping[str, Any], model_type: str
) -> dict[str, Any]:
    """The same in transformers' own architecture `model_type`, which has to express it: see `native.objections`."""
    return native.write_native(family(config.family), config, teacher_hf_config, model_type)


def hf_to_student_config(hf: dict[str, Any]) -> ModelConfig:
    """An exported student's config.json as a ModelConfig, in whichever form it was exported."""
    model_type = hf.get("model_type")
    if model_type in native.NATIVE and (model_type not in FAMILIES or is_student_config(hf)):
        return native.read_native(FAMILIES, hf)
    return student.read_student(FAMILIES, hf)


__all__ = [
    "FAMILIES",
    "STUDENT_TYPE",
    "Family",
    "config_to_hf",
    "family",
    "hf_to_config",
    "hf_to_student_config",
    "is_student_config",
    "native_student_config_to_hf",
    "student_config_to_hf",
]
