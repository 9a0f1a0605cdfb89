"""Small pieces every block shares, and what a block knows about its tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.params import Params, ParamSpec, normal, ones, zeros


class TokenContext(NamedTuple):
    """What token mixers may ask about the tokens at hand."""

    segment_ids: (
        jax.Array | None
    )  # [B,T]; 0 is padding, tokens of different ids do not see each other; None: one segment
    cos: jax.Array  # [B,T,K/2] rotary tables
    sin: jax.Array
    cache_segment_ids: jax.Array | None = None  # [B,M] of every cache slot, when decoding
    cache_index: jax.Array | None = None  # scalar: the slot of this call's first token


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis in float32, then cast back and scaled (as Llama does)."""
    exact = x.astype(exact_dtype(x.dtype))
    exact = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + eps)
    return exact.astype(x.dtype) * weight.astype(x.dtype)


def exact_dtype(dtype: Any) -> Any:
    """Dtype of norms, rotations, softmax and logits: float32, or float64 where the model runs in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def declare_mlp(config: ModelConfig) -> Params:
    D, F = config.hidden_size, config.intermediate_size
    specs = {
        "gate_proj": ParamSpec((D, F), ("embed", "mlp"), normal()),
        "up_proj": ParamSpec((D, F), ("embed", "mlp"), normal()),
        "down_proj": ParamSpec((F, D), ("mlp", "embed"), normal()),
    }
    if config.mlp_bias:
        specs |= {
            "gate_bias": ParamSpec((F,), ("mlp",), zeros),
            "up_bias": ParamSpec((F,), ("mlp",), zeros),
            "down_bias": ParamSpec((D,), ("embed",), zeros),
        }
    return specs


def declare_norms(config: ModelConfig) -> Params:
    D = config.hidden_size
    return {"input_norm": ParamSpec((D,), ("embed",), ones), "post_norm": ParamSpec((D,), ("embed",), ones)}


def mlp(params: Params, config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
    """SwiGLU: down(silu(gate x) * up x)."""
    gate = jnp.einsum("btd,df->btf", x_BTD, params["gate_proj"])
    up = jnp.einsum("btd,df->btf", x_BTD, params["up_proj"])
    if config.mlp_bias:
        gate, up = gate + params["gate_bias"], up + params["up_bias"]
    down = jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, params["down_proj"])
    return down + params["down_bias"] if config.mlp_bias else down


def segment_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Position of each token inside its own segment, [B,T] int32, starting at 0."""
    index = jnp.arange(segment_ids_BT.shape[1])[None]
    changed = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
    return (index - start).astype(jnp.int32)
