"""Powers of two that make s - 1 exact for every scale s of a norm, in 16 bits too.

A scale below 1/2 loses bits when it is stored as s - 1. Multiply it by f = 2^m or -2^m into [1/2, 1) and divide by f
what reads the channel: the product is the same to the last bit, whatever the type. A query norm and a key norm share
one f for each pair of channels that are rotated together, f for queries and 1 / f for keys; not every pair has one.
Nor has the final norm where its reader is the embedding too.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.names import file_tensors, layer_and_own
from jaxhybrid.weights.native_qwen3_5 import CENTRED, centred

LARGEST_POWER = 30  # kernels stay far from the smallest numbers of their type
READERS = {
    "input_layernorm.weight": (
        *(f"self_attn.{name}_proj.weight" for name in "qkv"),
        *(f"linear_attn.{name}_proj.weight" for name in "qkvgab"),
    ),
    "post_attention_layernorm.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "model.norm.weight": ("lm_head.weight",),
}
QUERY, KEY = "self_attn.q_norm.weight", "self_attn.k_norm.weight"


class Fold(NamedTuple):
    """Factors of tensors by our names, along the last axis of the file's layout; and what could not be made exact."""

    factors: dict[str, np.ndarray]
    rounded: dict[str, int]  # channels whose scale changes, by the norm's name
    largest_change: float  # of a scale, relative


def fold(scales: Mapping[str, np.ndarray], config: ModelConfig) -> Fold:
    """The factors for norms of these scales, in the type of the file."""
    names = {tensor.name for tensor in file_tensors(config)}
    factors: dict[str, np.ndarray] = {}
    for name, scale in scales.items():
        layer, own = layer_and_own(name)
        if own in READERS and (own != "model.norm.weight" or not config.tie_embeddings):
            factors[name] = _factor(scale)
            factors |= {layer + reader: 1 / factors[name] for reader in READERS[own] if layer + reader in names}
        elif own == QUERY:
            pair = _pair_factor(scale, scales[layer + KEY])
            factors |= {name: pair, layer + KEY: 1 / pair}
    rounded, largest = {}, 0.0
    for name, scale in scales.items():
        scale = scale * factors[name].astype(scale.dtype) if name in factors else scale
        if count := int((~_is_exact(scale)).sum()):
            rounded[name] = count
            wide = scale.astype(np.float64)
            change = np.abs(centred(scale).astype(np.float64) + 1 - wide)
            largest = max(largest, float((change[wide != 0] / np.abs(wide[wide != 0])).max()))
    return Fold({name: factor for name, factor in factors.items() if (factor != 1).any()}, rounded, largest)


def norms(config: ModelConfig) -> list[str]:
    """Our names of the scales that the architecture stores as s - 1."""
    return [tensor.name for tensor in file_tensors(config) if layer_and_own(tensor.name)[1] in CENTRED]


def _factor(scale: np.ndarray) -> np.ndarray:
    """Per channel 1 where s - 1 is exact, else the power of two that brings s into [1/2, 1)."""
    wide = scale.astype(np.float64)
    _, exponent = np.frexp(wide)
    leave = _is_exact(scale) | (exponent < -LARGEST_POWER)
    return np.where(leave, 1.0, np.copysign(np.ldexp(1.0, -exponent), wide))


def _pair_factor(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Per channel the smallest power of two for queries that makes both channels of its pair exact; else 1."""
    found = np.ones(len(query) // 2)
    open_ = np.ones(len(found), bool)
    for power in sorted(range(-LARGEST_POWER, LARGEST_POWER + 1), key=abs):
        for factor in (2.0**power, -(2.0**power)):
            fits = _is_exact(query * query.dtype.type(factor)) & _is_exact(key * key.dtype.type(1 / factor))
            fits = fits.reshape(2, -1).all(0) & open_
            found[fits] = factor
            open_ &= ~fits
    return np.tile(found, 2)


def _is_exact(scale: np.ndarray) -> np.ndarray:
    return centred(scale).astype(np.float64) + 1 == scale.astype(np.float64)
