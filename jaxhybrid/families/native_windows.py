"""The teacher's own architecture, where it says of each layer whether it slides: for students of sliding windows.

A converted layer is a sliding layer of it, with the tensors it has here under the name of attention. Its config.json is
that of a softmax model; what makes it a student stands under one key of ours, and is read back from there.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.base import Family, differences
from jaxhybrid.families.feature import Feature, flag, length_scale, linear_kind, others, rope_kind
from jaxhybrid.families.mistral import MINISTRAL
from jaxhybrid.families.olmo import OLMO3
from jaxhybrid.families.qwen2 import QWEN2
from jaxhybrid.families.qwen3 import QWEN3
from jaxhybrid.families.student import STUDENT_KEYS, STUDENT_TYPE, read_student
from jaxhybrid.model.config import ModelConfig, SoftmaxConfig, WindowConfig
from jaxhybrid.model.mixers.window_attention import WindowAttentionConfig

SLIDING: Mapping[str, Family] = {family.model_type: family for family in (QWEN2, QWEN3, MINISTRAL, OLMO3)}
FIRST_SLIDING = "max_window_layers"  # the first layer that slides, where layer_types is not read
WARNING = "Software that heeds no sliding window in single layers loads it without a word, and computes another model."
CARRIED = ("base_model_type", "base_model")


def features(config: ModelConfig) -> list[Feature]:
    """What the student's own family must be able to express, in the order of a layer."""
    mixer, own = config.mixer, config.window
    found = [linear_kind(config, WindowAttentionConfig.kind)]
    if not isinstance(mixer, WindowAttentionConfig):
        return found
    size, context = mixer.window, config.max_position_embeddings
    sizes = sorted({size, *(own.size for _ in _kept(config) if own)})
    turned = own is not None and own.rope is not None and not {*_converted(config)} <= {*own.layers}
    return [
        *found,
        flag("windows in single layers", True, config.family in SLIDING),
        Feature("attention sinks", str(mixer.sinks), "none", not mixer.sinks, "mixer.sinks=0"),
        Feature("window of converted layers", str(size), f"less than the context, {context}", size < context),
        Feature(
            "windows of all layers that slide", " and ".join(map(str, sizes)), "the same", len(sizes) == 1,
            f"mixer.window={own.size}" if own else "",
        ),
        flag("converted layers with the rotary base of full ones", turned, False),
        flag("rotary embedding of softmax layers", config.softmax.rope, True, "softmax.rope=true"),
        length_scale(config),
        rope_kind(config),
        *others(mixer, ("window", "sinks"), "mixer."),
    ]  # fmt: skip


def as_softmax(config: ModelConfig) -> ModelConfig:
    """The softmax model that the student is, in the config of a teacher."""
    mixer, own = config.mixer, config.window
    assert isinstance(mixer, WindowAttentionConfig)
    layers = tuple(sorted((*_converted(config), *_kept(config))))
    window = WindowConfig(mixer.window, layers, None if own is None else own.rope)
    return replace(config, layer_types=(), mixer=None, softmax=SoftmaxConfig(), window=window)


def write(family: Family, config: ModelConfig, student_hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a student that `features` has nothing against, from that of its form with code of its own."""
    softmax = as_softmax(config)
    hf = {key: value for key, value in student_hf.items() if key in CARRIED or key not in STUDENT_KEYS}
    hf |= family.write_config(softmax)
    if FIRST_SLIDING in family.own_keys:  # a server that goes by it alone refuses, where it took all layers for full
        assert softmax.window is not None
        hf[FIRST_SLIDING] = softmax.window.layers[0]
    return hf | {STUDENT_TYPE: {key: value for key, value in student_hf.items() if hf.get(key) != value}}


def read(families: Mapping[str, Family], hf: Mapping[str, Any]) -> ModelConfig:
    """The reverse of `write`.

    Raises:
        ConfigError: the two descriptions in it, of a softmax model and of a student, are not of one model.
    """
    own, family = hf.get(STUDENT_TYPE), SLIDING[hf["model_type"]]
    if not isinstance(own, dict):
        raise ConfigError(f"config.json has base_model_type, and {STUDENT_TYPE}={own!r}; export it again.")
    plain = {key: value for key, value in hf.items() if key != STUDENT_TYPE}
    config = read_student(families, plain | own)
    said = family.read_config({key: value for key, value in plain.items() if key not in STUDENT_KEYS})
    for name, given, other in differences(said, as_softmax(config)):
        raise ConfigError(
            f"config.json says {name}={given} of the model, and {other} under {STUDENT_TYPE}. Export it again."
        )
    return config


def _converted(config: ModelConfig) -> tuple[int, ...]:
    return tuple(layer for layer in range(config.num_layers) if layer not in config.softmax_layers)


def _kept(config: ModelConfig) -> tuple[int, ...]:
    """Softmax layers that slide in the teacher."""
    own = () if config.window is None else config.window.layers
    return tuple(layer for layer in own if layer in config.softmax_layers)
