"""`olmo_hybrid`, which no student of ours can be: norms stand after attention in it, and before Gated DeltaNet.

Only what it could not express is here, to be told.
"""

from jaxhybrid.families.feature import (
    KNOWN_PARTS,
    KNOWN_SETTINGS,
    Feature,
    flag,
    length_scale,
    linear_kind,
    linear_layers,
    no_linear_biases,
    others,
    rope_kind,
    softmax_layers,
    words,
)
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig

OLMO_HYBRID = "olmo_hybrid"
OUTPUT_NORM_EPS = 1e-5


def features(config: ModelConfig) -> list[Feature]:
    """What `olmo_hybrid` must be able to express, in the order of a layer."""
    mixer = config.mixer
    norms = "none" if not config.qk_norm else "of all heads together" if config.wide_qk_norm else "of each head"
    found = [
        softmax_layers(config),
        _norms("norms of softmax layers", config, "after"),
        _norms("norms of linear layers", config, "before"),
        Feature("query and key norms", norms, "of all heads together", config.wide_qk_norm),
        flag("biases on q, k, v", config.qkv_bias, False),
        flag("bias on o", config.o_bias, False),
        flag("biases in the MLP", config.mlp_bias, False),
        flag("mixture of experts", config.experts is not None, False),
        length_scale(config),
        rope_kind(config),
        Feature("tied embeddings", words(config.tie_embeddings), "any", True),
        *others(config, (*KNOWN_PARTS, "norms", "wide_qk_norm")),
        linear_kind(config, GatedDeltaNetConfig.kind),
    ]
    if not isinstance(mixer, GatedDeltaNetConfig):
        return found
    eps = config.norm_eps
    return [
        *found,
        *linear_layers(config, mixer, no_linear_biases(mixer)),
        Feature("epsilon of their output norm", f"{eps:g}", f"{OUTPUT_NORM_EPS:g}", eps == OUTPUT_NORM_EPS),
        *others(mixer, (*KNOWN_SETTINGS, "conv_size"), "mixer."),
    ]


def _norms(name: str, config: ModelConfig, there: str) -> Feature:
    where = {"before": "before mixer and MLP", "after": "after mixer and MLP", "around": "before and after them"}
    return Feature(name, where[config.norms], where[there], config.norms == there)
