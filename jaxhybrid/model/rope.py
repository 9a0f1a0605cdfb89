"""Rotary position embedding (arXiv 2104.09864) with the length-extension rules that Hugging Face configs name."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.model.config import ModelConfig, RopeConfig
from jaxhybrid.model.layers import exact_dtype
from jaxhybrid.model.partition import BATCH_AXES, largest


def rotary_tables(config: ModelConfig, positions_BT: jax.Array, longest: jax.Array | None = None) -> dict[str, Any]:
    """What a `TokenContext` has of positions: `cos` and `sin`, float32 [B,T,K/2], those of sliding layers, and the
    scale of queries.

    The `dynamic` and `longrope` rules take their length from the largest position present, as transformers does, or
    from `longest`, the tokens of the longest text, where these are a part of them.
    """
    cos, sin = _tables(config, config.rope, positions_BT, longest)
    tables: dict[str, Any] = {"cos": cos, "sin": sin}
    if config.window is not None and config.window.rope is not None:
        tables["sliding_tables"] = _tables(config, config.window.rope, positions_BT, longest)
    if (a := config.softmax.length_scale) is not None:
        tables["query_scale"] = jnp.log(positions_BT.astype(jnp.float32) + a) / math.log(a)
    return tables


def _tables(
    config: ModelConfig, rope: RopeConfig, positions_BT: jax.Array, longest: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    width, scale = rope.width(config.head_dim), 1.0
    frequencies: jax.Array | np.ndarray
    if rope.kind in ("dynamic", "longrope"):
        length = jnp.max(positions_BT) + 1 if longest is None else longest
        length = largest(length, *BATCH_AXES)
    if rope.kind == "dynamic":
        frequencies = _dynamic_frequencies(rope, width, config.max_position_embeddings, length)
    elif rope.kind == "longrope":
        frequencies, scale = _longrope_frequencies(rope, width, length)
    elif rope.kind == "llama3":
        frequencies = _llama3_frequencies(rope, width)
    elif rope.kind == "yarn":
        frequencies, scale = _yarn_frequencies(rope, width)
    else:
        frequencies = _frequencies(rope.theta, width) / (rope.factor if rope.kind == "linear" else 1.0)
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + K/2) of every head; cos and sin are [B,T,K/2]. Channels beyond their pairs stay."""
    if 2 * cos.shape[-1] < x_BTHK.shape[-1]:
        turned, rest = jnp.split(x_BTHK, [2 * cos.shape[-1]], axis=-1)
        return jnp.concatenate([rotate(turned, cos, sin), rest], axis=-1)
    first, second = jnp.split(x_BTHK.astype(exact_dtype(x_BTHK.dtype)), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHK.dtype)


def _frequencies(theta: float, width: int) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)


def _dynamic_frequencies(rope: RopeConfig, width: int, max_positions: int, length: jax.Array) -> jax.Array:
    original = rope.original_max_position_embeddings or max_positions
    length = jnp.maximum(length, original).astype(jnp.float32)
    theta = rope.theta * (rope.factor * length / original - (rope.factor - 1)) ** (width / (width - 2))
    return 1.0 / theta ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def _longrope_frequencies(rope: RopeConfig, width: int, length: jax.Array) -> tuple[jax.Array, float]:
    """LongRoPE (arXiv 2402.13753): each pair stretched by a factor of its own, others in texts beyond the original."""
    original = rope.original_max_position_embeddings
    assert original is not None
    factors = jnp.where(
        length > original, jnp.array(rope.long_factor, jnp.float32), jnp.array(rope.short_factor, jnp.float32)
    )
    scale = 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))
    frequencies = jnp.asarray(_frequencies(rope.theta, width), jnp.float32) / factors
    return frequencies, scale if rope.attention_factor is None else rope.attention_factor


def _llama3_frequencies(rope: RopeConfig, width: int) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, the band between interpolated."""
    assert rope.original_max_position_embeddings is not None
    frequencies = _frequencies(rope.theta, width)
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # rotations over the original length
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(smooth, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / rope.factor


def _yarn_frequencies(rope: RopeConfig, width: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, section 3): dimensions below the `beta` range interpolated, above it kept."""
    assert rope.original_max_position_embeddings is not None
    length = rope.original_max_position_embeddings

    def dimension_of(turns: float) -> float:
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high  # a zero-width ramp would divide by zero
    interpolated = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
    frequencies = _frequencies(rope.theta, width)
    frequencies = interpolated * frequencies / rope.factor + (1 - interpolated) * frequencies
    return frequencies, yarn_attention_factor(rope)


def yarn_attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: as given, else by the paper's formula from `factor` and the two `mscale`."""

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
