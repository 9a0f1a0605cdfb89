"""Students in an architecture that transformers has itself: which there are, what each can express, and the configs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxhybrid.errors import ConfigError
from jaxhybrid.families import native_granite, native_olmo, native_qwen3_5, native_windows
from jaxhybrid.families.base import Family
from jaxhybrid.families.feature import Feature
from jaxhybrid.families.native_granite import GRANITE_HYBRID
from jaxhybrid.families.native_olmo import OLMO_HYBRID
from jaxhybrid.families.native_qwen3_5 import QWEN3_5
from jaxhybrid.families.student import STUDENT_TYPE, read_student, write_student
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers.window_attention import WindowAttentionConfig

ROPE_KEYS = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")  # inside rope_parameters
WINDOW_KEYS = ("use_sliding_window", "sliding_window")  # of families that have them: no native student slides
# No limit of Mamba-2's steps: as JSON has it, and as transformers writes it.
NO_STEP_LIMIT = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
LEFT_OUT = ("full_attention_interval", "partial_rotary_factor")  # by transformers, when it saves


class Architecture(NamedTuple):
    """One of transformers' own, for students.

    Attributes:
        name: its class.
        features: what it must be able to express.
        keys: of its config, those that our own code has not or reads otherwise, from a config and `rope_parameters`;
            of the teacher's own architecture `native_windows` has all.
        own_keys: their names, and those of others that it has.
        layer_names: what it calls kinds of layers otherwise.
        since: the first transformers that computes it so, where that is newer than the oldest that exports are for.
        warning: what to heed where other software loads it.
    """

    name: str
    features: Callable[[ModelConfig], list[Feature]]
    keys: Callable[[ModelConfig, Mapping[str, Any]], dict[str, Any]] = lambda config, rope: {}
    own_keys: tuple[str, ...] = ()
    layer_names: Mapping[str, str] = {}
    since: str | None = None
    warning: str = ""


NATIVE: Mapping[str, Architecture] = {
    QWEN3_5: Architecture(
        native_qwen3_5.ARCHITECTURE, native_qwen3_5.features, native_qwen3_5.keys, native_qwen3_5.OWN_KEYS
    ),
    GRANITE_HYBRID: Architecture(
        native_granite.ARCHITECTURE, native_granite.features, native_granite.keys, native_granite.OWN_KEYS,
        native_granite.LAYER_NAMES, since="5.23",
    ),
    **{
        name: Architecture(family.architecture, native_windows.features, warning=native_windows.WARNING)
        for name, family in native_windows.SLIDING.items()
    },
}  # fmt: skip
# What can be said of each architecture of hybrids that was looked at, by its name; none is a student in olmo_hybrid.
HYBRIDS: Mapping[str, Callable[[ModelConfig], list[Feature]]] = {
    QWEN3_5: native_qwen3_5.features,
    GRANITE_HYBRID: native_granite.features,
    OLMO_HYBRID: native_olmo.features,
}


def objections(config: ModelConfig) -> dict[str, list[Feature]]:
    """Of each architecture what it cannot say of a student, which may be nothing; of sliding windows its own, too."""
    windows = isinstance(config.mixer, WindowAttentionConfig)
    asked = {config.family: native_windows.features, **HYBRIDS} if windows else HYBRIDS
    return {name: [one for one in features(config) if not one.fits] for name, features in asked.items()}


def write_native(
    family: Family, config: ModelConfig, teacher_hf_config: Mapping[str, Any], model_type: str
) -> dict[str, Any]:
    """The config.json of a student that `objections` has none to. Our own keys stay in it, to be read back."""
    hf = write_student(family, config, teacher_hf_config)
    if model_type in native_windows.SLIDING:
        return native_windows.write(family, config, hf)
    del hf["traits"]  # for our own code
    for key in WINDOW_KEYS:
        hf.pop(key, None)
    architecture = NATIVE[model_type]
    hf |= {"model_type": model_type, "architectures": [architecture.name]}
    hf["layer_types"] = [architecture.layer_names.get(kind, kind) for kind in hf["layer_types"]]
    return hf | architecture.keys(config, hf["rope_parameters"])


def read_native(families: Mapping[str, Family], hf: Mapping[str, Any]) -> ModelConfig:
    """The reverse of `write_native`.

    Raises:
        ConfigError: not a config that `write_native` wrote, or one that was changed since.
    """
    model_type, base = str(hf.get("model_type")), families.get(str(hf.get("base_model_type")))
    if "base_model_type" not in hf:
        raise ConfigError(
            f"model_type={model_type!r} without base_model_type: a model of {model_type} is read if jaxhybrid "
            "exported it; its layers may have parts that are not known here else."
        )
    if model_type in native_windows.SLIDING:
        return native_windows.read(families, hf)
    architecture, known = NATIVE[model_type], () if base is None else base.own_keys
    plain = {
        name: value
        for name, value in hf.items()
        if (name not in architecture.own_keys or name in known) and value not in NO_STEP_LIMIT
    }
    rope = {name: value for name, value in (hf.get("rope_parameters") or {}).items() if name not in ROPE_KEYS}
    kinds = {name: kind for kind, name in architecture.layer_names.items()}
    plain["layer_types"] = [kinds.get(name, name) for name in hf.get("layer_types") or ()]
    plain |= {"model_type": STUDENT_TYPE, "rope_parameters": rope, **dict.fromkeys({*WINDOW_KEYS} & {*known})}
    config = read_student(families, plain)
    for name, value in architecture.keys(config, rope).items():
        given = hf.get(name, value if name in LEFT_OUT else None)
        if given != value:
            raise ConfigError(f"config.json has {name}={given!r}; the other keys say {value!r}. Export it again.")
    return config


__all__ = ["GRANITE_HYBRID", "NATIVE", "OLMO_HYBRID", "QWEN3_5", "Feature", "objections"]
